"""A trained network, compacted: `python -m tests.measure.trained --model M --weights W --data D [options]`.

For every budget and calibration seed: test accuracy untuned and after each length of tuning, beside Torch-Pruning (each
importance, BatchNorm re-estimated on as many images, the same seconds of the same tuning; the one that validation
images prefer). Needs `pip install torch-pruning==1.6.1`. Prints Markdown rows as they come; seconds include everything
but loading.

    --budgets 0.73,0.5,0.35,0.25   --seeds 3   --search 60   --tune 0,30,2e (seconds, or epochs)   --parts
    --policies bandit,greedy,random,none   (ways to find widths)   --no-rivals   --no-ours   --threads 1

--parts prints an ablation instead: choice, repair, feedback on sums, rectifiers, widths, distillation, each on and off,
after each length of tuning.
--curves 20,60,120 prints another table instead: for every policy, distance and test accuracy of the best widths that it
had found after so many seconds.
"""

from __future__ import annotations

import argparse
import itertools
import time

import torch
from torch import nn

from dynprune import zoo
from dynprune.budgets.allocation import allocate, constraints_for
from dynprune.budgets.limits import Budget, parse_limit
from dynprune.data.loading import Data, Source, load_data
from dynprune.data.scores import evaluate, fitting, logits
from dynprune.deploy.rivals import IMPORTANCES, prune
from dynprune.repair.choice import orders
from dynprune.repair.distill import RATE, WEIGHT, Lesson, of_labels, tune
from dynprune.repair.images import sample_images
from dynprune.repair.refit import repair
from dynprune.repair.trained import Compaction
from dynprune.state.copies import copied
from dynprune.structure.tracing import trace
from dynprune.training.recipe import use_bfloat16
from dynprune.zoo.weights import load_trained

