"""Full attention turned into multi-head latent attention, whose cache is one narrow vector per token."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from flaxcompress import tree
from flaxcompress.compress.attention_distances import attention_distances, even_distances, mean_rotation
from flaxcompress.compress.joint_latent import compress_matrix
from flaxcompress.compress.rotary_components import Components, Pairs, choose_pairs, components, split, spread_pairs
from flaxcompress.compress.step import Context, Step, register_step
from flaxcompress.config import Latent, ModelConfig
from flaxcompress.formats import materialize
from flaxcompress.model import Model, abstract_flat
from flaxcompress.ops import frequencies

_SENTENCES = 64  # of the calibration text, on which attention is looked at


@register_step
@dataclasses.dataclass(frozen=True, kw_only=True)
class ToLatentAttention(Step):
    """Turns multi-head or grouped attention into multi-head latent attention (MLA, DeepSeek-V2, 2024, §2.1).

    Keys and values of all heads are approximated together from one latent, so that the cache keeps `rank` numbers of a
    token instead of all keys and values. Biases stay exact: a value's moves into the output's, a key's without rotary
    positions is the same for all keys, so that the softmax forgets it. At the full rank of [W_K | W_V] a model without
    rotary positions computes what it did.

    In a model with rotary positions the latent cannot carry them. The keys are first turned into components over the
    heads, frequency by frequency (see `rotary_components`), which changes no score; those whose positions are dearest
    to lose, summed over the layers, keep them as one key that all heads share, and the rest goes through the latent
    without positions, each rotation replaced by its mean over the distances that the head attends to. With all K·d
    numbers of all components kept that is exact.

    A step like this is a start: heal the model afterwards (MHA2MLA, Ji et al. 2025, trains on 3 to 6 billion tokens).

    Attributes:
      rank: R, the latent's width, or
      keep: the fraction of the numbers that a cache keeps of a token, the shared key's included.
      rotary: w, the width of the shared key with rotary positions, even; None: that of one head. Only where the model
        has them.
      whitening: "activation" weighs errors by the inputs, the queries and the output's map of calibration text (CARE);
        "none" by the weights alone.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"input_moments"})

    rank: int | None = None
    keep: float | None = None
    rotary: int | None = None
    whitening: Literal["activation", "none"] = "activation"

    def __post_init__(self):
        if (self.rank is None) == (self.keep is None):
            raise ValueError(f"ToLatentAttention: give either rank or keep, got {self.rank} and {self.keep}")
        if self.keep is not None and not 0 < self.keep <= 1:
            raise ValueError(f"ToLatentAttention: keep {self.keep} must lie in (0, 1]")

    def plan(self, config: ModelConfig) -> ModelConfig:
        """The structure; which frequencies keep their positions depends on the data, so they are any here."""
        return self._planned(config, None)

    def _planned(self, config: ModelConfig, pairs: Pairs | None) -> ModelConfig:
        """The structure where the shared key has these frequencies, places among those of the model's heads."""
        _check(config)
        shared = self._shared_width(config)
        scored, valued, heads = config.query_key_dim, config.head_dim, config.groups
        rotary = config.rotary
        if rotary is not None:
            pairs = spread_pairs(scored // 2, heads, shared // 2) if pairs is None else pairs
            rotary = rotary.with_pairs(pairs, scored)
        own = scored if pairs is None else 2 * len(_plain(pairs, scored // 2, heads))
        kind = Latent(
            key_value_rank=self._rank(config, own * heads + valued * heads, shared),
            rotary_width=shared,
            plain_width=own,
            value_width=valued,
            norms=False,
            query_bias=config.attention_bias,
        )
        planned = config.replace(
            attention=kind,
            rotary=rotary,
            attention_scale=config.attention_scale or scored**-0.5,
            attention_bias=config.attention_bias and shared > 0,
            output_bias=config.output_bias or config.attention_bias,
            key_value_heads=None,
            query_key_width=None,
        )
        made = ("latent", "expand") if pairs is None else ("query", "latent", "expand")
        for number in range(config.sharing.sets("attention")):
            for address in (f"layers/{number}/attention/{name}/kernel" for name in made):
                rule = planned.format_rule(address)
                if rule is not None and rule["kind"] != "dense":  # the rules were made for other matrices
                    planned = planned.with_format(address, {"kind": "dense", "dtype": "float32"})
        return planned

    def __call__(self, model: Model, context: Context, *, key: jax.Array) -> Model:
        del key
        config, planned = model.config, self.plan(model.config)
        moments: Mapping[str, np.ndarray] = {}
        if self.whitening == "activation":
            moments = context.need(self).input_moments(model, progress=context.progress)
        sets = range(config.sharing.sets("attention"))
        layers = [_Layer.read(model, number, moments.get(f"layers/{number}/attention/key")) for number in sets]
        found = rotations = [None for _ in sets]
        pairs: Pairs = ()
        if config.rotary is not None:
            rotations = self._rotations(model, context)
            found = [layer.components(rotation.lost) for layer, rotation in zip(layers, rotations, strict=True)]
            losses = np.sum([each.energy for each in found], 0)
            pairs = choose_pairs(losses, planned.rotary_dim // 2)
            planned = self._planned(config, pairs)
        shapes, view = abstract_flat(planned), tree.View(model.params)
        changes: dict[str, np.ndarray] = {}
        for number, layer, each, rotation in zip(sets, layers, found, rotations, strict=True):
            made, spectrum = _convert(layer, planned, each, rotation, pairs, self.whitening == "activation")
            address = f"layers/{number}/attention"
            changes |= {f"{address}/{name}": array for name, array in made.items()}
            context.keep_spectrum(f"{address}/expand", spectrum, _latent(planned).key_value_rank)
        new = {a: jnp.asarray(x, shapes[a].dtype) for a, x in changes.items()}
        params = tree.replace(model.params, new, drop=[a for a in view if a not in shapes])
        return Model(params=params, config=planned, assets=model.assets)

    def _shared_width(self, config: ModelConfig) -> int:
        """w, checked."""
        scored, width = config.query_key_dim, self.rotary
        if config.rotary is None:
            if width is not None:
                raise ValueError(
                    f"ToLatentAttention: rotary {width}, but a {config.family} model has no rotary positions"
                )
            return 0
        width, most = scored if width is None else width, scored * config.groups
        if width % 2 or not 2 <= width <= most:
            raise ValueError(
                f"ToLatentAttention: rotary {width} is not an even number in 2 … {most} ({config.groups} heads of "
                f"keys, {scored} wide)"
            )
        return width

    def _rank(self, config: ModelConfig, columns: int, shared: int) -> int:
        """R, checked."""
        cached = config.groups * (config.query_key_dim + config.head_dim)
        rank = int(self.keep * cached) - shared if self.keep is not None else self.rank
        most = min(config.width, columns, cached - shared)
        if rank is None or not 1 <= rank <= most:
            given = "" if self.keep is None else f"keep {self.keep} gives "
            raise ValueError(
                f"ToLatentAttention: {given}rank {rank}, which is not in 1 … {most}; beside a shared key of {shared}, "
                f"the latent must not make the cache of {cached} numbers per token and layer larger"
            )
        return rank

    def _rotations(self, model: Model, context: Context) -> list[_Rotation]:
        """What stands for the rotations of every weight set's heads."""
        config = model.config
        if self.whitening == "activation":
            batches = context.need(self).batches(_SENTENCES, pad=config.pad_token)
            shares = attention_distances(model, batches)
        else:
            shares = even_distances(config)
        out = []
        assert config.rotary is not None
        for number in range(config.sharing.sets("attention")):
            uses = [layer for layer, used in enumerate(config.sharing.attention) if used == number]
            local = all(config.local[layer] for layer in uses)
            turned = frequencies(config.rotary, config.query_key_dim, local=local)
            mean = mean_rotation(turned, shares[uses].mean(0))
            lost = np.sqrt(np.maximum(1 - np.abs(mean) ** 2, 0.0))
            out.append(_Rotation(mean * config.rotary.magnitude**2, lost))
        return out


class _Rotation(NamedTuple):
    """What queries are multiplied by where keys are not turned, and what share of a score is lost by that, [H, p]."""

    mean: np.ndarray
    lost: np.ndarray


class _Layer(NamedTuple):
    """One weight set: kernels with their biases (zeros for none) as last rows, [D + 1, heads, width], float64."""

    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    output: np.ndarray  # [H, d, D]
    output_bias: np.ndarray | None
    moments: np.ndarray | None  # E[xᵀx], [D, D]

    @classmethod
    def read(cls, model: Model, number: int, moments: np.ndarray | None) -> _Layer:
        config, view = model.config, tree.View(model.params)

        def dense(name: str) -> np.ndarray | None:
            node = view.get(f"layers/{number}/attention/{name}")
            return None if node is None else np.asarray(materialize(node), np.float64)

        def affine(name: str, heads: int) -> np.ndarray:
            kernel, bias = dense(f"{name}/kernel"), dense(f"{name}/bias")
            assert kernel is not None
            rows = np.concatenate([kernel, np.zeros((1, kernel.shape[1])) if bias is None else bias[None]])
            return rows.reshape(len(rows), heads, -1)

        output = dense("output/kernel")
        assert output is not None
        return cls(
            affine("query", config.heads),
            affine("key", config.groups),
            affine("value", config.groups),
            output.reshape(config.heads, -1, output.shape[1]),
            dense("output/bias"),
            moments,
        )

    def components(self, lost: np.ndarray) -> Components:
        """Of the keys; what a component loses with its positions is its energy."""
        return components(self.query * np.concatenate([lost, lost], -1), self.key, self.extended)

    @property
    def extended(self) -> Float[np.ndarray, "n n"]:
        """The moments of the input with a last entry of 1, as if its mean were 0; the identity where unknown."""
        out = np.eye(len(self.query))
        if self.moments is not None:
            out[:-1, :-1] = self.moments
        return out


def _convert(
    layer: _Layer,
    config: ModelConfig,
    found: Components | None,
    rotation: _Rotation | None,
    pairs: Pairs,
    weighted: bool,
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """{name of a matrix: what latent attention has there} of one weight set, and the spectrum that was cut."""
    kind, heads = _latent(config), layer.query.shape[1]
    groups = layer.key.shape[1]
    query, own, out = layer.query, layer.key, {}
    shared = np.zeros((len(query), 0))
    if found is not None and rotation is not None:
        parts = split(query, own, found, pairs, rotation.mean, _plain(pairs, rotation.mean.shape[1], groups))
        query, own = np.concatenate([parts.plain_query, parts.turned_query], -1), parts.own_key
        shared = parts.shared_key
        out["query/kernel"] = query[:-1].reshape(len(query) - 1, -1)
        if kind.query_bias:
            out["query/bias"] = query[-1].ravel()
    metrics = {}
    if weighted:
        plain = query[..., : kind.plain_width]
        scores = np.einsum("nhp,nm,mhq->hpq", plain, layer.extended, plain, optimize=True)
        outputs = np.einsum("hvd,hwd->hvw", layer.output, layer.output)
        metrics = {"key_metric": scores, "value_metric": outputs}
        of_group = (groups, heads // groups)
        metrics = {name: m.reshape(*of_group, *m.shape[1:]).sum(1) for name, m in metrics.items()}
    joint = compress_matrix(own[:-1], layer.value[:-1], kind.key_value_rank, moments=layer.moments, **metrics)
    each = [np.repeat(part, heads // groups, 1) for part in (joint.key, joint.value)]
    out["latent/kernel"] = np.concatenate([joint.latent, shared[:-1]], 1)
    out["expand/kernel"] = np.concatenate(each, -1).reshape(kind.key_value_rank, -1)
    if config.attention_bias:
        out["latent/bias"] = np.concatenate([np.zeros(kind.key_value_rank), shared[-1]])
    if config.output_bias:
        moved = np.einsum("hv,hvd->d", np.repeat(layer.value[-1], heads // groups, 0), layer.output)
        out["output/bias"] = moved if layer.output_bias is None else moved + layer.output_bias
    return out, joint.spectrum


def _plain(pairs: Pairs, count: int, heads: int) -> list[int]:
    """The frequencies of which something may be left without positions, as far as that follows from shapes alone."""
    if heads == 1:
        return [pair for pair in range(count) if pair not in pairs]
    return [] if len(pairs) == count * heads else list(range(count))


def _check(config: ModelConfig) -> None:
    """Raises ValueError for what cannot be turned into latent attention."""
    if config.attention is not None:
        raise ValueError(f"ToLatentAttention: the model has {config.attention.kind} attention, not full attention")
    if config.decoder is not None:
        raise ValueError("ToLatentAttention: models of an encoder and a decoder are not supported")
    if config.deltas is not None:
        raise ValueError("ToLatentAttention: the layers have low-rank deltas on these maps; merge them first")


def _latent(config: ModelConfig) -> Latent:
    assert isinstance(config.attention, Latent)
    return config.attention
