"""Loss and gradient of small models on meshes of 8 devices that the CPU pretends to have, against one device's.

Run in a process of its own, since devices are counted when JAX starts: `python sharded.py '["gpt2", "data=8", …]' …`
prints, for each structure with its meshes, {mesh: largest deviation}.
"""

from __future__ import annotations

import json
import os
import sys

MESHES = (
    *("data=8", "fsdp=8", "model=8", "model=4,data=2", "model=2,fsdp=4", "sequence=8", "sequence=2,data=4"),
    *("data=2,fsdp=2,model=2", "data=2,model=2,sequence=2", "dcn=2,data=2,fsdp=2"),
)
BATCH, LENGTH = 8, 16
BASE = {
    "vocabulary": 40,
    "width": 32,
    "layers": 2,
    "heads": 8,
    "feed_forward_width": 16,
    "positions": LENGTH,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "pooler": False,
    "head": "masked_lm",
}
DENSE = {"kind": "dense"}
INT8, INT4 = ({"kind": "quantized", "bits": bits, "group": group} for bits, group in ((8, None), (4, 8)))


def _low_rank(rank, left=DENSE, right=DENSE):
    return {"kind": "low_rank", "rank": rank, "left": left, "right": right}


_KERNEL, _TABLE, _ATTENTION = r".*layers/\d+/.*/kernel", "embedding/token", r".*/attention/.*/kernel"
_TRAIN = {"kind": "tensor_train", "rows": [4, 8], "columns": [8, 4], "ranks": [8]}
_CP = {"kind": "cp", "rows": [32], "columns": [8, 4], "rank": 8}
_TUCKER = {"kind": "tucker", "rows": [32], "columns": [4, 8], "ranks": [16, 4, 8]}
_BANDED = {"kind": "banded", "bands": [[4, 8], [8, 4], [4, 1]]}
FORMATS = {  # {name: {pattern: spec}}
    "dense-bf16": {_KERNEL: {"kind": "dense", "dtype": "bfloat16"}},
    "low_rank": {_KERNEL: _low_rank(8), _TABLE: _low_rank(16)},
    "low_rank-odd": {_KERNEL: _low_rank(5), _TABLE: _low_rank(7)},
    "tensor_train": {_ATTENTION: _TRAIN, _TABLE: {**_TRAIN, "rows": [5, 8]}},
    "cp": {_ATTENTION: _CP, _TABLE: {**_CP, "rows": [40]}},
    "tucker": {_ATTENTION: _TUCKER, _TABLE: {**_TUCKER, "rows": [5, 8], "ranks": [4, 8, 4, 4]}},
    "quantized": {_KERNEL: INT4, _TABLE: INT8},
    "quantized-low_rank": {_KERNEL: _low_rank(8, INT8, INT4), _TABLE: _low_rank(16, INT4, INT8)},
    "codebook": {_KERNEL: {"kind": "nf4", "group": 8}, _TABLE: {"kind": "fp8"}},
    "banded": {_TABLE: _low_rank(16, _BANDED, INT8)},
    "sparse": {
        _KERNEL: {"kind": "sparse", "kept": 300, "values": DENSE},
        _TABLE: {"kind": "sparse", "kept": 600, "values": INT8},
    },
    "semi_structured": {
        _KERNEL: {"kind": "semi_structured", "n": 2, "m": 4, "values": DENSE},
        _TABLE: {"kind": "semi_structured", "n": 1, "m": 2, "values": INT8},
    },
    "adapted": {_KERNEL: {"kind": "adapted", "base": INT4, "delta": _low_rank(4), "scale": 0.5}},
    "bucketed": {
        _TABLE: {
            "kind": "bucketed",
            "tiers": [{"rows": 8, "format": DENSE}, {"rows": 32, "format": _low_rank(8, INT4)}],
        }
    },
}
HEADS = ("none", "pretraining", "replaced_token", "sequence_classification", "token_classification", "span")
SHARINGS = ("all", "sequence", "cycle", "attention")


