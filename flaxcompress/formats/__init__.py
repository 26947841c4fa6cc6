"""Weight formats: how a matrix is stored and multiplied. A new format is one file and one import here."""

from flaxcompress.formats.banded import Banded, BandedSpec
from flaxcompress.formats.base import (
    DenseSpec,
    Format,
    Spec,
    attend,
    axes,
    dense,
    from_tensors,
    map_parts,
    materialize,
    matmul,
    matmul_flops,
    nbytes,
    parse_spec,
    select,
    spec_for,
    spec_of,
    stored_values,
    take,
    take_flops,
    to_tensors,
)
from flaxcompress.formats.bucketed import Bucketed, BucketedSpec, Tier
from flaxcompress.formats.fake_quantized import FakeQuantized, thaw
from flaxcompress.formats.low_rank import LowRank, LowRankSpec, break_even_rank, rank_for
from flaxcompress.formats.quantized import Quantized, QuantizedSpec
from flaxcompress.formats.rows import RowFormat, RowSpec
from flaxcompress.formats.tensor_train import TensorTrain, TensorTrainSpec

__all__ = [
    "Banded",
    "BandedSpec",
    "Bucketed",
    "BucketedSpec",
    "DenseSpec",
    "FakeQuantized",
    "Format",
    "LowRank",
    "LowRankSpec",
    "Quantized",
    "QuantizedSpec",
    "RowFormat",
    "RowSpec",
    "Spec",
    "TensorTrain",
    "TensorTrainSpec",
    "Tier",
    "attend",
    "axes",
    "break_even_rank",
    "dense",
    "from_tensors",
    "map_parts",
    "materialize",
    "matmul",
    "matmul_flops",
    "nbytes",
    "parse_spec",
    "rank_for",
    "select",
    "spec_for",
    "spec_of",
    "stored_values",
    "take",
    "take_flops",
    "thaw",
    "to_tensors",
]
