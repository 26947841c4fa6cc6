"""`flaxcompress train`: pretraining, fine-tuning and distillation from a file of settings."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, ClassVar

from tyro.conf import Positional, arg

from flaxcompress.cli.command import Debug, Ended, Failure, Verb, with_caption


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train(Verb):
    """Trains a model as a YAML file says, in the folder that it names as out, and goes on there where it was stopped.

    Settings may be changed on the command line: key=value, a dotted path and YAML. On a TPU pod, in a Slurm step or a
    job of Kubernetes, the processes find each other by themselves. A run that is asked to stop (SIGTERM, Ctrl-C) saves
    its state and ends with --stopped-status.

    For example: flaxcompress train albert.yaml training.steps=1000 out=albert
    """

    resumes: ClassVar = True
    wants_huge_pages: ClassVar = True
    config: Annotated[Path, Positional, arg(metavar="CONFIG", help="a YAML file of settings")]
    changes: Annotated[tuple[str, ...], Positional, arg(metavar="KEY=VALUE", help="settings that differ from it")] = ()
    mesh: Annotated[
        str | None, arg(metavar="data=8,model=2", help="the devices' axes", help_behavior_hint="(default: the file's)")
    ] = None
    allow_config_change: Annotated[bool, arg(help="goes on although settings differ from those of the run there")] = (
        False
    )
    profile: Annotated[bool, arg(help="writes a trace of some steps to profile/ in the run's folder")] = False
    stopped_status: Annotated[int, arg(metavar="N", help="exit status of a run that was asked to stop and saved")] = 0
    debug: Debug = False

    def check(self) -> None:
        if not 0 <= self.stopped_status <= 125:
            raise ValueError(f"--stopped-status must lie in 0 … 125, got {self.stopped_status}")

    def failed(self, status: int) -> None:
        from flaxcompress.train.cluster import leave_at_once

        leave_at_once(status)

    def run(self) -> Any:
        """Returns the report's table."""
        from flaxcompress.train.cluster import PeerLost, join_cluster, leave_cluster, noticing_lost_peers

        join_cluster()  # before anything uses a device

        import jax

        from flaxcompress.train.config import TrainConfig
        from flaxcompress.train.loop import Stopped
        from flaxcompress.train.run import run

        mesh = [] if self.mesh is None else [f"mesh={self.mesh}"]
        config = TrainConfig.load(self.config, [*self.changes, *mesh])
        try:
            with noticing_lost_peers():
                report = run(config, allow_changes=self.allow_config_change, progress=True, profile=self.profile)
        except PeerLost as lost:
            raise Failure(str(lost)) from lost
        except Stopped as stop:
            leave_cluster()
            raise Ended(f"{stop}; give the same command again to go on from there", self.stopped_status) from None
        first = jax.process_index() == 0
        leave_cluster()
        if not first:  # one table is enough
            return ""
        return with_caption(report.table(), f"written to {config.out}: model/, report.html, metrics.jsonl")
