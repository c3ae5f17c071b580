"""Input-dependent gates: per image, which channels of a network are computed.

Takes a network and its ChannelGraph; puts a small predictor in front of every layer that makes a group of arms. From
the layer's pooled input it decides which *units* (blocks of neighbouring arms) of the group to open for this image. An
arm that is closed is not computed, and no layer reads it: for each image the network is the compact network of its open
arms. So one table, the ChannelGraph, says what a gate closes, what that saves, and what must not be touched.

For training, gates multiply the inputs of the layers that read (nothing is saved then). A single image at inference
takes the other path: only open channels are gathered, convolved and put back, so that closed ones cost nothing.

The idea of gating feature maps per image, with weights learned by back-propagation and gates by REINFORCE, is that of
Waissman & Bar-Hillel, "Input-Dependently Feature-Map Pruning", ICANN 2018. Their formulas were not available to us:
what follows is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dynprune.budgets.allocation import CostModel
from dynprune.data.scores import logits
from dynprune.errors import DynpruneError
from dynprune.structure.channels import ChannelGraph
from dynprune.structure.record import AxisKey, Op
from dynprune.structure.rules import argument
from dynprune.structure.surgery import get_tensor
from dynprune.structure.tracing import evaluating

CONVOLUTIONS = {torch.conv1d, torch.conv2d, torch.conv3d, F.conv1d, F.conv2d, F.conv3d}
LINEAR = {F.linear}
KINDS = {"conv1d", "conv2d", "conv3d", "linear"}
SPLIT = 16  # arms per gate in a layer that must not be closed as a whole
SOFTENING = (
    0.01  # added to a pooled input's variance: one that is nearly always closed must not be blown up when it opens
)
SIZED = 1.0  # spread of the first logits over the units of a group of a trained network, by the size of its weights
OPEN, SPREAD = 2.0, 0.3  # mean and standard deviation over images of the gates' first logits: most are open


@dataclass(frozen=True)
class Channels:
    """Which gated arms lie along one dimension of a weight. groups: in order of first use; index: per position 0 for a
    channel without gate, else 1 + its arm in the concatenation of the groups' arms."""

    groups: tuple[str, ...]
    index: Tensor


@dataclass(frozen=True)
class Gate:
    """The units of one group. sizes: arms of each unit. cuts: closing all of them would cut the network in two, so the
    best one stays open."""

    group: str
    sizes: tuple[int, ...]
    cuts: bool = False


@dataclass(frozen=True)
class Site:
    """A weight whose inputs or outputs are gated. decides: the gates whose predictor stands before it."""

    op: Op
    inputs: Channels | None
    outputs: Channels | None
    decides: tuple[Gate, ...] = ()

    @property
    def units(self) -> int:
        return sum(len(gate.sizes) for gate in self.decides)


@dataclass
class Choices:
    """What was decided for a batch, gate by gate. logits, open: (batch, units) each; open holds 0 and 1."""

    gates: list[Gate] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    open: list[Tensor] = field(default_factory=list)

    def widths(self, order: dict[str, int], full: Tensor, units: list[Tensor] | None = None) -> Tensor:
        """Open arms per image and group, (batch, groups), differentiable. units: in place of `open`, such as
        probabilities."""
        units = self.open if units is None else units
        columns = {
            order[gate.group]: value @ torch.tensor(gate.sizes, dtype=value.dtype, device=value.device)
            for gate, value in zip(self.gates, units)
        }
        batch = len(units[0])
        return torch.stack(
            [columns[i] if i in columns else full[i].expand(batch).to(units[0].dtype) for i in range(len(full))], 1
        )


def gateable(graph: ChannelGraph) -> dict[str, str]:
    """Per group the weight in front of which its gate decides; groups that cannot be gated are absent.

    A gated group is made by one layer (not counting depthwise ones, and squeeze-and-excitation's, which work on one
    position) and read by convolutions and linear layers alone. The stream of a residual stage, which many layers add
    to, stays: its channels carry all blocks.
    """
    position: dict[str, int] = {}
    for number, op in enumerate(graph.ops):
        position.setdefault(op.weight, number)
    ops = {op.weight: op for op in graph.ops}
    found = {}
    for group in graph:
        makers = [
            tensor for tensor, dim in group.made if dim == 0 and tensor in ops and not is_depthwise(graph, ops[tensor])
        ]
        if len(makers) > 1:
            makers = [tensor for tensor in makers if ops[tensor].positions > 1]
        plain = all(dim == 1 and tensor in ops and ops[tensor].kind in KINDS for tensor, dim in group.reads)
        if group.mixed_by or len(makers) != 1 or ops[makers[0]].kind not in KINDS or not group.reads or not plain:
            continue
        first = position[makers[0]]
        # the first layer of all sees nothing but pixels
        if 0 < first < min(position[tensor] for tensor, _ in group.reads):
            found[group.name] = makers[0]
    return found


