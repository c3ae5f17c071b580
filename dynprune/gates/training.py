"""Training gates: everything that one run of `dynprune gate` holds, and one step of it.

Takes a GateConfig, data, and a network (new, or that of a finished run); trains weights by back-propagation and gates
by the chosen estimator, on a price per multiply-accumulate that steers the mean cost of an image to the target. The
steps fall into phases:

    warming   with `gates_first`: the weights rest while the gates learn
    gating    both learn; the target falls from 1 to the one asked for in the first half
    settled   the gates are set to the threshold that meets the target, and stay but for that threshold and the
              statistics that normalise what they see; the weights learn to live with them

After the last step, units that hardly any training image opens are closed for good, and the threshold is set once more.

It has the face of a `Session`, so that the training loop, its checkpoints and its resume serve both methods.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynprune import zoo
from dynprune.data.loading import Data, load_data, some
from dynprune.data.scores import fitting, logits
from dynprune.deploy.export import check_classes, load_compact
from dynprune.errors import DynpruneError
from dynprune.execution.saliency import magnitude
from dynprune.files import artifact
from dynprune.gates import estimators
from dynprune.gates import file as gated_file
from dynprune.gates.gating import Choices, Choose, GatedNetwork, Site, fixed, statistics_kept
from dynprune.gates.stats import GateStats, gate_stats, observe
from dynprune.gates.surgery import close_rare, closed_for_good
from dynprune.runs.config import GateConfig
from dynprune.runs.directory import GateRun, Run, open_compact
from dynprune.state.copies import copied
from dynprune.state.tensors import check_facts as check_state
from dynprune.state.tensors import fill, paths_of
from dynprune.structure.tracing import first_line, trace
from dynprune.training.checkpoint import History, lost, part
from dynprune.training.distributed import ALONE
from dynprune.training.recipe import choose_device, learning_rate, make_optimizer, set_learning_rate, use_bfloat16
from dynprune.training.session import PASSES
from dynprune.training.train import Progress, train
from dynprune.zoo.weights import load_trained

FALLING = 0.5  # share of the gating phase in which the target falls to its value
COLDEST = 0.2  # temperature at which gates stop learning
# of the price per MAC: how fast it moves with the excess, and how hard an excess pulls at once
PRICE_STEP, PRICE_PULL = 0.2, 20.0
TOLERANCE = 1.02  # the mean over other images than those that set the threshold may lie this far above the target
FILE_TOLERANCE = 1e-4  # float32, and sums in another order
CALIBRATION_IMAGES, CALIBRATION_ROUNDS = 500, 9
RARE_IMAGES = 1000  # training images, without augmentation, that show which units are hardly ever open
# divides the logits of teacher and student, so that what the teacher holds for less likely counts too (Hinton, Vinyals
# & Dean, 2015)
SOFTER = 2.0
SHIFT_STEP = 0.05  # of the common threshold while settled, per unit of share that is missing
ALWAYS = 1e4  # a shift that opens every gate
CLOSE = 0.9  # share of the target that images must cost at the end; below it, as above it, the threshold is set anew
MARGIN = 0.99  # the threshold aims this far below the target, so that other images meet it too


def base_network(
    config: GateConfig, classes: list[str], size: tuple[int, int, int]
) -> tuple[nn.Module, artifact.Facts | None]:
    """The network to gate: of the run in `base`, as compacted, or a new one; with what its file knows."""
    if not config.base:
        network = zoo.build(config.model, len(classes), config.seed, size=size)
        if config.weights:
            load_trained(network, config.model, config.weights, len(classes), size)
        return network, None
    run = open_compact(Path(config.base))
    if not run.compact_file.is_file():
        raise DynpruneError(f"{run.path} has no compact model yet. Run: dynprune compact {run.path}")
    network, facts = load_compact(run)
    check_classes(run.compact_file, facts, classes)
    return network, facts


class GateSession:
    """Everything that one run of gates holds, built from its configuration or from its checkpoint."""

    ranks, sent_bytes, dtype = ALONE, 0, torch.float32

    def __init__(self, config: GateConfig, data: Data):
        self.config = config = config.resolved(len(data.train))
        self.policy = f"gate-{config.estimator}"
        self.part = self.ranks.part(config.batch_size)
        self.stop: Callable[[], bool] = lambda: False
        self.stopping, self.step = False, 0
        self.device = choose_device(config.device)
        self.bfloat16 = use_bfloat16(config.precision, self.device)
        self.steps_per_epoch = data.steps_per_epoch(config.batch_size)
        self.steps = self.steps_per_epoch * config.epochs
        network, self.facts = base_network(config, data.classes, data.size)
        self.paths = paths_of(network)
        self.data = data = fitting(network, data)
        self.graph = trace(network, data.example)
        self.trained = bool(config.base or config.weights)
        # a network that stays as it is would only be held back by itself
        distills = self.trained and config.distill > 0 and not self.ungated
        self.teacher = copied(network).to(self.device, memory_format=torch.channels_last).eval() if distills else None
        self.model = GatedNetwork(
            network, self.graph, data.example, block=config.block, hidden=config.hidden, seed=config.seed
        ).to(self.device)
        self.network = self.model.network
        if self.trained:
            self.model.begin_with(magnitude(dict(self.network.named_parameters()), self.graph))
        if config.target < self.model.least_share:
            raise DynpruneError(
                f"--target {config.target} is below what gates can reach here: with as little open as "
                f"possible an image costs {self.model.least_share:.3f} of the ungated network. Choose "
                f"more, or gate a compact network."
            )
        self.weights = make_optimizer(config, self.network, self.device)
        self.gates = torch.optim.Adam(self.model.predictors.parameters(), config.gate_lr)
        self.price, self.share = 0.0, 1.0
        # a forward pass each
        baselines = self.settled_at if config.estimator == "reinforce" and not self.ungated else 0
        self.train_macs = (
            config.batch_size * self.model.dense_macs * (PASSES * self.steps + baselines + self.steps * distills)
        )
        if self.ungated:
            self.model.shift.fill_(ALWAYS)
        elif config.estimator == "random":
            self.model.threshold = self.by_chance

    @property
    def ungated(self) -> bool:
        return self.config.target >= 1

    @property
    def macs(self) -> int:
        """Mean multiply-accumulates of an image in the last step."""
        return round(self.share * self.model.dense_macs)

    def phase(self, step: int) -> str:
        if self.ungated:
            return "ungated"
        if step < round(self.config.gates_first * self.steps):
            return "warming"
        return "gating" if step < self.settled_at else "settled"

    @property
    def settled_at(self) -> int:
        return self.steps - round(self.config.settle * self.steps)

    @property
    def entropy_weight(self) -> float:
        """Falls to 0 while gates learn, so that they are decided when they settle."""
        return self.config.entropy * max(0.0, 1 - self.step / max(1, self.settled_at))

    @property
    def temperature(self) -> float:
        """Divides the logits while gates learn, falling from 1, so that what they draw becomes what the threshold will
        say."""
        return 1 + (COLDEST - 1) * min(1.0, self.step / max(1, self.settled_at))

    def target_at(self, step: int) -> float:
        """The mean share that gates are steered to now."""
        done = min(1.0, step / max(1, FALLING * self.settled_at))
        return 1 + (self.config.target - 1) * done

    def compile(self, _note: Callable[[str], None]) -> None:
        return None

    def autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16) if self.bfloat16 else contextlib.nullcontext()

    def by_chance(self, scores: Tensor, _site: Site) -> Tensor:
        """Gates that do not look: each open with the one probability that meets the target."""
        return (torch.rand(scores.shape, device=scores.device) < torch.sigmoid(self.model.shift)).to(scores.dtype)

    # -- one step ------------------------------------------------------------------------------------------------------

    def train_step(self, images: Tensor, labels: Tensor) -> Tensor:
        """One step: decide, forward, loss of weights and gates, backward, step. Returns the loss of the classes."""
        phase = self.phase(self.step)
        if phase == "settled" and self.step == self.settled_at:
            self.calibrate()
        set_learning_rate(
            self.weights, 0.0 if phase == "warming" else learning_rate(self.config, self.step, self.steps)
        )
        images, labels = images.to(self.device, memory_format=torch.channels_last), labels.to(self.device)
        with self.autocast():
            output, choices = (
                (self.network(images), Choices()) if phase == "ungated" else self.model.run(images, self.choose(phase))
            )
        taught = self.teach(images)
        each = self.loss_of(output, labels, taught)
        loss = each.mean()
        if phase != "ungated":
            self.share = float(
                self.model.executed_share(
                    Choices(choices.gates, choices.logits, [value.detach() for value in choices.open])
                ).mean()
            )
        total = loss
        if phase in ("warming", "gating") and self.config.estimator != "random":
            total = loss + self.loss_of_gates(choices, each, images, labels, taught)
        self.weights.zero_grad(set_to_none=True)
        self.gates.zero_grad(set_to_none=True)
        total.backward()
        self.weights.step()
        if total is not loss:
            self.gates.step()
        if phase == "settled" and self.config.estimator != "random":
            self.model.shift += SHIFT_STEP * (MARGIN * self.config.target - self.share)
        self.stopping = self.stop()
        self.step += 1
        if self.step == self.steps and not self.ungated:
            self.close_for_good()
            self.calibrate()
        return loss.detach()

    @torch.no_grad()
    def teach(self, images: Tensor) -> Tensor | None:
        """What the network said before it had gates: (batch, classes); None where there is nothing to distill."""
        if self.teacher is None:
            return None
        with self.autocast():
            return logits(self.teacher(images)).float()

    def loss_of(self, output: object, labels: Tensor, taught: Tensor | None) -> Tensor:
        """Loss of each image, (batch,): from its label and, where there is a teacher, from what that says of it."""
        scores = logits(output).float()
        each = F.cross_entropy(scores, labels, reduction="none", label_smoothing=self.config.label_smoothing)
        if taught is None:
            return each
        apart = F.kl_div(
            F.log_softmax(scores / SOFTER, 1), F.log_softmax(taught / SOFTER, 1), reduction="none", log_target=True
        ).sum(1)
        return torch.lerp(each, SOFTER**2 * apart, self.config.distill)

    def choose(self, phase: str) -> Choose:
        """How gates open in this phase."""
        if self.config.estimator == "random":
            if phase != "settled":
                self.model.shift.fill_(self.even_logit(self.target_at(self.step)))
            return self.by_chance
        if phase == "settled":
            return lambda scores, site: self.model.threshold(scores, site).detach()
        draw = estimators.straight_through if self.config.estimator == "gumbel" else estimators.sample
        temperature = self.temperature
        return lambda scores, _: draw(scores / temperature)

    def loss_of_gates(
        self, choices: Choices, each: Tensor, images: Tensor, labels: Tensor, taught: Tensor | None
    ) -> Tensor:
        """What the gates are to lower: the price of what they open, and with REINFORCE the images' loss. each: that
        loss, (batch,)."""
        cooled = [own / self.temperature for own in choices.logits]
        expected = self.model.executed_share(choices, [torch.sigmoid(own) for own in cooled])
        spent = expected if self.config.estimator == "reinforce" else self.model.executed_share(choices)
        # of what was really opened; the expectation takes gates for independent
        excess = self.share - self.target_at(self.step)
        self.price = max(0.0, self.price + PRICE_STEP * excess)
        cost = max(0.0, self.price + PRICE_PULL * excess) * spent.mean().float()
        cost = cost - self.entropy_weight * estimators.entropy(cooled)
        if self.config.estimator == "gumbel":
            return cost
        with torch.no_grad(), self.autocast(), statistics_kept(self.model):
            baseline = self.loss_of(self.network(images), labels, taught)
        return cost + estimators.reinforce(cooled, choices.open, estimators.advantage_over(each, baseline))

    # -- the threshold -------------------------------------------------------------------------------------------------

    def close_for_good(self) -> None:
        """Close what hardly any image opens: it can be cut then."""
        if self.config.estimator != "random":
            was_training = self.model.training
            seen = observe(self.model, self.data, some(self.data.train, RARE_IMAGES))
            close_rare(self.model, {gate.group: opened for gate, opened in zip(self.model.gates, seen.opened)})
            self.model.train(was_training)

    def even_logit(self, target: float) -> float:
        """The logit at which gates that are open by chance alone cost `target` on average."""
        model, low, high = self.model, -8.0, 8.0
        for _ in range(30):
            middle = (low + high) / 2
            units = [
                torch.full((1, len(gate.sizes)), torch.sigmoid(torch.tensor(middle)).item()) for gate in model.gates
            ]
            low, high = (
                (middle, high)
                if float(model.executed_share(Choices(model.gates, units, units))) <= target
                else (low, middle)
            )
        return low

    @torch.no_grad()
    def calibrate(self) -> None:
        """Shift all logits so that validation images cost at most the target on average. Where no shift within its
        range does, gates are closed as far as it goes, and the result says that the target is missed."""
        if self.config.estimator == "random":
            self.model.shift.fill_(self.even_logit(MARGIN * self.config.target))
            return
        was_training, settling = self.model.training, self.step < self.steps
        self.model.eval()
        # while settling, with the statistics of each batch, as the steps that follow use them
        self.network.train(settling)
        self.model.predictors.train(settling)
        try:
            batches = [batch for batch, _ in self.data.eval_batches(some(self.data.val, CALIBRATION_IMAGES), 100)]
            if not settling and CLOSE * self.config.target <= self.mean_share(batches) <= self.config.target:
                return  # what the weights have learned to live with meets the target as it is
            low, high = -8.0, 8.0
            for _ in range(CALIBRATION_ROUNDS):
                middle = (low + high) / 2
                self.model.shift.fill_(middle)
                low, high = (middle, high) if self.mean_share(batches) <= MARGIN * self.config.target else (low, middle)
            self.model.shift.fill_(low)
        finally:
            self.model.train(was_training)

    def mean_share(self, batches: list[Tensor]) -> float:
        """Mean executed share of these images under the threshold."""
        shares = []
        for batch in batches:
            batch = batch.to(self.device, memory_format=torch.channels_last)
            with self.autocast(), statistics_kept(self.model):
                shares.append(self.model.executed_share(self.model.run(batch, self.model.threshold)[1]))
        return float(torch.cat(shares).mean())

    # -- checkpoint ----------------------------------------------------------------------------------------------------

    def save(self, run: Run, history: History) -> None:
        """Write everything that is needed to go on. Weights that are not finite are refused."""
        if not all(bool(torch.isfinite(value).all()) for value in self.model.parameters()):
            raise lost(self, run, self.step, math.nan)
        own, state = gated_file.tensors_of(self.model, self.paths)
        tensors = {f"model.{name}": value for name, value in own.items()}
        for kind, optimizer, module in self.optimizers():
            for name, parameter in module.named_parameters():
                for key, value in optimizer.state.get(parameter, {}).items():
                    if isinstance(value, Tensor):
                        tensors[f"{kind}.{key}.{name}"] = value
        run.write_checkpoint(
            tensors,
            {
                "kind": "checkpoint",
                "history": asdict(history),
                "step": self.step,
                "steps": self.steps,
                "classes": self.data.classes,
                "price": self.price,
                "share": self.share,
                "state": state,
            },
        )

    def optimizers(self) -> tuple:
        return ("weights", self.weights, self.network), ("gates", self.gates, self.model.predictors)

    def restore(self, run: Run, *, override: bool = False, note: Callable[[str], None] = lambda _: None) -> History:
        """Go on where the run's newest whole checkpoint was."""
        tensors, facts = run.read_checkpoint(note, aside=True)
        try:
            if (
                facts["classes"] != self.data.classes
                or facts["steps"] != self.steps
                or not 0 <= facts["step"] <= self.steps
            ):
                raise ValueError(
                    f"{facts['steps']} steps and {len(facts['classes'])} classes, the settings and data "
                    f"now give {self.steps} and {len(self.data.classes)}"
                )
            own = part(tensors, "model.")
            if facts["schema"] == 1:
                self.model.load_state_dict(own)
            else:
                fill(self.network, part(own, "network."), check_state(facts.get("state")))
                gated_file.fill_gates(self.model, own)
            for kind, optimizer, module in self.optimizers():
                saved = part(tensors, f"{kind}.")
                for name, parameter in module.named_parameters():
                    state = {
                        key[: -len(name) - 1]: value
                        for key, value in saved.items()
                        if key.endswith("." + name) and "." not in key[: -len(name) - 1]
                    }
                    if any(value.ndim and value.shape != parameter.shape for value in state.values()):
                        raise ValueError(f"state of another shape for {name}")
                    if state:
                        optimizer.state[parameter] = {
                            key: value.clone().to(parameter.device, memory_format=torch.preserve_format)
                            for key, value in state.items()
                        }
            self.step, self.price, self.share = int(facts["step"]), float(facts["price"]), float(facts["share"])
            history = History(**facts["history"])
            if not all(
                isinstance(value, int | float) and not isinstance(value, bool) for value in asdict(history).values()
            ):
                raise ValueError("a history of other types")
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise DynpruneError(
                f"{run.checkpoint_file} does not fit these settings ({first_line(error)[:200]}). "
                f"Resume with the run's own settings and data."
            ) from error
        run.keep_metrics_until(self.step)
        return history


