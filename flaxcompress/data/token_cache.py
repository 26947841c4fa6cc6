"""Tokens of a corpus, kept in a folder between runs where the corpus names one."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from flaxcompress.data.documents import Corpus
from flaxcompress.data.hub import PREFIX
from flaxcompress.data.readers import parse_source
from flaxcompress.data.tokens import Tokens, open_tokens, tokenize_documents
from flaxcompress.text import Assets


def corpus_tokens(
    corpus: Corpus,
    assets: Assets,
    cut: Callable[[str], Sequence[str]] = lambda text: [text],
    *,
    before: Sequence[int] = (),
    after: Sequence[int] = (),
    words: bool = False,
    vocabulary: int | None = None,
) -> Tokens:
    """`tokenize_documents` of a corpus, each document cut into units by `cut`; raises as that and the corpus do.

    With `corpus.cache`, the tokens of unchanged files (the same names, sizes and times) are read from there.
    """

    def tokenize(folder: Path | None) -> Tokens:
        documents = map(cut, corpus.documents())
        return tokenize_documents(
            documents, assets, before=before, after=after, words=words, vocabulary=vocabulary, folder=folder
        )

    if corpus.cache is None or corpus.files is None:
        return tokenize(None)
    options = [cut.__qualname__, list(before), list(after), words, vocabulary]
    folder = Path(corpus.cache) / f"tokens-{_key(corpus, assets, options)}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=".tokens-", dir=folder.parent))
        try:
            tokenize(made)
            os.replace(made, folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster
                raise
        finally:
            shutil.rmtree(made, ignore_errors=True)
    return open_tokens(folder)


def _key(corpus: Corpus, assets: Assets, options: Sequence[object]) -> str:
    """A hash of all that the tokens depend on."""
    listed = [corpus.column, corpus.separator, corpus.max_bad_lines, assets.digest, *options]
    listed += [list(corpus.portion)] if corpus.portion.count else []
    for file in corpus.files or ():
        if isinstance(file, str) and file.startswith(PREFIX):
            listed.append(file)
            continue
        path, column = parse_source(file)
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file")
        stat = path.stat()
        listed.append([str(path.resolve()), column, stat.st_size, stat.st_mtime_ns])
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:20]
