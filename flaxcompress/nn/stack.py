"""All layers: `jax.lax.scan` over the pure `Layer.apply`, each part with its own sharing map.

A weight set is one leaf however often it is used, so its gradient is the sum over its uses. Layers are scanned together
while every part stays within one run of equal weight sets (see `tree`); a part that every layer owns is sliced by the
scan, a part with a single set is closed over, any other map gathers its set by index.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from flaxcompress import tree
from flaxcompress.config import PARTS, ModelConfig, Sets
from flaxcompress.nn.add_norm import norm_names
from flaxcompress.nn.attention import PROJECTIONS
from flaxcompress.nn.bases import BASES, init_bases
from flaxcompress.nn.cache import LayerCache, laid_out, stored
from flaxcompress.nn.context import Context
from flaxcompress.nn.deltas import init_deltas, layer_variables
from flaxcompress.nn.layer import Layer
from flaxcompress.nn.linear import INPUTS
from flaxcompress.nn.linformer import linformer_of, shares_one
from flaxcompress.nn.logical import part_put_together
from flaxcompress.nn.remat import rematerialised

Record = Callable[[Any, Any], Any]


class StackOutput(NamedTuple):
    """The last layer's output and what else was asked for.

    Attributes:
      x: [B, T, D].
      hidden_states: the input of every layer, [L, B, T, D].
      attentions: the attention probabilities, [L, B, H, T, T].
      cross_attentions: those of a decoder on the encoder's tokens, [L, B, H, T, S].
      recorded: (first layer, what `record` returned stacked over the segment's layers), one entry per segment.
      cache: what the layers keep for later tokens, these included, stacked.
      projections: the queries, keys and values of self-attention, [L, B, T, heads, width] each (see `Projections`).
    """

    x: Any
    hidden_states: Any = None
    attentions: Any = None
    cross_attentions: Any = None
    recorded: Any = None
    cache: Any = None
    projections: Any = None


class Segment(NamedTuple):
    """Neighbouring layers that one scan runs over: layers [first, last), and each part's run."""

    first: int
    last: int
    runs: dict[str, str]


def segments(config: ModelConfig, layers: dict[str, Any]) -> list[Segment]:
    """Cuts the layers where a part moves to another run."""
    run_of: dict[str, dict[int, str]] = {}
    for part in config.sharing.parts:
        run_of[part] = {int(name) + i: name for name, run in layers[part].items() for i in range(tree.run_length(run))}
    found: list[Segment] = []
    for layer in range(config.layers):
        runs = {part: run_of[part][getattr(config.sharing, part)[layer]] for part in config.sharing.parts}
        if found and found[-1].runs == runs:
            found[-1] = found[-1]._replace(last=layer + 1)
        else:
            found.append(Segment(layer, layer + 1, runs))
    return found


def init_layers(config: ModelConfig, key: jax.Array, prefix: str = "") -> dict[str, Any]:
    """The stacked parameters of all weight sets, `params["layers"]`: sets of one structure are drawn by one program."""
    x = jnp.zeros((1, 1, config.width))
    context = Context(memory=x) if config.sharing.cross_attention else Context()
    if shares_one(config):
        context = context._replace(sequence=jnp.zeros((1, 1, linformer_of(config).length)))

    def draw(part: str, number: int, key: jax.Array) -> Any:
        used = part == "deltas"  # by a layer whose linear maps they fit
        sets = config.sharing.of_layer(config.sharing.deltas.index(number)) if used else Sets(**{part: number})
        draw_layer = functools.partial(Layer(config, sets, prefix, parent=None).init, key, x, context)
        if used:
            shapes: Any = jax.eval_shape(draw_layer)
            return init_deltas(config, key, f"{prefix}layers/{number}/deltas", shapes["params"])
        return draw_layer()["params"][part]  # pyright: ignore[reportIndexIssue]

    def shapes(part: str, number: int) -> Any:
        return jax.eval_shape(functools.partial(draw, part, number), key)

    layers: dict[str, Any] = {}
    for index, part in enumerate(PARTS):
        if part not in config.sharing.parts:
            continue
        if part == BASES:  # the last one: its shapes are those that kernels leave room for
            layers[part] = init_bases(config, jax.random.fold_in(key, index), layers, prefix)
            continue
        keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.fold_in(key, index)))
        runs = [
            jax.vmap(functools.partial(draw, part, numbers[0]))(keys(jnp.arange(numbers[0], numbers[-1] + 1)))
            for numbers in _alike(config, part, functools.partial(shapes, part), prefix)
        ]
        layers[part] = tree.join_runs(runs)
    return layers


def _alike(config: ModelConfig, part: str, shapes: Callable[[int], Any], prefix: str) -> list[list[int]]:
    """Neighbouring weight sets of a part whose matrices have the same shapes and format rules."""
    inner = config.feed_forward_width_of
    structures: dict[str, Callable[[int], Any]] = {
        "feed_forward": inner,
        "norms": lambda n: tuple(norm_names(config, n)),
        "deltas": lambda n: inner(config.sharing.feed_forward[config.sharing.deltas.index(n)]),
    }
    structure = structures.get(part, lambda _: None)
    paths: dict[Any, list[str]] = {}
    found: list[list[int]] = []
    before = None
    for number in range(config.sharing.sets(part)):
        kind = structure(number)
        if kind not in paths:
            paths[kind] = [path for path, _ in tree.walk(shapes(number), "")]
        at = f"{prefix}layers/{number}/{part}"
        here = kind, [config.format_rule(f"{at}/{path}") for path in paths[kind]]
        if here == before:
            found[-1].append(number)
        else:
            found.append([number])
        before = here
    return found


