"""Compression: one file per method. A new method is one file and one import here."""

from flaxcompress.compress.calibrate import Calibration
from flaxcompress.compress.factorize_embedding import FactorizeEmbedding
from flaxcompress.compress.heal import Heal
from flaxcompress.compress.low_rank import LowRank
from flaxcompress.compress.quantize import BitsFor, Quantize
from flaxcompress.compress.recipe import Plan, Recipe, recipe_names
from flaxcompress.compress.run import compress
from flaxcompress.compress.step import Context, Step, known_steps, step_from_json
from flaxcompress.compress.tiers import TierSetting
from flaxcompress.compress.to_latent_attention import ToLatentAttention
from flaxcompress.compress.to_linformer import ToLinformer
from flaxcompress.compress.to_nystrom import ToNystrom
from flaxcompress.compress.trim import Trim
from flaxcompress.compress.trim_vocabulary import TrimVocabulary

__all__ = [
    "BitsFor",
    "Calibration",
    "Context",
    "FactorizeEmbedding",
    "Heal",
    "LowRank",
    "Plan",
    "Quantize",
    "Recipe",
    "Step",
    "TierSetting",
    "ToLatentAttention",
    "ToLinformer",
    "ToNystrom",
    "Trim",
    "TrimVocabulary",
    "compress",
    "known_steps",
    "recipe_names",
    "step_from_json",
]
