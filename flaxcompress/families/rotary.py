"""Rotary positions in Hugging Face configs: `rope_parameters`; older ones `rope_theta` and `rope_scaling`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from flaxcompress.config import ModelConfig, Rotary

_SCALINGS = {"default": "none", "linear": "linear", "llama3": "llama3", "yarn": "yarn"}
_LLAMA3 = {
    "low_freq_factor": "low_frequency_factor",
    "high_freq_factor": "high_frequency_factor",
    "original_max_position_embeddings": "original_positions",
}


def read_rotary(hf: Mapping[str, Any]) -> Rotary:
    """The rotary positions that a config states. Raises ValueError for a scaling that does not exist here."""
    return _rotary(stated_rotary(hf))


def stated_rotary(hf: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a config says about rotary positions, older ones in the current form."""
    return hf.get("rope_parameters") or {**(hf.get("rope_scaling") or {}), "rope_theta": hf.get("rope_theta")}


def _rotary(stated: Mapping[str, Any]) -> Rotary:
    kind = stated.get("rope_type") or stated.get("type") or "default"
    if kind not in _SCALINGS:
        raise ValueError(f"config.json: rope_type {kind!r} is not supported; known: {', '.join(_SCALINGS)}")
    fields: dict[str, Any] = {"theta": float(stated.get("rope_theta") or 10_000.0), "scaling": _SCALINGS[kind]}
    if kind != "default":
        if "factor" not in stated:
            raise ValueError(f"config.json: rope_type {kind!r} needs a factor")
        fields["factor"] = float(stated["factor"])
    if kind == "llama3":
        if missing := [key for key in _LLAMA3 if key not in stated]:
            raise ValueError(f"config.json: rope_type 'llama3' needs {', '.join(missing)}")
        fields.update({ours: stated[theirs] for theirs, ours in _LLAMA3.items()})
    if kind == "yarn":
        if "original_max_position_embeddings" not in stated:
            raise ValueError("config.json: rope_type 'yarn' needs original_max_position_embeddings")
        fields |= {
            "original_positions": stated["original_max_position_embeddings"],
            "high_frequency_factor": float(stated.get("beta_fast") or 32),
            "low_frequency_factor": float(stated.get("beta_slow") or 1),
            "whole": bool(stated.get("truncate", True)),
            "magnitude": _magnitude(stated, fields["factor"]),
        }
    return Rotary(**fields)


def yarn_scale(factor: float, weight: float = 1.0) -> float:
    """By what YaRN sharpens scores for longer text: 0.1·weight·ln(factor) + 1 (Peng et al. 2023, eq. 22)."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def _magnitude(stated: Mapping[str, Any], factor: float) -> float:
    if (own := stated.get("attention_factor")) is not None:
        return float(own)
    if (over := stated.get("mscale")) and (under := stated.get("mscale_all_dim")):
        return yarn_scale(factor, over) / yarn_scale(factor, under)
    return yarn_scale(factor)


def write_rotary(config: ModelConfig) -> dict[str, Any]:
    """The inverse of `read_rotary`."""
    assert config.rotary is not None
    return {"rope_parameters": _stated(config.rotary)}


def _stated(rotary: Rotary) -> dict[str, Any]:
    kind = {ours: theirs for theirs, ours in _SCALINGS.items()}[rotary.scaling]
    out: dict[str, Any] = {"rope_type": kind, "rope_theta": rotary.theta}
    if kind != "default":
        out["factor"] = rotary.factor
    if kind == "llama3":
        out.update({theirs: getattr(rotary, ours) for theirs, ours in _LLAMA3.items()})
    if kind == "yarn":
        out |= {
            "original_max_position_embeddings": rotary.original_positions,
            "beta_fast": rotary.high_frequency_factor,
            "beta_slow": rotary.low_frequency_factor,
            "truncate": rotary.whole,
            "attention_factor": rotary.magnitude,
        }
    return out


def read_alternating(hf: Mapping[str, Any], full: float, local: float) -> Rotary:
    """Rotary positions with a base of their own for local layers (ModernBERT); the arguments are the defaults."""
    stated = hf.get("rope_parameters")
    if stated is None:
        return Rotary(theta=hf.get("global_rope_theta", full), local_theta=hf.get("local_rope_theta", local))
    whole, near = (_rotary(stated[f"{name}_attention"]) for name in ("full", "sliding"))
    if whole.scaling != "none" or near.scaling != "none":
        raise ValueError("config.json: rope_parameters: scaled rotary positions are not supported beside local ones")
    return Rotary(theta=whole.theta, local_theta=near.theta)


def write_alternating(rotary: Rotary) -> dict[str, Any]:
    """The inverse of `read_alternating`."""
    local = rotary.theta if rotary.local_theta is None else rotary.local_theta
    return {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": rotary.theta},
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        }
    }
