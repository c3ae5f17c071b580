"""Gates: what a closed gate means, whichever way the network is run."""

import numpy as np
import pytest
import torch

import dynprune
from dynprune import zoo
from dynprune.execution.saliency import magnitude
from dynprune.gates import estimators, supervised
from dynprune.gates.gating import OPEN, Choices, Gate, GatedNetwork, gateable, units_of
from dynprune.gates.stats import Observed, bits, frozen_pattern, information
from dynprune.structure.surgery import slim
from tests.models import Grouped, Multiplied, Tiny, perturb

NETWORKS = {
    "tiny": (Tiny, 8, 4),
    "tiny, every channel": (Tiny, 8, 1),
    "grouped": (Grouped, 8, 1),
    "multiplied": (Multiplied, 8, 1),
    "vgg16": (lambda: zoo.build("vgg16", 10, 0), 32, 16),
    "densenet40": (lambda: zoo.build("densenet40", 10, 0), 16, 16),
    "resnet18": (lambda: zoo.build("torchvision:resnet18", 10, 0), 32, 0),
    "mobilenet_v2": (lambda: zoo.build("torchvision:mobilenet_v2", 10, 0), 32, 8),
    "alexnet": (lambda: zoo.build("torchvision:alexnet", 10, 0), 64, 16),
}


def gated(name):
    factory, side, block = NETWORKS[name]
    network, example = perturb(factory()), torch.randn(1, 3, side, side)
    return GatedNetwork(network, dynprune.trace(network, example), example, block=block).eval(), torch.randn(
        5, 3, side, side, generator=torch.Generator().manual_seed(1)
    )


def deciding(name):
    """A gated network whose gates differ between images."""
    model, images = gated(name)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        for predictor in model.predictors:
            predictor.spread.bias.normal_(std=0.1)
            predictor.spread.weight.fill_(1.0)
            predictor.norm.momentum = predictor.spread.momentum = 1.0
        model.predictors.train()
        model.run(images, lambda scores, _: torch.ones_like(scores))
        model.eval()
    return model, images


def replay(draws, image=slice(None)):
    left = iter(draws)
    return lambda scores, site: next(left)[image]


def half(draws, seed=0):
    rng = torch.Generator().manual_seed(seed)

    def choose(scores, site):
        draws.append((torch.rand(scores.shape, generator=rng) < 0.5).float())
        return draws[-1]

    return choose


@torch.no_grad()
@pytest.mark.parametrize("name", NETWORKS)
def test_masked_skipped_and_compact_agree_and_cost_what_is_counted(name):
    model, images = gated(name)
    draws = []
    output, choices = model.run(images, half(draws))
    shares = model.executed_share(choices)
    compacted = 0
    for i, image in enumerate(images.split(1)):
        skipped = model.run(image, replay(draws, slice(i, i + 1)), skip=True)[0]
        assert float((skipped - output[i]).abs().max()) < 1e-5 * float(output.abs().max())
        selection = {
            gate.group: np.flatnonzero(opened[i].repeat_interleave(torch.tensor(gate.sizes)).numpy())
            for gate, opened in zip(choices.gates, choices.open)
        }
        macs = model.graph.macs({group: len(arms) for group, arms in selection.items()})
        assert float(shares[i]) * model.dense_macs == pytest.approx(macs + model.gate_macs, abs=1)
        if all(len(arms) for arms in selection.values()):
            small = slim(model.network, model.graph.kept(selection))(image)
            assert float((small - output[i]).abs().max()) < 1e-5 * float(output.abs().max())
            compacted += 1
    assert compacted or name in ("densenet40", "resnet18", "tiny")  # gates of whole layers leave some empty


@torch.no_grad()
def test_an_image_alone_takes_the_path_that_skips_and_gives_the_same():
    model, images = deciding("tiny")
    together = model(images)
    assert torch.allclose(torch.cat([model(image) for image in images.split(1)]), together, atol=1e-5)
    # gates differ between images
    assert len({tuple(opened.tolist()) for opened in torch.cat(model.run(images, model.threshold)[1].open, 1)}) > 1


