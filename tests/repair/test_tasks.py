"""Networks of other tasks than classes: compacted by what their last layers say, tuned by a loss of one's own."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.models.detection import ssdlite320_mobilenet_v3_large
from torchvision.models.segmentation import lraspp_mobilenet_v3_large

import dynprune
from dynprune.errors import DynpruneError
from dynprune.repair.examples import Reader, count_of, joined, moved, part_of
from dynprune.repair.following import follow, last_layers, listen
from dynprune.repair.refit import repair, targets_of
from dynprune.repair.says import apart, own_loss, what_says
from dynprune.structure.surgery import slim
from tests.shapes import average_precision, draw, mean_iou

QUICK = {"images": 32, "search": 0.2}


class UNet(nn.Module):
    """Two levels down and up again, a transposed convolution, and a skip."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.down = nn.Sequential(nn.Conv2d(16, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.up = nn.ConvTranspose2d(32, 16, 2, 2)
        self.last = nn.Sequential(nn.Conv2d(32, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 4, 1))

    def forward(self, x):
        before = self.first(x)
        return {"out": self.last(torch.cat([before, F.relu(self.up(self.down(before)))], 1))}


class Two(nn.Module):
    """An image and numbers, by name; a class and a place, whose values matter."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 24, 3), nn.ReLU(), nn.Conv2d(24, 24, 3), nn.ReLU())
        self.more = nn.Linear(5, 24)
        self.kind, self.place = nn.Linear(24, 3), nn.Linear(24, 2)

    def forward(self, image, *, extra):
        y = self.body(image).mean((2, 3)) + self.more(extra).relu()
        return self.kind(y), self.place(y) + 100


class Text(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.body = nn.Sequential(nn.Conv1d(16, 32, 3, padding=1), nn.ReLU(), nn.Conv1d(32, 8, 3, padding=1))

    def forward(self, ids):
        return self.body(self.embed(ids).transpose(1, 2))


def taught(model, loss, batches, steps=60):
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(steps):
        optimizer.zero_grad()
        loss(model, batches[step % len(batches)]).backward()
        optimizer.step()
    return model.eval()


def of_masks(model, batch):
    return F.cross_entropy(model(batch[0])["out"], batch[1])


def pictures(batches, size=32, seed=0):
    return [draw(16, seed + number, size)[:2] for number in range(batches)]


def test_segmentation_keeps_what_it_knew():
    torch.manual_seed(0)
    data, (fresh, masks) = pictures(12), draw(64, 10**6, 32)[:2]
    model = taught(UNet(), of_masks, data, 150)
    graph = dynprune.trace(model, fresh[:1])
    before = mean_iou(model(fresh)["out"].argmax(1), masks)
    cut = dynprune.compact(model, fresh[:1], data, "macs=0.5", tune=0, images=48, search=0)
    tuned = dynprune.compact(model, fresh[:1], data, "macs=0.5", loss=of_masks, tune=3, images=48, search=0)
    masked = [mean_iou(own.model(fresh)["out"].argmax(1), masks) for own in (cut, tuned)]
    assert cut.macs <= 0.5 * graph.macs({}) and not cut.left and cut.distance < 1
    assert masked[0] > 0.6 * before and masked[1] > 0.9 * before and tuned.tune_steps > 3


@pytest.mark.parametrize("named", [True, False])
def test_a_budget_in_milliseconds_of_several_inputs(named):
    torch.manual_seed(0)
    image, extra = torch.zeros(1, 3, 12, 12), torch.zeros(1, 5)
    example = ({"image": image, "extra": extra},) if named else (image, {"extra": extra})
    way = None if named else lambda batch: (batch[0], {"extra": batch[1]})
    found = dynprune.compact(Two(), example, two(named=named), "latency=0.8", inputs=way, tune=0, **QUICK)
    assert found.macs < found.graph.macs({})
    with pytest.raises(DynpruneError, match=r"latency=0.001"):
        dynprune.compact(Two(), example, two(named=named), "latency=0.001", inputs=way, tune=0, **QUICK)


def test_a_budget_in_milliseconds():
    torch.manual_seed(0)
    data = pictures(4)
    # the narrowest network was measured at 0.61 of the time, beside other tests
    found = dynprune.compact(UNet(), torch.zeros(1, 3, 96, 96), data, "latency=0.75", tune=0, **QUICK)
    assert found.macs < found.graph.macs({}) and found.pulls >= 0


def two(batches=4, named=True):
    torch.manual_seed(3)
    return [
        ({"image": torch.randn(32, 3, 12, 12), "extra": torch.randn(32, 5), "other": "x"}) if named
        else (torch.randn(32, 3, 12, 12), torch.randn(32, 5), torch.rand(32))
        for _ in range(batches)
    ]  # fmt: skip


def test_several_inputs_by_name_and_values_that_are_no_classes():
    torch.manual_seed(0)
    example = ({"image": torch.zeros(1, 3, 12, 12), "extra": torch.zeros(1, 5)},)
    found = dynprune.compact(Two(), example, two(), "macs=0.6", tune=0.3, **QUICK)
    batch = two()[0]
    kind, place = found.model(batch["image"], extra=batch["extra"])
    assert found.tune_steps > 0 and kind.shape == (32, 3) and abs(float(place.detach().mean()) - 100) < 1
    mixed = (torch.zeros(1, 3, 12, 12), {"extra": torch.zeros(1, 5)})
    with pytest.raises(DynpruneError, match="inputs=, a function that makes the inputs"):
        dynprune.compact(Two(), mixed, two(named=False), "macs=0.6", tune=0, **QUICK)
    found = dynprune.compact(
        Two(),
        mixed,
        two(named=False),
        "macs=0.6",
        inputs=lambda batch: (batch[0], {"extra": batch[1]}),
        loss=lambda model, batch: F.mse_loss(model(batch[0], extra=batch[1])[1][:, 0], batch[2]),
        tune=0.3,
        **QUICK,
    )
    assert found.tune_steps > 0


def test_two_outputs_of_a_regression_are_not_taken_for_classes():
    """Of class scores a shift of all is nothing; of values it is everything."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 2))
    model[4].bias.data += 50
    data = [(torch.randn(32, 3, 12, 12), torch.rand(32, 2)) for _ in range(4)]
    found = dynprune.compact(model, torch.zeros(1, 3, 12, 12), data, "macs=0.5", tune=0.3, **QUICK)
    with torch.no_grad():
        said, before = found.model(data[0][0]), model(data[0][0])
    assert float((said - before).abs().max()) < 1  # taken for class scores, they would lose their mean of 50


