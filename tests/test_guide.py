"""What the guide and the README say can be typed: commands parse, code runs, pages stay short."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from dynprune.cli import app
from dynprune.errors import DynpruneError
from dynprune.guide import TOPICS, page

ROOT = Path(__file__).parents[1]
PAGES = {"README": (ROOT / "README.md").read_text(encoding="utf-8"), **{topic: page(topic) for topic in TOPICS}}
COMMANDS = typer.main.get_command(app).commands


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a page in one language."""
    return [
        body for kind, body in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL) if kind == language
    ]


def commands() -> list[tuple[str, str]]:
    """Every line in the pages that begins with dynprune or runs it, with its page."""
    found = []
    for name, text in PAGES.items():
        for line in "\n".join(blocks(text, "")).splitlines():
            if match := re.search(r"(?:^\$ |^|&& |-m )(dynprune [^#]*)", line):
                found.append((name, match[1].strip()))
    return found


@pytest.mark.parametrize("name, line", commands())
def test_every_command_that_is_shown_exists_with_its_options(name, line):
    _, verb, *rest = shlex.split(line)
    if verb in ("COMMAND", "--help", "--version"):
        return
    known = {
        option for parameter in COMMANDS[verb].params for option in (*parameter.opts, *parameter.secondary_opts)
    } | {"--help", "-h"}
    unknown = [word for word in rest if word.startswith("-") and word.partition("=")[0] not in known]
    assert not unknown, f"{name}: {line}"


def test_there_are_commands_to_check():
    assert len(commands()) > 20


@pytest.mark.parametrize("name", PAGES)
def test_pages_are_short(name):
    lines = PAGES[name].splitlines()
    assert len(lines) <= 150
    assert not [line for line in lines if len(line) > 160 and not line.startswith("|")]


def test_the_code_of_the_python_page_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = blocks(page("python"), "python")
    names: dict = {}
    for block in code:
        exec(compile(block, "guide/python.md", "exec"), names)  # noqa: S102 (our own pages)
    printed = capsys.readouterr().out
    assert len(code) >= 7 and "True" in printed and float(printed.split()[-1]) < 1e-4


def test_the_program_of_the_loop_page_runs(tmp_path, monkeypatch, capsys):
    """At its full length, which is short: it learns what it is about."""
    monkeypatch.chdir(tmp_path)
    (program,) = blocks(page("loop"), "python")
    assert len(program.splitlines()) < 80
    exec(compile(program, "guide/loop.md", "exec"), {})  # noqa: S102 (our own page)
    share, right, off = re.search(
        r"([\d.]+) of the MACs, ([\d.]+) % right, ([\d.]+) pixels", capsys.readouterr().out
    ).groups()
    assert float(share) <= 0.25 and float(right) > 90 and float(off) < 2


# what each program needs beside our own dependencies, its constants on a tiny scale, and what it prints then
PROGRAMS = {
    "segmentation": (
        ["segmentation_models_pytorch"],
        "STEPS, SIDE, BATCH, SEARCH, TUNE = 4, 32, 16, 0, 0.5",
        r"at 0\.2\d of the MACs: IoU .*half of that: IoU .* %, every layer refitted.*max_rel_diff.* at batch 1",
    ),
    "detection": (
        [],
        "STEPS, SIDE, BATCH, SEARCH, TUNE = 3, 64, 4, 0, 0.5",
        r"% found, [\d.]+ % at 0\.[45]\d of the MACs\s+True",
    ),
    "ultralytics": (
        ["ultralytics", "polars"],
        "PICTURES, EPOCHS, SIDE, SEARCH, TUNE, FURTHER = 48, 1, 64, 0, 0, 1",
        r"dense: AP50-95 .*compact: AP50-95 .*tuned: AP50-95 .*0\.[45]\d of the MACs: .* at batch 1",
    ),
    "lightning": (["lightning"], "PICTURES, EPOCHS, BATCH = 256, 1, 64", r"0\.2\d of the MACs, [\d.]+ % right"),
    "transformers": (
        ["transformers", "accelerate"],
        "PICTURES, EPOCHS, BATCH = 128, 1, 32",
        r"0\.2\d of the MACs, [\d.]+ % right\s+True",
    ),
}


SMALLER = {
    '"val", 200': '"val", 16',
    "draw(200, -1)": "draw(20, -1)",
    "encoder_weights=None": "encoder_depth=3, decoder_channels=(32, 16, 8), encoder_weights=None",
}


@pytest.mark.parametrize("topic", PROGRAMS)
def test_programs_with_other_libraries_run(topic, tmp_path):
    """On a tiny scale, in a process of their own: other libraries change what is global."""
    needs, tiny, words = PROGRAMS[topic]
    for name in needs:
        pytest.importorskip(name, reason=f'{name} is not installed: pip install "dynprune[guides]"')
    (program,) = blocks(page(topic), "python")
    assert len(program.splitlines()) < 80 and "from dynprune" not in program
    (first,) = re.findall(r"^[A-Z]+(?:, [A-Z]+)+ = .*$", program, re.MULTILINE)
    assert first.partition(" = ")[0] == tiny.partition(" = ")[0]
    program = program.replace(first, tiny)
    for large, small in SMALLER.items():
        program = program.replace(large, small)
    (tmp_path / "program.py").write_text(program)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "YOLO_OFFLINE": "1", "YOLO_CONFIG_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "program.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(words, done.stdout, re.DOTALL), done.stdout[-2000:]


def test_unknown_topics_are_refused():
    with pytest.raises(DynpruneError, match='No topic "budget". Did you mean budgets'):
        page("budget")
