"""The special tokens that a tokenizer puts around one text, or around two and between them."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

from flaxcompress.text import Assets
from flaxcompress.tokenizer import make_tokenizer

_USUAL = {"mask": ("[MASK]", "<mask>"), "pad": ("[PAD]", "<pad>"), "eos": ("</s>", "<|endoftext|>")}


class Frame(NamedTuple):
    """Ids of special tokens, in order.

    Attributes:
      before, after: around a single text.
      first, middle, last: before, between and after two texts.
      second_type: the token type of the second text, and of what follows it.
    """

    before: tuple[int, ...]
    after: tuple[int, ...]
    first: tuple[int, ...]
    middle: tuple[int, ...]
    last: tuple[int, ...]
    second_type: int

    @property
    def single_size(self) -> int:
        """Special tokens in a row of one text."""
        return len(self.before) + len(self.after)

    @property
    def pair_size(self) -> int:
        """Special tokens in a row of two texts."""
        return len(self.first) + len(self.middle) + len(self.last)


@functools.lru_cache(maxsize=8)
def whole_tokenizer(assets: Assets) -> Any:
    """The `tokenizers.Tokenizer` of a checkpoint, which cuts no text. Raises ValueError where it has none."""
    tokenizer = make_tokenizer(assets.files, assets.max_length)
    tokenizer.no_truncation()
    return tokenizer


def find_frame(assets: Assets) -> Frame:
    """What the checkpoint's tokenizer puts around texts."""
    tokenizer = whole_tokenizer(assets)
    single, pair = tokenizer.encode("a"), tokenizer.encode("a", "a")
    places = [i for i, special in enumerate(single.special_tokens_mask) if not special]
    before, after = single.ids[: places[0]], single.ids[places[-1] + 1 :]
    count = len(places)  # tokens that the text itself has: as many again in the pair
    places = [i for i, special in enumerate(pair.special_tokens_mask) if not special]
    middle = pair.ids[places[count - 1] + 1 : places[count]]
    first, last = pair.ids[: places[0]], pair.ids[places[-1] + 1 :]
    second_type = pair.type_ids[places[-1]]
    return Frame(tuple(before), tuple(after), tuple(first), tuple(middle), tuple(last), second_type)


def special_id(assets: Assets, role: str) -> int | None:
    """The id of the token for "mask", "pad", "bos", "eos" …, as tokenizer_config.json states it or as usual."""
    tokenizer = whole_tokenizer(assets)
    stated = assets.special_tokens.get(f"{role}_token")
    names = (stated,) if stated is not None else _USUAL.get(role, ())
    return next((i for name in names if (i := tokenizer.token_to_id(name)) is not None), None)


def need_special_id(assets: Assets, role: str, what: str) -> int:
    """`special_id`. Raises ValueError, saying `what` needs it, where the tokenizer has no such token."""
    found = special_id(assets, role)
    if found is None:
        raise ValueError(f"{what} needs a {role} token, which the tokenizer does not have")
    return found


def padding_id(assets: Assets, given: int | None) -> int:
    """The id for padding: the given one, else the tokenizer's, else 0."""
    return (special_id(assets, "pad") or 0) if given is None else given


def start_id(assets: Assets, pad: int) -> int:
    """The id that a decoder begins with: the checkpoint's, else padding's."""
    return pad if assets.start_token is None else assets.start_token


def special_ids(assets: Assets) -> frozenset[int]:
    """The ids of all special tokens."""
    added = whole_tokenizer(assets).get_added_tokens_decoder()
    return frozenset(i for i, token in added.items() if token.special)


def check_vocabulary(highest: int, vocabulary: int | None) -> None:
    """Raises ValueError for an id that a model of `vocabulary` tokens does not have."""
    if vocabulary is not None and highest >= vocabulary:
        raise ValueError(
            f"training data: the tokenizer gives id {highest}, but the model's vocabulary has {vocabulary} entries: "
            "tokenizer and model do not belong together"
        )


def sentinel_ids(assets: Assets) -> tuple[int, ...]:
    """The ids of <extra_id_0>, <extra_id_1>, …, which stand for what T5 leaves out. Raises ValueError without any."""
    tokenizer = whole_tokenizer(assets)
    found = []
    while (i := tokenizer.token_to_id(f"<extra_id_{len(found)}>")) is not None:
        found.append(i)
    if not found:
        raise ValueError(
            "span corruption needs a tokenizer with the tokens <extra_id_0>, <extra_id_1>, …, as "
            "train_tokenizer(…, sentinels=100) makes it"
        )
    return tuple(found)
