"""Folders in PyTorch: our modelling code, stock exports, and the check that compares them with the model."""

from __future__ import annotations

import functools
import json
import math
import shutil
from importlib import import_module

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from flaxcompress import formats, ops, storage, tree
from flaxcompress.config import FormatRule, ModelConfig, Sharing
from flaxcompress.export import FORMATS, check_folder, export, export_dense
from flaxcompress.export import torch as export_torch
from flaxcompress.folder import load, save, tensors_of
from flaxcompress.formats import Bucketed, base
from flaxcompress.model import Model
from flaxcompress.text import Assets, Pooling

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
modeling = import_module("flaxcompress.export.modeling_flaxcompress")
torch_formats = import_module("flaxcompress.export.flaxcompress_formats")

EPS = float(np.finfo(np.float32).eps)


# ── formats, one matrix at a time ────────────────────────────────────────────────────────────────────────────────────


def quantized(bits, group=None, **options):
    return {"kind": "quantized", "bits": bits, "group": group, **options}


def low_rank(rank, left=None, right=None):
    factors = {"left": left, "right": right}
    return {"kind": "low_rank", "rank": rank, **{name: spec for name, spec in factors.items() if spec}}


def bucketed(*tiers):
    return {"kind": "bucketed", "tiers": [{"rows": rows, "format": spec} for rows, spec in tiers]}


def banded(*bands, **options):
    return {"kind": "banded", "bands": [list(band) for band in bands], **options}


def sparse(kept, values=None):
    return {"kind": "sparse", "kept": kept, "values": values or {"kind": "dense"}}


def n_of_m(n, m, values=None):
    return {"kind": "semi_structured", "n": n, "m": m, "values": values or {"kind": "dense"}}


def adapted(base, delta, scale=1.0):
    return {"kind": "adapted", "base": base, "delta": delta, "scale": scale}


DENSE = {"kind": "dense"}
HALF = {"kind": "dense", "dtype": "float16"}
MATRIX_SPECS = {
    "dense": DENSE,
    "dense-fp16": HALF,
    "dense-bf16": {"kind": "dense", "dtype": "bfloat16"},
    **{f"int{b}-{g}": quantized(b, g) for b in (8, 6, 5, 4, 3, 2) for g in (None, 16, 5)},
    "int4-scale32": quantized(4, 7, scale_dtype="float32"),
    **{f"{kind}-{group}": {"kind": kind, "group": group} for kind in ("nf4", "fp8") for group in (None, 5)},
    "int8-scale-bf16": quantized(8, scale_dtype="bfloat16"),
    "defaults": {"kind": "quantized"},
    "low_rank": low_rank(5),
    "low_rank-int": low_rank(5, quantized(8), quantized(3, 4)),
    "low_rank-nested": low_rank(7, low_rank(3, quantized(2, 2)), HALF),
    "sparse": sparse(301),
    "sparse-int4": sparse(300, quantized(4, 16)),
    "sparse-factors": low_rank(9, sparse(100, HALF), sparse(70, quantized(8))),
    "two-of-four": n_of_m(2, 4),
    "one-of-eight-int8": n_of_m(1, 8, quantized(8)),
    "adapted": adapted(quantized(4, 16), low_rank(3, HALF, HALF), 0.5),
    "adapted-magnitude": {**adapted(quantized(4, 16), low_rank(3), 0.5), "magnitude": True},
    "adapted-sparse": adapted(sparse(200), low_rank(2, quantized(8), quantized(8))),
}
TABLE_SPECS = {
    "two-tiers": bucketed((30, DENSE), (67, quantized(4, 16))),
    "nested-tiers": bucketed(
        (10, low_rank(6, quantized(3, 4), quantized(8))), (40, low_rank(2)), (47, low_rank(4, banded((2, 4), (2, 1))))
    ),
    "six-tiers": bucketed((1, DENSE), (6, quantized(8)), (20, quantized(4)), (20, DENSE), (20, DENSE), (30, DENSE)),
    "one-tier": bucketed((97, quantized(8))),
    "banded": banded((3, 8), (5, 4), (5, 3), (5, 2), (3, 1), (3, 0)),
    "banded-float32": banded((24, 2), scale_dtype="float32"),
    "banded-factor": low_rank(9, banded((2, 4), (4, 0), (3, 1)), quantized(8)),
}
CASES = [(name, spec, table) for name, spec in MATRIX_SPECS.items() for table in (False, True)]
CASES += [(name, spec, True) for name, spec in TABLE_SPECS.items()]


