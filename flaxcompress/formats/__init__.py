"""Weight formats: how a matrix is stored and multiplied. A new format is one file and one import here."""

from flaxcompress.formats.adapted import Adapted, AdaptedSpec, column_norms
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
from flaxcompress.formats.basis import Basis, BasisSpec
from flaxcompress.formats.bucketed import Bucketed, BucketedSpec, Tier
from flaxcompress.formats.codebook import CodebookSpec, Coded, FP8Spec, NF4Spec
from flaxcompress.formats.cp import CP, CPSpec
from flaxcompress.formats.decomposed import Decomposed, DecomposedSpec
from flaxcompress.formats.fake_quantized import FakeQuantized, thaw
from flaxcompress.formats.low_rank import LowRank, LowRankSpec, break_even_rank, rank_for
from flaxcompress.formats.masked import Masked, MaskedRows, MaskedSpec, unpacked
from flaxcompress.formats.quantized import Quantized, QuantizedSpec
from flaxcompress.formats.rows import RowFormat, RowSpec, TrainingForm
from flaxcompress.formats.scaled import ScaledRows, ScaledSpec
from flaxcompress.formats.semi_structured import SemiStructured, SemiStructuredSpec
from flaxcompress.formats.sparse import Sparse, SparseSpec
from flaxcompress.formats.tensor_train import TensorTrain, TensorTrainSpec
from flaxcompress.formats.tucker import Tucker, TuckerSpec

__all__ = [
    "CP",
    "Adapted",
    "AdaptedSpec",
    "Banded",
    "BandedSpec",
    "Basis",
    "BasisSpec",
    "Bucketed",
    "BucketedSpec",
    "CPSpec",
    "CodebookSpec",
    "Coded",
    "Decomposed",
    "DecomposedSpec",
    "DenseSpec",
    "FP8Spec",
    "FakeQuantized",
    "Format",
    "LowRank",
    "LowRankSpec",
    "Masked",
    "MaskedRows",
    "MaskedSpec",
    "NF4Spec",
    "Quantized",
    "QuantizedSpec",
    "RowFormat",
    "RowSpec",
    "ScaledRows",
    "ScaledSpec",
    "SemiStructured",
    "SemiStructuredSpec",
    "Sparse",
    "SparseSpec",
    "Spec",
    "TensorTrain",
    "TensorTrainSpec",
    "Tier",
    "TrainingForm",
    "Tucker",
    "TuckerSpec",
    "attend",
    "axes",
    "break_even_rank",
    "column_norms",
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
    "unpacked",
]
