"""Low-rank deltas multiplied out, and bases put back into kernels, for readers that know neither."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp

from flaxcompress import tree
from flaxcompress.config import SUBLAYERS, ModelConfig
from flaxcompress.formats import materialize, spec_of
from flaxcompress.model import Model
from flaxcompress.nn import bases


def merge_deltas(model: Model) -> Model:
    """A model that computes the same without deltas: every layer owns the parts to which deltas were added."""
    config, flat = model.config, dict(tree.flatten(model.params))
    config, flat = _merge_stack(config, flat, "")
    if config.decoder is not None:
        decoder, flat = _merge_stack(config.decoder.replace(formats=config.formats), flat, "decoder/")
        config = config.replace(decoder=decoder.replace(formats=()), formats=decoder.formats)
    return model.replace(params=tree.unflatten(flat), config=config)  # pyright: ignore[reportAttributeAccessIssue]


def merge_bases(model: Model) -> Model:
    """A model that computes the same without bases of several layers: every kernel on one has a copy."""
    config, params = bases.merge_bases(model.config, model.params)
    return model.replace(params=params, config=config)  # pyright: ignore[reportAttributeAccessIssue]


def _merge_stack(config: ModelConfig, flat: tree.Flat, stack: str) -> tuple[ModelConfig, tree.Flat]:
    if config.deltas is None:
        return config, flat
    layers = f"{stack}layers/"
    own: dict[str, Any] = {}
    changed = {f"{at.path.split('/')[0]}" for a in flat if (at := tree.place(a)) and at[::2] == (stack, "deltas")}
    for part in changed:
        for layer, number in enumerate(getattr(config.sharing, part)):
            pattern = re.compile(re.escape(f"{layers}{number}/{part}/") + "(.+)")
            for address in flat:
                if (found := pattern.fullmatch(address)) is not None:
                    linear, _, last = found[1].rpartition("/")
                    delta, new = f"{layers}{config.sharing.deltas[layer]}/deltas/{part}/{linear}", flat[address]
                    if last == "kernel" and f"{delta}/down" in flat:
                        new = _sum(new, flat[f"{delta}/down"], flat[f"{delta}/up"], config.deltas.scale)
                    elif last == "bias" and f"{delta}/bias" in flat:
                        new = materialize(new) + materialize(flat[f"{delta}/bias"])
                    own[f"{layers}{layer}/{part}/{found[1]}"] = new
    gone = tuple(f"{layers}" + rf"\d+/{part}/.*" for part in (*changed, "deltas"))
    kept = {address: node for address, node in flat.items() if not any(re.fullmatch(p, address) for p in gone)}
    each = tuple(range(config.layers))
    maps = {part: each for part in SUBLAYERS if part in changed}
    widths = [config.feed_forward_width_of(number) for number in config.sharing.feed_forward]
    config = config.replace(
        sharing=dataclasses.replace(config.sharing, **maps, deltas=()),
        deltas=None,
        feed_forward_width=tuple(widths) if "feed_forward" in changed else config.feed_forward_width,
    )
    for address, node in own.items():
        config = config.with_format(address, spec_of(node).to_json())
    return config, {**kept, **own}


def _sum(base: Any, down: Any, up: Any, scale: float) -> jax.Array:
    delta = jnp.matmul(materialize(down), materialize(up), precision=jax.lax.Precision.HIGHEST)
    return materialize(base) + scale * delta