def random_matrix(spec, shape, table, seed=0):
    """A random node; a bucketed table's tiers are spread over the ids."""

    def draw(key, shape, dtype):  # from numpy: nothing to compile
        return jnp.asarray(rng.normal(0, 0.5, shape), dtype)

    rng = np.random.default_rng(seed)
    node = jax.jit(lambda key: base.parse_spec(spec).init(key, shape, draw, table=table))(jax.random.key(seed))
    if isinstance(node, Bucketed):
        node = Bucketed.from_tiers(node.tiers, np.random.default_rng(seed).permutation(np.asarray(node.tier_of_row())))
    return node


def to_torch(array):
    array = np.asarray(array)
    if array.dtype == jnp.bfloat16:
        return torch.tensor(array.astype(np.float32)).to(torch.bfloat16)
    return torch.tensor(array)


def close(got, want, terms, depth=1):
    """Equal to rounding: sums of `terms` products, `depth` of them in a row, accumulated in float32."""
    got = np.asarray(got.detach().float().numpy() if isinstance(got, torch.Tensor) else got, np.float32)
    want = np.asarray(want, np.float32)
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=0, atol=8 * EPS * math.sqrt(terms) * depth * np.abs(want).max())


QUICK = {(name, False) for name in ("dense-bf16", "int4-16", "int3-5", "low_rank-nested")}
QUICK |= {(name, True) for name in ("dense", "int8-scale-bf16", "int2-16", "low_rank-int", "banded", "banded-float32")}
QUICK |= {("nested-tiers", True), ("six-tiers", True), ("sparse-int4", True), ("sparse-factors", False)}
QUICK |= {("one-of-eight-int8", True), ("two-of-four", False), ("adapted", False)}


def _case(name, spec, table):
    marks = () if (name, table) in QUICK else pytest.mark.slow
    return pytest.param(spec, table, id=f"{name}-{'t' if table else 'k'}", marks=marks)


@pytest.mark.parametrize(("spec", "table"), [_case(*case) for case in CASES])
def test_every_format_computes_what_ours_does(spec, table):
    n, m = (97, 24) if table else (40 if spec["kind"] == "semi_structured" else 37, 21)
    node = random_matrix(spec, (n, m), table)
    holder = torch.nn.Module()
    holder.w = torch_formats.build(spec, (n, m), table)
    tensors = {name.replace("address", "w"): to_torch(leaf) for name, leaf in base.to_tensors(node, "address").items()}
    assert {k: (v.shape, v.dtype) for k, v in holder.state_dict().items()} == {
        k: (v.shape, v.dtype) for k, v in tensors.items()
    }
    holder.load_state_dict(tensors)

    rng = np.random.default_rng(1)
    x, y = (rng.normal(size=(2, 3, width)).astype(np.float32) for width in (n, m))
    ids = rng.integers(0, n, (4, 9))
    multiplies = not isinstance(node, Bucketed)

    @jax.jit
    def ours(node, x, y, ids):
        return formats.attend(y, node), formats.take(node, ids), formats.matmul(x, node) if multiplies else None

    attended, taken, multiplied = ours(node, x, y, ids)
    close(torch_formats.attend(torch.tensor(y), holder.w), attended, terms=max(n, m), depth=3)
    close(torch_formats.take(holder.w, torch.tensor(ids)), taken, terms=m, depth=3)
    if multiplies:
        close(torch_formats.matmul(torch.tensor(x), holder.w), multiplied, terms=n, depth=3)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_unpacking_is_the_inverse_of_packing(bits):
    for count in (1, 3, 8, 19):
        codes = np.random.default_rng(count).integers(0, 2**bits, (3, count))
        packed = torch.tensor(np.asarray(ops.pack(codes, bits)))
        assert packed.shape[-1] == torch_formats.packed_width(count, bits)
        np.testing.assert_array_equal(torch_formats.unpack(packed, bits, count).numpy(), codes)