# -- the command -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GateResult:
    """What gates reached on the test images. met: the mean cost is within the target, by less than the tolerance above
    it at most.
    dense_macs: of the ungated network; gate_macs: of the predictors; units: how many gates; closed_for_good: how many
    of them no image opens any more; file_max_diff: of the file, read back, over the largest output."""

    run: str
    base: str
    estimator: str
    target: float
    met: bool
    accuracy: float
    val_accuracy: float
    test_data: str
    macs: int
    dense_macs: int
    gate_macs: int
    path: str
    file_max_diff: float
    units: int
    closed_for_good: int
    stats: GateStats
    steps: int
    seconds: float


def gate(
    config: GateConfig,
    run: GateRun,
    *,
    resume: bool = False,
    override: bool = False,
    data: Data | None = None,
    report: Callable[[Progress], None] = lambda _: None,
    note: Callable[[str], None] = lambda _: None,
    stop: Callable[[], bool] = lambda: False,
    session: GateSession | None = None,
) -> GateResult:
    """Train gates, write RUN/gated.safetensors, read it back, and say what the gates do on the test images."""
    session = session or GateSession(config, data or load_data(config.source))
    config, data = session.config, session.data
    trained = train(config, run, resume=resume, override=override, report=report, note=note, stop=stop, session=session)
    model = session.model.cpu().eval()
    stats = gate_stats(model, data, data.test, note)
    if session.ungated:
        stats = dataclasses.replace(stats, share=1.0)
    facts = facts_of(session, stats.accuracy)
    cuts = [own.group for own in model.gates if own.cuts]
    fresh = run.gated_file.with_name("gated.unproven.safetensors")
    try:
        gated_file.save(
            fresh,
            model,
            facts,
            gated_file.GateFacts(config.block, config.hidden, cuts, config.estimator, config.target, stats.share),
            within=session.paths,
        )
        difference = file_difference(fresh, model, data, config)
        if not difference < FILE_TOLERANCE:
            raise DynpruneError(
                f"The gated file, read back, differs from the network that was saved by "
                f"{difference:.1e} of the largest output. Nothing was kept. Please report the model's "
                f"name."
            )
        fresh.replace(run.gated_file)
        for stale in (run.onnx_file, run.ungated_onnx_file, run.static_onnx_file):
            stale.unlink(missing_ok=True)
    except OSError as error:
        raise DynpruneError(
            f"Cannot write {run.gated_file} ({error.strerror}). The file that was there before is unchanged."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            fresh.unlink(missing_ok=True)
    result = GateResult(
        str(run.path),
        config.base or config.model,
        config.estimator,
        config.target,
        stats.share <= TOLERANCE * config.target,
        stats.accuracy,
        trained.val_accuracy,
        data.reports,
        round(stats.share * model.dense_macs),
        model.dense_macs,
        model.gate_macs,
        str(run.gated_file),
        difference,
        sum(len(own.sizes) for own in model.gates),
        sum(int(own.sum()) for own in closed_for_good(model).values()),
        stats,
        trained.steps,
        trained.seconds,
    )
    run.record("gate", asdict(result))
    return result


def facts_of(session: GateSession, accuracy: float) -> artifact.Facts:
    """What the file says of the network under the gates."""
    data, model = session.data, session.model
    if session.facts is not None:
        return dataclasses.replace(session.facts, accuracy=accuracy)
    return gated_file.facts_of_new(
        asdict(session.config),
        data.classes,
        list(data.size),
        list(data.mean),
        list(data.std),
        model.dense_macs,
        session.graph.params({}),
        accuracy,
    )


@torch.no_grad()
def file_difference(path: Path, model: GatedNetwork, data: Data, config: GateConfig) -> float:
    """Largest difference of the file's output, with the gates of the network that was saved, over the largest
    output."""
    network = zoo.build(config.model, len(data.classes), size=data.size)
    loaded = gated_file.load_gated(path, network)[0]
    batch = next(iter(data.eval_batches(data.val, 16)))[0]
    output, choices = model.run(batch, model.threshold)
    ours, theirs = (
        logits(output),
        logits(loaded.run(batch, fixed({own.group: opened for own, opened in zip(choices.gates, choices.open)}))[0]),
    )
    return float((ours - theirs).abs().max() / ours.abs().max().clamp(min=1e-30))
