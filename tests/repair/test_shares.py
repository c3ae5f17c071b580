"""One process and several, each with its share of the images, come to the same."""

import dataclasses
import json
import re
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import dynprune
from dynprune import zoo
from dynprune.budgets.allocation import allocate
from dynprune.cli.process import end_now
from dynprune.data.loading import Source, load_data
from dynprune.deploy.trained import compact_trained
from dynprune.errors import DynpruneError
from dynprune.repair import trained
from dynprune.repair.images import sample_images
from dynprune.repair.says import SCORES
from dynprune.repair.shares import Share
from dynprune.repair.trained import Compaction
from dynprune.runs.config import CompactConfig
from dynprune.structure.tracing import trace
from dynprune.training.distributed import Ranks
from tests.cli.test_commands import ROOT
from tests.cli.test_commands import dynprune as command
from tests.models import perturb

CPU = torch.device("cpu")


def compacted(rank, count, file, out):
    """Order, distance and repaired weights of one process."""
    torch.set_num_threads(1)
    if count > 1:
        dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=count)
    data = load_data(Source("digits", image_size="16"))
    torch.manual_seed(0)
    model = perturb(zoo.build("resnet20", 10, size=data.size)).eval()
    graph = trace(model, data.example)
    compaction = Compaction(model, graph, sample_images(model, data, 256, 0, CPU, Share(rank, count)))
    narrow = compaction.repaired(allocate(graph, ["0.4"]))
    orders = {name: torch.from_numpy(order.arms) for name, order in compaction.orders.items()}
    if rank == 0:
        torch.save((orders, compaction.distance(narrow), narrow.state_dict()), out)
    else:
        compaction.distance(narrow)
    if count > 1:
        dist.destroy_process_group()
        end_now(0)


def test_calibration_and_repair_are_sums_over_images(tmp_path):
    compacted(0, 1, None, tmp_path / "one.pt")
    mp.spawn(compacted, (2, tmp_path / "rendezvous", tmp_path / "two.pt"), nprocs=2)
    (orders, far, weights), (orders_2, far_2, weights_2) = (torch.load(tmp_path / f"{n}.pt") for n in ("one", "two"))
    assert all(torch.equal(orders[name], orders_2[name]) for name in orders)
    assert far_2 == pytest.approx(far, rel=1e-3)
    for name, value in weights.items():
        torch.testing.assert_close(weights_2[name], value, atol=2e-3, rtol=2e-2, msg=name)


def test_shares_are_equal_and_parts_come_together():
    values = torch.arange(11)
    assert [Share(rank, 3).own(values).tolist() for rank in range(3)] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert torch.equal(Share().own(values), values) and Share().gathered(values) is values


def test_every_process_gets_as_many_images_whatever_their_number():
    data = load_data(Source("digits", image_size="8"))
    model = zoo.build("resnet20", 10, size=data.size).eval()
    parts = [sample_images(model, data, 129, 0, CPU, Share(rank, 2)) for rank in range(2)]
    sizes = [
        ([len(x) for (x,) in own.moments], *(len(own[0]) for own in (own.repair, own.pull, own.judge))) for own in parts
    ]
    assert sizes[0] == sizes[1] and all(size > 0 for size in sizes[0][0]) and sum(sizes[0][0]) == 64
    assert not torch.equal(parts[0].pull[0], parts[1].pull[0])
    with pytest.raises(DynpruneError, match="2000 processes cannot share .* Start fewer processes"):
        sample_images(model, data, 129, 0, CPU, Share(0, 2000))


def test_torchrun_compacts_like_one_process(tmp_path):
    weights = tmp_path / "w.pt"
    torch.manual_seed(0)
    torch.save(perturb(zoo.build("resnet20", 10)).state_dict(), weights)
    options = ["compact", "--model", "resnet20", "--weights", weights, "--image-size", 16, "--images", 128, "--json"]
    options += ["--threads", 1, "--precision", "float32"]
    exact = [*options, "--search", "none", "--tune", "0"]
    one = json.loads(command(*exact, "--out", tmp_path / "one").stdout)
    two, hurried = (
        subprocess.run(
            [
                sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "dynprune",
                *map(str, own), "--out", str(tmp_path / name),
            ],
            cwd=ROOT, capture_output=True, text=True, timeout=280,
        )
        for name, own in (("two", exact), ("hurried", [*options, "--search-time", "2s", "--tune", "2s"]))
    )  # fmt: skip
    assert two.returncode == hurried.returncode == 0, two.stderr + hurried.stderr
    shared = json.loads(two.stdout)
    assert shared["widths"] == one["widths"] and shared["distance"] == pytest.approx(one["distance"], rel=0.02)
    found = json.loads(hurried.stdout)
    assert found["pulls"] > 0 and found["max_rel_diff"] < 1e-4
    # this network knows nothing, so that what it learned in 2 s may be taken back
    assert found["tune_steps"] > 0 or re.search(r"[1-9]\d* steps of tuning left", hurried.stderr)