def test_whole_numbers_as_inputs():
    torch.manual_seed(0)
    data = [torch.randint(0, 20, (32, 10)) for _ in range(4)]
    found = dynprune.compact(Text(), torch.zeros(1, 10, dtype=torch.int64), data, "macs=0.5", tune=0, **QUICK)
    assert not found.left and found.distance < 0.9


def detector():
    model = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=4, score_thresh=0.0)
    model.transform.fixed_size = (64, 64)
    return model


def of_boxes(model, batch):
    return sum(model(*batch).values())


def test_a_detector_from_images_to_detections():
    torch.manual_seed(0)
    pictures, _, boxes, kinds = draw(64, 0, 64)
    targets = [{"boxes": own, "labels": 1 + kind} for own, kind in zip(boxes, kinds)]
    data = [(list(pictures[at : at + 16]), targets[at : at + 16]) for at in range(0, 64, 16)]
    model, example = detector(), ([torch.zeros(3, 64, 64)],)
    found = dynprune.compact(model, example, data, "macs=0.5", loss=of_boxes, tune=1, tune_lr=0.003, **QUICK)
    assert found.tune_steps > 0 and found.macs <= 0.5 * found.graph.macs({}) and not found.left
    with torch.no_grad():
        said = found.model(list(pictures[:4]))
    assert len(said) == 4 and set(said[0]) == {"boxes", "scores", "labels"}
    assert 0 <= average_precision(said, boxes[:4], kinds[:4]) <= 1