def test_every_registered_format_has_a_class_in_pytorch():
    assert set(torch_formats.KINDS) == set(base._KINDS)


def test_an_unknown_format_names_the_known_ones():
    with pytest.raises(ValueError, match=r"'wavelet' is not among \[.*'dense', .*newer flaxcompress"):
        torch_formats.build({"kind": "wavelet"}, (2, 2), False)


# ── whole models ─────────────────────────────────────────────────────────────────────────────────────────────────────


def rules(*pairs):
    return tuple(FormatRule(pattern=pattern, spec=spec) for pattern, spec in pairs)


STRUCTURES = {
    "dense": {},
    "integers": {
        "formats": rules((".*norm.*", DENSE), ("embedding/.*", quantized(4, 16)), (".*/kernel", quantized(8))),
        "pooler": False,
        "segments": 0,
        "activation": "gelu_tanh",
    },
    "everything": {
        "formats": rules(
            ("embedding/token", TABLE_SPECS["nested-tiers"]),
            ("embedding/position", low_rank(3)),
            (r"layers/0/attention/(query|key)/kernel", quantized(3, 16)),
            (r"layers/1/attention/.*/kernel", quantized(2, 5)),
            (r".*/up/kernel", low_rank(6, quantized(8), quantized(4, 5))),
            (r".*/down/kernel", HALF),
            (r"(embedding/norm|layers/1)/.*/?(bias|scale)|head/bias", HALF),
            ("head/transform/kernel", {"kind": "dense", "dtype": "bfloat16"}),
        ),
        "sharing": Sharing(attention=(0, 0, 1), feed_forward=(0, 1, 0), norms=(0, 1, 2)),
        "layers": 3,
        "head": "masked_lm",
        "activation": "relu",
    },
}


def random_model(seed=0, assets=None, **changes):
    """A small model whose biases and norms are random too."""
    fields = {
        "vocabulary": 97,
        "width": 24,
        "layers": 2,
        "heads": 4,
        "feed_forward_width": 40,
        "positions": 16,
        "initializer_range": 0.3,
    }
    model = Model.init(ModelConfig(**{**fields, **changes}), key=jax.random.key(seed), assets=assets)
    rng = np.random.default_rng(seed)

    def shaken(address, node):
        if isinstance(node, Bucketed):
            return Bucketed.from_tiers(node.tiers, rng.permutation(np.asarray(node.tier_of_row())))
        if address.endswith(("/bias", "/scale")):
            return node + jnp.asarray(rng.normal(0, 0.1, node.shape), node.dtype)
        return node

    return model.replace(params=tree.update(model.params, shaken))


def batch(model, rows=3, length=11):
    """ids and mask: one full row, one padded, one without any token."""
    ids = np.random.default_rng(5).integers(0, model.config.vocabulary, (rows, length))
    mask = np.ones_like(ids)
    mask[1, 6:] = 0
    mask[2] = 0
    return ids, mask


class Saved:
    """A model, the folder it was saved to, and what transformers makes of it."""

    def __init__(self, model, folder):
        self.model, self.folder = model, folder
        save(model, folder)
        self.torch, self.info = transformers.AutoModel.from_pretrained(
            folder, trust_remote_code=True, output_loading_info=True
        )
        self.torch.eval()


@pytest.fixture(scope="module")
def save_once(tmp_path_factory):
    """The `Saved` of a structure; each is written once, since its initialisation takes seconds to compile."""
    folder = tmp_path_factory.mktemp("saved")
    return functools.cache(lambda name: Saved(random_model(**STRUCTURES[name]), folder / name))


@pytest.fixture(scope="module", params=list(STRUCTURES))
def saved(request, save_once):
    return save_once(request.param)


@pytest.fixture(scope="module")
def everything(save_once):
    return save_once("everything")


