"""Terms of a lexicon: put on a model with embeddings from outside."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxcompress.config import Lexicon
from flaxcompress.model import Model, init_params
from flaxcompress.terms import read_terms
from flaxcompress.text import LEXICON


def with_lexicon(
    model: Model,
    terms: Mapping[str, Sequence[float] | int],
    *,
    key: jax.Array,
    width: int | None = None,
) -> Model:
    """The model with embeddings from outside for the terms of a lexicon; it computes what it did until it is trained.

    Args:
      terms: {term: its vector}, all of one width, or {term: number of its vector, from 1}; terms may share one.
      key: draws the gate, and the vectors where numbers are given.
      width: of the vectors where numbers are given.

    Raises:
      ValueError: no terms, vectors of different widths, numbers without `width`, a term that is blank, a model without
        tokenizer, or one that has a lexicon.
    """
    if not model.assets.has_tokenizer or model.config.lexicon is not None:
        raise ValueError(
            "lexicon: the model has one" if model.config.lexicon else "lexicon: the model has no tokenizer"
        )
    numbers, table = _numbered(terms, width)
    entries = max(numbers.values())
    lexicon = Lexicon(entries=entries, width=table.shape[1] if table is not None else int(width or 0))
    config = model.config.replace(lexicon=lexicon)
    if config.formats:
        config = config.with_rule("embedding/lexicon/.*", {"kind": "dense"})
    fresh = jax.jit(lambda key: init_params(config, key)["embedding"]["lexicon"])(key)
    if table is not None:
        fresh = {**fresh, "table": jnp.asarray(table)}
    content = json.dumps({"terms": numbers}, ensure_ascii=False, indent=2).encode()
    files = (*((n, c) for n, c in model.assets.files if n != LEXICON), (LEXICON, content))
    assets = dataclasses.replace(model.assets, files=files)
    read_terms(assets)
    params = {**model.params, "embedding": {**model.params["embedding"], "lexicon": fresh}}
    return Model(params=params, config=config, assets=assets)


def _numbered(terms: Mapping[str, Any], width: int | None) -> tuple[dict[str, int], np.ndarray | None]:
    if not terms:
        raise ValueError("lexicon: no terms are given")
    if all(isinstance(value, (int, np.integer)) and not isinstance(value, bool) for value in terms.values()):
        if width is None or width < 1:
            raise ValueError("lexicon: numbers of vectors are given, so their width= must be, too")
        return {term: int(value) for term, value in terms.items()}, None
    table = [np.asarray(value, np.float32) for value in terms.values()]
    shapes = {row.shape for row in table}
    if len(shapes) != 1 or table[0].ndim != 1 or not table[0].size:
        raise ValueError(f"lexicon: every term needs a vector of one width, got shapes {sorted(shapes)}")
    return {term: i + 1 for i, term in enumerate(terms)}, np.stack(table)
