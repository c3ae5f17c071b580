"""What was trained is in the files, and what could not be brought back is refused before it is trained."""

import contextlib
import dataclasses
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import dynprune
from dynprune import zoo
from dynprune.data.loading import load_data
from dynprune.deploy.compact import compact
from dynprune.deploy.export import export
from dynprune.errors import DynpruneError
from dynprune.files import artifact
from dynprune.files.disk import read_tensors
from dynprune.gates.rehearsal import rehearse_gates
from dynprune.gates.session import GateSession
from dynprune.gates.training import gate
from dynprune.runs.config import GateConfig, TrainConfig
from dynprune.runs.directory import GateRun, Run
from dynprune.state.tensors import fill, state_of
from dynprune.training.rehearsal import rehearse, step_problem
from dynprune.training.session import Session
from dynprune.training.train import train
from tests import odd
from tests.cli.test_commands import write_folder

ROOT = Path(__file__).parents[2]
KEPT = (
    "NonPersistent",
    "NarrowedNonPersistent",
    "PlainTensor",
    "InContainers",
    "HiddenLayer",
    "ExtraState",
    "OddExtraState",
    "Alias",
    "Shared",
    "odd_names",
    "Locked",
    "lazy",
    "half",
    "bfloat16",
    "NoiseInTraining",
    "FixedNoiseInTraining",
    "SideHead",
    "Complex",
    "grey",
    "Encoded",
    "Asserts",
    "InPlace",
    "foldable",
    "SteadyAtTop",
    "NotesDown",
    "Counts",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("photos"), classes=("a", "b", "c", "d"), images=12, side=16)


def config_for(folder, name: str, **changes) -> TrainConfig:
    return TrainConfig(
        model=f"tests.odd:{name}",
        data=str(folder),
        image_size=16,
        batch_size=8,
        epochs=1,
        budget=("0.5",),
        align="4",
        **changes,
    )


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    """Every network of KEPT, rehearsed, trained and compacted; and what files that are loaded in another process
    compute."""
    root, x = tmp_path_factory.mktemp("runs"), torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    results, said = {}, {}
    for name in KEPT:
        config = config_for(folder, name)
        data = load_data(config.source)
        said[name] = []
        rehearse(session := Session(config, data), say=said[name].append)
        trained = train(config, run := Run.create(root / name, session.config, False), session=session)
        results[name] = (trained, compact(run, data=data), session)
    save_file({"x": x}, root / "x.safetensors")
    code = (
        "import sys, torch, random, numpy, dynprune; from safetensors.torch import load_file, save_file; from "
        "pathlib import Path; from dynprune.data.scores import logits;root = Path(sys.argv[1]); x = "
        "load_file(root / 'x.safetensors')['x']; torch.manual_seed(77); random.seed(5); out = {}\nfor name in "
        "sys.argv[2:]:\n    with torch.no_grad(): out[name] = logits(dynprune.load(root / name / "
        "'compact.safetensors', trust=True)(x[:, :1] if name == 'grey' else x.clone()))\nsave_file(out, root / "
        "'out.safetensors')"
    )
    subprocess.run([sys.executable, "-c", code, str(root), *KEPT], cwd=ROOT, check=True, capture_output=True, text=True)
    from safetensors.torch import load_file

    return root, x, results, load_file(root / "out.safetensors"), said


@pytest.mark.parametrize("name", KEPT)
def test_what_was_trained_comes_back_in_another_process(finished, name):
    root, x, results, loaded, _ = finished
    trained, compacted, session = results[name]
    assert compacted.accuracy == trained.accuracy and compacted.max_rel_diff < 1e-5
    with torch.no_grad():
        from dynprune.data.scores import logits

        executed = logits(session.model.cpu().eval()(x[:, :1] if name == "grey" else x.clone()))
    torch.testing.assert_close(loaded[name], executed, rtol=1e-4, atol=1e-5)


def test_extra_state_that_is_left_out_is_said(finished):
    assert (
        any("extra state" in line and "left out" in line for line in finished[4]["OddExtraState"])
        and not finished[4]["ExtraState"]
    )


