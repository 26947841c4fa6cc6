"""Parameter-efficient tuning: what is trained of a model whose weights stay. A new kind is one file and one import."""

from flaxcompress.tuning.base import Tuning
from flaxcompress.tuning.biases import Biases
from flaxcompress.tuning.bottleneck import Bottleneck, with_adapters
from flaxcompress.tuning.lora import Lora, merged, with_lora, without_lora
from flaxcompress.tuning.prefix import Prefix, with_prefix

__all__ = [
    "Biases",
    "Bottleneck",
    "Lora",
    "Prefix",
    "Tuning",
    "merged",
    "with_adapters",
    "with_lora",
    "with_prefix",
    "without_lora",
]