def test_loading_is_complete_and_bit_equal(saved):
    assert not any(saved.info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    want, got = tensors_of(saved.model), saved.torch.state_dict()
    assert set(got) == set(want)
    for name, array in want.items():
        expected = to_torch(array)
        assert got[name].dtype == expected.dtype, name
        assert torch.equal(got[name], expected), name


@torch.no_grad()
def test_outputs_equal_ours_with_padding_and_an_empty_row(saved):
    ids, mask = batch(saved.model)
    want = saved.model(ids, mask, output_hidden_states=True, output_attentions=True)
    inputs = torch.tensor(ids), torch.tensor(mask)
    got = saved.torch(*inputs, output_hidden_states=True, output_attentions=True)
    fused = saved.torch(*inputs)
    assert fused.hidden_states is None and fused.attentions is None
    config = saved.model.config
    rounding = {"terms": config.feed_forward_width, "depth": config.layers + 1}
    close(got.last_hidden_state, want.last_hidden_state, **rounding)
    close(fused.last_hidden_state, want.last_hidden_state, **rounding)
    for name in ("hidden_states", "attentions"):
        for layer, ours in zip(getattr(got, name), getattr(want, name), strict=True):
            close(layer, ours, **rounding)
    assert not got.attentions[0][2].any()
    assert (got.pooler_output is None) == (want.pooled is None)
    if want.pooled is not None:
        close(got.pooler_output, want.pooled, **rounding)
    as_tuple = saved.torch(*inputs, return_dict=False)
    assert torch.equal(as_tuple[0], fused.last_hidden_state)
    without_mask, with_ones = saved.torch(inputs[0]), saved.torch(inputs[0], torch.ones_like(inputs[0]))
    assert torch.equal(without_mask.last_hidden_state, with_ones.last_hidden_state)


@pytest.mark.slow
@torch.no_grad()
def test_segments_select_their_embeddings(everything):
    ids, mask = batch(everything.model)
    segments = np.random.default_rng(2).integers(0, 2, ids.shape)
    want = everything.model(ids, mask, segments).last_hidden_state
    got = everything.torch(torch.tensor(ids), torch.tensor(mask), torch.tensor(segments)).last_hidden_state
    close(got, want, terms=40, depth=4)
    unsegmented = everything.torch(torch.tensor(ids), torch.tensor(mask)).last_hidden_state
    assert (got - unsegmented).abs().max() > 0.1


@pytest.mark.slow
@torch.no_grad()
def test_masked_lm_logits_and_loss(everything):
    lm = transformers.AutoModelForMaskedLM.from_pretrained(everything.folder, trust_remote_code=True).eval()
    ids, mask = batch(everything.model)
    labels = torch.tensor(ids).masked_fill(torch.tensor(mask) == 0, -100)
    out = lm(torch.tensor(ids), torch.tensor(mask), labels=labels)
    want = everything.model(ids, mask).logits
    close(out.logits, want, terms=40, depth=5)
    log_p = jax.nn.log_softmax(want)[mask == 1]
    expected = -np.mean(np.asarray(log_p)[np.arange(len(log_p)), ids[mask == 1]])
    np.testing.assert_allclose(float(out.loss), expected, rtol=1e-5)


def test_save_pretrained_round_trip_is_identical(saved, tmp_path):
    saved.torch.save_pretrained(tmp_path)
    before, after = (load_file(folder / storage.WEIGHTS) for folder in (saved.folder, tmp_path))
    assert set(before) == set(after)
    for name, array in before.items():
        assert array.dtype == after[name].dtype and np.array_equal(array, after[name]), name
    assert load(tmp_path).config == saved.model.config
    assert (tmp_path / "modeling_flaxcompress.py").is_file()
    again = transformers.AutoModel.from_pretrained(tmp_path, trust_remote_code=True).eval()
    ids, mask = map(torch.tensor, batch(saved.model))
    with torch.no_grad():
        assert torch.equal(again(ids, mask).last_hidden_state, saved.torch(ids, mask).last_hidden_state)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@torch.no_grad()
def test_low_precision_follows_the_dtype_and_keeps_the_storage(everything, dtype):
    dtype = getattr(torch, dtype)
    low = transformers.AutoModel.from_pretrained(everything.folder, trust_remote_code=True, dtype=dtype).eval()
    ids, mask = map(torch.tensor, batch(everything.model))
    got, want = low(ids, mask).last_hidden_state, everything.torch(ids, mask).last_hidden_state
    assert got.dtype == low.dtype == dtype
    assert low.state_dict()["layers/0/attention/query/kernel.scale"].dtype == torch.float16
    assert low.state_dict()["layers/0/attention/query/kernel.values"].dtype == torch.uint8
    # Twice the error that rounding the activations once per layer and part would make.
    steps = 2 * 3 * everything.model.config.layers
    assert (got.float() - want).abs().max() <= 2 * steps * torch.finfo(dtype).eps * want.abs().max()


@pytest.mark.slow
def test_torch_export_with_dynamic_batch_and_length(everything):
    ids, mask = map(torch.tensor, batch(everything.model))
    auto = torch.export.Dim.AUTO
    axes = {0: auto, 1: auto}
    program = torch.export.export(
        everything.torch, (ids, mask), dynamic_shapes={"input_ids": axes, "attention_mask": axes}
    )
    with torch.no_grad():
        for rows, length in ((3, 11), (2, 7), (3, 16)):
            some = torch.randint(0, 97, (rows, length)), torch.ones(rows, length, dtype=torch.long)
            want = everything.torch(*some).last_hidden_state
            torch.testing.assert_close(program.module()(*some).last_hidden_state, want, rtol=0, atol=1e-5)
    assert set(program.state_dict) == set(everything.torch.state_dict())


@pytest.mark.slow
@torch.no_grad()
def test_torch_compile_without_graph_breaks(everything):
    compiled = torch.compile(everything.torch, fullgraph=True, dynamic=True, backend="aot_eager")
    ids, mask = map(torch.tensor, batch(everything.model))
    for some in ((ids, mask), (ids[:2, :7], mask[:2, :7])):
        want = everything.torch(*some).last_hidden_state
        torch.testing.assert_close(compiled(*some).last_hidden_state, want, rtol=0, atol=1e-5)


def test_float_weights_train_and_dropout_acts(everything):
    net = transformers.AutoModel.from_pretrained(everything.folder, trust_remote_code=True).train()
    ids, mask = map(torch.tensor, batch(everything.model))
    first, second = (net(ids, mask).last_hidden_state for _ in range(2))
    assert not torch.equal(first, second)
    first.square().sum().backward()
    gradients = {name: p.grad for name, p in net.named_parameters() if not name.startswith(("head/", "pooler/"))}
    for name, gradient in gradients.items():
        assert gradient is not None and torch.isfinite(gradient).all(), name
    assert gradients["embedding/token.tiers.1.left"].any()
    assert gradients["layers/0/attention/query/kernel.scale"].any()


def test_callers_mistakes_are_named(everything):
    net = everything.torch
    with pytest.raises(ValueError, match="17 tokens, but the model has 16 positions"):
        net(torch.zeros(1, 17, dtype=torch.long))
    with pytest.raises(ValueError, match=r"attention_mask: shape \[1, 4\] is not \[1, 5\]"):
        net(torch.zeros(1, 5, dtype=torch.long), torch.ones(1, 4))
    with pytest.raises(IndexError):
        net(torch.full((1, 5), 97))
    config = random_model().config
    with pytest.raises(ValueError, match="needs the head masked_lm, but this folder's head is 'none'"):
        modeling.FlaxCompressForMaskedLM(modeling.FlaxCompressConfig(flaxcompress=config.to_json()))


def test_a_missing_tensor_is_an_error(everything, tmp_path):
    shutil.copytree(everything.folder, tmp_path / "m")
    tensors = load_file(tmp_path / "m" / storage.WEIGHTS)
    del tensors["layers/0/attention/query/kernel.values"]
    storage.write_tensors(tmp_path / "m" / storage.WEIGHTS, tensors)
    with pytest.raises(ValueError, match=r"1 tensors are missing.*query/kernel\.values"):
        transformers.AutoModel.from_pretrained(tmp_path / "m", trust_remote_code=True)


# ── sentences ────────────────────────────────────────────────────────────────────────────────────────────────────────

VOCAB_TXT = (
    "[PAD] [UNK] [CLS] [SEP] [MASK] the a river froze in november how many moons has planet letter ##s un ##known yes "
    ". , ? b c d e f g h i j k l m n o p ##a ##b ##c ##d ##e ##f ##g ##h"
).replace(" ", "\n")
TEXTS = ["Yes.", "The river froze in November", "how MANY moons has a planet, letters? " * 3, "", "zzz unknown"]


def word_assets(pooling):
    config = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 512}
    files = (("vocab.txt", VOCAB_TXT.encode()), ("tokenizer_config.json", json.dumps(config).encode()))
    return Assets(files=files, pooling=pooling, max_length=12, source="owner/tiny", licence="apache-2.0")


