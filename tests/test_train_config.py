"""The settings of a training run: read from YAML, typed, changed from a command line, compared."""

from __future__ import annotations

import copy

import pytest

from flaxcompress.config import Sharing
from flaxcompress.config.yaml_file import differences, parse_yaml, with_changes
from flaxcompress.train.architectures import ARCHITECTURES, architecture
from flaxcompress.train.config import TrainConfig
from flaxcompress.train.tasks import TASKS, read_task

SMALL = {
    "model": {"config": {"width": 8, "layers": 2, "heads": 2, "feed_forward_width": 16}},
    "task": {"name": "masked_lm", "sentence_order": True},
    "data": {"train": "text.txt", "validation": ["a.txt", "b.txt"]},
    "training": {"steps": 100, "batch_size": 8},
    "tokenizer": {"kind": "wordpiece", "vocabulary": 100},
    "out": "run",
}


def changed(path, value):
    """SMALL with one value changed; None takes a key out."""
    out = copy.deepcopy(SMALL)
    here = out
    *names, last = path.split("/")
    for name in names:
        here = here.setdefault(name, {})
    if value is None:
        del here[last]
    else:
        here[last] = value
    return out


def test_defaults_are_filled_in_and_a_resolved_config_reads_as_itself():
    config = TrainConfig.from_dict(SMALL)
    assert config.data.train == ("text.txt",) and config.data.validation == ("a.txt", "b.txt")
    assert config.optimizer.name == "adamw" and config.training.remat == "dots" and config.task.mask_rate == 0.15
    resolved = config.resolved()
    assert resolved["task"]["name"] == "masked_lm" and resolved["optimizer"]["schedule"] == "cosine"
    assert TrainConfig.from_dict(resolved) == config
    assert TrainConfig.from_dict(parse_yaml(config.to_yaml(), "config.yaml")) == config


@pytest.mark.parametrize("name", TASKS)
def test_every_task_reads_its_own_settings(name):
    given = {"name": name, **({"teacher": "minilm"} if name == "distill" else {})}
    settings = changed("task", given)
    settings["data"]["columns"] = ["de", "en"] if name == "translation" else []
    config = TrainConfig.from_dict(settings)
    assert TrainConfig.from_dict(config.resolved()) == config
    assert config.task.head


def test_a_task_may_be_its_name_alone():
    assert read_task("causal_lm") == read_task({"name": "causal_lm"})


WRONG = [
    ("traning", {}, ["unknown key 'traning'", "did you mean 'training'"]),
    ("training/stepz", 3, ["training: unknown key 'stepz'", "did you mean 'steps'"]),
    ("training/steps", "ten", ["training/steps: expected int, got 'ten'"]),
    ("training/steps", 1.5, ["training/steps: expected int, got 1.5"]),
    ("training/steps", True, ["training/steps: expected int"]),
    ("training/steps", 0, ["training/steps", "at least 1"]),
    ("training/remat", "ful", ["training/remat", "did you mean 'full'"]),
    ("training/accumulate", 3, ["training/accumulate", "8 rows", "3 microbatches"]),
    ("training/seed", -1, ["training/seed"]),
    ("training/evaluate_every", -1, ["training/evaluate_every"]),
    ("training/steps", None, ["training: steps must be given"]),
    ("training", None, ["missing training"]),
    ("training", 3, ["training: expected settings"]),
    ("task/name", "maskedlm", ["unknown task 'maskedlm'", "did you mean 'masked_lm'"]),
    ("task/mask_rat", 0.1, ["task: unknown key 'mask_rat'", "did you mean 'mask_rate'"]),
    ("task", {"mask_rate": 0.1}, ["task", "name"]),
    ("task", "distill", ["task: teacher must be given"]),
    ("model/load", "minilm", ["model", "give load, or architecture and config"]),
    ("model", {}, ["model: give load"]),
    ("tokenizer", {}, ["tokenizer: give load"]),
    ("tokenizer/vocabulary", None, ["tokenizer", "needs vocabulary"]),
    ("tokenizer/kind", "wordpeice", ["tokenizer/kind", "did you mean 'wordpiece'"]),
    ("data/train", [], ["data/train: names no file"]),
    ("data/columns", ["a", "b"], ["data/columns: masked_lm reads 1, got 2: a, b"]),
    ("data/train_targets", "b.txt", ["data: train_targets and validation_targets"]),
    ("data/train_targets", ["a", "b"], ["data: 1 files, but 2 of targets"]),
    ("task", "translation", ["translation needs train_targets, or columns"]),
    ("data/hold_out", -1, ["data/hold_out", "not be negative"]),
    ("data/hold_out", 3, ["hold_out takes validation data", "give it or validation"]),
    ("training/buckets", "many", ["training/buckets: expected int, got 'many'"]),
    ("data/threads", -1, ["data/threads"]),
    ("optimizer", {"name": "adamv"}, ["'adamv'", "adamw"]),
    ("optimizer", {"warmup": 100}, ["warmup of 100", "run of 100"]),
    ("optimizer", {"learning_rate": "fast"}, ["optimizer/learning_rate: expected float, got 'fast'"]),
    ("mesh", "data=8,modle=2", ["unknown axis 'modle'", "did you mean 'model'"]),
    ("metrics", {"every": 0}, ["metrics/every"]),
    ("out", "", ["out: names no folder"]),
]