def structures():
    """{name: config}, but for families, which need torch to be drawn."""
    import dataclasses

    import flaxcompress as fc
    from flaxcompress.config import Adapters, Linformer, Nystrom
    from flaxcompress.config.format_rule import FormatRule

    config = fc.ModelConfig(**BASE)
    rules = {name: tuple(FormatRule(pattern=p, spec=s) for p, s in specs.items()) for name, specs in FORMATS.items()}
    out = {name: config.replace(formats=rule) for name, rule in rules.items()}
    for name in HEADS:
        out[name] = config.replace(head=name, pooler=name == "pretraining", classes=2 if name == "span" else 3)
    for name in SHARINGS:
        sharing = fc.Sharing.named(name, layers=4, sets=2 if name in ("sequence", "cycle") else None)
        out[name] = config.replace(layers=4, sharing=sharing)
    out["all-low_rank"] = out["all"].replace(formats=rules["low_rank"])
    out["all-deltas"] = out["all"].replace(deltas=fc.Deltas(rank=4))
    on_basis = {"kind": "low_rank", "rank": 4, "left": {"kind": "basis"}}
    two = dataclasses.replace(fc.Sharing.own(4), bases=(0, 0, 1, 1))
    out["bases"] = config.replace(layers=4, sharing=two).with_rule(r"layers/\d+/\w+/(query|up|down)/kernel", on_basis)
    out["adapters"] = config.replace(adapters=Adapters(width=4))
    out["linformer"] = config.replace(attention=Linformer(length=4))
    out["nystrom"] = config.replace(attention=Nystrom(landmarks=4, convolution=3))
    out["kernels"] = config.replace(projection_kernel=3, feed_forward_kernel=3)
    placed = {"position_embedding": "none", "segments": 0, "rotary": fc.Rotary(), "causal": True, "head": "causal_lm"}
    out["two-groups"] = config.replace(**placed, key_value_heads=2, gated=True, tied=False)
    out["parallel"] = out["two-groups"].replace(norm_place="pre", parallel="two_norms", window=4)
    return out


def family(name):
    """A config of a family: what `family_cases` draws, with heads and widths that meshes divide."""
    import family_cases
    import numpy as np

    from flaxcompress.families import FAMILIES

    if name == "vit":
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 8, "intermediate_size": 16}
        return FAMILIES[name].read_config({**sizes, "image_size": 6, "patch_size": 2, "num_channels": 3})
    _, draw, classes = family_cases.CASES[name]
    head = next((h for h in ("masked_lm", "causal_lm", "seq2seq_lm") if h in classes), "none")
    config = FAMILIES[name].read_config({**draw(np.random.default_rng(3)), "architectures": [classes[head]]})

    def sizes(config):
        groups = None if config.groups == config.heads else 4
        zero = dict.fromkeys(("dropout", "attention_dropout"), 0.0)
        widths = {"width": 32, "heads": 8, "head_width": None, "key_value_heads": groups, "feed_forward_width": 16}
        return {**zero, **widths, "positions": LENGTH}

    decoder = None if config.decoder is None else config.decoder.replace(**sizes(config.decoder))
    return config.replace(**sizes(config), decoder=decoder)