POOLINGS = {
    "mean-normalized": Pooling("mean", True),
    "cls": Pooling("cls", False),
    "max": Pooling("max", False),
}


def word_model(pooling, **changes):
    return random_model(assets=word_assets(pooling), vocabulary=len(VOCAB_TXT.splitlines()), **changes)


QUANTIZED = {"formats": rules((".*/kernel", quantized(4, 16)), ("embedding/token", low_rank(6, quantized(8))))}


@pytest.mark.slow
@pytest.mark.parametrize("pooling", POOLINGS.values(), ids=POOLINGS)
def test_sentence_transformers_gives_the_vectors_of_encode(tmp_path, pooling):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    model = word_model(pooling, **QUANTIZED)
    want = model.encode(TEXTS)
    for folder in (save(model, tmp_path / "own"), export_dense(model, tmp_path / "stock")):
        net = sentence_transformers.SentenceTransformer(str(folder), trust_remote_code=True, device="cpu")
        assert net.max_seq_length == 12
        close(net.encode(TEXTS), want, terms=40, depth=3)


@pytest.mark.parametrize("kind", ["own", "stock"])
def test_the_folders_tokenizer_gives_our_ids(tmp_path, kind):
    model = word_model(POOLINGS["cls"])
    folder = (save if kind == "own" else export_dense)(model, tmp_path / kind)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer(TEXTS, truncation=True)["input_ids"] == model.assets.tokenize(TEXTS).ids


