"""Reading text, cleaning it, and the calibration text that compression works with."""

from flaxcompress.data.calibration import CalibrationText, calibration_text
from flaxcompress.data.docstrings import docstring_sentences
from flaxcompress.data.readers import parse_source, read_pairs, read_texts
from flaxcompress.data.sentences import clean_sentences

__all__ = [
    "CalibrationText",
    "calibration_text",
    "clean_sentences",
    "docstring_sentences",
    "parse_source",
    "read_pairs",
    "read_texts",
]