def batch_of(config):
    import numpy as np

    rng = np.random.default_rng(4)
    if (patches := config.patches) is not None:
        return {"ids": rng.normal(size=(BATCH, patches.channels, patches.height, patches.width)).astype("f")}
    lengths = rng.integers(LENGTH // 2, LENGTH + 1, (BATCH, 1))
    ids = lambda: rng.integers(1, config.vocabulary, (BATCH, LENGTH), dtype=np.int32)  # noqa: E731
    batch = {"ids": ids(), "mask": np.arange(LENGTH) < lengths, "targets": ids()}
    if config.decoder is not None:
        batch["decoder_ids"] = ids()
    elif config.head in ("masked_lm", "pretraining"):
        batch["label_positions"] = rng.integers(0, LENGTH, (BATCH, 5), dtype=np.int32)
    elif config.head == "causal_lm" and config.family != "bert":  # as packed rows
        batch["packs"] = np.sort(rng.integers(0, 3, (BATCH, LENGTH), dtype=np.int32), 1)[:, ::-1].copy()
        del batch["mask"]
    return batch


def loss(config, params, batch):
    """Cross-entropy of every output of the head, or the size of the last hidden state and the pooled output."""
    import jax
    import jax.numpy as jnp

    from flaxcompress.nn import run

    given = {name: array for name, array in batch.items() if name != "targets"}
    out = run(params, config, jnp.float32, given.pop("ids"), given.pop("mask", None), **given)
    total = 0.0
    for logits in jax.tree.leaves(out.logits):
        logits = jnp.stack([logits, -logits], -1) if config.head == "replaced_token" else logits
        targets = batch["targets"][:, : logits.shape[1]] if logits.ndim == 3 else batch["targets"][:, 0]
        rows = jnp.take_along_axis(logits, targets[..., None] % logits.shape[-1], -1)[..., 0]
        total = total + (jax.nn.logsumexp(logits, -1) - rows).mean()
    if config.head == "none":
        total = jnp.square(out.last_hidden_state - 0.3).mean()
        total += 0.0 if out.pooled is None else jnp.square(out.pooled).mean()
    return total


def deviations(config, meshes):
    """{mesh: the largest deviation of loss and gradient leaves, over the leaf's largest value}.

    A leaf's size counts as a hundredth of the largest one's at least: what should be 0 is rounding errors alone.
    """

    import jax
    import jax.numpy as jnp
    import numpy as np

    import flaxcompress as fc
    from flaxcompress import tree
    from flaxcompress.model import abstract_flat
    from flaxcompress.train import thaw_model
    from flaxcompress.train.mesh import parse_mesh
    from flaxcompress.train.sharding import batch_shardings, param_shardings, within
    from flaxcompress.train.trainable import combine, partition

    rng = np.random.default_rng(5)

    def draw(path, leaf):
        floating = jnp.issubdtype(leaf.dtype, jnp.floating)
        spread = 0.006 if any(getattr(key, "name", "") == "scale" for key in path) else 0.3  # of integers up to 99
        values = rng.normal(size=leaf.shape) * spread if floating else rng.integers(0, 99, leaf.shape)
        return jnp.asarray(values, leaf.dtype)

    abstract = abstract_flat(config)
    flat = {address: jax.tree_util.tree_map_with_path(draw, node) for address, node in abstract.items()}
    if any(rule.spec["kind"] == "bucketed" for rule in config.formats):  # whose assignment is no number of any kind
        drawn = tree.flatten(fc.Model.init(config, key=jax.random.key(0)).params)
        flat["embedding/token"] = drawn["embedding/token"]
    params = thaw_model(fc.Model(params=tree.unflatten(flat), config=config))

    def unrounded(path, leaf):  # on the levels themselves, the gradient of a scale is 0
        latent = str(path[-1]) == ".latent"
        return leaf * (1 + 0.1 * jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype)) if latent else leaf

    params = jax.tree_util.tree_map_with_path(unrounded, params)
    batch = batch_of(config)

    def value(params, batch):
        moving, fixed = partition(params)
        return jax.value_and_grad(lambda moving: loss(config, combine(moving, fixed), batch))(moving)

    want = jax.tree.map(np.asarray, jax.jit(value)(params, batch))
    least = 1e-2 * max(np.abs(leaf).max() for leaf in jax.tree.leaves(want[1]))
    found = {}
    for name in meshes:
        mesh = fc.make_mesh(**parse_mesh(name))
        shardings = param_shardings(tree.abstract(params), config, mesh)
        moving = jax.tree.map(
            lambda m, s: None if m is None else s, partition(params)[0], shardings, is_leaf=lambda m: m is None
        )
        with within(mesh):
            placed = jax.device_put(params, shardings), jax.device_put(batch, batch_shardings(batch, mesh))
            got = jax.jit(value, out_shardings=(None, moving))(*placed)
        errors = jax.tree.map(lambda a, b: float(np.abs(a - b).max() / max(np.abs(b).max(), least)), got, want)
        found[name] = max(jax.tree.leaves(errors))
    return found


def main():
    # Code that is hardly optimized compiles in two thirds of the time.
    fast = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=8 {fast}"
    os.environ["JAX_PLATFORMS"] = "cpu"
    known = structures()
    for request in map(json.loads, sys.argv[1:]):
        name, *meshes = request
        print(json.dumps({name: deviations(known[name] if name in known else family(name), meshes)}), flush=True)


if __name__ == "__main__":
    main()