@torch.no_grad()
def test_the_path_that_skips_multiplies_as_little_as_is_counted():
    """Counted by PyTorch: a mask over full work would show."""
    from torch.utils.flop_counter import FlopCounterMode

    model, images = gated("vgg16")
    draws = []
    choices = model.run(images[:1], half(draws))[1]
    with FlopCounterMode(display=False) as counter:
        model.run(images[:1], replay(draws), skip=True)
    counted = counter.get_total_flops() / 2
    shapes_only = model.dense_macs  # convolutions on the meta device ask for shapes; they are not executed, but counted
    assert counted - shapes_only < float(model.executed_share(choices)) * model.dense_macs < 0.6 * model.dense_macs


def test_units_and_what_can_be_gated():
    assert units_of(40, 16) == (16, 16, 8) and units_of(12, 16) == (12,) and units_of(40, 0) == (40,)
    model, _ = gated("resnet18")
    assert [gate.group for gate in model.gates] == [
        f"layer{stage}.{block}.conv1" for stage in range(1, 5) for block in (0, 1)
    ]
    assert not {"conv1", "layer2.0.conv2"} & gateable(model.graph).keys()  # the first layer, and the stream of a stage
    assert not any(gate.cuts for gate in model.gates)  # a residual block can be skipped


def test_whole_layers_are_gated_where_the_network_can_do_without_them():
    network, example = zoo.build("vgg16", 10, 0).eval(), torch.randn(1, 3, 32, 32)
    assert {gate.sizes[0] for gate in GatedNetwork(network, dynprune.trace(network, example), example).gates} == {16}
    model, _ = gated("resnet18")
    assert [gate.sizes for gate in model.gates] == [(64,), (64,), (128,), (128,), (256,), (256,), (512,), (512,)]


def test_a_group_that_carries_everything_keeps_its_best_unit():
    model, images = gated("vgg16")
    assert all(gate.cuts for gate in model.gates)
    with torch.no_grad():
        output, choices = model.run(images, lambda scores, _: torch.zeros_like(scores))
    assert all((opened.sum(1) == 1).all() for opened in choices.open)
    assert float((output[0] - output[1]).abs().max()) > 0
    assert model.least_share == pytest.approx(float(model.executed_share(choices).min()), rel=0.05)


def test_probabilities_give_the_expected_cost_with_a_gradient():
    model, images = gated("tiny")
    choices = model.run(images, lambda scores, _: torch.ones_like(scores))[1]
    units = [torch.full_like(opened, 0.5).requires_grad_() for opened in choices.open]
    share = model.executed_share(choices, units).mean()
    share.backward()
    assert float(share.detach()) < float(model.executed_share(choices).mean()) and all(
        (own.grad > 0).all() for own in units
    )


def test_small_units_of_a_trained_network_are_the_first_to_close():
    model, _ = gated("tiny, every channel")
    sizes = magnitude(dict(model.network.named_parameters()), model.graph)
    model.begin_with(sizes)
    for site in model.sites.values():
        biases = iter(
            model.predictors[model.predictor_of[site.op.weight]].spread.bias.split(
                [len(gate.sizes) for gate in site.decides]
            )
            if site.decides
            else ()
        )
        for gate in site.decides:
            first = next(biases)
            assert torch.equal(
                torch.argsort(first), torch.argsort(sizes[gate.group])
            ) and first.mean().item() == pytest.approx(OPEN, abs=1e-5)
    whole, _ = gated("resnet18")  # a layer alone in its group has none to be compared with
    whole.begin_with(magnitude(dict(whole.network.named_parameters()), whole.graph))
    alone = [gate.group for gate in whole.gates if len(gate.sizes) == 1]
    assert alone and all(
        torch.allclose(whole.predictors[whole.predictor_of[site.op.weight]].spread.bias, torch.tensor(OPEN))
        for site in whole.sites.values()
        if [gate.group for gate in site.decides] == alone[:1]
    )


