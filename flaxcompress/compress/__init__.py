"""Compression: one file per method. A new method is one file and one import here."""

from flaxcompress.compress.allocate import Allocate
from flaxcompress.compress.autoencode_embedding import AutoencodeEmbedding
from flaxcompress.compress.calibrate import Calibration
from flaxcompress.compress.drop_layers import DropLayers
from flaxcompress.compress.factorize_embedding import FactorizeEmbedding
from flaxcompress.compress.fold import Fold
from flaxcompress.compress.heal import Heal
from flaxcompress.compress.joint_query_key import JointQueryKey
from flaxcompress.compress.joint_value_output import JointValueOutput
from flaxcompress.compress.low_memory import compress_folder
from flaxcompress.compress.low_rank import LowRank
from flaxcompress.compress.prune import Prune
from flaxcompress.compress.prune_channels import PruneChannels
from flaxcompress.compress.prune_heads import PruneHeads
from flaxcompress.compress.prune_width import PruneWidth
from flaxcompress.compress.quantize import BitsFor, Quantize
from flaxcompress.compress.recipe import Plan, Recipe, recipe_names
from flaxcompress.compress.repair import Repair
from flaxcompress.compress.run import compress
from flaxcompress.compress.separable_convolutions import SeparableConvolutions
from flaxcompress.compress.share import Share
from flaxcompress.compress.share_basis import ShareBasis
from flaxcompress.compress.step import Context, Step, known_steps, step_from_json
from flaxcompress.compress.student import student_from
from flaxcompress.compress.tensor_train_embedding import TensorTrainEmbedding
from flaxcompress.compress.tensorize import Tensorize
from flaxcompress.compress.tiers import TierSetting
from flaxcompress.compress.to_latent_attention import ToLatentAttention
from flaxcompress.compress.to_linformer import ToLinformer
from flaxcompress.compress.to_nystrom import ToNystrom
from flaxcompress.compress.trim import Trim
from flaxcompress.compress.trim_vocabulary import TrimVocabulary

__all__ = [
    "Allocate",
    "AutoencodeEmbedding",
    "BitsFor",
    "Calibration",
    "Context",
    "DropLayers",
    "FactorizeEmbedding",
    "Fold",
    "Heal",
    "JointQueryKey",
    "JointValueOutput",
    "LowRank",
    "Plan",
    "Prune",
    "PruneChannels",
    "PruneHeads",
    "PruneWidth",
    "Quantize",
    "Recipe",
    "Repair",
    "SeparableConvolutions",
    "Share",
    "ShareBasis",
    "Step",
    "TensorTrainEmbedding",
    "Tensorize",
    "TierSetting",
    "ToLatentAttention",
    "ToLinformer",
    "ToNystrom",
    "Trim",
    "TrimVocabulary",
    "compress",
    "compress_folder",
    "known_steps",
    "recipe_names",
    "step_from_json",
    "student_from",
]