def test_a_resumed_run_has_what_the_first_one_had(folder, tmp_path):
    """Drawn anew, the constant of the resumed process would be another one."""
    config = dataclasses.replace(config_for(folder, "InContainers"), epochs=2, checkpoint_every="1")
    data = load_data(config.source)
    whole = Session(config, data)
    train(config, Run.create(tmp_path / "whole", config, False), session=whole)
    stopped, steps = Session(config, data), []
    with pytest.raises(DynpruneError, match="Stopped"):
        train(
            config,
            run := Run.create(tmp_path / "run", config, False),
            session=stopped,
            stop=lambda: steps.append(1) or len(steps) > 3,
        )
    torch.manual_seed(1234), random.seed(99), np.random.seed(3)
    again = Session(config, data)
    again.reservoir.active.scales[0].fill_(7.0)
    train(config, run, session=again, resume=True)
    ours, theirs = (
        read_tensors(tmp_path / name / "checkpoint.safetensors", "checkpoint")[0] for name in ("whole", "run")
    )
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize(
    "name, words",
    [
        ("InClosure", "depends on values that are in no parameter, buffer or attribute"),
        ("RandomAtTop", "such as random numbers in a function or at the top of a file"),
        ("MakesStatistics", 'depends on what a training step leaves in "mean", which was not there before'),
        ("ReturnsDict", "at the chosen widths: The model returns dict"),
        ("Noisy", "another output each time"),
        ("DependsOnData", r"cannot be exported: .*odd.py:\d+, `if y.mean\(\) > 10:`"),
        ("five_channels", "to have 5 channels, but got 3"),
        ("raises", "cannot be built: KeyError in odd.py"),
        (
            "needs_depth",
            r"missing 1 required positional argument: "
            r"'depth'.*needs_depth\?depth=18",
        ),
        ("ignores_classes", "output of shape 1x100 .* Expected one score per class: 1x4"),
    ],
)
def test_what_cannot_be_brought_back_is_refused_before_training(folder, name, words):
    config = config_for(folder, name)
    with pytest.raises(DynpruneError, match=words) as refusal:
        rehearse(Session(config, load_data(config.source)))
    assert "\n" not in str(refusal.value) and "\x1b" not in str(refusal.value)


def test_a_network_that_cannot_be_exported_trains_if_no_onnx_file_is_wanted(folder, tmp_path):
    config = config_for(folder, "DependsOnData", no_onnx=True)
    data = load_data(config.source)
    rehearse(session := Session(config, data))
    train(config, run := Run.create(tmp_path / "run", config, False), session=session)
    compact(run, data=data)
    with pytest.raises(DynpruneError, match="cannot export this network"):
        export(run, data=data)


def test_what_bfloat16_cannot_do_is_done_in_float32(folder):
    said = []
    config = config_for(folder, "NoBfloat16", no_onnx=True)
    session = Session(config, load_data(config.source))
    session.bfloat16 = True  # as on a processor that is fast at it
    rehearse(session, say=said.append)
    assert (
        not session.bfloat16
        and step_problem(session) is None
        and "training in float32: bfloat16 does not work here" in said[0]
    )
    chosen = Session(dataclasses.replace(config, precision="bfloat16"), load_data(config.source))
    with pytest.raises(DynpruneError, match="Nothing was trained. Try --precision float32"):
        rehearse(chosen)


def test_rehearsing_changes_nothing(folder):
    config = config_for(folder, "InContainers")
    session, other = (Session(config, load_data(config.source)) for _ in range(2))
    state, python = torch.get_rng_state(), random.getstate()
    rehearse(session)
    assert torch.equal(torch.get_rng_state(), state) and random.getstate() == python and session.step == 0
    ours, theirs = state_of(session.reservoir.active)[0], state_of(other.reservoir.active)[0]
    assert all(torch.equal(ours[name], theirs[name]) for name in ours) and not any(
        p.grad is not None for p in session.parameters.values()
    )


def test_importing_a_module_anew_leaves_the_first_one(folder):
    import tests

    with zoo.imported_anew("tests.odd:Base"):
        other = zoo.build("tests.odd:Base", 4)
        assert type(other) is not odd.Base and type(other).__module__ == "tests.odd"
    assert sys.modules["tests.odd"] is odd and tests.odd is odd and isinstance(zoo.build("tests.odd:Base", 4), odd.Base)
    with zoo.imported_anew("torchvision:resnet18"):
        assert sys.modules["tests.odd"] is odd and sys.modules["torch"] is torch


def test_a_network_that_changed_after_training_is_refused_by_compact(folder, tmp_path, monkeypatch):
    """The checkpoint knows what the trained network said of the example."""
    config = config_for(folder, "SteadyAtTop", no_onnx=True)
    data = load_data(config.source)
    train(config, run := Run.create(tmp_path / "run", config, False), session=Session(config, data))
    compact(run, data=data)
    monkeypatch.setattr(odd, "STEADY", odd.STEADY * 2)
    with pytest.raises(DynpruneError, match="computes something else than the one that was trained"):
        compact(run, data=data)


@pytest.mark.parametrize(
    "entry, value, words",
    [
        ("classes", 7, "lacks a header entry"),
        ("scores", ["x"], "garbles a header entry"),
        ("scores", 3, "garbles a header entry"),
        (
            "fit",
            {"widths": {"a": 2**31}, "latency": None, "candidates": 0},
            "widths of other groups, or of more arms than there are",
        ),
    ],
)
def test_a_garbled_checkpoint_is_refused_in_one_line(folder, tmp_path, entry, value, words):
    config = config_for(folder, "Base", no_onnx=True)
    data = load_data(config.source)
    train(config, run := Run.create(tmp_path / "run", config, False), session=Session(config, data))
    tensors, facts = run.read_checkpoint()
    run.write_checkpoint(tensors, {**facts, entry: value})
    with pytest.raises(DynpruneError, match=words):
        Session(config, data).restore(run) if entry == "fit" else compact(run, data=data)


