"""Reading text and images, calibration text, and the batches that training reads."""

from flaxcompress.data.batches import Batches, PlannedBatches, StepBatches
from flaxcompress.data.calibration import CalibrationText, calibration_text
from flaxcompress.data.docstrings import docstring_sentences
from flaxcompress.data.documents import Corpus
from flaxcompress.data.images import Images, read_images
from flaxcompress.data.labelled import Labelled, read_labelled
from flaxcompress.data.parallel import read_parallel
from flaxcompress.data.readers import parse_source, read_pairs, read_texts
from flaxcompress.data.sentences import clean_sentences
from flaxcompress.data.tasks import (
    causal_lm_batches,
    classification_batches,
    image_batches,
    masked_lm_batches,
    span_corruption_batches,
    translation_batches,
)
from flaxcompress.data.train_tokenizer import train_tokenizer, vocabulary_size

__all__ = [
    "Batches",
    "CalibrationText",
    "Corpus",
    "Images",
    "Labelled",
    "PlannedBatches",
    "StepBatches",
    "calibration_text",
    "causal_lm_batches",
    "classification_batches",
    "clean_sentences",
    "docstring_sentences",
    "image_batches",
    "masked_lm_batches",
    "parse_source",
    "read_images",
    "read_labelled",
    "read_pairs",
    "read_parallel",
    "read_texts",
    "span_corruption_batches",
    "train_tokenizer",
    "translation_batches",
    "vocabulary_size",
]