# ── stock folders ────────────────────────────────────────────────────────────────────────────────────────────────────


def without(model, part, **changes):
    """The model less one of its parts."""
    params = {name: child for name, child in model.params.items() if name != part}
    return model.replace(params=params, config=model.config.replace(**changes))


def stock(folder, cls):
    net, info = cls.from_pretrained(folder, output_loading_info=True)
    return net.eval(), info


@pytest.mark.parametrize("structure", ["dense", pytest.param("everything", marks=pytest.mark.slow)])
@torch.no_grad()
def test_a_stock_folder_computes_what_the_model_does(tmp_path, save_once, structure):
    model = without(save_once(structure).model, "head", head="none")
    net, info = stock(export_dense(model, tmp_path / "out"), transformers.BertModel)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids, mask = batch(model)
    ids, mask = ids[:2], mask[:2]  # stock attention gives NaN or an average for a row without tokens
    want = model(ids, mask)
    got = net(torch.tensor(ids), torch.tensor(mask))
    close(got.last_hidden_state, want.last_hidden_state, terms=40, depth=4)
    close(got.pooler_output, want.pooled, terms=40, depth=4)
    assert load(tmp_path / "out").config == model.config.replace(formats=(), sharing=None)


@pytest.mark.slow
@torch.no_grad()
def test_a_stock_masked_lm(tmp_path, everything):
    model = without(everything.model, "pooler", pooler=False)
    net, info = stock(export_dense(model, tmp_path / "out"), transformers.BertForMaskedLM)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids, mask = batch(model)
    want = model(ids[:2], mask[:2]).logits
    close(net(torch.tensor(ids[:2]), torch.tensor(mask[:2])).logits, want, terms=40, depth=5)
    close(load(tmp_path / "out")(ids, mask).logits, model(ids, mask).logits, terms=40, depth=5)


