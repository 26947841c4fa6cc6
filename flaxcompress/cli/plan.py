"""`flaxcompress plan`: what a training step needs on chips that are not here."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from flaxcompress.cli.command import Debug, JsonFile, Verb
from flaxcompress.cli.files import check_file, write_json


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan(Verb):
    """Compiles a training step for a TPU topology without a TPU, or for CPU devices, and says whether it fits.

    CONFIG is a YAML file: model (albert-base … albert-xxlarge, or the fields of ModelConfig, or of a Hugging Face
    config.json), batch_size, length and, if wanted, optimizer (adamw, lion, lamb, adafactor), remat (none, dots, full),
    dtype, and formats: pairs of a pattern of addresses and a format, in which low_rank may have keep in place of rank.

    For example: flaxcompress plan albert.yaml --topology v5e:16x16 --mesh data=64,model=4
    """

    config: Annotated[Path, Positional, arg(metavar="CONFIG", help="a YAML file, see above")]
    topology: Annotated[
        str, arg(metavar="v5e:16x16|cpu:8", help="the chips: v4, v5e, v5p, v6e or cpu, and their shape")
    ]
    mesh: Annotated[str, arg(metavar="data=64,model=4", help="the axes of the mesh: dcn, data, fsdp, sequence, model")]
    only_this: Annotated[bool, arg(help="looks for no other mesh or remat where this one does not fit")] = False
    json_file: JsonFile = None
    debug: Debug = False

    def check(self) -> None:
        from flaxcompress.train.chips import parse_topology
        from flaxcompress.train.mesh import parse_mesh

        parse_mesh(self.mesh)
        parse_topology(self.topology)

    def run(self) -> Any:
        """Returns the table."""
        from flaxcompress.train.chips import pretend_devices
        from flaxcompress.train.mesh import parse_mesh

        check_file(self.json_file)
        pretend_devices(self.topology)
        from flaxcompress.train.plan import plan

        report = lambda line: print(line, file=sys.stderr)  # noqa: E731
        options = {
            "topology": self.topology,
            "mesh": parse_mesh(self.mesh),
            "suggest": not self.only_this,
            "report": report,
        }
        found = plan(**read(self.config), **options)
        write_json(self.json_file, found.to_json())
        return found.table()


OPTIMIZERS = ("adamw", "lion", "lamb", "adafactor")
_KEYS = ("model", "batch_size", "length", "optimizer", "remat", "dtype", "formats")


def read(path: Path) -> dict[str, Any]:
    """The file's settings as `plan` takes them. Raises ValueError for unknown and missing keys, and wrong values."""
    import optax
    import yaml

    from flaxcompress.config import closest, reject_unknown

    try:
        data = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: cannot be read ({' '.join(str(error).split())})") from None
    if not isinstance(data, Mapping):
        raise ValueError(f"{path}: expected settings, such as batch_size: 4096")
    reject_unknown(str(path), data, _KEYS)
    if missing := [key for key in _KEYS[:3] if key not in data]:
        raise ValueError(f"{path}: missing {', '.join(missing)}")
    for key in ("batch_size", "length"):
        if not isinstance(data[key], int) or isinstance(data[key], bool) or data[key] < 1:
            raise ValueError(f"{path}: {key} must be a positive integer, got {data[key]!r}")
    if (name := data.get("optimizer", "adamw")) not in OPTIMIZERS:
        raise ValueError(f"{path}: unknown optimizer {name!r}; {closest(str(name), OPTIMIZERS)}")
    if (dtype := data.get("dtype", "bfloat16")) not in ("bfloat16", "float32"):
        raise ValueError(f"{path}: dtype must be bfloat16 or float32, got {dtype!r}")
    config = _with_formats(_structure(data["model"], f"{path}: model"), data.get("formats", ()), f"{path}: formats")
    if data["length"] > config.positions:
        raise ValueError(f"{path}: length {data['length']}, but the model has {config.positions} positions")
    more = {"remat": data.get("remat", "none"), "dtype": dtype, "optimizer": getattr(optax, name)(1e-4)}
    return {"config": config, "batch_size": data["batch_size"], "length": data["length"], **more}


def _structure(given: Any, where: str) -> Any:
    from flaxcompress.config import ModelConfig, closest
    from flaxcompress.families import FAMILIES
    from flaxcompress.train.architectures import architecture

    if isinstance(given, str):
        return architecture(given, head="pretraining", classes=2)
    if not isinstance(given, Mapping):
        raise ValueError(f"{where}: expected a name, or the fields of a config, got {given!r}")
    if "model_type" not in given:
        return ModelConfig.from_json(given)
    if given["model_type"] not in FAMILIES:
        raise ValueError(
            f"{where}: unknown model_type {given['model_type']!r}; {closest(given['model_type'], FAMILIES)}"
        )
    return FAMILIES[given["model_type"]].read_config(given)


def _with_formats(config: Any, rules: Any, where: str) -> Any:
    from flaxcompress.compress import LowRank

    if not isinstance(rules, (list, tuple)) or not all(isinstance(r, (list, tuple)) and len(r) == 2 for r in rules):
        raise ValueError(f"{where}: expected pairs of a pattern and a format, got {rules!r}")
    for pattern, spec in reversed(rules):
        if isinstance(spec, Mapping) and set(spec) == {"kind", "keep"} and spec["kind"] == "low_rank":
            config = LowRank(pattern=pattern, keep=spec["keep"]).plan(config)
        else:
            config = config.with_rule(pattern, spec)
    return config
