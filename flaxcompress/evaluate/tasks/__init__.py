"""What a model can be evaluated on: one file for each task, and one entry in `TASKS`."""

from __future__ import annotations

from typing import Any

from flaxcompress.config import closest
from flaxcompress.evaluate.tasks.classification import classification
from flaxcompress.evaluate.tasks.fidelity import compare_vectors, fidelity
from flaxcompress.evaluate.tasks.images import images
from flaxcompress.evaluate.tasks.lm import lm
from flaxcompress.evaluate.tasks.sts import sts
from flaxcompress.evaluate.tasks.task import Result, Task, options_of
from flaxcompress.evaluate.tasks.tokens import tokens
from flaxcompress.evaluate.tasks.translation import translation
from flaxcompress.evaluate.tasks.zero_shot import zero_shot
from flaxcompress.model import Model

__all__ = ["TASKS", "Result", "Task", "compare_vectors", "evaluate", "options_of", "sts"]

TASKS: dict[str, Task] = {
    "fidelity": fidelity,
    "sts": sts,
    "classification": classification,
    "tokens": tokens,
    "zero-shot": zero_shot,
    "lm": lm,
    "translation": translation,
    "images": images,
}


def evaluate(
    model: Model,
    task: str,
    *,
    data: Any = None,
    reference: Model | None = None,
    progress: bool = False,
    **options: Any,
) -> Result:
    """Measures a model on a task, and beside it the `reference` it was made from.

    Args:
      task: "fidelity": how close the sentence vectors are to the reference's. "sts": Spearman correlation of cosines
        with human scores. "classification": accuracy, F1 and Matthews' correlation of a classifier of texts, or
        correlations of one that gives a number. "tokens": precision, recall and F1 of entities. "zero-shot": accuracy
        of a sentence encoder that compares texts with the classes' names. "lm": loss of a language model, causal or
        masked. "translation": BLEU and chrF. "images": accuracy of a classifier of images.
      data: files as the task reads them, or the data themselves; fidelity alone does without.
      progress: shows a bar.
      options: of the task, see its function (`flaxcompress.evaluate.tasks`); others are refused.

    Returns a JSON object: data, n, the figures, and with a reference `reference_` figures and how far the two agree.

    Raises:
      ValueError: an unknown task or option, data that do not fit, a model without the head that the task needs.
      FileNotFoundError: no such file.
    """
    if task not in TASKS:
        raise ValueError(f"evaluate: unknown task {task!r}; {closest(str(task), TASKS)}")
    known = options_of(TASKS[task])
    for name in options:
        if name not in known:
            raise ValueError(f"evaluate: the task {task!r} has no option {name!r}; {closest(name, known)}")
    return TASKS[task](model, data=data, reference=reference, progress=progress, **options)
