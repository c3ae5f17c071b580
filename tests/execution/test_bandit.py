import math

import torch

from dynprune.execution import bandit
from dynprune.execution.bandit import Bandit


def test_two_rounds_by_hand():
    """Three arms, two slots, c = 1."""
    state = Bandit.new(3)
    first = bandit.play(state, 2, 1.0)
    assert first.tolist() == [0, 1]  # none was played: all infinite, ties go to the lower arm
    bandit.update(state, first, torch.tensor([0.2, 0.8], dtype=torch.float64))
    second = bandit.play(state, 2, 1.0)
    # t = 2: arm 0 has 0.2 + sqrt(3 ln 2 / 2), arm 1 has 0.8 + the same, arm 2 was never played
    radius = math.sqrt(3 * math.log(2) / 2)
    index = bandit.upper_confidence(state.counts, state.means, 2, 1.0)
    assert index.tolist() == [0.2 + radius, 0.8 + radius, math.inf]
    assert second.tolist() == [1, 2]
    bandit.update(state, second, torch.tensor([0.4, 0.1], dtype=torch.float64))
    assert state.counts.tolist() == [1, 2, 1]
    torch.testing.assert_close(state.means, torch.tensor([0.2, 0.6, 0.1], dtype=torch.float64), rtol=0, atol=1e-12)
    # t = 3: 0.2 + sqrt(3 ln 3 / 2) = 1.484, 0.6 + sqrt(3 ln 3 / 4) = 1.508, 0.1 + sqrt(3 ln 3 / 2) = 1.384
    index = bandit.upper_confidence(state.counts, state.means, state.rounds + 1, 1.0)
    torch.testing.assert_close(index, torch.tensor([1.4837, 1.5077, 1.3837], dtype=torch.float64), rtol=0, atol=1e-4)
    assert bandit.play(state, 2, 1.0).tolist() == [0, 1]
    assert bandit.play(state, 1, 0.0).tolist() == [1]
    assert bandit.settle(state, 2).tolist() == [0, 1]


def test_every_arm_is_played_before_any_is_favoured():
    state, width = Bandit.new(10), 3
    for _ in range(math.ceil(10 / width)):
        arms = bandit.play(state, width, 0.1)
        assert len(set(arms.tolist())) == width
        bandit.update(state, arms, torch.linspace(1, 0, 10)[arms])
    assert state.counts.min() >= 1


def test_best_arms_win_in_the_long_run():
    state, rewards = Bandit.new(12), torch.linspace(0, 1, 12)
    for _ in range(300):
        arms = bandit.play(state, 4, 0.3)
        bandit.update(state, arms, rewards[arms])
    assert bandit.settle(state, 4).tolist() == [8, 9, 10, 11]


def test_settling_never_prefers_an_arm_that_was_not_played():
    state = Bandit.new(4)
    bandit.update(state, torch.tensor([2, 3]), torch.tensor([0.0, 0.0]))
    assert bandit.settle(state, 2).tolist() == [2, 3]


def test_random_selections_are_a_function_of_the_generator():
    one, other = (bandit.select_random(20, 5, torch.Generator().manual_seed(3)) for _ in range(2))
    assert one.tolist() == other.tolist() and len(set(one.tolist())) == 5
