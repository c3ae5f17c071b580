"""Dynamic channel execution in a training loop of any kind.

Takes a full-width network, the number of steps and how to make an optimizer; gives `model`, the narrow network that
runs forward and backward, and `step()`, which stands where `optimizer.step()` would. When the last step is made, what
runs is the compact network.

    for batch in loader:
        loss = my_loss(execution.model(batch.images), batch.targets)
        loss.backward()
        execution.step()  # rewards, optimizer, swaps
    small = execution.finish()

`Execution` is the mechanism, on a channel graph and widths that are known; `DynamicExecution` finds them first. The
command `train` runs on the first, a loop of your own on the second.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dynprune.budgets.fit import Fitter
from dynprune.budgets.latency import Report, silent
from dynprune.budgets.limits import Budget
from dynprune.errors import DynpruneError
from dynprune.execution.explore import Exploration, Explorer
from dynprune.execution.momentum import FRESH, MakeOptimizer, rebound, state_kinds
from dynprune.execution.reservoir import Reservoir, scale_for_narrow_fan_in, silence, up_to_date
from dynprune.execution.saliency import magnitude, prepare
from dynprune.execution.stand_in import StandIn
from dynprune.state.copies import copied
from dynprune.state.tensors import check_facts, fill, loose_to, state_of
from dynprune.structure.calling import Inputs, arguments
from dynprune.structure.channels import ChannelGraph, Selection
from dynprune.structure.surgery import slim
from dynprune.structure.tracing import first_line, trace

POLICIES = ("cucb", "random", "static", "dense")
NARROW = 0.5  # share of the budgeted multiplications at which training begins with `grow`


class Execution:
    """Which arms run in each step, and the optimizer that trains them.

    model: the narrow network. Its tensors stay in place while arms are exchanged; another module takes its place when
    widths change, and `installed` is called then. optimizer: made once; its groups and what holds it (schedulers) stay.
    done: steps so far.
    """

    def __init__(
        self,
        full: nn.Module,
        graph: ChannelGraph,
        explorer: Explorer,
        make_optimizer: MakeOptimizer,
        *,
        steps: int,
        final: Mapping[str, int] | None = None,
        growth_step: int = 0,
        device: torch.device | str = "cpu",
        store_device: torch.device | str | None = None,
        fresh: Collection[str] = FRESH,
        find_widths: Callable[[np.ndarray], Mapping[str, int]] | None = None,
        installed: Callable[[], None] = lambda: None,
    ):
        """full: with the weights to begin with; it becomes the reservoir's. explorer: begins with the widths to begin
        with. final: widths to grow to at `growth_step`. find_widths: from what one more arm of each group is worth to
        widths, asked for where the explorer moves them."""
        self.graph, self.explorer, self.make_optimizer = graph, explorer, make_optimizer
        self.steps, self.done = steps, 0
        self.final, self.growth_step = dict(final or explorer.widths), growth_step
        self.device, self.store_device = torch.device(device), torch.device(store_device or device)
        self.fresh, self.find_widths, self.installed = fresh, find_widths, installed
        self.parameters: dict[str, nn.Parameter] = {}
        self.optimizer: torch.optim.Optimizer | None = None
        self.install(self.new_reservoir(full, explorer.first()))

    def new_reservoir(self, full: nn.Module, selection: Selection, template: Selection | None = None) -> Reservoir:
        """The full-width tensors, and the active model of a selection."""
        return Reservoir(full, self.graph, selection, template, device=self.device, store_device=self.store_device)

    def install(self, reservoir: Reservoir) -> None:
        """Go on with the active model of this reservoir. What the optimizer knows begins anew."""
        self.reservoir, self.model, self.widths = reservoir, reservoir.active, reservoir.widths
        before, self.parameters = self.parameters, dict(self.model.named_parameters())
        if self.optimizer is None:
            self.kinds = state_kinds(self.make_optimizer, self.parameters, reservoir.spans)
            self.optimizer = self.make_optimizer(list(self.parameters.values()))
        else:
            rebound(self.optimizer, before, self.parameters)
        reservoir.attach(self.optimizer, self.kinds, self.fresh)
        shapes = {name: parameter.shape for name, parameter in self.parameters.items()}
        places = {name: reservoir.places[name] for name in self.widths}
        made = {name: self.graph.groups[name].made for name in places}
        self.ledger = prepare(shapes, places, made, self.device)

    @property
    def selection(self) -> dict[str, np.ndarray]:
        """Per group, the arms that run now, sorted."""
        return {name: np.sort(arms) for name, arms in self.reservoir.slots.items()}

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the network that runs now, of the example inputs."""
        return self.graph.macs(self.widths)

    @property
    def params(self) -> int:
        """Parameters of the network that runs now."""
        return self.graph.params(self.widths)

    @property
    def exploring(self) -> bool:
        """Whether arms are still tried out; afterwards the selection stands."""
        return self.explorer.explores_at(self.done)

    # -- one step ------------------------------------------------------------------------------------------------------

    def step(self, scaler: torch.amp.GradScaler | None = None) -> None:
        """After `backward`: reward the arms that ran, let the optimizer make its step, forget the gradients, and
        exchange arms where a round is over.

        Gradients may come from several backward passes, and may have been clipped. scaler: that the loss was scaled
        with; it is updated too. Raises DynpruneError where no gradient has come, where the parameters are no longer
        those of `model`, and after the last step.
        """
        assert self.optimizer is not None
        if self.done >= self.steps:
            raise DynpruneError(f"step() was called {self.steps + 1} times, and steps={self.steps}. Call finish().")
        if self.done == 0 or self.due:
            self.refuse_changed()
        if all(parameter.grad is None for parameter in self.parameters.values()):
            raise DynpruneError(
                "step() found no gradients. Expected loss.backward() before it, of a loss made by execution.model."
            )
        if scaler is not None:
            unscale(scaler, self.optimizer)
        if self.exploring and (scaler is None or self.gradients_are_finite()):
            self.explorer.reward(self.parameters, self.ledger)
        if scaler is None:
            self.optimizer.step()
        else:
            scaler.step(self.optimizer)
            scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.explorer.uncounted += 1
        self.done += 1
        self.turn()

    @property
    def due(self) -> bool:
        """Whether another selection or other widths come after the coming step."""
        return self.explorer.changes_at(self.done + 1) or self.done + 1 == self.growth_step

    def turn(self) -> None:
        """What comes between two steps: the next selection, other widths. Done once, however often it is asked for."""
        if self.explorer.round_is_over(self.done):
            self.explorer.count(self.reservoir.slots)
            self.explorer.end_round(self.reservoir.slots)
            if self.find_widths and self.done == self.explorer.reallocation_step:
                self.reallocate(self.find_widths(self.explorer.loss_per_arm()))
            else:
                self.reservoir.swap(self.explorer.select(self.done))
        if self.growth_step <= self.done < self.steps and self.widths != self.final:
            self.grow()

    def reallocate(self, widths: Mapping[str, int]) -> None:
        """Rebuild the active model at widths that its arms turned out to be worth. Momentum starts at zero."""
        training = self.model.training
        self.reservoir.write_back()
        self.final = dict(widths)
        self.explorer.change_widths(widths)
        self.install(self.new_reservoir(self.reservoir.full, self.explorer.select(self.done)))
        self.model.train(training)
        self.installed()

    def grow(self) -> None:
        """Widen every layer to its width. What the network computes stays the same; momentum starts at zero."""
        training = self.model.training
        self.explorer.count(self.reservoir.slots)
        self.reservoir.write_back()
        slots, full = self.reservoir.slots, self.reservoir.full
        selection = self.explorer.more(self.done, slots, self.final)
        silence(full, self.graph, {name: np.setdiff1d(arms, slots[name]) for name, arms in selection.items()})
        self.explorer.change_widths(self.final)
        self.install(self.new_reservoir(full, selection))
        self.model.train(training)
        self.installed()

    def gradients_are_finite(self) -> bool:
        """Whether no gradient overflowed, as scaled ones may."""
        given = [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]
        return all(bool(torch.isfinite(gradient).all()) for gradient in given)

    def refuse_changed(self) -> None:
        """Raises DynpruneError where the active model is no longer what it was: its parameters are views of buffers."""
        now = dict(self.model.named_parameters())
        for name, parameter in self.parameters.items():
            span = self.reservoir.spans.get(name)
            moved = span is not None and not shares_memory(parameter, span.buffers.live)
            if now.get(name) is not parameter or moved:
                raise DynpruneError(
                    f'"{name}" of execution.model was replaced or moved from outside, so its channels could not be '
                    "exchanged. Change the network, its device or its precision before DynamicExecution is made."
                )
        if more := set(now) - set(self.parameters):
            raise DynpruneError(
                f'execution.model has got the parameter "{sorted(more)[0]}" from outside. Change the network before '
                "DynamicExecution is made."
            )

    def as_optimizer(self) -> torch.optim.Optimizer:
        """This execution in the place of an optimizer, for trainers that call `optimizer.step()` themselves: its step
        is `step()`, its groups and state are the optimizer's. With mixed precision use bfloat16, which needs no scaler.

        Raises DynpruneError with `grow`, where `model` would become another module behind the trainer's back.

        >>> Trainer(model=execution.model, optimizers=(execution.as_optimizer(), None), ...).train()
        """
        if self.growth_step and self.widths != self.final:
            raise DynpruneError("as_optimizer() got an execution with grow. Expected grow=0: trainers keep one model.")
        return StandIn(self)

    # -- the end, and what is kept on the way --------------------------------------------------------------------------

    def finish(self) -> nn.Module:
        """The network that runs now, as a module of its own class, in eval mode and on the same device, with tensors of
        its own."""
        self.refuse_changed()
        reservoir = self.reservoir
        small = slim(up_to_date(reservoir), self.graph.kept(reservoir.slots, reservoir.template))
        return loose_to(small.to(self.device), self.device).eval()

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on exactly where this is: tensors, numbers and texts, for torch.save. The random
        generators, the data and the schedule of the learning rate are yours."""
        assert self.optimizer is not None
        self.explorer.count(self.reservoir.slots)
        tensors, state = state_of(up_to_date(self.reservoir))
        return {
            "done": self.done,
            "steps": self.steps,
            "tensors": {name: value.detach().clone() for name, value in tensors.items()},
            "state": state,
            "explorer": {name: value.clone() for name, value in self.explorer.state().items()},
            "slots": {name: torch.from_numpy(arms.copy()) for name, arms in self.reservoir.slots.items()},
            "template": {name: torch.from_numpy(arms.copy()) for name, arms in self.reservoir.template.items()},
            "final": dict(self.final),
            "optimizer": copy_of(self.optimizer.state_dict()),
            "carried": {name: value.clone() for name, value in self.reservoir.carried().items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was called. `model` is another module afterwards. Raises DynpruneError for the state
        of another network, budget or optimizer; what was there can go on then."""
        if state.get("steps") != self.steps:
            raise DynpruneError(f"The state is of a run of {state.get('steps')} steps, this one has {self.steps}.")
        before, touched = self.state_dict(), False
        try:
            self.check_state(state)
            touched = True
            self.restore(state)
        except (LookupError, TypeError, ValueError, RuntimeError, AttributeError, AssertionError) as error:
            if touched:
                self.restore(before)
            raise DynpruneError(
                f"The state does not fit this execution ({first_line(error)[:200]}). Make it of the same network, "
                "budget, steps and optimizer."
            ) from error

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raises what `restore` would, as far as it shows before anything is touched."""
        tensors = state_of(up_to_date(self.reservoir))[0]
        if state["final"].keys() != self.graph.groups.keys():
            raise ValueError("widths of other groups")
        for name, value in tensors.items():
            if state["tensors"][name].shape != value.shape:
                raise ValueError(f"{name} has shape {list(state['tensors'][name].shape)}, expected {list(value.shape)}")

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take a state over. What does not fit shows on the way."""
        assert self.optimizer is not None
        slots, template = (
            {name: state[kind][name].numpy().copy() for name in self.graph.groups} for kind in ("slots", "template")
        )
        fill(self.reservoir.full, state["tensors"], check_facts(state["state"]))
        self.explorer.change_widths({name: len(arms) for name, arms in slots.items()})
        self.explorer.load_state(state["explorer"])
        self.final, self.done = dict(state["final"]), state["done"]
        training = self.model.training
        self.install(self.new_reservoir(self.reservoir.full, slots, template))
        self.model.train(training)
        self.optimizer.load_state_dict(state["optimizer"])
        self.reservoir.carry(state["carried"])


