"""flaxcompress: makes transformers smaller and faster in JAX/Flax and hands them back to PyTorch."""

from flaxcompress.compress import (
    Allocate,
    AutoencodeEmbedding,
    BitsFor,
    DropLayers,
    FactorizeEmbedding,
    Fold,
    Heal,
    JointQueryKey,
    JointValueOutput,
    LowRank,
    Prune,
    PruneChannels,
    PruneHeads,
    PruneWidth,
    Quantize,
    Recipe,
    Repair,
    SeparableConvolutions,
    Share,
    ShareBasis,
    Tensorize,
    TensorTrainEmbedding,
    TierSetting,
    ToLatentAttention,
    ToLinformer,
    ToNystrom,
    Trim,
    TrimVocabulary,
    compress,
    compress_folder,
    student_from,
)
from flaxcompress.config import Deltas, ModelConfig, Rotary, Sharing
from flaxcompress.data import CalibrationText, calibration_text
from flaxcompress.decoding import Constraint, Generated
from flaxcompress.evaluate import Report, evaluate, profile
from flaxcompress.export import export, load_adapter
from flaxcompress.folder import load, save
from flaxcompress.heads import with_head
from flaxcompress.lexicon import with_lexicon
from flaxcompress.model import Model, ModelOutput
from flaxcompress.nn import register_head
from flaxcompress.terms import Terms
from flaxcompress.text import Assets, Pooling
from flaxcompress.train import Classification, Distill, MaskedLM, NextToken, Optimizer, fit
from flaxcompress.train.mesh import make_mesh
from flaxcompress.tuning import merged, with_adapters, with_lora, with_prefix, without_lora

__version__ = "0.1.0"

__all__ = [
    "Allocate",
    "Assets",
    "AutoencodeEmbedding",
    "BitsFor",
    "CalibrationText",
    "Classification",
    "Constraint",
    "Deltas",
    "Distill",
    "DropLayers",
    "FactorizeEmbedding",
    "Fold",
    "Generated",
    "Heal",
    "JointQueryKey",
    "JointValueOutput",
    "LowRank",
    "MaskedLM",
    "Model",
    "ModelConfig",
    "ModelOutput",
    "NextToken",
    "Optimizer",
    "Pooling",
    "Prune",
    "PruneChannels",
    "PruneHeads",
    "PruneWidth",
    "Quantize",
    "Recipe",
    "Repair",
    "Report",
    "Rotary",
    "SeparableConvolutions",
    "Share",
    "ShareBasis",
    "Sharing",
    "TensorTrainEmbedding",
    "Tensorize",
    "Terms",
    "TierSetting",
    "ToLatentAttention",
    "ToLinformer",
    "ToNystrom",
    "Trim",
    "TrimVocabulary",
    "calibration_text",
    "compress",
    "compress_folder",
    "evaluate",
    "export",
    "fit",
    "load",
    "load_adapter",
    "make_mesh",
    "merged",
    "profile",
    "register_head",
    "save",
    "student_from",
    "with_adapters",
    "with_head",
    "with_lexicon",
    "with_lora",
    "with_prefix",
    "without_lora",
]