def test_a_search_in_bfloat16_measures_nearly_the_same(monkeypatch):
    torch.manual_seed(0)
    data = load_data(Source("digits", image_size="16"))
    model = perturb(zoo.build("resnet20", 10, size=data.size)).eval()
    graph = trace(model, data.example)
    images, widths = sample_images(model, data, 128, 0, CPU), allocate(graph, ["0.4"])
    exact, half = (Compaction(model, graph, images, bfloat16=own) for own in (False, True))
    far, hurried = exact.pull(widths), half.distance_in_a_hurry
    assert half.pull(widths) == pytest.approx(far, abs=5e-4) and half.pull(widths) != far > trained.COARSE
    monkeypatch.setattr(half, "distance_in_a_hurry", lambda _: pytest.fail("measured twice"))
    assert half.pull(dict(reversed(widths.items()))) == half.pull(widths)
    monkeypatch.setattr(trained, "COARSE", 2 * far)  # so near that it counts
    assert hurried(widths) == far
    assert half.distance(half.repaired(widths)) == exact.distance(exact.repaired(widths))  # the last one is exact
    values = Compaction(model, graph, images, says=dataclasses.replace(SCORES, scores=False), bfloat16=True)
    assert not values.bfloat16  # only class scores can be


IMAGES = 256  # a quarter to calibrate on, a half to repair with, a quarter to judge by


def own_batches(rank, count):
    """The part of every phase's images that a process would get."""
    torch.manual_seed(0)
    images, labels = torch.randn(IMAGES, 3, 16, 16), torch.randint(0, 10, (IMAGES,))
    phases = torch.arange(IMAGES).split(IMAGES // 4)
    indices = torch.cat([Share(rank, count).own(own) for own in phases])
    return [(images[own], labels[own]) for own in indices.split(32)]


def perturbed():
    torch.manual_seed(0)
    return perturb(zoo.build("resnet20", 10, size=(3, 16, 16))).eval()


def compacted_module(rank, count, file, out):
    """A module of the user's own: as repaired, and after a second of search and one of tuning."""
    torch.set_num_threads(1)
    if count > 1:
        dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=count)
    model = perturbed()
    example, batches = torch.zeros(1, 3, 16, 16), own_batches(rank, count)
    quick = {"images": IMAGES // 4, "precision": "float32"}
    exact = dynprune.compact(model, example, batches, "macs=0.4", search=0, tune=0, **quick)
    hurried = dynprune.compact(model, example, batches, "macs=0.4", search=1, tune=1, **quick)
    arms = {name: torch.tensor(own) for name, own in exact.selection.items()}
    torch.save((arms, exact.distance, exact.model.state_dict()), out / f"{count}-{rank}.pt")
    torch.save((hurried.widths, hurried.tune_steps, hurried.model.state_dict()), out / f"hurried-{count}-{rank}.pt")
    if count > 1:
        with pytest.raises(DynpruneError, match="Start compact without torchrun"):
            dynprune.compact(model, example, batches, "latency=0.5", search=0, tune=0, **quick)
        with pytest.raises(DynpruneError, match="gave 8 images to the process that had fewest of 2"):
            few = [(batches[0][0][: 8 + rank],)]
            dynprune.compact(model, example, few, "macs=0.5", search=0, tune=0, **quick)
        dist.destroy_process_group()
        end_now(0)


def test_a_module_is_compacted_alike_by_one_process_and_by_two_with_batches_of_their_own(tmp_path):
    compacted_module(0, 1, None, tmp_path)
    mp.spawn(compacted_module, (2, tmp_path / "rendezvous", tmp_path), nprocs=2)
    (arms, far, _), (arms_2, far_2, weights), (_, far_3, weights_3) = (
        torch.load(tmp_path / f"{name}.pt") for name in ("1-0", "2-0", "2-1")
    )
    assert all(torch.equal(arms[name], arms_2[name]) for name in arms)
    assert far_2 == far_3 == pytest.approx(far, rel=0.1)  # each looks at other places of its images
    assert all(torch.equal(value, weights_3[name]) for name, value in weights.items())
    (widths, steps, tuned), (widths_2, steps_2, tuned_2) = (
        torch.load(tmp_path / f"hurried-2-{rank}.pt") for rank in range(2)
    )
    assert widths == widths_2 and steps == steps_2 > 0
    assert all(torch.equal(value, tuned_2[name]) for name, value in tuned.items())
    half = dynprune.compact(
        perturbed(), torch.zeros(1, 3, 16, 16), own_batches(0, 2), "macs=0.4", search=0, tune=0, images=IMAGES // 8
    )
    assert not all(arms[name].tolist() == list(own) for name, own in half.selection.items())  # it matters who sees what


@pytest.mark.parametrize("own", [{"max_drop": 1.0}, {"budget": ("latency=2ms",)}])
def test_what_processes_cannot_decide_together_is_refused(own, tmp_path):
    config = CompactConfig(model="resnet20", weights="w.pt", **own)
    with pytest.raises(DynpruneError, match="Start compact without torchrun"):
        compact_trained(config, tmp_path / "run", ranks=Ranks(0, 2))
