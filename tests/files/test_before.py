"""Runs and files of earlier versions still open: schema 1, and schema 2 of before the package had folders."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import dynprune
from dynprune.commands import train as verb

BEFORE = Path(__file__).parent / "before"


@pytest.fixture(params=["schema1", "schema2"])
def old(request, tmp_path) -> Path:
    shutil.copytree(BEFORE / request.param, tmp_path / "old")
    return tmp_path / "old"


def recorded(run: Path) -> dict:
    return json.loads((run / "result.json").read_text(encoding="utf-8"))


def test_a_compact_file_opens_and_computes_what_a_new_one_does(old):
    file = old / "run" / "compact.safetensors"
    before, x = dynprune.load(file, trust=True), torch.randn(4, 3, 8, 8)
    before_result = recorded(old / "run")
    result = dynprune.compact(old / "run")
    after = dynprune.load(file, trust=True)
    with torch.no_grad():
        assert torch.equal(before(x), after(x))
    assert result.accuracy == before_result["compact"]["accuracy"]
    assert dynprune.export(old / "run").top1_agreement == 1


def test_a_run_goes_on(old):
    steps = recorded(old / "run")["train"]["steps"]
    result = verb.resume(old / "run", {"epochs": 2}, override=True, model="tests.models:tiny")
    assert result.steps >= 2 * steps and result.policy == "cucb"


def test_a_gated_file_opens(old):
    model = dynprune.load(old / "gate" / "gated.safetensors", trust=True)
    with torch.no_grad():
        assert model(torch.randn(1, 3, 8, 8)).shape == (1, 10)