def is_depthwise(graph: ChannelGraph, op: Op) -> bool:
    return op.groups > 1 and graph.shapes[op.weight][1] == 1


def channels_along(graph: ChannelGraph, key: AxisKey, gated: dict[str, str]) -> Channels | None:
    """The gated arms along one axis; None without any."""
    if key not in graph.axes:
        return None
    axis, names = graph.axes[key], list(graph.groups)
    present = [names[number] for number in dict.fromkeys(axis.group.tolist()) if number >= 0 and names[number] in gated]
    if not present:
        return None
    index, start = np.zeros(axis.size, dtype=np.int64), 1
    for name in present:
        here = axis.group == names.index(name)
        index[here] = start + axis.arm[here]
        start += graph.groups[name].arms
    return Channels(tuple(present), torch.from_numpy(index))


def units_of(arms: int, block: int) -> tuple[int, ...]:
    """Arms of each unit; a block of 0 means the whole group."""
    block = block or arms
    return tuple(min(block, arms - start) for start in range(0, arms, block))


class Predictor(nn.Module):
    """Gates of one layer from its pooled input, (batch, channels) to logits (batch, units): one hidden layer between
    two normalisations.

    The second gives every unit's logit a variance over images from the start: gates whose logits differ too little
    between images soon ignore them, and become a static choice of channels.
    """

    def __init__(self, inputs: int, hidden: int, units: int):
        super().__init__()
        self.norm = nn.BatchNorm1d(inputs, eps=SOFTENING, affine=False)
        self.hidden, self.out = nn.Linear(inputs, hidden), nn.Linear(hidden, units, bias=False)
        self.spread = nn.BatchNorm1d(units)
        nn.init.constant_(self.spread.bias, OPEN)
        nn.init.constant_(self.spread.weight, SPREAD)

    def forward(self, pooled: Tensor) -> Tensor:
        return self.spread(self.out(F.relu(self.hidden(self.norm(pooled)))))

    @torch.no_grad()
    def folded(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Weight and bias of the two linear layers with the normalisations inside, as in eval mode."""
        (mean_before, before), (mean_after, after) = statistics(self.norm), statistics(self.spread)
        before, after = 1 / before, 1 / after
        first = self.hidden.weight * before
        second = self.out.weight * (after * self.spread.weight)[:, None]
        return (
            first,
            self.hidden.bias - first @ mean_before,
            second,
            self.spread.bias - mean_after * after * self.spread.weight,
        )


def statistics(norm: nn.BatchNorm1d) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation that a norm uses in eval mode."""
    assert norm.running_mean is not None and norm.running_var is not None, "the norms of gates keep statistics"
    return norm.running_mean, torch.sqrt(norm.running_var + norm.eps)


# logits of all units that a site decides, (batch, units), to what is opened, 0 or 1
Choose = Callable[[Tensor, Site], Tensor]


class GatedNetwork(nn.Module):
    """A network with gates. In eval mode a batch is masked, and a single image without gradients computes only what is
    open.

    shift: added to every logit at inference, so that the mean cost meets the target. dense_macs: of the ungated
    network, per image.
    """

    shift: Tensor

    def __init__(
        self,
        network: nn.Module,
        graph: ChannelGraph,
        example: Tensor,
        *,
        block: int = 0,
        hidden: int = 16,
        seed: int = 0,
        cuts: Collection[str] | None = None,
    ):
        """block: arms per gate; 0 gates whole groups, and blocks of 16 where the network cannot do without the group.
        cuts: the groups that carry everything, where they are known already."""
        super().__init__()
        self.network, self.graph, self.block, self.hidden = network, graph, block, hidden
        gated = gateable(graph)
        if not gated:
            raise DynpruneError("No channel of this network can be gated. See what it is made of: dynprune inspect.")
        self.place(gated, {name: Gate(name, units_of(graph.groups[name].arms, block)) for name in gated}, hidden, seed)
        cuts = self.find_cuts(example) if cuts is None else cuts
        self.place(
            gated,
            {
                name: Gate(
                    name, units_of(graph.groups[name].arms, block or (SPLIT if name in cuts else 0)), name in cuts
                )
                for name in gated
            },
            hidden,
            seed,
        )
        self.register_buffer("shift", torch.zeros(()))
        cost = CostModel(graph)
        self.cost, self.dense_macs = Cost(cost), int(cost.cost("macs", cost.arms))
        self.gate_macs = sum(gate_cost(graph, site, hidden) for site in self.sites.values() if site.decides)

    def place(self, gated: dict[str, str], gates: dict[str, Gate], hidden: int, seed: int) -> None:
        """Put fresh predictors before the layers that make these groups."""
        self.sites = find_sites(self.graph, gated, gates)
        deciding = [site for site in self.sites.values() if site.decides]
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.predictors = nn.ModuleList(
                Predictor(self.graph.shapes[site.op.weight][1] * site.op.groups, hidden, site.units)
                for site in deciding
            )
        self.predictor_of = {site.op.weight: number for number, site in enumerate(deciding)}

    @torch.no_grad()
    def begin_with(self, magnitudes: Mapping[str, Tensor]) -> None:
        """Of a trained network: units of small weights are the first to close. magnitudes: (arms,) per group,
        `saliency.magnitude`."""
        for site in self.sites.values():
            if not site.decides:
                continue
            means = [
                torch.stack([part.mean() for part in magnitudes[gate.group].split(gate.sizes)]) for gate in site.decides
            ]
            scores = torch.cat([(own - own.mean()) / own.std(correction=0).clamp(min=1e-12) for own in means])
            self.predictor(site).spread.bias.copy_(OPEN + SIZED * scores)

    def predictor(self, site: Site) -> Predictor:
        """The one that stands before a site's layer."""
        found = self.predictors[self.predictor_of[site.op.weight]]
        assert isinstance(found, Predictor)
        return found

    @property
    def gates(self) -> list[Gate]:
        return [gate for site in self.sites.values() for gate in site.decides]

    def forward(self, x: Tensor) -> object:
        return self.run(x, self.threshold, skip=len(x) == 1 and not self.training and not torch.is_grad_enabled())[0]

    def threshold(self, scores: Tensor, _site: Site) -> Tensor:
        return (scores + self.shift > 0).to(scores.dtype)

    def run(
        self, x: Tensor, choose: Choose, *, skip: bool = False, gates_alone: bool = False
    ) -> tuple[object, Choices]:
        """The network's output and what was decided. skip: compute only what is open, of a single image. gates_alone:
        gradients go back to the gates and not to the network."""
        mode = Gating(self, choose, skip, len(x), gates_alone)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not gates_alone), mode:
            output = self.network(x)
        return output, mode.choices

    def executed_share(self, choices: Choices, units: list[Tensor] | None = None) -> Tensor:
        """Multiply-accumulates of each image, the gates' own included, over those of the ungated network: (batch,),
        differentiable."""
        return (self.cost(choices, units) + self.gate_macs) / self.dense_macs

    @property
    def least_share(self) -> float:
        """What an image costs with as little open as possible."""
        units = [torch.tensor([[float(gate.cuts and i == 0) for i in range(len(gate.sizes))]]) for gate in self.gates]
        return float(self.executed_share(Choices(self.gates, units, units)))

    @property
    def most_share(self) -> float:
        """What an image costs that opens everything."""
        units = [torch.ones(1, len(gate.sizes)) for gate in self.gates]
        return float(self.executed_share(Choices(self.gates, units, units)))

    @torch.no_grad()
    def find_cuts(self, example: Tensor) -> list[str]:
        """The groups that carry everything: with all of their arms closed, the output no longer depends on the
        image."""
        images = torch.randn(2, *example.shape[1:], generator=torch.Generator().manual_seed(0))

        def spread(closed: str) -> float:
            """How far the outputs for two images lie apart with one group closed."""

            def choose(scores: Tensor, site: Site) -> Tensor:
                return torch.cat(
                    [torch.full((2, len(gate.sizes)), float(gate.group != closed)) for gate in site.decides], 1
                )

            first, second = logits(self.run(images, choose)[0]).float()
            return float((first - second).abs().max())

        with evaluating(self):
            whole = spread("")
            return [gate.group for gate in self.gates if spread(gate.group) <= 1e-4 * whole]