class DynamicExecution(Execution):
    """Train any network with dynamic channel execution, in your own loop.

    >>> execution = dynprune.DynamicExecution(
    ...     model, torch.zeros(1, 3, 224, 224), "macs=0.25", steps=10_000,
    ...     optimizer=lambda parameters: torch.optim.AdamW(parameters, 1e-3),
    ... )
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Inputs,
        budget: str | Sequence[str] | Budget = "macs=0.25",
        *,
        steps: int,
        optimizer: MakeOptimizer,
        policy: str = "cucb",
        explore: float = 0.005,
        hold: int = 20,
        bonus: float = 0.1,
        trained: bool | None = None,
        grow: float = 0.0,
        fresh: Collection[str] = FRESH,
        reservoir: str = "device",
        seed: int = 0,
        report: Report = silent,
    ):
        """Find the structure, the widths and the first selection. The model stays as it is.

        model: at full width, on the device and in the precision that it is to be trained in. example_inputs: as
        torch.onnx.export takes its `args`: a tensor, or a tuple of arguments whose last one may hold named ones, in a
        dict. budget: as the option `--budget`, several in a list, or a `Budget`. steps: how often `step()` will be
        called. optimizer: makes it of a list of parameters; any whose state has their shapes.

        policy: cucb; or random, static and dense to compare with. explore, hold, bonus: see `Exploration`. trained:
        whether the weights are; then the bandit starts from their sizes, else they are scaled for the narrow fan-in;
        without an answer BatchNorms that have seen images tell. grow: share of the steps at half of the budgeted
        multiplications, after which `model` is another, wider module. fresh: names of the optimizer's state with which
        arms begin anew when they come back. reservoir: "cpu" leaves a GPU's memory to the narrow network.

        Raises DynpruneError for what cannot work: a budget out of reach (with what can be reached), a model that fails
        on the example, an optimizer whose state cannot follow, one that trains other tensors.
        """
        if steps < 1:
            raise DynpruneError(f"steps got {steps}. Expected how often step() will be called, at least once.")
        if policy not in POLICIES:
            raise DynpruneError(f'policy got "{policy}". Expected one of {", ".join(POLICIES)}.')
        if not 0 <= explore < 1 or not 0 <= grow < 1 or hold < 1:
            raise DynpruneError(
                f"explore got {explore:g}, grow {grow:g}, hold {hold}. Expected shares in [0, 1) and a number of steps."
            )
        if reservoir not in ("device", "cpu"):
            raise DynpruneError(f'reservoir got "{reservoir}". Expected device or cpu.')
        full, inputs = copied(model), arguments(example_inputs)
        device = next((parameter.device for parameter in full.parameters()), torch.device("cpu"))
        allowed = (
            budget if isinstance(budget, Budget) else Budget((budget,) if isinstance(budget, str) else tuple(budget))
        )
        graph = trace(full, inputs)
        fitter = Fitter(full, graph, inputs, allowed, report, whole=True)
        widths = graph.full_widths if policy == "dense" else fitter.fit().widths
        if fitter.in_ms:
            widths = as_first_process(widths)
        trained = has_seen_images(full) if trained is None else trained
        if not trained:
            scale_for_narrow_fan_in(full, graph, widths)
        how = Exploration(policy, explore, hold, bonus, seed=seed)
        known = magnitude(dict(full.named_parameters()), graph) if trained else None
        first = fitter.narrower(widths, NARROW) if grow else widths
        explorer = Explorer(how, graph, first, steps, known)
        super().__init__(
            full,
            graph,
            explorer,
            optimizer,
            steps=steps,
            final=widths,
            growth_step=growth_step(steps, grow, explorer),
            device=device,
            store_device="cpu" if reservoir == "cpu" else device,
            fresh=fresh,
        )
        self.model.train(model.training)


def growth_step(steps: int, grow: float, explorer: Explorer) -> int:
    """The step from which every layer has its width: after a share of the steps, and never while arms are tried out."""
    return min(steps - 1, max(round(grow * steps), explorer.steps))


def as_first_process(widths: dict[str, int]) -> dict[str, int]:
    """The first process's widths in all that the user's program has joined: what is measured differs in each."""
    if not (dist.is_available() and dist.is_initialized()):
        return widths
    told = [widths]
    dist.broadcast_object_list(told)
    return told[0]


def has_seen_images(model: nn.Module) -> bool:
    """Whether BatchNorms count batches that they were trained on."""
    counts = [getattr(module, "num_batches_tracked", None) for module in model.modules()]
    return any(isinstance(count, Tensor) and not count.is_meta and bool(count > 0) for count in counts)


def unscale(scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> None:
    """Unscale gradients, unless that was done already, to clip them."""
    try:
        scaler.unscale_(optimizer)
    except RuntimeError as error:
        if "already been called" not in str(error):
            raise


def shares_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def copy_of(tree: Any) -> Any:
    """Nested dicts and lists with tensors of their own."""
    if isinstance(tree, Tensor):
        return tree.detach().clone()
    if isinstance(tree, dict):
        return {key: copy_of(value) for key, value in tree.items()}
    return [copy_of(value) for value in tree] if isinstance(tree, list) else tree
