"""Hugging Face families by model_type. A new family is one file and one line here."""

from flaxcompress.families import bert
from flaxcompress.families.base import Family

FAMILIES: dict[str, Family] = {f.model_type: f for f in (bert.FAMILY,)}

__all__ = ["FAMILIES", "Family"]
