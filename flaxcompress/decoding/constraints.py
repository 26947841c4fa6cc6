"""Hard rules at decoding: which tokens may come next."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool, Integer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constraint:
    """Tokens that may, or may not, be generated, and phrases that may not.

    Attributes:
      allowed_tokens: only these ids may come; None: any.
      forbidden_tokens: these ids may not.
      forbidden_phrases: sequences of ids that may not come: the last id is ruled out where the ids before it just came.
    """

    allowed_tokens: tuple[int, ...] | None = None
    forbidden_tokens: tuple[int, ...] = ()
    forbidden_phrases: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self):
        for name in ("allowed_tokens", "forbidden_tokens"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, tuple(int(i) for i in value))
        phrases = tuple(tuple(int(i) for i in phrase) for phrase in self.forbidden_phrases)
        object.__setattr__(self, "forbidden_phrases", phrases)
        if any(not phrase for phrase in phrases):
            raise ValueError("constraint: a forbidden phrase has no tokens")
        if self.allowed_tokens is not None and not set(self.allowed_tokens) - set(self.forbidden_tokens):
            raise ValueError("constraint: no token is left that is allowed and not forbidden")

    @property
    def reach(self) -> int:
        """How many tokens back the rules look."""
        return max((len(phrase) - 1 for phrase in self.forbidden_phrases), default=0)

    def check(self, vocabulary: int) -> None:
        """Raises ValueError for ids outside the vocabulary."""
        ids = [*(self.allowed_tokens or ()), *self.forbidden_tokens, *(i for p in self.forbidden_phrases for i in p)]
        if outside := [i for i in ids if not 0 <= i < vocabulary]:
            raise ValueError(f"constraint: id {outside[0]} lies outside the vocabulary 0 … {vocabulary - 1}")

    def allowed(self, recent: Integer[Array, "B R"], vocabulary: int) -> Bool[Array, "B V"]:
        """Which tokens may come after each row's last `reach` tokens (-1 where there are fewer)."""
        may = jnp.full((recent.shape[0], vocabulary), self.allowed_tokens is None)
        if self.allowed_tokens is not None:
            may = may.at[:, jnp.asarray(self.allowed_tokens)].set(True)
        forbidden = [*self.forbidden_tokens, *(p[0] for p in self.forbidden_phrases if len(p) == 1)]
        if forbidden:
            may = may.at[:, jnp.asarray(forbidden)].set(False)
        for phrase in self.forbidden_phrases:
            if len(phrase) > 1:
                before = jnp.asarray(phrase[:-1])
                came = (recent[:, recent.shape[1] - len(before) :] == before).all(-1)
                may = may.at[:, phrase[-1]].set(may[:, phrase[-1]] & ~came)
        return may