def find_sites(graph: ChannelGraph, gated: dict[str, str], gates: dict[str, Gate]) -> dict[str, Site]:
    """Per weight with gated channels, in order of execution, where they lie and which gates are decided there."""
    sites: dict[str, Site] = {}
    for op in graph.ops:
        if op.weight in sites or op.weight not in graph.shapes or op.kind not in KINDS:
            continue
        inputs, outputs = channels_along(graph, (op.weight, 1), gated), channels_along(graph, (op.weight, 0), gated)
        decides = tuple(gates[name] for name, weight in gated.items() if weight == op.weight)
        if inputs or outputs:
            sites[op.weight] = Site(op, inputs, outputs, decides)
    return sites


def gate_cost(graph: ChannelGraph, site: Site, hidden: int) -> int:
    """Multiply-accumulates of one predictor; pooling counts one for every value that it adds up."""
    inputs = graph.shapes[site.op.weight][1] * site.op.groups
    return inputs * int(np.prod(site.op.size)) + inputs * hidden + hidden * site.units


class Cost:
    """Multiply-accumulates per image from the open arms: `CostModel` as differentiable tensor operations."""

    def __init__(self, model: CostModel):
        self.order = {name: number for number, name in enumerate(model.names)}
        self.arms = torch.from_numpy(model.arms).double()
        self.coefficients, self.constants = (
            torch.from_numpy(model.coefficients).double(),
            torch.from_numpy(model.constants).double(),
        )
        self.tensors, self.weights = (
            torch.from_numpy(model.tensors),
            torch.from_numpy(model.fixed * model.weights["macs"]).double(),
        )

    def __call__(self, choices: Choices, units: list[Tensor] | None = None) -> Tensor:
        widths = choices.widths(self.order, self.arms, units).double().cpu()
        sizes = (widths @ self.coefficients.T + self.constants)[:, self.tensors]
        return sizes.prod(2) @ self.weights


