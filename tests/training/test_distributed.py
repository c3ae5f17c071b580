"""Several processes on this machine against one: the same arms, the same weights, and less to send than a dense model
has."""

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from dynprune.data.loading import load_data
from dynprune.errors import DynpruneError
from dynprune.files.artifact import load
from dynprune.repair.shares import WHOLE, Share
from dynprune.runs.directory import Run
from dynprune.training.distributed import Ranks
from dynprune.training.session import Session
from tests.cli.test_commands import ROOT, TINY, dynprune
from tests.models import tiny

# in float32 rounding grows: two sums in another order flip a ReLU after some 50 steps, and then the runs drift apart
OPTIONS = [*TINY, "--epochs", "10", "--precision", "float64", "--threads", "1", "--json"]


def torchrun(count, *options):
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={count}",
        "-m",
        "dynprune",
        "train",
        *map(str, options),
    ]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    path = tmp_path_factory.mktemp("alone") / "run"
    return path, json.loads(dynprune("train", *OPTIONS, "--out", path).stdout)


@pytest.mark.parametrize("count", [2, 4])
def test_several_processes_train_like_one(alone, tmp_path, count):
    path, result = alone
    done = subprocess.run(
        torchrun(count, *OPTIONS, "--out", tmp_path / "run"), cwd=ROOT, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    ours = json.loads(done.stdout)  # one object: only the first process prints
    assert (
        ours["processes"] == count
        and ours["steps"] == result["steps"] == 210
        and ours["accuracy"] == result["accuracy"]
    )
    one, several = (load_file(where / "checkpoint.safetensors") for where in (path, tmp_path / "run"))
    for name, value in one.items():
        if value.is_floating_point():
            torch.testing.assert_close(several[name], value, atol=1e-5, rtol=0, msg=name)
        else:
            assert torch.equal(several[name], value), name
    picked = [json.loads((where / "selections.json").read_text()) for where in (path, tmp_path / "run")]
    assert picked[0] == picked[1]
    sent, active = (
        ours["gradient_bytes"] / ours["dense_gradient_bytes"],
        sum(v.numel() for k, v in several.items() if k.startswith("optimizer.")) * 8,
    )
    assert (
        ours["gradient_bytes"] == active + 24 and sent < 0.4
    )  # the narrow model's gradients, the loss, the wish to stop and the number of right answers
    lines = [json.loads(line) for where in (path, tmp_path / "run") for line in (where / "metrics.jsonl").open()]
    assert [line["accuracy"] for line in lines[:10]] == [line["accuracy"] for line in lines[10:]]


def test_a_trained_network_is_calibrated_together(alone, tmp_path):
    """Each process looks at its share of the images, and what it begins with is the same."""
    dynprune("train", *TINY, "--policy", "dense", "--epochs", "6", "--threads", "1", "--out", tmp_path / "dense")
    dynprune("compact", tmp_path / "dense")
    dense = load(tmp_path / "dense" / "compact.safetensors", tiny(10))
    torch.save(dense.state_dict(), tmp_path / "weights.pt")
    options = [*TINY, "--weights", tmp_path / "weights.pt", "--epochs", "1", "--threads", "1", "--budget", "0.6"]
    options += ["--search-time", "2s", "--precision", "float32", "--json"]
    one = json.loads(dynprune("train", *options, "--out", tmp_path / "one").stdout)
    done = subprocess.run(
        torchrun(2, *options, "--out", tmp_path / "two"), cwd=ROOT, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    two = json.loads(done.stdout)
    assert two["processes"] == 2 and abs(two["accuracy"] - one["accuracy"]) < 0.1


def test_where_milliseconds_decide_each_process_sees_all_images():
    session = object.__new__(Session)
    session.ranks = Ranks(1, 2)
    for in_ms, expected in (([], Share(1, 2)), (["latency=2ms"], WHOLE)):
        session.fitter = SimpleNamespace(in_ms=in_ms)
        assert session.share == expected


def test_a_process_that_dies_ends_the_run_with_a_checkpoint(tmp_path):
    path = tmp_path / "run"
    process = subprocess.Popen(
        torchrun(2, *TINY, "--epochs", 500, "--checkpoint-every", 20, "--threads", 1, "--out", path),
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    try:
        for line in process.stderr:
            if line.startswith("epoch 3"):
                break
        children = subprocess.run(
            ["ps", "-o", "pid=,args=", "--ppid", str(process.pid)], capture_output=True, text=True
        ).stdout.splitlines()
        workers = [
            int(line.split()[0]) for line in children if "dynprune" in line and "torch.distributed.run" not in line
        ]
        os.kill(max(workers), signal.SIGKILL)
        errors = process.communicate(timeout=120)[1]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode != 0
    assert "Lost contact with another process" in errors or "The state is saved" in errors, errors
    step = json.loads((path / "selections.json").read_text())["steps"]
    assert step >= 60
    resumed = subprocess.Popen(
        torchrun(2, "--resume", "--trust", "--out", path),
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    try:
        said = []
        for line in resumed.stderr:
            said.append(line)
            if line.startswith("epoch ") and int(line.split()[1].partition("/")[0]) * 21 > step:
                break
        else:
            pytest.fail("the resumed run ended:\n" + "".join(said))
    finally:
        os.killpg(resumed.pid, signal.SIGKILL)
        resumed.wait()
        time.sleep(0.1)


def test_a_batch_that_cannot_be_shared_is_refused():
    assert [Ranks(rank, 4).part(64) for rank in range(4)] == [slice(0, 16), slice(16, 32), slice(32, 48), slice(48, 64)]
    with pytest.raises(
        DynpruneError, match="--batch-size 66 cannot be shared equally by 4 processes. Choose a multiple of 4"
    ):
        Ranks(0, 4).part(66)


def test_of_several_processes_that_go_on_one_alone_writes(alone, monkeypatch):
    path, _ = alone
    run, kept = Run(path), []
    monkeypatch.setattr(Run, "keep_metrics_until", lambda self, step: kept.append(step))
    data = load_data(run.config.source)
    for ranks in (Ranks(0, 2), Ranks(1, 2)):
        session = Session(run.config, data)
        session.ranks = ranks
        session.restore(run)
    assert len(kept) == 1
