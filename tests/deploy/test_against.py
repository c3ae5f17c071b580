"""`bench --against`: a trained dense network in place of the twin."""

import pytest

import dynprune
from dynprune.errors import DynpruneError
from tests.cli.test_commands import dynprune as command


def exported(path, *options):
    command("train", "--model", "resnet20", "--epochs", 1, "--threads", 1, *options, "--out", path)
    command("compact", path)
    command("export", path, "--onnx")
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("against")
    own = exported(folder / "own", "--image-size", 8, "--policy", "static")
    dense = {
        size: exported(folder / f"dense-{size}", "--image-size", size, "--policy", "dense") for size in ("8x8", "12")
    }
    return own, dense


def test_a_trained_dense_network_is_the_dense_side_however_its_size_was_given(runs):
    own, dense = runs
    found = dynprune.bench(own, against=dense["8x8"], batches=[1])
    assert found.dense_path == str(dense["8x8"] / "compact.onnx") and found.dense_accuracy_onnx > 0
    assert found.speedup_p50 == pytest.approx(found.dense_p50_ms / found.compact_p50_ms)


def test_other_sizes_and_runs_that_are_not_dense_are_refused(runs):
    own, dense = runs
    with pytest.raises(
        DynpruneError, match="takes images of 3x12x12, .* of 3x8x8. Train it with the same --image-size"
    ):
        dynprune.bench(own, against=dense["12"], batches=[1])
    with pytest.raises(DynpruneError, match="a run of policy static"):
        dynprune.bench(own, against=own, batches=[1])