class Gating(TorchFunctionMode):
    """Runs inside every function call of the network: where a gated weight is used, it decides, masks or skips."""

    def __init__(self, gated: GatedNetwork, choose: Choose, skip: bool, batch: int, gates_alone: bool = False):
        super().__init__()
        self.gated, self.choose, self.skip, self.batch, self.gates_alone = gated, choose, skip, batch, gates_alone
        self.at = {id(get_tensor(gated.network, weight)): site for weight, site in gated.sites.items()}
        self.masks: dict[str, Tensor] = {}  # per group, its open arms, (batch, arms)
        self.choices = Choices()

    def __torch_function__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        kwargs = kwargs or {}
        if func in CONVOLUTIONS or func in LINEAR:
            site = self.at.get(id(argument(args, kwargs, 1, "weight")))
            if site is not None:
                x = args[0] if args else kwargs["input"]
                if len(x) != self.batch:
                    raise DynpruneError(
                        f"Layer {site.op.layer} sees {len(x)} inputs for {self.batch} images. Gates "
                        f"need layers that see one input per image."
                    )
                return self.compute(site, func, x, args, kwargs)
        return func(*args, **kwargs)

    def compute(self, site: Site, func: Callable, x: Tensor, args: tuple, kwargs: dict) -> Tensor:
        channel = x.ndim - 1 if func in LINEAR else 1
        seen = self.mask(site.inputs, site.op.groups)
        if site.decides and site.decides[0].group not in self.masks:
            self.decide(site, x, channel, seen)
        if self.skip:
            return self.only_open(site, func, x, channel, args, kwargs)
        if seen is not None:
            shape = [1] * x.ndim
            shape[0], shape[channel] = seen.shape
            x = x * seen.to(x.dtype).view(shape)
        return func(x, *args[1:], **{name: value for name, value in kwargs.items() if name != "input"})

    def mask(self, channels: Channels | None, groups: int = 1) -> Tensor | None:
        """Which channels are open, (batch, channels); None where nothing is gated."""
        if channels is None:
            return None
        known = [self.masks[name] for name in channels.groups]
        every = torch.cat([known[0].new_ones(len(known[0]), 1), *known], 1).index_select(
            1, channels.index.to(known[0].device)
        )
        return every.repeat(1, groups) if groups > 1 else every

    def decide(self, site: Site, x: Tensor, channel: int, seen: Tensor | None) -> None:
        """Pool what the layer sees, and open units for it. Gates follow the features: no gradient goes back from them
        into what they saw."""
        pooled = (
            x.detach().mean([d for d in range(1, x.ndim) if d != channel], dtype=torch.float32)
            if x.ndim > 2
            else x.detach().float()
        )
        if seen is not None:
            pooled = pooled * seen
        learns = self.gates_alone or torch.is_grad_enabled()
        sizes = [len(gate.sizes) for gate in site.decides]
        with torch.autocast(x.device.type, enabled=False), torch.set_grad_enabled(learns):
            scores = self.gated.predictor(site)(pooled)
            by_gate = scores.split(sizes, 1)
        opened = self.choose(scores, site)
        for gate, score, part in zip(site.decides, by_gate, opened.split(sizes, 1), strict=True):
            if gate.cuts:
                part = torch.maximum(part, F.one_hot(score.argmax(1), len(gate.sizes)).to(part.dtype))
            self.choices.gates.append(gate)
            self.choices.logits.append(score)
            self.choices.open.append(part)
            self.masks[gate.group] = part.repeat_interleave(torch.tensor(gate.sizes, device=part.device), dim=1)

    def only_open(self, site: Site, func: Callable, x: Tensor, channel: int, args: tuple, kwargs: dict) -> Tensor:
        """The layer on its open channels alone, put back in their places; zeros elsewhere, which nobody reads."""
        kwargs = {name: value for name, value in kwargs.items() if name not in ("input", "weight")}
        weight, rest, groups = get_tensor(self.gated.network, site.op.weight), list(args[2:]), site.op.groups
        bias = argument(args, kwargs, 2, "bias")
        depthwise = is_depthwise(self.gated.graph, site.op)
        made = open_positions(self.mask(site.outputs))
        read = open_positions(self.mask(site.inputs))
        if depthwise:  # each input makes so many outputs, which are open together with it
            each = len(weight) // groups
            read = None if made is None else made[::each] // each
        out_shape = func(
            x[:, :1].to("meta") if groups == 1 and func not in LINEAR else x.to("meta"),
            weight[:, :1].to("meta") if groups == 1 and func not in LINEAR else weight.to("meta"),
            None,
            *rest[1:],
            **{name: value for name, value in kwargs.items() if name != "bias"},
        ).shape
        whole = x.new_zeros(out_shape)
        if made is not None and not len(made):
            return whole
        if made is not None:
            weight = weight.index_select(0, made)
            bias = bias if bias is None else bias.index_select(0, made)
        if read is not None and not depthwise:
            columns, read = read, torch.cat([read + i * weight.shape[1] for i in range(groups)])
            weight = weight.index_select(1, columns)
        if read is not None:
            x = x.index_select(channel, read)
        out_channel = whole.ndim - 1 if func in LINEAR else 1
        if read is not None and not len(read):
            part = whole.new_zeros([len(weight) if d == out_channel else size for d, size in enumerate(whole.shape)])
            if bias is not None:
                part = part + bias.view([-1 if d == out_channel else 1 for d in range(whole.ndim)])
        else:
            rest = [bias, *rest[1:]] if rest else []
            if "bias" in kwargs:
                kwargs["bias"] = bias
            if depthwise and read is not None:
                rest, kwargs = with_groups(rest, kwargs, len(read))
            part = func(x, weight, *rest, **kwargs)
        return part if made is None else whole.index_copy_(out_channel, made, part.to(whole.dtype))


def open_positions(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else torch.nonzero(mask[0])[:, 0]


def with_groups(rest: list, kwargs: dict, groups: int) -> tuple[list, dict]:
    """A convolution's arguments after its weight, with another number of groups."""
    if len(rest) > 4:
        return [*rest[:4], groups, *rest[5:]], kwargs
    return rest, {**kwargs, "groups": groups}


def fixed(opened: Mapping[str, Tensor]) -> Choose:
    """Open what is given, whatever the images: per group (images, units), or (1, units) for all of them."""

    def choose(scores: Tensor, site: Site) -> Tensor:
        return torch.cat([opened[gate.group] for gate in site.decides], 1).to(scores).expand(len(scores), -1)

    return choose


@contextmanager
def statistics_kept(network: nn.Module) -> Iterator[None]:
    """BatchNorm uses the batch's statistics without remembering them."""
    norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    try:
        for norm in norms:
            norm.momentum = 0.0
        yield
    finally:
        for norm, momentum in zip(norms, momenta):
            norm.momentum = momentum