def test_a_network_without_gateable_channels_is_refused():
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(8, 2)
    )
    with pytest.raises(dynprune.errors.DynpruneError, match="No channel of this network can be gated"):
        GatedNetwork(network, dynprune.trace(network, torch.randn(1, 3, 8, 8)), torch.randn(1, 3, 8, 8))


# -- estimators --------------------------------------------------------------------------------------------------------


def test_reinforce_raises_what_was_better_than_expected():
    """One gate, two images: opening it for the first lost less than expected, for the second more. By hand: the
    gradient of the loss in a logit is -advantage * (open - probability) / 2."""
    logits = torch.zeros(2, 1, requires_grad=True)
    loss = estimators.reinforce([logits], [torch.tensor([[1.0], [1.0]])], torch.tensor([0.4, -0.4]))
    loss.backward()
    assert logits.grad[:, 0].tolist() == pytest.approx([-0.4 * 0.5 / 2, 0.4 * 0.5 / 2])


def known_loss(opened):
    """Of two gates, for each outcome."""
    return (opened[:, 0] - 2 * opened[:, 1]) ** 2


def known_gradient(one, other):
    """The derivative of its expectation in two logits."""
    logits = torch.tensor([one, other], requires_grad=True)
    p, q = torch.sigmoid(logits)
    (p * (1 - q) * 1 + (1 - p) * q * 4 + p * q * 1).backward()
    return logits.grad


def test_reinforce_estimates_the_true_gradient():
    """Two gates with a known loss for each outcome: the mean of many estimates is the derivative of the expected
    loss."""
    torch.manual_seed(0)
    logits = torch.tensor([[0.3, -0.5]]).expand(200_000, 2).clone().requires_grad_()
    opened = estimators.sample(logits)
    estimators.reinforce([logits], [opened], -known_loss(opened) + 0.7).backward()
    assert torch.allclose(logits.grad.sum(0), known_gradient(0.3, -0.5), atol=0.01)


def test_two_samples_estimate_it_too_with_half_of_the_variance():
    torch.manual_seed(0)
    one = torch.tensor([[0.3, -0.5]]).expand(200_000, 2).clone().requires_grad_()
    other = one.detach().clone().requires_grad_()
    opened = [estimators.sample(own) for own in (one, other)]
    losses = [known_loss(own) for own in opened]
    estimators.leave_one_out(([one], [other]), [[own] for own in opened], losses).backward()
    both = len(one) * (one.grad + other.grad)
    assert torch.allclose(both.mean(0), known_gradient(0.3, -0.5), atol=0.01)
    alone = (losses[0] - losses[1])[:, None] * (opened[0] - torch.sigmoid(one.detach()))  # one of the two
    assert (both.var(0) < 0.7 * alone.var(0)).all()


def test_gradients_of_gates_alone_leave_the_network_alone():
    model, images = gated("vgg16")
    output, choices = model.train().run(images, lambda scores, _: estimators.sample(scores), gates_alone=True)
    assert not output.requires_grad and all(own.requires_grad for own in choices.logits)
    estimators.reinforce(choices.logits, choices.open, torch.randn(len(images))).backward()
    assert all(value.grad is None for value in model.network.parameters())
    assert all(value.grad is not None for value in model.predictors.parameters() if value.ndim == 2)
    with torch.no_grad():
        assert not any(own.requires_grad for own in model.run(images, model.threshold)[1].logits)


def test_gumbel_gates_are_open_or_closed_and_pass_a_gradient():
    torch.manual_seed(0)
    logits = torch.full((10_000, 1), 1.0, requires_grad=True)
    opened = estimators.straight_through(logits)
    assert set(opened.detach().round(decimals=5).unique().tolist()) == {0.0, 1.0}
    assert float(opened.detach().mean()) == pytest.approx(float(torch.sigmoid(torch.tensor(1.0))), abs=0.02)
    opened.sum().backward()
    assert (logits.grad > 0).all()
    assert float(estimators.entropy([torch.zeros(2, 3)])) == pytest.approx(np.log(2))