class Stack(nn.Module):
    """Runs L layers. Dropout in layer l draws from fold_in(key, l)."""

    config: ModelConfig
    prefix: str = ""

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        context: Context = Context(),  # noqa: B008  (a tuple, never changed)
        *,
        cache: Any = None,
        deterministic: bool = True,
        need_hidden_states: bool = False,
        need_attentions: bool = False,
        need_projections: bool = False,
        record: Record | None = None,
        remat: str = "none",
        unroll: int = 1,
    ) -> StackOutput:
        """Runs the layers; `record(inputs, mask)` reduces what each kernel is multiplied by (see `Linear`).

        `remat` says what a gradient computes again instead of keeping it (see `nn/remat.py`); `unroll`, how many layers
        one turn of the loop over layers has.
        """
        config, parts = self.config, self.config.sharing.parts
        if self.is_initializing():
            layers = init_layers(config, self.make_rng("params"), self.prefix)
            for part in parts:
                self.put_variable("params", part, layers[part])
        else:
            layers = {part: self.get_variable("params", part) for part in parts}
        dropout_key = None if deterministic else self.make_rng("dropout")
        hidden, attentions, crossed, recorded, added, projected = [], [], [], [], [], []
        for segment in segments(config, layers):
            need = (need_hidden_states, need_attentions, need_projections, record)
            x, outputs = self._scan(segment, layers, x, context, cache, dropout_key, (remat, unroll), *need)
            hidden.append(outputs[0])
            attentions.append(outputs[1])
            crossed.append(outputs[2])
            recorded.append((segment.first, outputs[3]))
            added.append(outputs[4])
            projected.append(outputs[5])
        if cache is not None:
            new, whole = jax.tree.map(lambda *parts: jnp.concatenate(parts), *added)
            cache = stored(cache, new, whole, context.slots)
        return StackOutput(
            x,
            jnp.concatenate(hidden) if need_hidden_states else None,
            jnp.concatenate(attentions) if need_attentions else None,
            jnp.concatenate(crossed) if need_attentions and config.sharing.cross_attention else None,
            recorded if record is not None else None,
            cache,
            jax.tree.map(lambda *parts: jnp.concatenate(parts), *projected) if need_projections else None,
        )

    def _scan(self, segment, layers, x, context, cache, dropout_key, loop, *need):
        need_hidden_states, need_attentions, need_projections, record = need
        config = self.config
        (first, last, runs), (remat, unroll) = segment, loop
        module = Layer(config, config.sharing.of_layer(first), self.prefix, parent=None)
        scanned, picked, closed = {}, {}, {}
        for part in config.sharing.parts:
            run = layers[part][runs[part]]
            local = [number - int(runs[part]) for number in getattr(config.sharing, part)[first:last]]
            if tree.run_length(run) == 1:
                at = f"{self.prefix}layers/{int(runs[part])}/{part}"
                closed[part] = part_put_together(config, at, jax.tree.map(lambda leaf: leaf[0], run))
            elif local == list(range(tree.run_length(run))):
                scanned[part] = run
            else:
                picked[part] = (run, jnp.asarray(local))
        windows = config.local[first:last]
        alike = len(set(windows)) == 1
        kept_beside = [*([INPUTS] if record is not None else []), *([PROJECTIONS] if need_projections else [])]

        def body(x, step):
            number, slices, indices, is_local, kept = step
            params = {**closed, **slices}
            for part, (run, _) in picked.items():
                params[part] = jax.tree.map(lambda leaf, i=indices[part]: leaf[i], run)
            drops = config.layer_dropout if dropout_key is not None else 0.0
            rngs = {} if dropout_key is None else {"dropout": jax.random.fold_in(dropout_key, number)}
            out, recorded = module.apply(
                layer_variables(params),
                x,
                context.within(windows[0] if alike else is_local),
                cache=None if kept is None else LayerCache(kept, context.slots, {}, {}),
                deterministic=dropout_key is None,
                need_probabilities=need_attentions,
                drop_rate=drops * (number + 1) / config.layers if drops else None,
                rngs=rngs,
                mutable=kept_beside,
            )
            inputs = record(recorded[INPUTS], context.real) if record is not None else None
            state = x if need_hidden_states else None
            added = None if out.cache is None else (out.cache.new, out.cache.whole)
            projected: Any = recorded[PROJECTIONS]["attention"]["all"] if need_projections else None
            return out.x, (state, out.probabilities, out.cross_probabilities, inputs, added, projected)

        indices = {part: local for part, (_, local) in picked.items()}
        steps = (jnp.arange(first, last), scanned, indices, None if alike else jnp.asarray(windows))
        loops = last - first > 1 and not laid_out(cache)
        body = rematerialised(body, remat, scanned=loops and unroll == 1)
        if loops:
            kept = jax.tree.map(lambda array: array[first:last], cache)
            return jax.lax.scan(body, x, (*steps, kept), unroll=unroll)
        found = []
        for i in range(last - first):
            kept = None if cache is None else {name: array[first + i] for name, array in cache.items()}
            x, outputs = body(x, (*jax.tree.map(lambda leaf, i=i: leaf[i], steps), kept))
            found.append(outputs)
        return x, jax.tree.map(lambda *each: jnp.stack(each), *found)
