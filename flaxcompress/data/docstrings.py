"""The calibration text that every Python carries: English sentences from the standard library's docstrings."""

from __future__ import annotations

import ast
import functools
import inspect
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from flaxcompress.data.sentences import clean_sentences

_SKIPPED = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_BLOCKS = ("body", "handlers", "orelse", "finalbody", "cases")
_CODE = re.compile(
    r"^\s*(?:>>>|\.\.\. |\.\. |\$ |% |[-+|=~*#^]{3,}|@\w"
    r"|(?:async )?def \w+\(|class \w+[(:]|from \S+ import |import [\w.]+$)",
    re.MULTILINE,
)
_ITEM = re.compile(r"^\s*(?:[-*+o]|\d+[.)]|:\w[^:]*:)\s+", re.MULTILINE)
_MARKUP = (
    (re.compile(r":[\w:]+:`~?!?([^`<]+?)(?:\s*<[^>`]*>)?`"), r"\1"),
    (re.compile(r"``?([^`']+?)(?:``?|')"), r"\1"),
    (re.compile(r"(?<!\w)\*{1,2}(\w[^*\n]*?)\*{1,2}(?!\w)"), r"\1"),
)
_WHOLE = re.compile(r"[A-Z\"'(].*\w[\"')\]]*[.!?][\"')]*", re.DOTALL)
_PART = re.compile(r"[\w\"'(][^=<>{}|\\]*\w[\"').:?!]*", re.DOTALL)
# The least share of letters and blanks; code has fewer. What is no whole sentence has to look more like English.
_LETTERS_IN_WHOLE, _LETTERS_IN_PART = 0.75, 0.85


@functools.lru_cache(maxsize=4)
def docstring_sentences(folder: Path | None = None) -> tuple[str, ...]:
    """Distinct English sentences from the docstrings of the Python files below `folder`, in the order of their paths.

    Args:
      folder: by default the running Python's standard library, tests and installed packages left out. Files are parsed,
        never imported; those that cannot be parsed are skipped.
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if folder is None else Path(folder)
    files = sorted(path for path in root.rglob("*.py") if _SKIPPED.isdisjoint(path.relative_to(root).parts))
    blocks = (block for path in files for text in _docstrings(path) for block in _prose(text))
    return tuple(s for s in clean_sentences(blocks, min_words=3) if _is_english(s))


def _docstrings(path: Path) -> Iterator[str]:
    try:
        source = path.read_bytes()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old files
            tree = ast.parse(source)
    except (SyntaxError, ValueError, OSError, RecursionError, MemoryError):
        return
    waiting: list[ast.AST] = [tree]
    while waiting:  # statements only, in their order: `ast.walk` would visit every expression too
        node = waiting.pop()
        if isinstance(node, _DOCUMENTED):
            text = ast.get_docstring(node, clean=False)
            if text:
                yield inspect.cleandoc(text)
        children = [child for field in _BLOCKS for child in getattr(node, field, ())]
        waiting.extend(reversed(children))


def _prose(docstring: str) -> Iterator[str]:
    """The paragraphs and list items of a docstring that are prose, without reStructuredText's marks."""
    literal = False
    for block in re.split(r"\n\s*\n", docstring):
        indented = block.startswith((" ", "\t"))
        if _CODE.search(block) or (literal and indented):
            continue
        literal = block.rstrip().endswith("::")
        for piece in _ITEM.split(block):
            for pattern, to in _MARKUP:
                piece = pattern.sub(to, piece)
            yield piece


def _is_english(sentence: str) -> bool:
    letters = sum(c.isalpha() or c == " " for c in sentence) / len(sentence)
    if not sentence.isascii():
        return False
    if _WHOLE.fullmatch(sentence):
        return letters >= _LETTERS_IN_WHOLE
    return letters >= _LETTERS_IN_PART and bool(_PART.fullmatch(sentence))