# -- statistics --------------------------------------------------------------------------------------------------------


def test_information_of_gates_by_hand():
    labels = torch.tensor([0, 0, 1, 1])
    # knows the class; varies without; never varies
    opened = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 1.0], [0.0, 1.0, 1.0], [0.0, 0.0, 1.0]])
    assert information(opened, labels, 2).tolist() == pytest.approx([1.0, 0.0, 0.0], abs=1e-9)
    assert bits(opened.mean(0)).tolist() == pytest.approx([1.0, 1.0, 0.0], abs=1e-9)


@pytest.mark.parametrize("name", ["vgg16", "densenet40", "resnet18", "mobilenet_v2"])
def test_what_a_unit_is_worth_is_what_closing_it_a_little_changes(name):
    model, images = gated(name)
    model.network.double()
    images = images.double()
    scores_to_loss = lambda output: output.square().sum(1)  # noqa: E731
    choices, by_gate = supervised.worth(model, images, scores_to_loss)
    assert [own.shape for own in by_gate] == [(5, len(gate.sizes)) for gate in choices.gates]
    number = max(range(len(by_gate)), key=lambda own: float(by_gate[own].max()))
    unit = int(by_gate[number].max(0).values.argmax())
    name, small = choices.gates[number].group, 2.0**-12  # 1 less it is exact in float32

    def almost(scores, site):
        opened = torch.ones_like(scores)
        start = 0
        for gate in site.decides:
            if gate.group == name:
                opened[:, start + unit] -= small
            start += len(gate.sizes)
        return opened

    with torch.no_grad():
        whole, less = (
            scores_to_loss(model.run(images, choose)[0]) for choose in (lambda own, _: torch.ones_like(own), almost)
        )
    np.testing.assert_allclose(by_gate[number][:, unit], ((whole - less) / small).abs(), rtol=1e-2)


@pytest.mark.parametrize("name", ["vgg16", "densenet40", "resnet18"])
@pytest.mark.parametrize("share", [0.8, 0.45])
def test_answers_are_what_is_worth_most_within_the_share(name, share):
    model, images = gated(name)
    choices, by_gate = supervised.worth(model, images, lambda output: output.square().sum(1))
    wanted = supervised.answers(model, choices, by_gate, share)
    costs = supervised.unit_costs(model, choices)
    reached = float(model.executed_share(choices, wanted).mean())
    assert reached <= share and reached > share - 0.1
    worth = torch.cat([own.double() / cost for own, cost in zip(by_gate, costs)], 1)
    opened = torch.cat(wanted, 1) > 0
    assert worth[opened].min() > worth[~opened].max()
    # images may open as much as they need
    assert len(set(opened.sum(1).tolist())) > 1


def test_frozen_gates_cost_what_was_paid_and_do_not_look():
    model, images = gated("vgg16")
    draws = []
    with torch.no_grad():
        choices = model.run(images, half(draws))[1]
        seen = Observed(
            torch.zeros(5, dtype=torch.int64),
            torch.zeros(5, dtype=torch.int64),
            model.executed_share(choices),
            choices.open,
        )
        frozen = model.run(images, frozen_pattern(model, seen))[1]
    shares = model.executed_share(frozen)
    assert float(shares.std()) == 0 and float(seen.shares.mean()) <= float(shares[0]) < float(seen.shares.mean()) + 0.05


def test_widths_count_arms_of_open_units():
    choices = Choices([Gate("b", (2, 3))], [torch.zeros(1, 2)], [torch.tensor([[0.0, 1.0]])])
    assert choices.widths({"a": 0, "b": 1}, torch.tensor([7.0, 5.0])).tolist() == [[7.0, 3.0]]
