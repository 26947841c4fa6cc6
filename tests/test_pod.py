"""The launch files for pods: they parse, their commands are commands, and meshes have the devices that are stated."""

from __future__ import annotations

import math
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from flaxcompress.cli.parse import parse
from flaxcompress.cli.train import Train
from flaxcompress.config.yaml_file import read_yaml
from flaxcompress.train.architectures import ARCHITECTURES
from flaxcompress.train.cluster import find_cluster
from flaxcompress.train.config import TrainConfig
from flaxcompress.train.mesh import parse_mesh

FOLDER = Path(__file__).resolve().parent.parent / "experiments" / "pod"
SETTINGS = sorted(FOLDER.glob("albert_*.yaml"))


def devices(path):
    """The devices of the topology that a file states: "v5e:4x4" has 16."""
    found = re.search(r"^# topology: \w+:(\d+(?:x\d+)*)$", path.read_text("utf-8"), re.M)
    assert found, f"{path} states no topology"
    return math.prod(map(int, found[1].split("x")))


def size(mesh):
    return math.prod(parse_mesh(mesh).values())


def config_of(verb):
    path = Path(verb.config)
    path = path if path.is_absolute() else FOLDER.parent.parent / path
    return TrainConfig.load(path, [*verb.changes, *([] if verb.mesh is None else [f"mesh={verb.mesh}"])])


def test_every_published_size_has_settings():
    assert {read_yaml(path)["model"]["architecture"] for path in SETTINGS} == set(ARCHITECTURES)


@pytest.mark.parametrize("path", SETTINGS, ids=lambda path: path.stem)
def test_settings_fit_their_topology(path):
    config = TrainConfig.load(path)
    assert size(config.mesh) == devices(path)
    rows = math.prod(n for name, n in parse_mesh(config.mesh).items() if name in ("dcn", "data", "fsdp"))
    assert config.training.batch_size % (rows * config.training.accumulate) == 0
    for command in re.findall(r"^#\s+(flaxcompress train .*)$", path.read_text("utf-8"), re.M):
        verb = parse(shlex.split(command)[1:])
        assert isinstance(verb, Train) and config_of(verb).out.startswith("gs://")
        assert Path(verb.config).name == path.name
    assert f"out: runs/{config.model.architecture}" in path.read_text("utf-8")


def test_the_jobset_runs_one_process_for_each_host():
    path = FOLDER / "jobset.yaml"
    job = yaml.safe_load(path.read_text("utf-8"))
    assert (job["apiVersion"], job["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (replicated,) = job["spec"]["replicatedJobs"]
    spec = replicated["template"]["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    chips = container["resources"]["limits"]["google.com/tpu"]
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    assert spec["parallelism"] == spec["completions"] and spec["completionMode"] == "Indexed"
    assert spec["completions"] * chips == math.prod(map(int, topology.split("x"))) == devices(path)
    verb = parse(container["command"][1:])
    assert container["command"][0] == "flaxcompress" and isinstance(verb, Train) and verb.stopped_status == 75
    assert size(config_of(verb).mesh) == devices(path) * replicated["replicas"]


@pytest.mark.parametrize("name", ["train.slurm", "queued_resource.sh"])
def test_scripts_are_bash(name):
    assert subprocess.run(["bash", "-n", FOLDER / name], capture_output=True).returncode == 0


def commands(name):
    """The calls of `flaxcompress train` in a script, variables filled in with stand-ins."""
    text = (FOLDER / name).read_text("utf-8").replace("\\\n", " ")
    for call in re.findall(r"flaxcompress train (experiments[^\"\n]*(?:\"[^\"]*\"[^\"\n]*)*)", text):
        yield ["train", *shlex.split(re.sub(r"\$\{?\w+\}?", "x", call.replace("$mesh", "data=16")))]


@pytest.mark.parametrize("name", ["train.slurm", "queued_resource.sh"])
def test_commands_in_scripts_are_read(name):
    (call,) = commands(name)
    verb = parse([word.rstrip('"') for word in call])
    assert size(config_of(verb).mesh) == devices(FOLDER / name)


def test_slurm_starts_a_process_for_each_gpu():
    text = (FOLDER / "train.slurm").read_text("utf-8")
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", text, re.M))
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    assert int(options["nodes"]) * int(options["gpus-per-node"]) == devices(FOLDER / "train.slurm")


SLURM = {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "a", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
BY_HAND = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}


@pytest.mark.parametrize(
    "environment, kind",
    [
        ({}, None),
        ({**SLURM, "SLURM_NTASKS": "4"}, "slurm"),
        ({**SLURM, "SLURM_NTASKS": "1"}, None),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4"}, None),  # inside sbatch, not in a step
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "tpu"),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "MEGASCALE_NUM_SLICES": "2"}, "tpu"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "3"}, "kubernetes"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),  # some pod, not of an indexed job
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "openmpi"),
        (BY_HAND, "variables"),
    ],
)
def test_clusters_are_found(environment, kind, tmp_path):
    assert find_cluster(environment, tmp_path) == kind


def test_a_tpu_vm_is_found_by_its_chips(tmp_path, monkeypatch):
    import importlib.util

    (tmp_path / "accel0").touch()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name == "libtpu" else None)
    assert find_cluster({}, tmp_path) == "tpu"
    assert find_cluster({"TPU_SKIP_MDS_QUERY": "1"}, tmp_path) is None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert find_cluster({}, tmp_path) is None


def test_variables_that_do_not_say_all(tmp_path):
    with pytest.raises(ValueError, match="JAX_COORDINATOR_ADDRESS must be set too"):
        find_cluster({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}, tmp_path)
    with pytest.raises(ValueError, match="JAX_PROCESS_ID must be a number"):
        find_cluster({**BY_HAND, "JAX_PROCESS_ID": "first"}, tmp_path)
