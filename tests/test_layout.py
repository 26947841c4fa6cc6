"""The layout: which file may import which, what the package list says, and what an import loads."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "flaxcompress"
KERNELS = ROOT / "kernels" / "pallas"
# A unit (a file or a folder of the package) imports only from units to its left. `machine`, `sentence_piece`,
# `tokenizer`, `storage` and `progress` are helpers beside `text`, `card` is one of `folder`; `encoding`, `blocks`,
# `inputs` and `decoding` are of `model`; `heads`, `lexicon` and `tuning` put something on one.
ORDER = (
    *(
        "config",
        "machine",
        "sentence_piece",
        "tokenizer",
        "text",
        "terms",
        "storage",
        "progress",
        "tree",
        "linalg",
        "kernels",
        "ops",
        "formats",
        "nn",
        "families",
    ),
    *(
        "card",
        "encoding",
        "blocks",
        "inputs",
        "decoding",
        "model",
        "heads",
        "lexicon",
        "tuning",
        "weights",
        "folder",
        "data",
        "evaluate",
        "train",
        "compress",
        "export",
        "bench",
        "cli",
        "__main__",
        "__init__",
    ),
)
# (importing file, imported unit): why this import, made at call time, may point to the right.
LATE = {
    ("model.py", "evaluate"): "the saved report's page is drawn by evaluate",
}
_PYTORCH = "is the PyTorch side itself: copied into saved folders and run by transformers"
EVERYWHERE = {
    f"export/{name}.py": _PYTORCH
    for name in (
        "modeling_flaxcompress",
        "flaxcompress_network",
        "flaxcompress_attention",
        "flaxcompress_formats",
        "flaxcompress_decomposed",
    )
}
FRAMEWORKS = ("torch", "transformers", "sentence_transformers", "peft", "onnx", "onnxruntime", "onnxscript", "jax2onnx")
LOADED_LATE = ("torch", "transformers", "sentence_transformers", "onnx", "onnxruntime", "peft")
LOADED_LATE += ("sacrebleu", "grain", "qwix", "matplotlib", "tyro", "huggingface_hub", "tensorboardX", "wandb")


def files() -> list[tuple[str, Path]]:
    """(name relative to the package, file); kernels stand where they are imported."""
    own = [(str(p.relative_to(PACKAGE)), p) for p in PACKAGE.rglob("*.py")]
    return sorted(own + [(f"kernels/{p.relative_to(KERNELS)}", p) for p in KERNELS.rglob("*.py")])


def unit_of(name: str) -> str:
    return name.split("/")[0].removesuffix(".py")


def dotted(name: str) -> str:
    return "flaxcompress." + name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


MODULES = {dotted(name) for name, _ in files()}


def imports(path: Path) -> list[tuple[str, bool, int]]:
    """(dotted module, whether inside a function, line) of every import statement."""
    found = []

    def visit(node: ast.AST, late: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                found.extend((alias.name, late, child.lineno) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                copied = path.name in {Path(name).name for name in EVERYWHERE}  # into folders where it has no package
                assert child.level == copied * (child.level > 0), f"{path}:{child.lineno}: relative import"
                module = f"flaxcompress.export.{child.module}" if child.level else child.module or ""
                for alias in child.names:  # `from a import b` names the module a.b, or something inside a
                    whole = f"{module}.{alias.name}"
                    inner = module == "flaxcompress" or whole in MODULES
                    found.append((whole if inner else module, late, child.lineno))
            visit(child, late or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)))

    visit(ast.parse(path.read_text("utf-8")), False)
    return found


def imported_unit(module: str) -> str | None:
    """The unit that "flaxcompress.x.y" belongs to; a public name of the package itself is "__init__"."""
    root, *rest = module.split(".")
    if root != "flaxcompress":
        return None
    return rest[0] if rest and rest[0] in ORDER else "__init__"


def test_every_file_has_a_place_in_the_order():
    assert {unit_of(name) for name, _ in files()} <= set(ORDER)


@pytest.mark.parametrize("name, path", files(), ids=lambda v: v if isinstance(v, str) else "")
def test_imports_only_from_above(name, path):
    unit = unit_of(name)
    if unit == "__init__":
        return
    for module, late, line in imports(path):
        other = imported_unit(module)
        if other is None or other == unit or ORDER.index(other) < ORDER.index(unit):
            continue
        assert late and (name, other) in LATE, f"{name}:{line} imports {module}, which stands below {unit}"


@pytest.mark.parametrize("name, path", files(), ids=lambda v: v if isinstance(v, str) else "")
def test_other_frameworks_only_at_call_time(name, path):
    if name in EVERYWHERE:
        return
    for module, late, line in imports(path):
        if module.split(".")[0] in FRAMEWORKS:
            allowed = unit_of(name) in ("export", "bench") and late
            assert allowed, f"{name}:{line} imports {module}: only inside functions of export/ and bench/"


def test_kernels_are_reached_only_from_ops():
    for name, path in files():
        for module, _, line in imports(path):
            if imported_unit(module) == "kernels":
                assert unit_of(name) in ("ops", "kernels"), f"{name}:{line} imports {module}"


def test_no_import_cycles_between_files():
    modules = {dotted(name): [m for m, late, _ in imports(path) if not late] for name, path in files()}
    state: dict[str, int] = {}

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert state.get(module) != 1, f"import cycle: {' -> '.join((*trail, module))}"
        if state.get(module) == 2 or module not in modules:
            return
        state[module] = 1
        for other in modules[module]:
            visit(other, (*trail, module))
        state[module] = 2

    for module in modules:
        visit(module, ())


def test_kernels_folder_is_no_package():
    """kernels/__init__.py would shadow the PyPI package `kernels`, and then importing transformers fails."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_packages_list_equals_the_tree():
    options = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]
    folders = {p.parent for p in PACKAGE.rglob("*.py")}
    tree = {".".join(("flaxcompress", *f.relative_to(PACKAGE).parts)) for f in folders} | {"flaxcompress.kernels"}
    assert sorted(options["packages"]) == sorted(tree)
    assert options["package-dir"] == {"flaxcompress": "flaxcompress", "flaxcompress.kernels": "kernels/pallas"}


def test_every_package_has_an_init():
    folders = {p.parent for p in PACKAGE.rglob("*.py")} | {KERNELS}
    assert [str(f) for f in sorted(folders) if not (f / "__init__.py").is_file()] == []


def test_top_level_is_fixed():
    known = {
        "pyproject.toml",
        "flaxcompress",
        "kernels",
        "experiments",
        "tests",
        "README.md",
        "LICENSE",
        "CONTRIBUTING.md",
    }
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    top = {line.split("/")[0] for line in listed.stdout.splitlines()}
    assert {name for name in top if not name.startswith(".")} <= known


@pytest.mark.slow
def test_import_is_light():
    """No framework and no plotting is loaded, and our own import takes under two seconds of processor time."""
    code = """
        import json, sys, time
        import jax
        start = time.process_time()
        import flaxcompress
        print(json.dumps([time.process_time() - start, sorted({m.split(".")[0] for m in sys.modules})]))
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    code = "\n".join(line.strip() for line in code.splitlines())
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    seconds, loaded = json.loads(run.stdout)
    assert [m for m in LOADED_LATE if m in loaded] == []
    assert seconds < 2.0
