"""Weights out of files as people save them, and nothing else out of these files."""

import argparse
import io
import os
import pickle
import random
import struct
import zipfile
from collections import OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.swa_utils import AveragedModel

from dynprune.errors import DynpruneError
from dynprune.zoo.checkpoints import Foreign, Reader, read_contents
from dynprune.zoo.weights import load_weights
from tests import odd


def trained() -> nn.Module:
    torch.manual_seed(3)
    return odd.Base(4)


STATE = trained().state_dict()


def prefixed(prefix: str) -> dict:
    return {prefix + name: value for name, value in STATE.items()}


class Config:
    """Something of the user's, beside the tensors."""

    def __init__(self):
        self.path, self.count = Path("/somewhere"), np.float64(3.5)


WRAPPED = {
    "plain": STATE,
    "ordered": OrderedDict(STATE),
    "parameters": {name: nn.Parameter(value) for name, value in STATE.items()},
    "ddp": prefixed("module."),
    "compiled": prefixed("_orig_mod."),
    "both": prefixed("module._orig_mod."),
    "lightning": {"state_dict": prefixed("model.")},
    "deep prefix": {"state_dict": prefixed("learner.net.backbone.")},
    "in the middle": {name.replace("head.", "head._orig_mod."): value for name, value in STATE.items()},
    "tutorial": {
        "epoch": 3,
        "model_state_dict": STATE,
        "optimizer_state_dict": {"state": {0: {"momentum_buffer": torch.zeros(3)}}},
    },
    "reference": {"model": STATE, "args": argparse.Namespace(lr=0.1, out=Path("x")), "scaler": {"scale": 1.0}},
    "numpy": {
        "state_dict": STATE,
        "best": np.float32(0.7),
        "rng": np.random.get_state(),
        "kinds": {1, 2},
        "type": np.dtype("float32"),
    },
    "objects": {"net": STATE, "config": Config(), "counts": defaultdict(int, a=1), "function": os.path.join},
    "ema": {"ema": STATE},
    "params": {"params_ema": STATE},
    "averaged": AveragedModel(trained()).state_dict(),
    "nested": {"a": {"b": {"weights": STATE}}},
    "with criterion": {"state_dict": {**prefixed("model."), "criterion.weight": torch.ones(4)}},
    "half": {name: value.half() for name, value in STATE.items()},
    "bfloat16": {name: value.bfloat16() for name, value in STATE.items()},
    "double": {name: value.double() for name, value in STATE.items()},
    "strided": {name: value.t().contiguous().t() if value.ndim == 2 else value for name, value in STATE.items()},
    "shared storage": dict(
        zip(
            STATE,
            torch.cat([value.reshape(-1) for value in STATE.values()]).split(
                [value.numel() for value in STATE.values()]
            ),
        )
    ),
}
WRAPPED["shared storage"] = {name: value.view(STATE[name].shape) for name, value in WRAPPED["shared storage"].items()}


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("name", WRAPPED)
def test_what_holds_the_right_tensors_loads(tmp_path, name, old):
    torch.save(WRAPPED[name], tmp_path / "w.pth", _use_new_zipfile_serialization=not old)
    model = odd.Base(4)
    load_weights(model, tmp_path / "w.pth")
    for key, value in model.state_dict().items():
        assert torch.allclose(value, STATE[key], atol=2e-3 if name in ("half", "bfloat16") else 0), key


def test_averaged_weights_come_first_and_the_place_is_told(tmp_path):
    averaged = {name: value + 1 for name, value in STATE.items()}
    torch.save({"state_dict": STATE, "state_dict_ema": averaged}, tmp_path / "w.pth")
    model = odd.Base(4)
    assert load_weights(model, tmp_path / "w.pth") == "state_dict_ema"
    assert torch.equal(model.head.weight, averaged["head.weight"])


class Wrapper(nn.Module):
    def __init__(self):
        super().__init__()
        self.module = odd.Base(4)


