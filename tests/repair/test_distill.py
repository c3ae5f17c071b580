"""Distillation: the loss, the time, and that it learns."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dynprune.repair.distill import ENOUGH, RATE, Lesson, Memory, of_labels, peak_of, rate_at, tune
from dynprune.repair.says import divergence
from dynprune.runs.config import CompactConfig


def test_divergence_is_zero_for_equals_and_has_the_gradient_of_soft_cross_entropy():
    scores, teacher = torch.randn(5, 4, requires_grad=True), torch.randn(5, 4)
    assert float(divergence(teacher, teacher)) == 0
    (gradient,) = torch.autograd.grad(divergence(scores, teacher, 2.0), scores)
    expected = 2.0 * (F.softmax(scores / 2, 1) - F.softmax(teacher / 2, 1)) / 5
    torch.testing.assert_close(gradient, expected)


def test_labels_count_for_their_share_and_may_be_absent():
    x, labels = torch.randn(5, 6), torch.tensor([0, 1, 2, 3, 0])
    narrow, teacher = nn.Linear(6, 4), nn.Linear(6, 4)
    told = divergence(narrow(x), teacher(x))
    lesson = Lesson(
        teacher,
        lambda model, batch: model(batch[0]),
        own=lambda output, batch: of_labels(output, batch[1]),
        weight=0.75,
    )
    expected = 0.75 * told + 0.25 * F.cross_entropy(narrow(x), labels)
    torch.testing.assert_close(lesson(narrow, (x, labels))[0], expected)
    assert torch.equal(lesson(narrow, (x, None))[0], told)


def test_what_was_said_of_an_image_is_not_asked_again():
    torch.manual_seed(0)
    images, labels = torch.randn(20, 6), torch.randint(0, 4, (20,))
    narrow, teacher, asked = nn.Linear(6, 4), nn.Linear(6, 4), []
    teacher.register_forward_hook(lambda _module, given, _output: asked.append(len(given[0])))
    ways = dict(run=lambda model, batch: model(batch[0]), own=lambda output, batch: of_labels(output, batch[1]))
    knows, forgets = Lesson(teacher, **ways, memory=Memory(20)), Lesson(teacher, **ways)
    knows.quick = teacher  # nothing is to be merged
    for rows, new in (([3, 1, 7], 3), ([1, 2, 3], 1), ([7, 7, 1], 0), ([9, 9, 4], 3)):
        rows, asked[:] = torch.tensor(rows), []
        batch = images[rows], labels[rows], rows
        loss = knows(narrow, batch)[0]
        assert sum(asked) == new
        torch.testing.assert_close(loss, forgets(narrow, batch[:2])[0])


def test_the_rate_rises_and_falls_to_nothing():
    rates = [rate_at(done / 100, 1.0) for done in range(101)]
    assert rates[0] == 0 and rates[100] == 0 and rates.index(max(rates)) == 20 and max(rates) == 0.8
    assert rates[:21] == sorted(rates[:21]) and rates[20:] == sorted(rates[20:], reverse=True)


def test_few_steps_get_a_lower_rate_and_a_rate_that_is_given_holds():
    assert peak_of(None, RATE, 1000) == RATE and peak_of(None, RATE, ENOUGH / 2) == RATE / 2
    assert peak_of(0.5, RATE, 3) == 0.5
    assert CompactConfig().tune_lr == 0  # auto

    class Far(nn.Module):
        """Of one weight, which each step moves by the rate."""

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, x):
            return 1000 + self.weight * x

    def moved(seconds, **options):
        narrow, ticks = Far(), itertools.count()
        lesson = Lesson(narrow, lambda model, x: model(x), own=lambda output, _: output.mean(), weight=0.0)
        tune(narrow, lesson, itertools.repeat(torch.ones(4, 1)), seconds, clock=lambda: float(next(ticks)), **options)
        return -float(narrow.weight.detach())

    few, many = moved(20.0), moved(400.0)
    assert 0 < few < 0.3 * moved(20.0, lr=RATE) and many == pytest.approx(moved(400.0, lr=RATE), rel=0.02)
    assert moved(400.0, most=RATE / 10) < 0.2 * many


def test_tuning_learns_from_the_teacher_alone_and_stops_in_time():
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    narrow, before = copy.deepcopy(teacher), copy.deepcopy(teacher.state_dict())
    with torch.no_grad():
        for parameter in narrow.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    images = [(torch.randn(64, 6), None) for _ in range(4)]
    far = divergence(narrow(images[0][0]), teacher(images[0][0]))
    ticks, rates = itertools.count(), []
    steps = tune(
        narrow,
        Lesson(teacher, lambda model, batch: model(batch[0])),
        itertools.cycle(images),
        400.0,
        report=lambda now, loss, step: rates.append(now),
        clock=lambda: float(next(ticks)),
    )
    assert steps == len(rates) and rates[-1] <= 401 and not narrow.training
    assert divergence(narrow(images[0][0]), teacher(images[0][0])) < 0.1 * far
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
