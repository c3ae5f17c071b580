"""Rooms: imports between folders run one way (contracts in pyproject.toml), and each folder says what it is for."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = sorted(path for path in (ROOT / "dynprune").iterdir() if path.is_dir() and path.name != "__pycache__")
COMMAND = (
    "import sys; sys.path.insert(0, '.'); from importlinter.cli import lint_imports_command; lint_imports_command()"
)


def lint(folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", COMMAND, "--no-cache"], cwd=folder, capture_output=True, text=True)


def test_imports_between_rooms_run_one_way():
    done = lint(ROOT)
    assert done.returncode == 0 and "0 broken" in done.stdout, done.stdout


@pytest.mark.parametrize(
    "room, line",
    [
        ("structure", "from dynprune.training.train import train"),
        ("budgets", "from dynprune.execution.bandit import Bandit"),
        ("data", "from dynprune.runs.config import TrainConfig"),
        ("training", "from dynprune.gates.gating import GatedNetwork"),
    ],
)
def test_an_import_that_runs_up_is_found(room, line, tmp_path):
    shutil.copytree(ROOT / "dynprune", tmp_path / "dynprune", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "dynprune" / room / "new.py").write_text(f"def f():\n    {line}\n")
    done = lint(tmp_path)
    assert done.returncode == 1 and f"dynprune.{room}.new -> " in done.stdout, done.stdout


@pytest.mark.parametrize("room", ROOMS, ids=lambda path: path.name)
def test_every_room_says_what_goes_in_and_what_comes_out(room):
    words = ast.get_docstring(ast.parse((room / "__init__.py").read_text(encoding="utf-8"))) or ""
    assert len(words.split()) > 8, room


@pytest.mark.parametrize("room", ROOMS, ids=lambda path: path.name)
def test_what_a_room_says_that_others_use_is_there_and_used(room):
    words = ast.get_docstring(ast.parse((room / "__init__.py").read_text(encoding="utf-8"))) or ""
    names = set(re.findall(r"`(\w+)`", words.partition("Others use")[2]))
    assert names or room.name in ("cli", "commands")  # the top: dynprune/__init__.py exports what these have
    own, others = [], []
    for path in (ROOT / "dynprune").rglob("*.py"):
        (own if room in path.parents else others).append(path)
    trees = [ast.parse(path.read_text(encoding="utf-8")).body for path in own]
    made = {getattr(node, "name", None) for tree in trees for node in tree} | {path.stem for path in own}
    made |= {
        getattr(target, "id", None)
        for tree in trees
        for node in tree
        if isinstance(node, ast.Assign)
        for target in node.targets
    }
    assert names <= made
    text = "\n".join(path.read_text(encoding="utf-8") for path in others)
    assert not [name for name in names if not re.search(rf"\b{name}\b", text)]


def test_every_room_is_on_a_floor():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert all(f"dynprune.{room.name}" in text for room in ROOMS)


@pytest.mark.parametrize("options", [("check",), ("format", "--check")], ids=lambda options: options[0])
def test_code_is_clean_and_formatted(options):
    done = subprocess.run([sys.executable, "-m", "ruff", *options, "."], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_types_hold():
    done = subprocess.run([sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_public_names_say_what_they_raise_and_show_an_example():
    import inspect

    import dynprune

    for name in dynprune.__all__:
        if name != "__version__":
            own = getattr(dynprune, name)
            words = f"{inspect.getdoc(own)} {inspect.getdoc(own.__init__) if isinstance(own, type) else ''}"
            assert ">>> " in words and re.search(r"[Rr]aises?\s", words), name
    for name, own in inspect.getmembers(dynprune.DynamicExecution):
        assert name.startswith("_") or inspect.getdoc(own), name