@pytest.mark.parametrize(
    "content", [prefixed("module."), prefixed("module.module."), prefixed("_orig_mod.module."), STATE]
)
def test_a_network_whose_own_names_begin_like_a_wrapper(tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    model = Wrapper()
    load_weights(model, tmp_path / "w.pth")
    assert torch.equal(model.module.head.weight, STATE["head.weight"])


def test_layers_under_two_names_need_one_of_them(tmp_path):
    torch.manual_seed(5)
    whole = odd.Alias(4).state_dict()
    torch.save({name: value for name, value in whole.items() if not name.startswith("encoder")}, tmp_path / "w.pth")
    model = odd.Alias(4)
    load_weights(model, tmp_path / "w.pth")
    assert torch.equal(model.encoder[2].weight, whole["b.weight"])


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_safetensors_by_name_or_by_content(tmp_path, suffix):
    from safetensors.torch import save_file

    save_file(prefixed("model."), tmp_path / f"w{suffix}")
    model = odd.Base(4)
    load_weights(model, tmp_path / f"w{suffix}")
    assert torch.equal(model.head.bias, STATE["head.bias"])


@pytest.mark.parametrize(
    "content, words",
    [
        (
            {name: value * float("nan") if name == "b.weight" else value for name, value in STATE.items()},
            "nan or infinite.*b.weight",
        ),
        ({name: value / 0 if name == "a.bias" else value for name, value in STATE.items()}, "nan or infinite.*a.bias"),
        (trained(), r"whole object \(tests.odd.Base\), not a state dict"),
        ({"epoch": 3}, "without tensors, not a state dict"),
        ([1, 2], "not a state dict"),
        (odd.Base(7).state_dict(), r"head.weight is \[7, 24\], the model has \[4, 24\]"),
        ({name: value for name, value in STATE.items() if "head" not in name}, "missing 2: head.weight, head.bias"),
        ({**STATE, "extra.weight": torch.zeros(2)}, "unknown 1: extra.weight"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_clean_line(tmp_path, content, words):
    torch.save(content, tmp_path / "w.pth")
    model = odd.Base(4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(DynpruneError, match=words) as refusal:
        load_weights(model, tmp_path / "w.pth")
    assert "\n" not in str(refusal.value) and "\x1b" not in str(refusal.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_scripted_archive_is_refused_with_advice(tmp_path):
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(trained(), torch.zeros(1, 3, 8, 8)), str(tmp_path / "w.pt"))
    with pytest.raises(DynpruneError, match=r"TorchScript archive; save the model's state_dict\(\)"):
        load_weights(odd.Base(4), tmp_path / "w.pt")


# -- nothing but tensors and plain values ------------------------------------------------------------------------------


class Runs:
    """Unpickled by an ordinary reader, this would make a file."""

    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return os.mkdir, (self.place,)


def allowed(tree: object, depth: int = 0) -> bool:
    """Only containers, plain values, descriptions of tensors, and objects that do nothing."""
    from dynprune.zoo.checkpoints import Described, Rebuild, Storage

    if (
        depth > 50
        or tree is None
        or isinstance(
            tree, (bool, int, float, complex, str, bytes, bytearray, torch.dtype, Described, Storage, Foreign, Rebuild)
        )
    ):
        return True
    if isinstance(tree, type):
        return issubclass(tree, (Foreign, OrderedDict, tuple, set))
    if isinstance(tree, dict):
        return all(allowed(key, depth + 1) and allowed(value, depth + 1) for key, value in tree.items())
    return isinstance(tree, (list, tuple, set, frozenset)) and all(allowed(value, depth + 1) for value in tree)


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("protocol", [2, 4])
def test_no_code_comes_out_of_a_file(tmp_path, old, protocol):
    content = {
        "state_dict": STATE,
        "evil": Runs(str(tmp_path / "ran")),
        "eval": [eval, exec, __import__, os.system, torch.load],
    }
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=not old, pickle_protocol=protocol)
    load_weights(odd.Base(4), tmp_path / "w.pth")
    assert allowed(read_contents(tmp_path / "w.pth").tree) and not (tmp_path / "ran").exists()


HOSTILE = [
    b"cos\nsystem\n(S'touch ran'\ntR.",
    b"\x80\x02cbuiltins\neval\nX\x05\x00\x00\x00print\x85R.",
    b"\x80\x04\x8c\x08builtins\x8c\x04exec\x93\x8c\x04pass\x85R.",
    b"(S'touch ran'\nios\nsystem\n.",
    b"\x80\x02ccollections\nOrderedDict\n}X\x01\x00\x00\x00aK\x01sb.",
    b"\x80\x02\x82\x01.",
    b"\x80\x02r\xff\xff\xff\x7f.",
    b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x08\x00\x00\x00__code__K\x01sb.",
    b"\x80\x02ctorch\nload\nX\x01\x00\x00\x00x\x85R.",
    b"]" * 10000 + b".",
]


@pytest.mark.parametrize("data", HOSTILE)
def test_hostile_pickles_do_nothing(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        tree = Reader(io.BytesIO(data)).load()
    except Exception:
        tree = None
    assert allowed(tree) and not (tmp_path / "ran").exists()


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_mutated_pickles_give_plain_values_or_an_error(data):
    """Names of functions that do something are put in the place of those that torch.save writes, and bytes are
    changed."""
    pickled = pickle.dumps(
        {"a": OrderedDict(x=[1, 2.5, "t"]), "evil": Runs("ran"), "n": argparse.Namespace(a=1), "s": {1, 2}},
        protocol=data.draw(st.sampled_from([0, 2, 4])),
    )
    changed = bytearray(pickled)
    for _ in range(data.draw(st.integers(1, 6))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    try:
        tree = Reader(io.BytesIO(bytes(changed))).load()
    except Exception:
        tree = None
    assert allowed(tree) and not Path("ran").exists()


def test_tensors_larger_than_their_numbers_are_refused(tmp_path):
    """Sizes and strides are read from the pickle, so a small file could ask for any amount of memory."""
    torch.save({"head.weight": torch.zeros(1).expand(10**6, 10**6)}, tmp_path / "w.pth")
    with pytest.raises(DynpruneError, match="does not fit"):
        load_weights(odd.Base(4), tmp_path / "w.pth")
    contents = read_contents(tmp_path / "w.pth")
    with pytest.raises(ValueError, match="larger than the numbers"):
        contents.tensor(contents.tree["head.weight"])


@pytest.mark.parametrize("seed", range(3))
def test_damaged_files_are_refused_or_give_the_tensors(tmp_path, seed):
    rng, path = random.Random(seed), tmp_path / "w.pth"
    for old in (False, True):
        torch.save({"state_dict": STATE}, path, _use_new_zipfile_serialization=not old)
        whole = path.read_bytes()
        for _ in range(40):
            data = bytearray(whole if rng.random() < 0.7 else whole[: rng.randrange(len(whole))])
            for _ in range(rng.choice((0, 1, 8))):
                if data:
                    data[rng.randrange(min(len(data), 2000))] ^= 1 << rng.randrange(8)
            path.write_bytes(bytes(data))
            try:
                load_weights(odd.Base(4), path)
            except DynpruneError as error:
                assert "\n" not in str(error)


def test_an_archive_that_unpacks_to_more_than_its_size_is_refused(tmp_path):
    torch.save(STATE, tmp_path / "w.pth")
    with (
        zipfile.ZipFile(tmp_path / "w.pth") as old,
        zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name) if name.endswith("pkl") else bytes(10**7))
    with pytest.raises(DynpruneError, match="compressed archive"):
        load_weights(odd.Base(4), tmp_path / "bomb.pth")


def test_a_legacy_file_that_claims_too_many_numbers_is_refused(tmp_path):
    torch.save({"x": torch.zeros(4)}, tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    data = (tmp_path / "w.pth").read_bytes()
    (tmp_path / "w.pth").write_bytes(data[:-24] + struct.pack("<q", 2**50) + data[-16:])
    with pytest.raises(DynpruneError, match="end of the file too early"):
        load_weights(odd.Base(4), tmp_path / "w.pth")
