"""`flaxcompress compress`: a model made smaller by a recipe."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Annotated, Any, ClassVar

from tyro.conf import arg

from flaxcompress.cli.command import DATA, Debug, ModelName, Overwrite, Verb, check_data, with_caption
from flaxcompress.cli.files import absolute
from flaxcompress.cli.torch_check import PyTorchCheck


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compress(Verb):
    """Makes a model smaller by a recipe, and writes it as a folder that also loads in PyTorch.

    A run that was interrupted goes on from its last checkpoint when the same command is given again.

    For example: flaxcompress compress minilm --recipe balanced --out small
    """

    resumes: ClassVar = True
    wants_huge_pages: ClassVar = True
    model: ModelName
    out: Annotated[Path, arg(metavar="DIR", help="the folder to write")]
    recipe: Annotated[str, arg(metavar="NAME|FILE", help="light, balanced, small, tiny, nano, fast or a YAML file")] = (
        "balanced"
    )
    target: Annotated[
        str | None,
        arg(metavar="8x|10MB|2x-faster", help="chooses what each matrix becomes, for this size or speed"),
    ] = None
    max_drop: Annotated[
        str | None,
        arg(metavar="1%", help="the same for the smallest model that loses at most this before healing (1 - cosine)"),
    ] = None
    data: DATA = None
    heal_steps: Annotated[
        int | None, arg(metavar="N", help="steps of healing, 0 for none", help_behavior_hint="(default: the recipe's)")
    ] = None
    statistics: Annotated[
        Path | None, arg(metavar="DIR", help="keeps statistics there, for other recipes on this model and text")
    ] = None
    mesh: Annotated[
        str | None, arg(metavar="AXES", help="spreads statistics and healing over devices, such as data=4")
    ] = None
    low_memory: Annotated[
        bool, arg(help="reads the folder layer by layer, one in memory at a time; for recipes of LowRank, Quantize, …")
    ] = False
    dry_run: Annotated[bool, arg(help="shows the plan and its sizes, and writes nothing")] = False
    overwrite: Overwrite = False
    seed: Annotated[int, arg(metavar="N", help="of everything random")] = 0
    debug: Debug = False

    @property
    def saves_memory(self) -> bool:
        return self.low_memory

    def check(self) -> None:
        if self.target is not None and self.max_drop is not None:
            raise ValueError("compress: --target and --max-drop exclude each other; give one")
        if self.max_drop is not None and not self.max_drop.strip().endswith("%"):
            raise ValueError(f"compress: --max-drop {self.max_drop!r}: give a share such as 1%")
        given = {
            "--target": self.target,
            "--max-drop": self.max_drop,
            "--heal-steps": self.heal_steps,
            "--statistics": self.statistics,
            "--mesh": self.mesh,
            "--dry-run": self.dry_run or None,
        }
        if self.low_memory and (others := [flag for flag, value in given.items() if value is not None]):
            raise ValueError(f"compress: --low-memory and {others[0]} exclude each other; leave one out")

    def run(self) -> Any:
        """Returns the report's table, or the plan's."""
        import jax

        from flaxcompress import storage
        from flaxcompress.compress.recipe import Recipe
        from flaxcompress.compress.run import compress
        from flaxcompress.folder import load, save
        from flaxcompress.train.mesh import make_mesh, parse_mesh

        mesh = None if self.mesh is None else make_mesh(**parse_mesh(self.mesh))  # pyright: ignore[reportArgumentType]
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"compress: --seed must lie in 0 … {2**32 - 1}, got {self.seed}")
        out = absolute(self.out)
        storage.check_output(out, overwrite=self.overwrite)
        check_data(self.data, "compress")
        recipe = Recipe.load(self.recipe)
        if self.low_memory:
            return self._by_layer(recipe, out)
        model = load(self.model)
        if self.heal_steps is not None:
            recipe = recipe.with_heal_steps(self.heal_steps)
        if (target := self.target or self.max_drop) is not None:
            recipe = recipe.with_target(target, model)
        if self.dry_run:
            return self._plan(model, recipe)
        calibration = None if self.data is None else list(self.data)
        work = work_folder(out)
        small, report = compress(
            model,
            recipe,
            calibration=calibration,
            key=jax.random.key(self.seed),
            work=work,
            statistics=self.statistics,
            mesh=mesh,
            progress=True,
        )
        check = PyTorchCheck(small, out)
        save(small, out, report=report, overwrite=self.overwrite, check=check)
        shutil.rmtree(work, ignore_errors=True)
        table = report.table()
        return with_caption(table, f"written to {self.out}; {check.outcome}")

    def _by_layer(self, recipe: Any, out: Path) -> Any:
        from flaxcompress.compress.low_memory import compress_folder

        calibration = None if self.data is None else list(self.data)
        options = {"calibration": calibration, "work": work_folder(out), "overwrite": self.overwrite}
        report = compress_folder(self.model, recipe, out, progress=True, **options)
        return with_caption(report.table(), f"written to {self.out}, layer by layer; not checked in PyTorch")

    def _plan(self, model: Any, recipe: Any) -> Any:
        """The plan's table, and below it that of an allocation's choices."""
        import jax
        from rich.console import Group

        from flaxcompress.compress.run import predict

        plan = recipe.plan(model).table()
        if not any(step.name == "Allocate" for step in recipe.steps):
            return plan
        data = None if self.data is None else list(self.data)
        key = jax.random.key(self.seed)
        found = predict(model, recipe, calibration=data, key=key, statistics=self.statistics, progress=True)
        if found is None:
            return plan
        structure, solution = found
        return Group(plan, with_caption(solution.table(), structure.label))


def work_folder(out: Path) -> Path:
    """Where a compression into `out` keeps its checkpoints: a hidden sibling, removed at the end."""
    return out.parent / f".{out.name}.work"
