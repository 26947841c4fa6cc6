"""Parameter-efficient tuning: what is trained of a model whose weights stay. A new kind is one file and one import."""

from flaxcompress.tuning.base import Tuning
from flaxcompress.tuning.biases import Biases
from flaxcompress.tuning.bottleneck import Bottleneck, with_adapters
from flaxcompress.tuning.lora import Lora, merged, with_lora, without_lora

__all__ = ["Biases", "Bottleneck", "Lora", "Tuning", "merged", "with_adapters", "with_lora", "without_lora"]
