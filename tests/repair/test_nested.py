"""A narrow network inside of a wide one: in torch, where both learn at once, and in the ONNX graph that shares them."""

import itertools

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import inliner, numpy_helper
from torch import nn

import dynprune
from dynprune.cascades.graph import joined
from dynprune.files.nested import wider
from dynprune.files.onnxfile import macs_in, open_session, run_all
from dynprune.repair.nested import Nested
from dynprune.repair.scores import scores_layer
from dynprune.structure.surgery import slim
from dynprune.structure.tracing import trace
from dynprune.zoo import build

SIZES = {"resnet20": 16}  # others: 32 pixels


def settled(model):
    """As if it had been trained: BatchNorms are unlike one another, and scores unlike too."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0, 0.3)
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.running_mean, 0, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0, 0.1)
    return model.eval()


class Odd(nn.Module):
    """Much in one: a transposed convolution, PReLU, a gate of the channels, a concatenation, a flattened map."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 12, 3, 2, 1)
        self.norm = nn.BatchNorm2d(12)
        self.slope = nn.PReLU(12)
        self.deep = nn.Conv2d(12, 12, 3, 1, 1, groups=12)
        self.squeeze, self.excite = nn.Conv2d(12, 8, 1), nn.Conv2d(8, 12, 1)
        self.beside = nn.Conv2d(12, 6, 3, 1, 1, bias=False)
        self.up = nn.ConvTranspose2d(18, 10, 2, 2)
        self.scale = nn.Parameter(torch.rand(10, 1, 1))
        self.hidden = nn.Linear(10 * 16, 14)
        self.classifier = nn.Linear(14, 5)

    def forward(self, x):
        x = self.deep(self.slope(self.norm(self.first(x))))
        x = x * torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        x = torch.cat([F.avg_pool2d(x, 3, 1, 1), self.beside(x)], 1)
        x = F.max_pool2d(F.hardswish(self.up(x)) * self.scale, 8)
        return self.classifier(F.relu(self.hidden(x.flatten(1))))


def along(dimensions):
    """Convolutions over so many dimensions, with a number for each channel between them."""
    conv, pool = getattr(nn, f"Conv{dimensions}d"), getattr(nn, f"AdaptiveAvgPool{dimensions}d")
    norm = getattr(nn, f"BatchNorm{dimensions}d")
    layers = [conv(3, 12, 3), norm(12), nn.PReLU(12), conv(12, 12, 3, groups=12), nn.ELU(), conv(12, 10, 3), nn.ReLU()]
    return nn.Sequential(
        *layers, pool(1), nn.Flatten(), nn.Linear(10, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 5)
    )


def pair(model, images, seed=0, part=0.5):
    """A network, chosen at random, inside of a wide one."""
    graph, rng = trace(model, images[:2]), np.random.default_rng(seed)
    arms = {name: group.arms for name, group in graph.groups.items()}
    selection = {name: np.sort(rng.permutation(count)[: max(1, round(count * part))]) for name, count in arms.items()}
    kept = graph.kept(selection)
    head = scores_layer(model, (images[:2],))
    return Nested(model, slim(model, kept).eval(), kept, head), head


def written(model, images, path):
    dynprune.export(model, (images[:2],), path)
    return onnx.load(path)


@pytest.mark.parametrize("name", ["resnet20", "vgg16", "odd", "torchvision:mobilenet_v2"])
def test_one_graph_holds_both_and_computes_the_inner_one_once(name, tmp_path):
    torch.manual_seed(0)
    size = SIZES.get(name, 32)
    images = torch.randn(7, 3, size, size) * torch.linspace(0.2, 3, 7).view(-1, 1, 1, 1)  # so that they differ
    model = settled(Odd() if name == "odd" else build(name, 10, 0, size=(3, size, size)))
    nested, _ = pair(model, images)
    protos = [written(own, images, tmp_path / f"{i}.onnx") for i, own in enumerate((nested.narrow, nested.wide))]
    more = wider(*(inliner.inline_local_functions(proto) for proto in protos), "p")
    inner, outer = map(macs_in, protos)
    assert more is not None and 0 < more.macs < outer - inner  # what reads channels that it must not is left out, too
    alone = np.stack(
        [run_all(open_session(tmp_path / f"{i}.onnx"), feed(tmp_path / f"{i}.onnx", images))[0] for i in (0, 1)]
    )
    assert np.abs(alone[0] - alone[1]).max() > 1e-3  # they say different things
    chances = torch.from_numpy(alone[0]).softmax(1).sort(1).values
    margin = float((chances[:, -1] - chances[:, -2]).median())
    session = open_session(joined(protos, [margin], {}))
    scores, step = run_all(session, {session.get_inputs()[0].name: images.numpy()})
    assert 0 < step.sum() < len(step)  # some go on
    expected = alone[step, np.arange(len(step))]
    assert np.abs(scores - expected).max() < 1e-4 * np.abs(expected).max()


