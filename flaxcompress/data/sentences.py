"""Raw text -> clean sentences: paragraphs split, the spacing of word-level corpora undone, doublets dropped."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

_BOUNDARY = re.compile(r"\n[ \t\r\f\v]*\n|<\|endoftext\|>|<eos>|</?s>")
_HEADING = re.compile(r"\s*=+\s.*\s=+\s*", re.DOTALL)
# A corpus that was split into words shows it: " @-@ ", " , ", " n't ", or a full stop that stands alone.
_SPACED = re.compile(
    r" @[-,.]@ | [,;] | (?:n't|'(?:s|m|d|re|ve|ll)) | [.?!]\s*$| [.?!] (?=\S)|-[lr][rs]b-", re.IGNORECASE
)
_UNDO = tuple(
    (re.compile(pattern), to)
    for pattern, to in (
        (r" @([-,.])@ ", r"\1"),
        (r"(?i)-l[rs]b-", "("),
        (r"(?i)-r[rs]b-", ")"),
        (r"(?i) (n't|'(?:s|m|d|re|ve|ll))\b", r"\1"),
        (r"(?<=s) ' (?=\w)", "' "),  # the plural's possessive: "lobsters ' claws"
        (r" ([,.;:!?)\]}]++)(?=[\s\"']|$)", r"\1"),
        (r"(?<=\d) %", "%"),
        (r"([(\[{]|[$£€](?= \d)) ", r"\1"),
    )
)
_LONE_QUOTE = re.compile(r"(?:^|\s)(?:\"|``|'')(?=\s|$)")

# The look-behind and the possessive ++ keep this linear on a line of 100,000 full stops.
_END = re.compile(r"(?<![.!?…])([.!?…]++)[\"')\]”’»]*+\s+(?=[\"'(\[“‘«]*(\S))|[。！？]+[」』”’]*\s*")
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\s\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+")
_ABBREVIATIONS = frozenset(
    re.findall(
        r"\S+",
        "mr mrs ms dr prof st gen col lt sgt capt cpt cmdr adm maj rev gov sen rep pres hon messrs mme mt ft "
        "vs cf eg ie al bros ph.d viz resp",
    )
)
_BEFORE_NUMBERS = frozenset(
    re.findall(
        r"\S+",
        "no nos fig figs eq eqs p pp vol ch sec art ca approx jan feb mar apr jun jul aug sept sep oct nov dec",
    )
)
_INITIALS = re.compile(r"(?:[^\W\d_]\.)*[^\W\d_]")


def clean_sentences(
    texts: Iterable[str], *, min_words: int = 3, max_characters: int = 400, unknown: tuple[str, ...] = ("<unk>",)
) -> Iterator[str]:
    """Yields the distinct sentences of `texts`, in order of first appearance.

    Headings between equals signs, sentences with a marker of `unknown` words, those of fewer than `min_words` words and
    those without a letter are left out; longer ones than `max_characters` are cut at a blank. The spacing of corpora
    that were split into words is undone, white space is collapsed. A text that is one plain sentence stays as it is.

    Raises TypeError for a text that is not a string.
    """
    seen: set[str] = set()
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"text {number} is {type(text).__name__}, not a string: {text!r:.80}")
        for paragraph in _BOUNDARY.split(text):
            if _HEADING.fullmatch(paragraph):
                continue
            for sentence in split_sentences(undo_spacing(" ".join(paragraph.split()))):
                sentence = cut(sentence, max_characters)
                if sentence in seen or any(marker in sentence for marker in unknown):
                    continue
                if len(_WORD.findall(sentence)) < min_words or not any(c.isalpha() for c in sentence):
                    continue
                seen.add(sentence)
                yield sentence


def undo_spacing(text: str) -> str:
    """Puts together what a word-level corpus took apart: "it 's 1 @,@ 000 m ( or so ) ." -> "it's 1,000 m (or so)."

    Text that shows no such spacing is returned as it is.
    """
    if not _SPACED.search(text):
        return text
    first, *rest = _LONE_QUOTE.split(text)
    for number, piece in enumerate(rest):
        first += f' "{piece.lstrip()}' if number % 2 == 0 else f'"{piece}'
    for pattern, to in _UNDO:
        first = pattern.sub(to, first)
    return first.strip()


def split_sentences(text: str) -> list[str]:
    """Cuts a paragraph after full stops, question and exclamation marks that end a sentence.

    A full stop ends none after an abbreviation or an initial, nor before a small letter.
    """
    found, start = [], 0
    for match in _END.finditer(text):
        marks, following = match.group(1), match.group(2)
        if marks is not None:
            if following.islower() or not (following.isalnum()):
                continue
            if marks == "." and _abbreviated(text[max(start, match.start() - 40) : match.start()], following):
                continue
        found.append(text[start : match.end()].strip())
        start = match.end()
    found.append(text[start:].strip())
    return [sentence for sentence in found if sentence]


def _abbreviated(before: str, following: str) -> bool:
    words = before.split()
    word = words[-1].lstrip("\"'([“‘") if words else ""
    if word.lower() in _ABBREVIATIONS or (word != "I" and _INITIALS.fullmatch(word)):
        return True
    return following.isdigit() and word.lower() in _BEFORE_NUMBERS


def cut(text: str, limit: int) -> str:
    """The first words of `text` that fit into `limit` characters; a single longer word is cut inside."""
    if len(text) <= limit:
        return text
    head, blank, _ = text[: limit + 1].rpartition(" ")
    return head if blank else text[:limit]