CPU, BATCH = torch.device("cpu"), 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--image-size", default="auto")
    parser.add_argument("--budgets", default="0.73,0.5,0.35,0.25")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--search", type=float, default=60.0)
    parser.add_argument("--policies", default="bandit,none")
    parser.add_argument("--tune", default="0")
    parser.add_argument("--lr", type=float, default=RATE)
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--align", default="auto")
    parser.add_argument("--parts", action="store_true")
    parser.add_argument("--curves", default="")
    parser.add_argument("--no-rivals", action="store_true")
    parser.add_argument("--no-ours", action="store_true")
    parser.add_argument("--threads", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(given.threads or torch.get_num_threads())
    data = load_data(Source(given.data, image_size=given.image_size))
    model = zoo.build(given.model, len(data.classes), size=data.size)
    data = fitting(model, data)
    load_trained(model, given.model, given.weights, len(data.classes), data.size)
    model.eval()
    untouched = evaluate(model, data, data.test)
    print(f"{given.model}, untouched {100 * untouched:.2f} % on {len(data.test)} test images", flush=True)
    if given.parts or given.curves:
        (ablate if given.parts else draw)(model, data, given)
        return
    print("| MACs kept | seed | how | " + " | ".join(map(in_words, given.tune.split(","))) + " | seconds before |")
    print("|---|---|---|" + "---|" * (len(given.tune.split(",")) + 1))
    for budget in given.budgets.split(","):
        for seed in range(given.seeds):
            for how, (network, seconds) in candidates(model, data, budget, seed, given).items():
                cells = []
                for length in given.tune.split(","):
                    trial = copied(network)
                    learn(trial, model, data, length, given.lr, seed)
                    cells.append(f"{100 * evaluate(trial, data, data.test):.2f}")
                share = trace(network, data.example).macs({}) / trace(model, data.example).macs({})
                print(f"| {share:.3f} | {seed} | {how} | {' | '.join(cells)} | {seconds:.0f} |", flush=True)


def candidates(model: nn.Module, data: Data, budget: str, seed: int, given) -> dict[str, tuple[nn.Module, float]]:
    """Compact networks within the budget, with the seconds that each took."""
    graph, found = trace(model, data.example), {}
    if given.no_ours:
        bound = parse_limit(budget).value(graph.macs({}))
        return {"Torch-Pruning": best_rival(model, data, bound, seed)}
    began = time.perf_counter()
    compaction = Compaction(model, graph, sample_images(model, data, given.images, seed, CPU), seed=seed)
    calibrated = time.perf_counter() - began
    allowed = Budget((budget,), align=given.align)
    start = allocate(graph, [budget], allowed=constraints_for(graph, allowed))
    for policy in given.policies.split(","):
        began = time.perf_counter()
        widths = start
        if policy != "none":
            widths = compaction.find_widths(start, allowed, given.search, policy=policy).widths
        network = compaction.repaired(widths)
        name = "uniform widths" if policy == "none" else f"widths by {policy}"
        found[name] = network, calibrated + time.perf_counter() - began
    if not given.no_rivals:
        bound = parse_limit(budget).value(graph.macs({}))
        found["Torch-Pruning"] = best_rival(model, data, bound, seed)
    return found


def best_rival(model: nn.Module, data: Data, macs: float, seed: int) -> tuple[nn.Module, float]:
    """Torch-Pruning's importances, each with BatchNorm re-estimated; the one with the best validation accuracy."""
    tried = []
    for importance in IMPORTANCES:
        began = time.perf_counter()
        small = prune(model, data, macs, importance, seed)
        seconds = time.perf_counter() - began
        tried.append((evaluate(small, data, data.val), seconds, small))
    _, seconds, small = max(tried, key=lambda entry: entry[0])
    return small, seconds


def in_words(length: str) -> str:
    return "untuned" if length == "0" else f"{length[:-1]} epochs" if length.endswith("e") else f"tuned {length} s"


def learn(
    narrow: nn.Module, teacher: nn.Module, data: Data, length: str, lr: float, seed: int, weight: float = WEIGHT
) -> None:
    """Tune for so many seconds or, "2e", epochs. weight: of what the teacher says, beside the labels."""

    def batches():
        for epoch in range(10**6):
            for images, labels in data.train_batches(BATCH, seed, epoch):
                yield images.contiguous(memory_format=torch.channels_last), labels

    if length == "0":
        return
    lesson = Lesson(
        teacher,
        lambda model, batch: model(batch[0]),
        own=lambda output, batch: of_labels(logits(output), batch[1]),
        weight=weight,
    )
    seconds, clock = float(length.rstrip("e")), time.perf_counter
    if length.endswith("e"):  # a clock that moves by one with every step
        seconds, clock = seconds * data.steps_per_epoch(BATCH), itertools.count().__next__
    tune(narrow, lesson, batches(), seconds, lr=lr, bfloat16=use_bfloat16("auto", CPU), clock=clock)


# arms, what of repair is done (None: nothing), whether widths are searched for, weight of what the teacher says
PARTS = {
    "chance, as cut": ("random", None, False, WEIGHT),
    "magnitude, as cut": ("magnitude", None, False, WEIGHT),
    "magnitude, repaired": ("magnitude", {}, False, WEIGHT),
    "what repair cannot replace, as cut": ("repairable", None, False, WEIGHT),
    "repaired layer by layer": ("repairable", {"sums": False, "rounds": 0}, False, WEIGHT),
    "and towards sums": ("repairable", {"rounds": 0}, False, WEIGHT),
    "and behind rectifiers": ("repairable", {}, False, WEIGHT),
    "and the scores": ("repairable", "all", False, WEIGHT),
    "and widths by the bandit (the default)": ("repairable", "all", True, WEIGHT),
    "the default, labels alone": ("repairable", "all", True, 0.0),
}


def ablate(model: nn.Module, data: Data, given) -> None:
    """Choice, repair, widths and distillation, each part on and off, after each length of tuning."""
    graph, lengths = trace(model, data.example), given.tune.split(",")
    print("| MACs kept | seed | parts | " + " | ".join(map(in_words, lengths)) + " | distance |")
    print("|---|---|---|" + "---|" * (len(lengths) + 1))
    for budget, seed in itertools.product(given.budgets.split(","), range(given.seeds)):
        allowed = Budget((budget,), align=given.align)
        uniform = allocate(graph, [budget], allowed=constraints_for(graph, allowed))
        images = sample_images(model, data, given.images, seed, CPU)
        compaction = Compaction(model, graph, images, seed=seed)
        repairable = compaction.orders
        found = compaction.find_widths(uniform, allowed, given.search).widths
        for words, (choice, parts, searched, weight) in PARTS.items():
            own = orders(model, graph, compaction.calibration, choice, seed) if choice != "repairable" else repairable
            compaction.orders = own
            widths = found if searched else uniform
            narrow = compaction.repaired(widths) if parts == "all" else compaction.cut(widths)
            if isinstance(parts, dict):
                repair(narrow, graph.kept(compaction.selection(widths)), compaction.targets, **parts)
            cells = []
            for length in lengths:
                trial = copied(narrow)
                learn(trial, model, data, length, given.lr, seed, weight)
                cells.append(f"{100 * evaluate(trial, data, data.test):.2f}")
            far = compaction.distance(narrow)
            print(f"| {budget} | {seed} | {words} | {' | '.join(cells)} | {far:.3f} |", flush=True)


def watched(compaction: Compaction) -> list[tuple[float, float, dict[str, int]]]:
    """Seconds from now, distance and widths of every pull that will be."""
    seen: list[tuple[float, float, dict[str, int]]] = []
    began = time.perf_counter()

    def pull(widths: dict[str, int]) -> float:
        far = compaction.distance_in_a_hurry(widths)
        seen.append((time.perf_counter() - began, far, widths))
        return far

    compaction.pull = pull  # type: ignore[method-assign]
    return seen


def draw(model: nn.Module, data: Data, given) -> None:
    """Distance and accuracy of the best widths over the seconds of the search, by every policy."""
    graph, times = trace(model, data.example), [float(text) for text in given.curves.split(",")]
    print("| MACs kept | seed | policy | seconds | pulls | distance, quick | distance | test accuracy, % |")
    print("|---|---|---|---|---|---|---|---|")
    for budget, seed in itertools.product(given.budgets.split(","), range(given.seeds)):
        compaction = Compaction(model, graph, sample_images(model, data, given.images, seed, CPU), seed=seed)
        allowed = Budget((budget,), align=given.align)
        start = allocate(graph, [budget], allowed=constraints_for(graph, allowed))
        for policy in given.policies.split(","):
            seen = watched(compaction)
            if policy == "none":
                compaction.pull(start)
            else:
                compaction.find_widths(start, allowed, max(times), policy=policy)
            for until in times if policy != "none" else times[:1]:
                until_then = [entry for entry in seen if entry[0] <= until] or seen[:1]
                _, quick, widths = min(until_then, key=lambda entry: entry[1])
                narrow = compaction.repaired(widths)
                accuracy, far = 100 * evaluate(narrow, data, data.test), compaction.distance(narrow)
                print(
                    f"| {budget} | {seed} | {policy} | {until:g} | {len(until_then)} | {quick:.4f} | {far:.4f} "
                    f"| {accuracy:.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
