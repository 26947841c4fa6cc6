"""What experiments share: where the data lies, and a file of results that grows run by run."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def data(name: str) -> Path:
    """A file of the folder in FLAXCOMPRESS_DATA."""
    folder = os.environ.get("FLAXCOMPRESS_DATA")
    if not folder:
        raise SystemExit(f"set FLAXCOMPRESS_DATA to the folder that holds {name}")
    return Path(folder) / name


def fidelity(small: Any, original: Any) -> dict[str, float]:
    """Spearman and mean cosine on STS-B dev sentences, and both on its train sentences."""
    import flaxcompress as fc

    dev = fc.evaluate(small, "sts", data=data("stsb/dev.tsv.gz"), reference=original)
    train = fc.evaluate(small, "sts", data=data("stsb/train.tsv.gz"), reference=original)
    return {
        "spearman": round(dev["spearman"], 4),
        "cosine": round(dev["mean_cosine"], 4),
        "train_cosine": round(train["mean_cosine"], 4),
        "train_spearman": round(train["spearman"], 4),
    }


class Results:
    """{name: entry} in the JSON file beside an experiment.

    Args:
      experiment: the experiment's `__file__`.
    """

    def __init__(self, experiment: str):
        self._file = Path(experiment).with_suffix(".json")

    def read(self) -> dict[str, Any]:
        return json.loads(self._file.read_text("utf-8")) if self._file.exists() else {}

    def keep(self, name: str, entry: dict[str, Any]) -> None:
        """Adds an entry, or exchanges it."""
        self._file.write_text(json.dumps({**self.read(), name: entry}, indent=1) + "\n", "utf-8")
        print(name, entry, flush=True)