@pytest.mark.parametrize(
    "name, words",
    [("Base", ""), ("NotesDown", ""), ("RandomAtTop", "at the top of a file"), ("Noisy", "another output each time")],
)
def test_gates_are_rehearsed_too(folder, name, words):
    config = GateConfig(model=f"tests.odd:{name}", data=str(folder), image_size=16, batch_size=8, epochs=1, block=4)
    session = GateSession(config, load_data(config.source))
    before = state_of(session.network)[0]["head.weight"].clone()
    with pytest.raises(DynpruneError, match=words) if words else contextlib.nullcontext():
        rehearse_gates(session)
    assert torch.equal(state_of(session.network)[0]["head.weight"], before) and session.step == 0


def test_what_a_gated_network_notes_down_does_not_keep_its_file_from_loading(folder, tmp_path):
    config = GateConfig(model="tests.odd:NotesDown", data=str(folder), image_size=16, batch_size=8, epochs=1, block=4)
    session = GateSession(config, load_data(config.source))
    result = gate(config, GateRun.create(tmp_path / "gate", session.config, False), session=session)
    assert result.file_max_diff < 1e-4 and dynprune.load(result.path, trust=True)(torch.randn(1, 3, 16, 16)).shape == (
        1,
        4,
    )


def test_an_opset_that_is_not_written_is_refused_before_training(folder):
    config = config_for(folder, "Base")
    with pytest.raises(DynpruneError, match="--opset 11 cannot be written for this network: torch's exporter gives 18"):
        rehearse(Session(config, load_data(config.source)), opset=11)


# -- state -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make", [odd.InContainers, odd.HiddenLayer, odd.ExtraState, odd.Alias, odd.odd_names, odd.NarrowedNonPersistent]
)
def test_state_goes_into_another_instance(make):
    torch.manual_seed(0), random.seed(0)
    one, x = make().eval(), torch.randn(2, 3, 16, 16)
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    other = make().eval()
    tensors, facts = state_of(one)
    fill(other, {name: value.clone() for name, value in tensors.items()}, json.loads(json.dumps(facts)))
    with torch.no_grad():
        assert torch.equal(one(x), other(x))


@pytest.mark.parametrize(
    "change",
    [
        lambda facts: facts["loose"].update({"a.weight": ["", "a"]}),
        lambda facts: facts["loose"].clear(),
        lambda facts: facts["plain"].append([["", "deep", 1], "text"]),
        lambda facts: facts["loose"].update({"loose.0": ["", "nowhere"]}),
        lambda facts: facts["loose"].update({"loose.0": ["a", "weight"]}),
    ],
)
def test_a_file_cannot_put_values_where_there_are_none(change):
    model = odd.InContainers()
    tensors, facts = state_of(model)
    facts = json.loads(json.dumps(facts))
    change(facts)
    with pytest.raises((ValueError, LookupError, AttributeError, TypeError)):
        fill(odd.InContainers(), tensors, facts)


def test_a_file_cannot_change_modules_of_libraries():
    model = odd.Base()
    tensors, facts = state_of(model)
    assert not any(path[0] in ("a", "b", "head") for path, _ in facts["plain"])
    facts["plain"] += [[["a", "out_channels"], 10**9], [["", "training"], True], [["", "forward"], "x"]]
    fill(other := odd.Base().eval(), tensors, facts)
    assert other.a.out_channels == 16 and not other.training and callable(other.forward)


def test_files_of_the_version_before_still_open(tmp_path, folder):
    """Schema 1: a state dict, a side, numbers with their old names."""
    config = dataclasses.replace(config_for(folder, "Asserts"), model="tests.odd:Asserts")
    data = load_data(config.source)
    train(config, run := Run.create(tmp_path / "run", config, False), session=Session(config, data))
    compact(run, data=data)
    tensors, header = read_tensors(run.compact_file, "compact")
    kept = {}
    for key, positions in header["kept"].items():
        name, _, dim = key.rpartition(":")
        kept["#" + ":".join(map(str, json.loads(name[1:]))) + ":0" if dim == "-1" else key] = positions
    assert any(key.startswith("#:dim:") for key in kept)
    old = {**header, "schema": 1, "kept": kept, "side": header["input_size"][1]}
    save_file(
        tensors,
        tmp_path / "old.safetensors",
        metadata={
            "dynprune": json.dumps({key: value for key, value in old.items() if key not in ("state", "input_size")})
        },
    )
    one, other = (dynprune.load(path, trust=True) for path in (run.compact_file, tmp_path / "old.safetensors"))
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(one(x), other(x)) and other.dim == one.dim < 16
    assert artifact.load_with_facts(tmp_path / "old.safetensors", trust=True)[1].input_size == [3, 16, 16]
