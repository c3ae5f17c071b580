"""The last layer, refitted to the scores: closer on images that it did not see, and found where there is one."""

import pytest
import torch
from torch import nn

from dynprune.repair.says import distance_between
from dynprune.repair.scores import refit_scores, scores_layer


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 4), nn.Linear(8, 3)

    def forward(self, x):
        x = self.body(x).relu()
        return self.first(x), self.second(x)


@pytest.mark.parametrize("bias", [True, False])
def test_scores_come_closer_on_images_that_were_not_fitted(bias):
    torch.manual_seed(0)
    untouched = nn.Sequential(nn.Linear(20, 40), nn.ReLU(), nn.Linear(40, 5, bias=bias)).eval()
    untouched[2].weight.data *= 4
    narrow = nn.Sequential(nn.Linear(20, 12), nn.ReLU(), nn.Linear(12, 5, bias=bias)).eval()
    narrow[0].weight.data, narrow[0].bias.data = untouched[0].weight.data[:12].clone(), untouched[0].bias.data[:12]
    narrow[2].weight.data = untouched[2].weight.data[:, :12].clone()
    fitted, other = torch.randn(600, 20), torch.randn(600, 20)
    with torch.no_grad():
        said, wanted = untouched(fitted), untouched(other)
        before = distance_between([narrow(other)], [wanted])
        first = narrow[0].weight.clone()
        refit_scores(narrow, "2", [(part,) for part in fitted.split(100)], said)
        assert distance_between([narrow(other)], [wanted]) < 0.7 * before
    assert torch.equal(narrow[0].weight, first) and (narrow[2].bias is not None) == bias


def test_a_layer_that_is_right_already_stays():
    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Linear(6, 3)).eval(), torch.randn(200, 6)
    before, said = model[0].weight.clone(), model(inputs).detach()
    refit_scores(model, "0", [(inputs,)], said)
    assert torch.allclose(model[0].weight, before, atol=1e-5)


def test_only_a_layer_that_makes_the_scores_counts():
    x = torch.randn(2, 6)
    assert scores_layer(TwoHeads(), (x,)) == "first"
    assert scores_layer(nn.Sequential(nn.Linear(6, 3), nn.Softmax(1)), (x,)) is None
    assert scores_layer(nn.Sequential(nn.Linear(6, 1)), (x,)) is None
    same = nn.Linear(6, 6)
    assert scores_layer(nn.Sequential(same, same), (x,)) is None