def feed(path, images):
    return {open_session(path).get_inputs()[0].name: images.numpy()}


def test_weights_alone_say_whether_one_lies_in_the_other(tmp_path):
    torch.manual_seed(0)
    images = torch.randn(4, 3, 16, 16)
    model = settled(build("resnet20", 10, 0, size=(3, 16, 16)))
    nested, _ = pair(model, images)
    protos = [
        inliner.inline_local_functions(written(own, images, tmp_path / f"{i}.onnx"))
        for i, own in enumerate((nested.narrow, nested.wide, model))
    ]
    assert wider(protos[0], protos[1], "p")
    assert wider(protos[0], protos[2], "p") is None  # of the network that it was cut from, channels see all others
    for place in (2, len(protos[1].graph.initializer) // 2):
        other = onnx.ModelProto()
        other.CopyFrom(protos[1])
        names = {node.input[1] for node in other.graph.node if node.op_type == "Conv"}
        tensor = [own for own in other.graph.initializer if own.name in names][min(place, len(names) - 1)]
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1.001), tensor.name))
        assert wider(protos[0], other, "p") is None


@pytest.mark.parametrize("dimensions", [1, 3])
def test_sequences_and_volumes_can_lie_in_one_another_too(dimensions, tmp_path):
    torch.manual_seed(0)
    values = torch.randn(6, 3, *[9] * dimensions)
    nested, _ = pair(settled(along(dimensions)), values)
    protos = [written(own, values, tmp_path / f"{i}.onnx") for i, own in enumerate((nested.narrow, nested.wide))]
    session = open_session(joined(protos, [2.0], {}))  # all go on
    scores, step = run_all(session, {session.get_inputs()[0].name: values.numpy()})
    assert wider(*(inliner.inline_local_functions(proto) for proto in protos), "p") and step.all()
    expected = nested.wide(values).detach().numpy()
    assert np.abs(scores - expected).max() < 1e-4 * np.abs(expected).max()


def test_other_settings_are_another_network(tmp_path):
    torch.manual_seed(0)
    images = torch.randn(2, 3, 16, 16)
    nested, _ = pair(settled(build("resnet20", 10, 0, size=(3, 16, 16))), images)
    protos = [written(own, images, tmp_path / f"{i}.onnx") for i, own in enumerate((nested.narrow, nested.wide))]
    narrow, wide = (inliner.inline_local_functions(proto) for proto in protos)
    assert wider(narrow, wide, "p")
    convolution = next(node for node in wide.graph.node if node.op_type == "Conv")
    next(own for own in convolution.attribute if own.name == "pads").ints[:] = [0, 0, 2, 2]
    assert wider(narrow, wide, "p") is None


def mixed(batches, nested, steps, rate=0.05):
    optimizer = torch.optim.SGD(nested.parameters(), rate, 0.9, weight_decay=5e-4)
    nested.train()
    for images, labels in itertools.islice(batches, steps):
        optimizer.zero_grad()
        F.cross_entropy(nested(images), torch.cat([labels, labels])).backward()
        optimizer.step()
        nested.settle()


@pytest.mark.parametrize("name", ["resnet20", "odd"])
def test_both_learn_in_one_pass_and_one_stays_inside(name, tmp_path):
    torch.manual_seed(0)
    images = torch.randn(64, 3, 16 if name == "resnet20" else 32, 16 if name == "resnet20" else 32)
    labels = torch.arange(64) % 5
    model = settled(Odd() if name == "odd" else build(name, 10, 0, size=(3, 16, 16)))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    nested, head = pair(model, images)
    start = nested.narrow.get_submodule(head).weight.clone()
    mixed(itertools.repeat((images, labels)), nested, 5)
    narrow = nested.hand_over()
    nested.eval()
    wide_says, narrow_says = nested(images).chunk(2)
    assert torch.allclose(narrow(images), narrow_says, atol=1e-4 * float(narrow_says.detach().abs().max()))
    assert torch.allclose(nested.wide(images), wide_says)
    assert not torch.equal(narrow.get_submodule(head).weight, start)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())  # untouched
    protos = [
        inliner.inline_local_functions(written(own, images, tmp_path / f"{i}.onnx"))
        for i, own in enumerate((narrow, nested.wide))
    ]
    assert wider(*protos, "p")