@pytest.mark.parametrize("path, value, words", WRONG, ids=[f"{path}={value}" for path, value, _ in WRONG])
def test_mistakes_say_where_they_are(path, value, words):
    with pytest.raises(ValueError) as error:
        TrainConfig.from_dict(changed(path, value))
    assert all(word in str(error.value) for word in words), str(error.value)


def test_evaluations_need_data():
    settings = changed("training/evaluate_every", 10)
    del settings["data"]["validation"]
    with pytest.raises(ValueError, match="data/validation"):
        TrainConfig.from_dict(settings)


def test_what_is_held_out_is_evaluated_on():
    settings = changed("training/evaluate_every", 10)
    settings["data"] = {"train": "text.txt", "hold_out": 5}
    assert TrainConfig.from_dict(settings).data.validates


def test_images_may_have_their_labels_inside_one_file_and_beside_another():
    settings = changed("task", "images")
    settings["data"] = {"train": "a.gz", "train_targets": "b.gz", "validation": "c.npz"}
    assert TrainConfig.from_dict(settings).data.validation_targets == ()


def test_a_loaded_model_brings_its_tokenizer():
    with pytest.raises(ValueError, match="a loaded model has its own"):
        TrainConfig.from_dict(changed("model", {"load": "minilm"}))


def test_changes_from_a_command_line(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(TrainConfig.from_dict(SMALL).to_yaml(), "utf-8")
    changes = ["training.steps=7", "optimizer.learning_rate=1e-3", "data.train=[x.txt, y.txt]", "task.ngram=1"]
    config = TrainConfig.load(path, [*changes, "mesh=data=2,model=2", "metrics.wandb=null"])
    assert config.training.steps == 7 and config.optimizer.learning_rate == 1e-3
    assert config.data.train == ("x.txt", "y.txt") and config.task.ngram == 1
    assert config.mesh == "data=2,model=2" and config.metrics.wandb is None


def test_environment_variables(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_DATA", "/data")
    monkeypatch.delenv("NO_SUCH_DATA", raising=False)
    path = tmp_path / "small.yaml"
    files = {"train": "${SOME_DATA}/text.txt", "validation": ["a.txt", "${NO_SUCH_DATA}/b.txt"]}
    path.write_text(TrainConfig.from_dict(changed("data", files)).to_yaml(), "utf-8")
    with pytest.raises(ValueError, match=r"data/validation: .* NO_SUCH_DATA is not set; set it, or give data.validat"):
        TrainConfig.load(path)
    config = TrainConfig.load(path, ["data.validation=${SOME_DATA}${SOME_DATA}"])
    assert config.data.train == ("/data/text.txt",) and config.data.validation == ("/data/data",)
    assert TrainConfig.load(path, ["data.validation=$SOME_DATA", "out=a{1}$"]).out == "a{1}$"  # as it stands


@pytest.mark.parametrize(
    "change, words",
    [
        ("training.steps", ["no change", "key=value"]),
        ("=3", ["no change"]),
        ("training..steps=3", ["no change"]),
        ("out.x=3", ["'run'", "no keys inside"]),
        ("training.stepz=3", ["unknown key 'stepz'"]),
        ("training.steps=[", ["not valid YAML"]),
    ],
)
def test_changes_that_are_none(tmp_path, change, words):
    path = tmp_path / "small.yaml"
    path.write_text(TrainConfig.from_dict(SMALL).to_yaml(), "utf-8")
    with pytest.raises(ValueError) as error:
        TrainConfig.load(path, [change])
    assert all(word in str(error.value) for word in words), str(error.value)


def test_changes_leave_the_settings_as_they_were():
    before = copy.deepcopy(SMALL)
    with_changes(SMALL, ["training.steps=1", "optimizer.name=lion"])
    assert before == SMALL


@pytest.mark.parametrize(
    "text, words",
    [
        ("training: {steps: 1\n", ["not valid YAML"]),
        ("out: a\nout: b\n", ["'out' is there twice"]),
        ("- a\n", ["expected settings"]),
    ],
)
def test_files_that_hold_no_settings(tmp_path, text, words):
    path = tmp_path / "bad.yaml"
    path.write_text(text, "utf-8")
    with pytest.raises(ValueError) as error:
        TrainConfig.load(path)
    assert all(word in str(error.value) for word in [str(path), *words]), str(error.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="none"):
        TrainConfig.load(tmp_path / "none.yaml")


@pytest.mark.parametrize("text, value", [("1e-3", 1e-3), ("5E4", 5e4), ("-.5e1", -5.0), ("1e", "1e"), ("12", 12)])
def test_numbers_as_people_write_them(text, value):
    assert parse_yaml(text, "x") == value and isinstance(parse_yaml(text, "x"), type(value))


def test_differences():
    old = {"a": 1, "b": {"c": 2, "d": [1]}, "gone": 0}
    new = {"a": 1, "b": {"c": 3, "d": [1]}, "new": "x"}
    assert differences(old, new) == ["b/c: 2 -> 3", "gone: 0 -> -", "new: - -> 'x'"]
    assert differences(old, old) == []


def test_what_a_resumed_run_may_change():
    old = TrainConfig.from_dict(SMALL).resolved()
    free = with_changes(SMALL, ["mesh=data=4", "training.save_every=5", "metrics.tensorboard=true", "out=moved"])
    assert TrainConfig.from_dict(free).changed(old) == []
    bound = with_changes(SMALL, ["training.steps=200", "optimizer.name=lion"])
    assert TrainConfig.from_dict(bound).changed(old) == [
        "training/steps: 100 -> 200",
        "optimizer/name: 'adamw' -> 'lion'",
    ]


def test_a_setting_that_is_newer_than_the_run_had_its_default():
    old = TrainConfig.from_dict(SMALL).resolved()
    del old["training"]["buckets"]
    assert TrainConfig.from_dict(SMALL).changed(old) == []
    other = TrainConfig.from_dict(changed("training/buckets", [16, 128]))
    assert other.changed(old) == ["training/buckets: 4 -> [16, 128]"]


# Parameters without heads, as Lan et al. 2020, table 1 gives them in millions: 12, 18, 60 and 235.
@pytest.mark.parametrize("name, millions", [("base", 12), ("large", 18), ("xlarge", 60), ("xxlarge", 235)])
def test_albert_has_its_published_size(name, millions):
    import numpy as np

    from flaxcompress.model import abstract_flat

    config = architecture(f"albert-{name}")
    assert config.family == "albert" and config.sharing == Sharing.named("all", layers=config.layers)
    count = sum(int(np.prod(node.shape)) for node in abstract_flat(config).values())
    assert abs(count / 1e6 - millions) < max(1, 0.06 * millions)


def test_architectures_take_heads():
    assert architecture("albert-base", head="pretraining").head == "pretraining"
    assert architecture("albert-base", head="sequence_classification", classes=3).classes == 3
    with pytest.raises(ValueError, match="did you mean 'albert-large'"):
        architecture("albert-larg")
    with pytest.raises(ValueError, match="no head 'causal_lm'"):
        architecture("albert-base", head="causal_lm")
    assert len(ARCHITECTURES) == 4