class Proposals(nn.Module):
    """Two stages: the best places, and a layer that looks at them again."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1))
        self.good, self.again, self.what = nn.Conv2d(16, 1, 1), nn.Linear(16, 32), nn.Linear(32, 3)

    def forward(self, x):
        y = self.body(x).relu()
        places = self.good(y).flatten(1).topk(5, dim=1).indices
        rows = y.flatten(2).transpose(1, 2)
        chosen = torch.zeros(len(x), 5, 16)
        for number in range(len(x)):
            chosen[number] = rows[number, places[number]]
        return self.what(self.again(chosen).relu())


def test_what_was_chosen_by_value_is_not_compared():
    torch.manual_seed(0)
    model, data = Proposals(), [torch.randn(32, 3, 8, 8) for _ in range(4)]
    found = follow(model.eval(), (data[0][:2],))
    assert [name for name, own in found.items() if own.chosen] == ["again", "what"]
    assert last_layers(model, lambda model: model(data[0][:2])) == ["good"]
    small = dynprune.compact(model, data[0][:1], data, "macs=0.6", tune=0, **QUICK)
    assert set(small.left) == {"again", "what"} and "chosen by value" in small.left["what"]


def test_the_last_layers_of_a_segmentation_network_are_its_classifiers():
    model = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=4).eval()
    found = last_layers(model, lambda model: model(torch.rand(2, 3, 64, 64)))
    assert found == ["classifier.low_classifier", "classifier.high_classifier"]


def test_outputs_of_other_shapes_are_no_distance():
    assert float(apart([torch.zeros(2, 3)], [torch.zeros(2, 4)], scores=False)) == 0


def test_a_batch_that_is_there_stays_what_it_is():
    class Batch(dict):
        pass

    batch = Batch(x=torch.zeros(2), name="y")
    assert moved(batch, torch.device("cpu")) is batch


def test_every_output_counts_for_as_much_whatever_its_scale():
    torch.manual_seed(0)
    said = [torch.randn(64, 3, requires_grad=True), (1000 * torch.randn(64, 5, 4)).requires_grad_()]
    gradients = torch.autograd.grad(own_loss(said, 0, scores=False), said)
    worth = [float((g * g).sum() * x.detach().square().mean()) for g, x in zip(gradients, said)]
    assert worth[0] == pytest.approx(worth[1], rel=0.5)


@pytest.mark.parametrize(
    "loss, words",
    [
        (F.cross_entropy, r"loss\(model, batch\) failed on the first batch \(.*Expected a function of the model"),
        (lambda model, batch: 1.0, "gave a float. Expected one number, as a tensor"),
        (lambda model, batch: model(batch[0])["out"], r"gave a tensor of shape \[16, 4, 32, 32\]. Expected one number"),
        (lambda model, batch: of_masks(model, batch).detach(), "has no gradient"),
        (lambda model, batch: of_masks(model, batch) / 0, r"loss\(model, batch\) is inf"),
    ],
)
def test_a_loss_that_cannot_be_trained_on_is_refused_before_the_work(loss, words):
    with pytest.raises(DynpruneError, match=words):
        dynprune.compact(UNet(), torch.zeros(1, 3, 32, 32), pictures(4), "macs=0.5", loss=loss, **QUICK)


def test_pictures_of_several_shapes_are_refused_in_a_line():
    data = [*pictures(1), *pictures(1, 48)]
    with pytest.raises(DynpruneError, match=r"shapes \[3, 32, 32\] and \[3, 48, 48\]. Expected one shape"):
        dynprune.compact(UNet(), torch.zeros(1, 3, 32, 32), data, "macs=0.5", **QUICK)
    with pytest.raises(DynpruneError, match="a batch without extra, which the example inputs have"):
        example = ({"image": torch.zeros(1, 3, 12, 12), "extra": torch.zeros(1, 5)},)
        dynprune.compact(Two(), example, [{"image": torch.zeros(32, 3, 12, 12)}], "macs=0.5", **QUICK)


class Scales(nn.Module):
    """One head for two scales, as RetinaNet's, of two layers that run twice; with a bias and without, in groups."""

    def __init__(self):
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(3, 24, 3, padding=1), nn.ReLU())
        self.two = nn.Sequential(nn.Conv2d(24, 24, 3, 2, 1), nn.ReLU())
        self.tower = nn.Sequential(
            nn.Conv2d(24, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 1, bias=False), nn.ReLU()
        )
        self.deep = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.what = nn.Conv2d(32, 5, 1)

    def forward(self, x):
        one = self.one(x)
        return [self.what(self.deep(self.tower(level)).relu()) for level in (one, self.two(one))]


def test_layers_that_run_several_times_are_refitted_too():
    torch.manual_seed(0)
    model, data = Scales(), [torch.randn(32, 3, 12, 12) for _ in range(8)]
    example = data[0][:1]
    graph = dynprune.trace(model, example)
    repaired = dynprune.compact(model, example, data, "macs=0.5", tune=0, images=64, search=0)
    assert not repaired.left and repaired.macs <= 0.5 * graph.macs({})
    cut, fresh = slim(model, graph.kept(repaired.selection)).eval(), torch.randn(64, 3, 12, 12)
    with torch.no_grad():
        wanted, as_cut, now = model(fresh), cut(fresh), repaired.model(fresh)
    for was, then, own in zip(wanted, as_cut, now):
        assert float((own - was).square().mean()) < 0.5 * float((then - was).square().mean())
    assert not torch.equal(repaired.model.deep.weight, cut.deep.weight)  # whose groups have gone
    same = copy.deepcopy(model).eval()
    repair(same, {}, targets_of(model.eval(), (data[0],)))
    with torch.no_grad():
        # channels that hardly ever fire leave their readers' weights open: outputs near 0.3 agree to a thousandth
        assert all(torch.allclose(a, b, atol=1e-3) for a, b in zip(same(fresh), wanted))
        assert all(float((a - b).abs().mean()) < 3e-5 for a, b in zip(same(fresh), wanted))


def test_a_detector_with_one_head_for_all_scales_has_every_layer_refitted():
    torch.manual_seed(0)
    model = torchvision.models.detection.retinanet_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=4, min_size=64, max_size=64
    ).eval()
    images = ([torch.rand(3, 64, 64)] * 2,)
    story = listen(model, images, lambda: model(*images))
    assert len(story.shared()) == 10 and not story.left()
    found = targets_of(model, images)
    assert not found.left and set(found.shared) == set(story.shared())


