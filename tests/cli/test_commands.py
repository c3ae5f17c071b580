"""Whole journeys through the command line on tiny networks and folders."""

import contextlib
import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import time
import traceback
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dynprune.cli import process, program
from dynprune.cli.process import refuse_missed
from dynprune.errors import DynpruneError
from tests.measure import kills

ROOT = Path(__file__).parents[2]
TINY = ["--model", "tests.models:tiny", "--image-size", "8", "--batch-size", "64", "--no-onnx"]


def dynprune(*args, cwd=ROOT, check=True):
    """Run a command. The tests' runs name "tests.models:tiny" as their model, which commands that read a run must be
    told to trust."""
    if (
        args[0] in ("compact", "export")
        or args[0] == "gate"
        and not str(args[1]).startswith("-")
        or "--resume" in args
        or args[0] == "bench"
        and len(args) > 1
        and Path(args[1]).is_dir()
    ):
        args = (*args, "--trust")
    done = called([str(arg) for arg in args], cwd)
    if check:
        assert done.returncode == 0, done.stderr
    return done


def called(arguments, cwd):
    """What the command `dynprune` does, in this process: starting one with torch takes seconds. What a process has of
    its own is put back after it."""
    out, errors = io.StringIO(), io.StringIO()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    threads, shown, filters = torch.get_num_threads(), warnings.showwarning, warnings.filters[:]
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        patch.setattr(sys, "argv", ["dynprune", *arguments])
        patch.setattr(process, "VOICE", "normal")
        patch.setattr(sys, "path", sys.path[:])
        patch.chdir(cwd)
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
                warnings.resetwarnings()  # a process of its own shows each
                process.run_alone(program.app)
        except SystemExit as ended:
            code = ended.code
        except BaseException:  # Python would print it, and exit with 1
            errors.write(traceback.format_exc())
            code = 1
        finally:
            warnings.showwarning, warnings.filters[:] = shown, filters
            torch.set_num_threads(threads)
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), errors.getvalue())


def refused(*args, cwd=ROOT):
    """The one line on stderr of a command that must fail with exit status 1."""
    done = dynprune(*args, cwd=cwd, check=False)
    assert done.returncode == 1 and done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
    return lines[0]


def write_folder(root, classes=("cat", "dog"), images=12, splits=("train", "val"), side=16, seed=0):
    """Photos whose brightness tells the class."""
    rng = np.random.default_rng(seed)
    for split in splits:
        for number, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(images):
                pixels = rng.integers(0, 120, (side, side, 3)) + 120 * number
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.jpg")
    return root


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """`dynprune run` on the digits with a tiny network, and its JSON."""
    path = tmp_path_factory.mktemp("runs") / "tiny"
    done = dynprune("run", *TINY[:-1], "--epochs", 20, "--budget", 0.5, "--out", path, "--batch", "1,4", "--json")
    return path, json.loads(done.stdout)


def test_run_does_the_whole_journey(finished):
    path, result = finished
    assert result["train"]["policy"] == "cucb" and result["train"]["macs_executed_share"] <= 0.5
    assert result["train"]["accuracy"] > 0.6 and "test split" in result["train"]["test_data"]
    compact = result["compact"]
    assert compact["macs"] <= 0.5 * compact["dense_macs"] and compact["params"] < compact["dense_params"]
    assert compact["max_rel_diff"] < 1e-5 and compact["size_bytes"] == (path / "compact.safetensors").stat().st_size
    assert (
        result["export"]["max_abs_diff"] < 1e-4
        and result["export"]["top1_agreement"] == 1.0
        and result["export"]["opset"] >= 17
    )
    assert result["bench"]["accuracy_onnx"] == pytest.approx(compact["accuracy"], abs=0.01)
    assert result["bench"]["speedup_p50"] == pytest.approx(
        result["bench"]["dense_p50_ms"] / result["bench"]["compact_p50_ms"]
    )
    assert sorted(file.name for file in path.iterdir()) == [
        "MODEL_CARD.md",
        "bench.json",
        "checkpoint.previous.safetensors",
        "checkpoint.safetensors",
        "compact.onnx",
        "compact.safetensors",
        "config.toml",
        "dense.onnx",
        "env.json",
        "metrics.jsonl",
        "report.html",
        "result.json",
        "selections.json",
    ]
    samples = json.loads((path / "bench.json").read_text())["rows"][0]["dense"]["samples_ms"]
    assert len(samples) >= 20 and np.percentile(samples, 50) == pytest.approx(result["bench"]["dense_p50_ms"])