@torch.no_grad()
def test_without_pooler_or_segments_the_hidden_states_still_agree(tmp_path, save_once):
    model = save_once("integers").model
    net, info = stock(export_dense(model, tmp_path / "out"), transformers.BertModel)
    assert {name.split(".")[0] for name in info["missing_keys"]} == {"pooler"} and not info["unexpected_keys"]
    ids, mask = batch(model)
    want = model(ids[:2], mask[:2]).last_hidden_state
    close(net(torch.tensor(ids[:2]), torch.tensor(mask[:2])).last_hidden_state, want, terms=40, depth=3)


@pytest.mark.parametrize("name", ["BertModel", "BertForMaskedLM"])
def test_stock_to_ours_to_stock_is_the_identity(tmp_path, name):
    sizes = {"vocab_size": 60, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.BertConfig(**sizes, intermediate_size=40, max_position_embeddings=20)
    torch.manual_seed(0)
    getattr(transformers, name)(config).save_pretrained(tmp_path / "a")
    export_dense(load(tmp_path / "a"), tmp_path / "b")
    before, after = (load_file(tmp_path / folder / storage.WEIGHTS) for folder in "ab")
    assert set(before) == set(after)
    for tensor, array in before.items():
        assert array.dtype == after[tensor].dtype and np.array_equal(array, after[tensor]), tensor


def test_export_names_the_known_formats_and_spares_existing_folders(tmp_path, monkeypatch):
    model = random_model()
    with pytest.raises(ValueError, match=r"unknown format 'torch'.*did you mean 'torch-dense'"):
        export(model, tmp_path / "out", format="torch")
    assert set(FORMATS) >= {"torch-dense"}
    export(model, tmp_path / "out")
    weights = (tmp_path / "out" / storage.WEIGHTS).read_bytes()
    with pytest.raises(ValueError, match="not empty"):
        export(model, tmp_path / "out")

    def fails(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage, "write_tensors", fails)
    with pytest.raises(ValueError, match="No space left"):
        export(model, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / storage.WEIGHTS).read_bytes() == weights
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


# ── the check ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
@pytest.mark.parametrize("write", [save, export_dense])
@pytest.mark.parametrize("pooling", ["mean-normalized", "max"])
def test_check_folder_accepts_what_was_written(tmp_path, capfd, write, pooling):
    model = word_model(POOLINGS[pooling], **QUANTIZED, head="masked_lm")
    folder = write(model, tmp_path / "out")
    assert 0 <= check_folder(model, folder) < 1e-5
    assert 0 <= check_folder(model, folder, ["a letter", "The planet has many moons?"]) < 1e-5
    assert "Loading weights" not in capfd.readouterr().err


def test_check_folder_draws_tokens_for_a_model_without_tokenizer(everything):
    assert 0 <= check_folder(everything.model, everything.folder) < 1e-5
    with pytest.raises(ValueError, match="no tokenizer"):
        check_folder(everything.model, everything.folder, ["text"])


def test_check_folder_reports_both_numbers(tmp_path):
    model = word_model(Pooling("mean", True))
    other = model.replace(params=jax.tree.map(lambda leaf: leaf * 1.01, model.params))
    folder = save(other, tmp_path / "out")
    with pytest.raises(ValueError, match=r"differ from the model's by \d\.\d+e-0\d, more than the 1e-04"):
        check_folder(model, folder)


def test_check_folder_runs_no_code_from_the_folder(tmp_path):
    model = random_model()
    folder = save(model, tmp_path / "out")
    with (folder / "modeling_flaxcompress.py").open("a") as file:
        file.write("\nraise SystemExit('this code ran')\n")
    with pytest.raises(ValueError, match="not this version's file"):
        check_folder(model, folder)


def test_check_folder_says_nothing_without_torch(tmp_path, monkeypatch):
    monkeypatch.setattr(export_torch.util, "find_spec", lambda name: None)
    assert check_folder(random_model(), tmp_path) is None
