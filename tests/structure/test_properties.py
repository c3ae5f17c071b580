"""Random networks, random removals: the masked original and the compact copy agree, whatever is combined."""

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from dynprune import trace
from dynprune.structure.surgery import slim
from dynprune.structure.tracing import masked, random_selection
from tests.models import perturb

EXACT = 1e-9  # float64


class Random(nn.Module):
    """A chain of blocks; sizes in `forward` come from shapes, as in most code."""

    def __init__(self, blocks, flat):
        super().__init__()
        self.kinds, self.flat = [kind for kind, _ in blocks], flat
        self.parts = nn.ModuleList()
        c = 8
        self.stem = nn.Conv2d(3, c, 3, padding=1)
        for kind, n in blocks:
            part, c = make(kind, n, c)
            self.parts.append(part)
        self.head = nn.Linear(c * 4 if flat else c, 5)

    def forward(self, x):
        x = self.stem(x)
        for kind, part in zip(self.kinds, self.parts):
            x = apply(kind, part, x)
        x = F.adaptive_avg_pool2d(x, 2).flatten(1) if self.flat else x.mean((2, 3))
        return self.head(x)


def make(kind, n, c):
    """Layers of one block and the channels it gives; n is a small number that the block uses as it likes."""
    out = 4 * n
    if kind == "conv":
        return nn.ModuleList([nn.Conv2d(c, out, 3, padding=1, bias=n % 2 == 0), nn.BatchNorm2d(out)]), out
    if kind == "residual":
        return nn.ModuleList([nn.Conv2d(c, out, 1), nn.BatchNorm2d(out), nn.Conv2d(out, c, 3, padding=1)]), c
    if kind == "concat":
        return nn.ModuleList([nn.BatchNorm2d(c), nn.Conv2d(c, out, 3, padding=1)]), c + out
    if kind == "split":
        return nn.ModuleList([nn.Conv2d(c // 2, out, 1)]), out + c - c // 2
    if kind == "partial":
        return nn.ModuleList([nn.Conv2d(c, out, 1), nn.Conv2d(out // 2, out // 2, 3, padding=1)]), out
    if kind == "shuffle":
        return nn.ModuleList(), c
    if kind == "depthwise":
        m = 1 + n % 2
        return nn.ModuleList([nn.Conv2d(c, m * c, 3, padding=1, groups=c), nn.BatchNorm2d(m * c)]), m * c
    if kind == "grouped":
        g = 4 if c % 4 == 0 else 1
        return nn.ModuleList([nn.Conv2d(c, out, 3, padding=1, groups=g)]), out
    if kind == "excite":
        return nn.ModuleList([nn.Linear(c, out), nn.Linear(out, c)]), c
    assert kind == "shared"
    return nn.ModuleList([nn.Conv2d(c, c, 3, padding=1), nn.PReLU(c)]), c


def apply(kind, part, x):
    n, c, h, w = x.shape
    if kind == "conv":
        return F.relu(part[1](part[0](x)))
    if kind == "residual":
        return x + part[2](F.relu(part[1](part[0](x))))
    if kind == "concat":
        return torch.cat([x, part[1](F.relu(part[0](x)))], 1)
    if kind == "split":
        a, b = x.split([c // 2, c - c // 2], 1)
        return torch.cat([F.silu(part[0](a)), b], 1)
    if kind == "partial":
        a, b = part[0](x).chunk(2, 1)
        return torch.cat([a, torch.tanh(part[1](b))], 1)
    if kind == "shuffle":
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w) if c % 2 == 0 else x
    if kind == "depthwise":
        return part[1](part[0](x))
    if kind == "grouped":
        return F.gelu(part[0](x))
    if kind == "excite":
        return x * torch.sigmoid(part[1](F.relu(part[0](x.mean((2, 3))))))[:, :, None, None]
    return part[1](part[0](F.relu(part[0](x))))


blocks = st.lists(
    st.tuples(
        st.sampled_from(
            ["conv", "residual", "concat", "split", "partial", "shuffle", "depthwise", "grouped", "excite", "shared"]
        ),
        st.integers(1, 4),
    ),
    min_size=1,
    max_size=5,
)


@settings(max_examples=500, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(blocks, st.booleans(), st.sampled_from([0.25, 0.5, 0.75]), st.integers(0, 10))
def test_removal_is_exact_on_random_networks(chain, flat, fraction, seed):
    torch.manual_seed(seed)
    model = perturb(Random(chain, flat), seed)
    x = torch.randn(2, 3, 4, 4)
    graph = trace(model, x[:1])
    selection = random_selection(graph, fraction, seed)
    rng = np.random.default_rng(seed)
    shuffled = {name: rng.permutation(arms) for name, arms in selection.items()}  # slots in any order
    with torch.no_grad():
        expected = masked(model, graph, selection).double()(x.double())
        small = slim(model, graph.kept(shuffled)).double()
        found = small(x.double())
    assert not any(group.mixed_by for group in graph)
    assert float((expected - found).abs().max()) <= EXACT * float(expected.abs().max())
    widths = {name: len(arms) for name, arms in selection.items()}
    assert graph.params(widths) == sum(p.numel() for p in small.parameters())


def test_most_random_networks_have_something_to_remove():
    rng = np.random.default_rng(0)
    kinds = ["conv", "residual", "concat", "split", "partial", "shuffle", "depthwise", "grouped", "excite", "shared"]
    shares = []
    for _ in range(30):
        model = Random([(kinds[rng.integers(10)], int(rng.integers(1, 5))) for _ in range(4)], bool(rng.integers(2)))
        graph = trace(model, torch.zeros(1, 3, 4, 4))
        shares.append(graph.params({group.name: 1 for group in graph}) / graph.params({}))
    assert np.median(shares) < 0.5