def test_selections_tell_how_often_each_arm_ran(finished):
    path, result = finished
    selections = json.loads((path / "selections.json").read_text())
    for group in selections["groups"].values():
        assert sum(group["steps_executed"]) == selections["steps"] * group["width"]
        assert len(group["chosen"]) == group["width"] and min(group["steps_executed"]) > 0


def test_the_compact_file_loads_in_a_fresh_process(finished, tmp_path):
    """The outputs of a fresh process equal those of the executed model in the checkpoint."""
    from safetensors.torch import load_file

    from dynprune.files.artifact import load_with_facts

    path, _ = finished
    code = (
        f"import torch, dynprune, tests.models as m; net = dynprune.load('{path}/compact.safetensors', m.tiny()); "
        f"assert type(net) is m.Tiny;torch.manual_seed(0); torch.save(net(torch.randn(5, 3, 8, 8)), "
        f"'{tmp_path}/out.pt')"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    net, facts = load_with_facts(path / "compact.safetensors", trust=True)
    full = {
        k.removeprefix("full."): v
        for k, v in load_file(path / "checkpoint.safetensors").items()
        if k.startswith("full.")
    }
    executed = full["conv1.weight"][facts.kept["conv1.weight:0"]][:, facts.kept["conv1.weight:1"]]
    assert torch.equal(net.conv1.weight, executed)
    torch.manual_seed(0)
    assert torch.equal(torch.load(tmp_path / "out.pt"), net(torch.randn(5, 3, 8, 8)))


def test_a_file_that_names_code_does_not_run_it(finished):
    import dynprune
    from dynprune.errors import DynpruneError

    with pytest.raises(DynpruneError, match="asks to run the code"):
        dynprune.load(finished[0] / "compact.safetensors")


def test_onnx_file_describes_itself_and_takes_any_batch(finished):
    import onnxruntime

    session = onnxruntime.InferenceSession(str(finished[0] / "compact.onnx"))
    facts = session.get_modelmeta().custom_metadata_map
    assert json.loads(facts["classes"]) == [str(i) for i in range(10)] and len(json.loads(facts["mean"])) == 3
    for batch in (1, 7):
        assert session.run(None, {"input": np.zeros((batch, 3, 8, 8), np.float32)})[0].shape == (batch, 10)


def test_folded_normalisation_agrees(finished, tmp_path):
    done = dynprune(
        "export", finished[0], "--onnx", "--fold-normalization", "--out", tmp_path / "folded.onnx", "--json"
    )
    assert json.loads(done.stdout)["top1_agreement"] == 1.0


def test_a_folder_of_photos_with_compaction_options(tmp_path):
    photos = write_folder(tmp_path / "photos", images=20)
    out = tmp_path / "run"
    done = dynprune(
        "train", "--data", photos, *TINY[:2], "--batch-size", 8, "--epochs", 2, "--policy", "random", "--out", out
    )
    assert "validation is 10 % of train/, test is val/" in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("epoch ")]) == 2
    done = dynprune("compact", out, "--min-rate", 0.9, "--bn-images", 16, "--finetune-epochs", 1, "--json")
    result = json.loads(done.stdout)
    assert result["max_rel_diff"] < 1e-5 and (out / "finetune" / "metrics.jsonl").is_file()


def test_photos_larger_than_memory_are_decoded_by_workers(tmp_path):
    photos = write_folder(tmp_path / "photos", images=10, side=120, splits=("train", "val", "test"))
    done = dynprune(
        "train",
        "--data",
        photos,
        *TINY[:2],
        "--image-size",
        100,
        "--batch-size",
        4,
        "--epochs",
        1,
        "--workers",
        2,
        "--out",
        tmp_path / "run",
    )
    assert "validation is val/, test is test/" in done.stderr