class Named(nn.Module):
    """As transformers' networks: an object with logits, inputs by name."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Linear(16, 4)

    def forward(self, pixel_values):
        return Output(self.c(self.b(self.a(pixel_values).relu()).relu().mean((2, 3))))


@dataclasses.dataclass
class Output:
    logits: torch.Tensor


def test_classes_count_as_classes_whatever_the_batch_and_the_loss():
    torch.manual_seed(0)
    data = [{"pixel_values": torch.randn(32, 3, 12, 12), "labels": torch.randint(0, 4, (32,))} for _ in range(4)]
    example = ({"pixel_values": torch.zeros(1, 3, 12, 12)},)
    found = dynprune.compact(Named(), example, data, "macs=0.5", tune=0.3, **QUICK)
    assert found.tune_steps > 0 and found.model(data[0]["pixel_values"]).logits.shape == (32, 4)
    bad = [{**batch, "labels": batch["labels"] + 9} for batch in data]
    with pytest.raises(DynpruneError, match="the network has 4 classes"):
        dynprune.compact(Named(), example, bad, "macs=0.5", **QUICK)

    def smooth(model, batch):
        return F.cross_entropy(model(batch["pixel_values"]).logits, batch["labels"], label_smoothing=0.1)

    model = Named()
    graph, run = dynprune.trace(model, example), lambda own: smooth(own, data[0])
    says = what_says(model.eval(), graph, run, scores=True)
    with torch.no_grad():
        said, loss = says.of(model, run)
    assert says.layers == ("c",) and said[0].shape == (32, 4) and loss.ndim == 0
    assert float(apart(said, [said[0] + 5], scores=True)) < 1e-6 < float(apart(said, [said[0] + 5], scores=False))
    found = dynprune.compact(model, example, data, "macs=0.5", loss=smooth, tune=0.3, **QUICK)
    assert found.tune_steps > 0


def test_a_dict_that_is_an_argument_itself():
    torch.manual_seed(0)

    class Whole(UNet):
        def forward(self, batch):
            return super().forward(batch["image"])

    data = [{"image": picture, "name": "x"} for picture, _ in pictures(4)]
    found = dynprune.compact(Whole(), {"image": torch.zeros(1, 3, 32, 32)}, data, "macs=0.5", tune=0, **QUICK)
    assert not found.left and found.model({"image": data[0]["image"]})["out"].shape == (16, 4, 32, 32)


def test_batches_of_any_structure_are_joined_and_cut():
    x, ids = torch.arange(12.0).view(6, 2), torch.arange(6)
    batch = (x, {"ids": ids, "flag": True, "table": torch.ones(3)})
    whole = joined([part_of(batch, 0, 2), part_of(batch, 2, 6)])
    assert torch.equal(whole[0], x) and torch.equal(whole[1]["ids"], ids) and whole[1]["flag"] is True
    assert whole[1]["table"].shape == (3,) and count_of(whole) == 6
    images = [torch.zeros(3, size, size) for size in (8, 9, 10)]
    reader = Reader(([torch.zeros(3, 8, 8)],))
    inputs = reader((images, "targets"))
    assert reader.listed(inputs) and count_of(inputs, True) == 3
    assert len(joined([inputs, inputs], True)[0]) == 6 and len(part_of(inputs, 1, 3, True)[0]) == 2
    by_torchvision = reader((tuple(images), ("targets",) * 3))  # tuple(zip(*batch)), as its references collate
    assert isinstance(by_torchvision[0], list) and reader.listed(by_torchvision)
    assert count_of(by_torchvision, reader.listed(by_torchvision)) == 3
    levels = Reader(([torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 4, 4)],))
    assert not levels.listed(([torch.zeros(5, 3, 8, 8), torch.zeros(5, 3, 4, 4)],))


def test_frozen_layers_stay_and_a_network_loaded_to_be_used_is_tuned():
    torch.manual_seed(0)
    data = pictures(4)
    model = UNet()
    model.last[2].weight.requires_grad_(False)
    found = dynprune.compact(model, data[0][0][:1], data, "macs=0.5", tune=0.3, **QUICK)
    kept = found.graph.kept(found.selection)["last.2.weight", 1]
    assert (
        torch.equal(found.model.last[2].weight, model.last[2].weight[:, kept]) and "is frozen" in found.left["last.2"]
    )
    model.requires_grad_(False)
    found = dynprune.compact(model, data[0][0][:1], data, "macs=0.5", loss=of_masks, tune=0.3, **QUICK)
    assert found.tune_steps > 0 and not found.left
    assert not any(value.requires_grad or value.grad is not None for value in found.model.parameters())
