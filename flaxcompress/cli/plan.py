"""`flaxcompress plan`: what a training step needs on chips that are not here."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from flaxcompress.cli.command import Debug, JsonFile, Verb
from flaxcompress.cli.files import check_file, write_json


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan(Verb):
    """Compiles a training step for a TPU topology without a TPU, or for CPU devices, and says whether it fits.

    CONFIG is the file that `flaxcompress train` takes; what it says of data, out and the number of steps is not read.
    Settings may be changed on the command line: key=value, a dotted path and YAML.

    For example: flaxcompress plan albert.yaml --topology v5e:16x16 --mesh data=64,model=4 training.remat=full
    """

    config: Annotated[Path, Positional, arg(metavar="CONFIG", help="a YAML file of settings")]
    changes: Annotated[tuple[str, ...], Positional, arg(metavar="KEY=VALUE", help="settings that differ from it")] = ()
    topology: Annotated[
        str, arg(metavar="v5e:16x16|cpu:8", help="the chips: v4, v5e, v5p, v6e or cpu, and their shape")
    ]
    mesh: Annotated[
        str | None,
        arg(
            metavar="data=64,model=4",
            help="the axes of the mesh: dcn, data, fsdp, sequence, model",
            help_behavior_hint="(default: the file's)",
        ),
    ] = None
    only_this: Annotated[bool, arg(help="looks for no other mesh or remat where this one does not fit")] = False
    json_file: JsonFile = None
    debug: Debug = False

    def check(self) -> None:
        from flaxcompress.train.chips import parse_topology
        from flaxcompress.train.mesh import parse_mesh

        if self.mesh is not None:
            parse_mesh(self.mesh)
        parse_topology(self.topology)

    def run(self) -> Any:
        """Returns the table."""
        from flaxcompress.train.chips import pretend_devices
        from flaxcompress.train.mesh import parse_mesh

        check_file(self.json_file)
        pretend_devices(self.topology)
        from flaxcompress.train.plan import plan
        from flaxcompress.train.plan_settings import read_plan_settings

        found = plan(
            read_plan_settings(self.config, self.changes),
            topology=self.topology,
            mesh=None if self.mesh is None else parse_mesh(self.mesh),
            suggest=not self.only_this,
            report=lambda line: print(line, file=sys.stderr),
        )
        write_json(self.json_file, found.to_json())
        return found.table()