def test_a_corrupt_photo_is_named_by_the_worker_that_meets_it(tmp_path):
    photos = write_folder(tmp_path / "photos", images=10, side=120)
    (photos / "train" / "dog" / "7.jpg").write_bytes((photos / "train" / "dog" / "7.jpg").read_bytes()[:200])
    line = refused(
        "train",
        "--data",
        photos,
        *TINY[:2],
        "--image-size",
        100,
        "--batch-size",
        4,
        "--epochs",
        2,
        "--workers",
        2,
        "--out",
        tmp_path / "run",
    )
    assert "Cannot read the image" in line and "train/dog/7.jpg" in line


def test_ctrl_c_keeps_the_state_and_resume_ends_like_an_uninterrupted_run(tmp_path):
    options = [*TINY, "--epochs", "12", "--precision", "float32"]
    process = subprocess.Popen(
        [sys.executable, "-m", "dynprune", "train", *options, "--out", str(tmp_path / "stopped")],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    for line in process.stderr:
        if line.startswith("epoch 2"):
            process.send_signal(signal.SIGINT)
            break
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "The state is saved" in errors and "--resume" in errors
    assert "Finish it first" in refused("compact", tmp_path / "stopped")
    assert "--epochs 99" in refused("train", "--resume", "--out", tmp_path / "stopped", "--epochs", 99)
    assert "--override cannot change --budget" in refused(
        "train", "--resume", "--override", "--out", tmp_path / "stopped", "--budget", "0.5"
    )
    dynprune("train", "--resume", "--out", tmp_path / "stopped")
    dynprune("train", *options, "--out", tmp_path / "whole")
    from safetensors.torch import load_file

    one, other = (load_file(tmp_path / name / "checkpoint.safetensors") for name in ("stopped", "whole"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    longer = json.loads(
        dynprune("train", "--resume", "--override", "--epochs", 14, "--out", tmp_path / "whole", "--json").stdout
    )
    assert longer["steps"] == 14 * 21 and "epochs = 14" in (tmp_path / "whole" / "config.toml").read_text()


def test_killed_runs_end_like_an_uninterrupted_one(capsys):
    """One of them; `python -m tests.measure.kills` does twenty."""
    assert kills.main(["--runs", "1", "--seed", "5"]) == 0, capsys.readouterr().out


@pytest.mark.parametrize("command", [["compact"], ["export", "--onnx"], ["bench"], ["train", "--resume", "--out"]])
def test_code_that_a_run_names_is_not_run_unasked(tmp_path, command):
    """A stranger's run could name any function that can be imported."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.toml").write_text('model = "evil:build"')
    (tmp_path / "evil.py").write_text("open('ran', 'w')")
    done = subprocess.run(
        [sys.executable, "-m", "dynprune", *command, folder],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert (
        done.returncode == 1
        and 'asks to run the code "evil:build"' in done.stderr
        and "--trust or --model evil:build" in done.stderr
    )
    assert not (tmp_path / "ran").exists()


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path):
    path = tmp_path / "run"
    dynprune("train", *TINY, "--epochs", 3, "--out", path)
    whole, expected = (path / "checkpoint.safetensors").read_bytes(), kills.outcome(path)
    (path / "checkpoint.safetensors").write_bytes(whole[: len(whole) // 2])
    errors = dynprune("train", "--resume", "--out", path).stderr
    assert (
        "warning: " in errors and "is damaged" in errors and "Going on from the checkpoint before, of step 42" in errors
    )
    assert kills.same(kills.outcome(path), expected) and (path / "checkpoint.damaged.safetensors").is_file()
    (path / "checkpoint.safetensors").unlink()  # killed between the two renames
    assert "of step" in dynprune("train", "--resume", "--out", path).stderr
    for name in ("checkpoint.safetensors", "checkpoint.previous.safetensors"):
        (path / name).write_bytes(b"nothing")
    assert "is damaged" in refused("train", "--resume", "--out", path)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--model", "vgg17"], 'No model "vgg17". Did you mean vgg1'),
        (["--model", "torchvision:resnet19"], "Close to it: resnet"),
        (["--model", "no_such_module:net"], 'Cannot import "no_such_module"'),
        (["--data", "mnist"], "which does not exist. Expected digits, cifar10"),
        (["--policy", "best"], "Choose one of: cucb, random, static, dense"),
        (["--budget", "0"], "--budget got 0. Expected a share in (0, 1]"),
        (["--budget", "1.5"], "--budget got 1.5"),
        (["--budget", "half"], 'got "half". Expected 0.25 or macs=0.25'),
        (["--keep", "layer9", *TINY], '--keep got "layer9", which matches no layer'),
        (["--budget", "0.0001", *TINY], "Choose at least 0."),
        (["--weights", "absent.safetensors"], "No weights file absent.safetensors"),
        (["--device", "cuda:9"], "Try --device cpu"),
        (["--batch-size", "5000"], "more than the 1293 training images"),
    ],
)
def test_bad_options_are_refused_in_one_line(options, message, tmp_path):
    line = refused("train", *options, "--out", tmp_path / "run")
    assert message in line
    assert not (tmp_path / "run").exists()


def test_bad_folders_are_refused_in_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "no class folders" in refused("train", "--data", tmp_path / "empty")
    assert "a single class" in refused("train", "--data", write_folder(tmp_path / "one", classes=("cat",)))
    lacking = write_folder(tmp_path / "lacking")
    (lacking / "val" / "owl").mkdir()
    assert 'a class "owl" that train/ lacks' in refused("train", "--data", lacking)
    broken = write_folder(tmp_path / "broken")
    (broken / "train" / "cat" / "3.jpg").write_bytes(b"not a jpeg")
    assert "train/cat/3.jpg" in refused("train", "--data", broken)
    assert "neither val/ nor test/" in refused("train", "--data", write_folder(tmp_path / "alone", splits=("train",)))


def test_weights_that_do_not_fit_name_the_tensors(tmp_path):
    from safetensors.torch import save_file

    from tests.models import Tiny

    state = Tiny(10).state_dict()
    state["conv1.weight"] = torch.zeros(3, 3)
    del state["head.bias"]
    save_file(state, tmp_path / "w.safetensors")
    line = refused("train", *TINY, "--weights", tmp_path / "w.safetensors", "--out", tmp_path / "run")
    assert "missing 1: head.bias" in line and "conv1.weight is [3, 3], the model has [24, 16, 3, 3]" in line


def test_training_starts_from_the_users_checkpoint(tmp_path):
    from safetensors.torch import load_file

    from tests.models import Tiny

    torch.manual_seed(5)
    state = Tiny(10).state_dict()
    torch.save(state, tmp_path / "w.pt")
    dynprune(
        "train",
        *TINY,
        "--epochs",
        1,
        "--lr",
        "1e-12",
        "--weight-decay",
        0,
        "--weights",
        tmp_path / "w.pt",
        "--no-repair",
        "--out",
        tmp_path / "run",
    )
    after = load_file(tmp_path / "run" / "checkpoint.safetensors")
    torch.testing.assert_close(after["full.conv1.weight"], state["conv1.weight"])


def test_existing_directories_are_safe(finished, tmp_path):
    path, _ = finished
    assert "Pass --overwrite" in refused("train", *TINY, "--out", path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    assert "not a run directory" in refused("train", *TINY, "--out", tmp_path / "mine", "--overwrite")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_truncated_and_foreign_files_are_refused(finished, tmp_path):
    import shutil

    path, _ = finished
    copy = tmp_path / "copy"
    shutil.copytree(path, copy)
    whole = (path / "checkpoint.safetensors").read_bytes()
    (copy / "checkpoint.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "damaged" in refused("compact", copy)
    (copy / "checkpoint.safetensors").write_bytes((path / "compact.safetensors").read_bytes())
    assert "not one of ours, or of another kind" in refused("compact", copy)
    (copy / "compact.safetensors").write_bytes(b"\x80\x04pickle")
    assert "damaged" in refused("export", copy, "--onnx")
    (copy / "compact.onnx").write_bytes(b"not onnx")
    assert "cannot be opened by onnxruntime" in refused("bench", copy / "compact.onnx", path / "compact.onnx")
    assert "no config.toml" in refused("compact", tmp_path)
    assert "Pass --onnx" in refused("export", path)


def test_nan_loss_names_the_step(tmp_path):
    line = refused("train", *TINY, "--lr", "1e17", "--momentum", 0, "--out", tmp_path / "run")
    assert "The loss became" in line and "at step" in line and "lower --lr" in line


def test_two_onnx_files_can_be_compared(finished):
    path, _ = finished
    done = dynprune("bench", path / "dense.onnx", path / "compact.onnx", "--batch", "2", "--json")
    result = json.loads(done.stdout)
    assert result["rows"][0]["batch"] == 2 and "at batch 2" in result["verdict"]


def test_plan_says_what_a_budget_gives():
    result = json.loads(
        dynprune(
            "plan", "--model", "resnet20", "--budget", "macs=0.25", "--budget", "params=0.2", "--no-latency", "--json"
        ).stdout
    )
    assert (
        result["satisfiable"]
        and result["macs"] <= 0.25 * result["dense_macs"]
        and result["params"] <= 0.2 * result["dense_params"]
    )
    assert set(result["widths"]) == set(result["full_widths"]) and result["smallest_macs"] < result["macs"]
    done = dynprune("plan", "--model", "resnet20", "--budget", "0.001", "--no-latency", "--json", check=False)
    assert done.returncode == 1 and json.loads(done.stdout)["satisfiable"] is False and "Choose at least" in done.stderr


def test_plan_from_a_run_uses_what_its_bandit_learned(finished):
    path, result = finished
    options = [
        "--model",
        "tests.models:tiny",
        "--input",
        "3x8x8",
        "--budget",
        "0.5",
        "--align",
        "1",
        "--no-latency",
        "--json",
    ]
    learned = json.loads(dynprune("plan", *options, "--from", path).stdout)
    plain = json.loads(dynprune("plan", *options).stdout)
    assert (
        learned["satisfiable"]
        and learned["widths"] != plain["widths"]
        and learned["macs"] <= 0.5 * learned["dense_macs"]
    )
    assert "has learned nothing about" in refused("plan", "--model", "resnet20", "--no-latency", "--from", path)
    assert "needs --from RUN" in refused("plan", "--allocation", "learned", "--no-latency")


def test_budgets_are_reported_and_a_missed_one_is_an_error(finished):
    _, result = finished
    (line,) = result["bench"]["budgets"]
    assert (
        line["met"]
        and line["budget"] == "macs=0.5"
        and line["actual"] == line["predicted"] == result["compact"]["macs"] <= line["limit"]
    )
    assert result["compact"]["budgets"] == [line]
    missed = dataclasses.make_dataclass("Result", ["budgets"])(
        [{"budget": "latency=0.5", "limit": 1.0, "predicted": 1.0, "actual": 1.2, "met": False}]
    )
    with pytest.raises(DynpruneError, match="budget latency=0.5 missed: measured 1.2, allowed 1"):
        refuse_missed(missed)


def test_inspect_proves_and_reports():
    result = json.loads(
        dynprune("inspect", "--model", "tests.models:tiny", "--input", "3x8x8", "--check", "--json").stdout
    )
    assert (
        result["check"]["ok"] and result["check"]["max_rel_diff"] < 1e-4 and result["check"]["params_kept_share"] < 0.5
    )
    assert result["groups"] == 4 and result["arms"] == 60 and result["prunable_params_share"] > 0.9
    assert {"op": "output", "layer": "(output)", "channels": 10} in result["pinned"]
    assert "layer" in refused("inspect", "--model", "tests.models:tiny", "--input", "5x8x8")


def test_training_steps_are_timed_side_by_side():
    done = dynprune("bench", "--training", *TINY, "--steps", 4, "--hold", 2, "--json")
    result = json.loads(done.stdout)
    assert all(
        result[key] > 0
        for key in ("dense_ms", "static_ms", "dynamic_ms", "speedup_over_dense", "macs_ratio", "dense_peak_mib")
    )
    assert result["dynamic_over_static"] == pytest.approx(result["dynamic_ms"] / result["static_ms"])
    assert (
        set(result["overhead"]) == {"select_ms", "swap_ms", "reward_ms", "data_ms"}
        and len(result["samples_ms"]["static"]) == 4
    )


def test_help_is_quick_and_complete():
    started = time.perf_counter()
    done = dynprune("train", "--help")
    from dataclasses import fields

    from dynprune.runs.config import TrainConfig

    for field in fields(TrainConfig):
        assert "--" + field.name.replace("_", "-") in done.stdout.replace("\n", "")
    # generous: it must not import torch on the way, which the next line checks
    assert time.perf_counter() - started < 20
    code = "import sys, dynprune.cli; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ).returncode == 0
