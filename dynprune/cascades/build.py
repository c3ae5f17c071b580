"""A cascade made: chosen on validation images, written as one ONNX file, measured on test images.

Takes networks and data; writes cascade.onnx, cascade.csv (of every test image, which network had the last word) and
cascade.json. What is shown on the page is gathered here too.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from dynprune.budgets.latency import Report, silent
from dynprune.cascades.choice import (
    Added,
    Asked,
    Goal,
    Plan,
    choose,
    cost_at,
    frontier,
    plans,
    static_at,
    steps_taken,
    weigh,
)
from dynprune.cascades.graph import joined
from dynprune.cascades.latency import latencies, timed
from dynprune.cascades.networks import Network, Said, answers, check_alike, margin_of, nested_in
from dynprune.data.loading import Data, image_name, some, some_of
from dynprune.deploy.answers import normalised
from dynprune.deploy.modules import TOLERANCE
from dynprune.errors import DynpruneError
from dynprune.files.disk import write_bytes, write_text
from dynprune.files.onnxfile import open_session, run_all
from dynprune.machine import environment
from dynprune.units import digits
from dynprune.version import __version__

PARITY_IMAGES, TIMED_IMAGES = 256, 200
ALIKE = 0.99  # of the images are answered by the same network: one exactly at a threshold may fall to either side


@dataclass(frozen=True)
class Row:
    """One network of the cascade, or the whole. accuracy: on test images. images_share: of the test images, those that
    it has the last word on. Milliseconds: over single test images, each the median of its repeats; mean_ms of the
    medians of all that end at one network."""

    name: str
    macs: float
    val_accuracy: float
    accuracy: float
    images_share: float
    mean_ms: float
    p50_ms: float
    p95_ms: float


@dataclass(frozen=True)
class CascadeResult:
    """rows: every network given, then the cascade. cost: what was asked for in, macs or latency. share: mean MACs of a
    test image over the last network's; ms_share: mean milliseconds so. static_accuracy: on test images, of a static
    network of this cost: on the straight lines between the networks given; static_ms: mean of a static network of this
    accuracy, on the lines between their times; None where none is as accurate; static_as_quick: accuracy, so, of one
    that takes as long. goes_on_from: the network that another goes on from, since it lies inside of it; "" where none
    does. cascade_accuracy: then, on test images, of the best cascade of the others for the same goal; None where there
    is none. goes_on: of the test images of each class, the share that the first network is not trusted with.
    agreement: share of the images for which the ONNX file's class and step are those of its parts. page: what the
    command writes on top; "" before."""

    path: str
    chain: list[str]
    left_out: list[str]
    thresholds: list[float]
    cost: str
    share: float
    val_share: float
    ms_share: float
    accuracy: float
    val_accuracy: float
    static_accuracy: float
    static_ms: float | None
    static_as_quick: float
    goes_on_from: str
    cascade_accuracy: float | None
    rows: list[Row]
    goes_on: dict[str, float]
    max_abs_diff: float
    agreement: float
    images: int
    val_data: str
    test_data: str
    verdict: str
    environment: dict
    page: str = ""


@dataclass(frozen=True)
class Sights:
    """What a page shows beyond the result. curve: the best plans on validation images, weighed on test images. test:
    what every network given says of these. step: which of `chain` had the last word, (images,)."""

    curve: list[Plan]
    test: Said
    step: np.ndarray
    chain: tuple[int, ...]


def make(
    networks: Sequence[Network],
    data: Data,
    folder: Path,
    asked: Asked,
    *,
    threads: int = 1,
    nested: bool = False,
    report: Report = silent,
) -> tuple[CascadeResult, Sights]:
    """Choose, write and measure. nested: a network that holds another must go on from it. Raises DynpruneError before
    anything is written where no cascade does what is asked, and leaves no file where it and its parts disagree."""
    added = nested_in(networks)
    check_alike(networks, {outer for _, outer in added})
    for network in networks:
        if network.classes != data.classes:
            raise DynpruneError(
                f"{network.path} knows the classes {', '.join(network.classes[:8])}; the data give "
                f"{', '.join(data.classes[:8])}. Use the data it was trained on."
            )
    names, macs = names_of(networks), [network.macs for network in networks]
    val = answers(networks, data, data.val, "validation images", report)
    report("weighing thresholds", 0, 0)
    goal = asked.goal(float(val.right[-1].mean()))
    costs, more = (macs, added) if asked.cost == "macs" else latencies(networks, data, threads, report)
    every = list(plans(val, costs, more))
    found = [plan for plan in every if len(plan.chain) == 1 or goes_on(plan, added)] if nested else every
    best = choose(found, goal, costs, names)
    chosen = [networks[number] for number in best.chain]
    content = joined([own.proto for own in chosen], best.thresholds, facts_of(chosen, names, best, macs))
    difference, agreement = parity(content, best.thresholds, chosen, data, report)
    test = answers(networks, data, data.test, "test images", report)
    reached = weigh(best.chain, best.thresholds, test, macs, added)
    inner = goes_on(best, added)
    others = [plan for plan in every if not goes_on(plan, added)]
    rival = rival_of(others, goal, costs, names) if inner else None
    step = steps_taken(best.chain, best.thresholds, test)
    sessions = [*(open_session(own.path, threads) for own in networks), open_session(content, threads)]
    times = timed(sessions, data, some(data.test, TIMED_IMAGES), report, "timing single test images in turn")
    ends = step[some_of(len(step), TIMED_IMAGES).numpy()]
    rows = [
        Row(
            name,
            macs[number],
            float(val.right[number].mean()),
            float(test.right[number].mean()),
            float((step == best.chain.index(number)).mean()) if number in best.chain else 0.0,
            *spread(times[number], np.zeros_like(ends)),
        )
        for number, name in enumerate(names)
    ]
    rows.append(Row("cascade", reached.cost, best.accuracy, reached.accuracy, 1.0, *spread(times[-1], ends)))
    accuracies, times_alone, own = [row.accuracy for row in rows[:-1]], [row.mean_ms for row in rows[:-1]], rows[-1]
    static = static_at(reached.cost, macs, accuracies)
    static_ms = cost_at(reached.accuracy, times_alone, accuracies)
    as_quick = static_at(own.mean_ms, times_alone, accuracies)
    cascade = weigh(rival.chain, rival.thresholds, test, macs).accuracy if rival else None
    path = folder / "cascade.onnx"
    on = {
        name: float((step[test.labels == number] > 0).mean())
        for number, name in enumerate(data.classes)
        if (test.labels == number).any()
    }
    result = CascadeResult(
        str(path),
        [names[number] for number in best.chain],
        [name for number, name in enumerate(names) if number not in best.chain],
        list(best.thresholds),
        asked.cost,
        reached.cost / macs[-1],
        weigh(best.chain, best.thresholds, val, macs, added).cost / macs[-1],
        own.mean_ms / rows[-2].mean_ms,
        reached.accuracy,
        best.accuracy,
        static,
        static_ms,
        as_quick,
        names[inner[0]] if inner else "",
        cascade,
        rows,
        on,
        difference,
        agreement,
        len(step),
        data.chooses,
        data.reports,
        verdict(rows, reached.cost / macs[-1], static, static_ms, as_quick, cascade, asked.cost),
        {**environment(), "threads": threads},
    )
    write_bytes(path, content)
    write_text(folder / "cascade.csv", table_of(data, test, best, names, step))
    write_text(folder / "cascade.json", json.dumps(asdict(result), indent=2))
    curve = [weigh(plan.chain, plan.thresholds, test, costs, more) for plan in thinned(frontier(found))]
    return result, Sights(curve, test, step, best.chain)


def goes_on(plan: Plan, added: Added) -> tuple[int, int] | None:
    """The first pair of networks of the chain of which the second goes on from the first."""
    return next((pair for pair in itertools.pairwise(plan.chain) if pair in added), None)


def rival_of(found: Sequence[Plan], goal: Goal, costs: Sequence[float], names: Sequence[str]) -> Plan | None:
    """The best cascade of these for the goal, if there is one."""
    try:
        return choose(found, goal, costs, names)
    except DynpruneError:
        return None


def names_of(networks: Sequence[Network]) -> list[str]:
    """As they were given; whole paths where names are alike."""
    names = [network.name for network in networks]
    return names if len(set(names)) == len(names) else [str(network.path) for network in networks]


def facts_of(chosen: Sequence[Network], names: Sequence[str], best: Plan, macs: Sequence[int]) -> dict[str, str]:
    """The file's metadata: the first network's, and what it is a cascade of."""
    steps = [
        {"network": names[number], "macs": macs[number], "threshold": threshold}
        for number, threshold in zip(best.chain, [*best.thresholds, None])
    ]
    own = {key: value for key, value in chosen[0].facts.items() if key not in ("made_from_sha256", "precision")}
    return {**own, "producer": f"dynprune {__version__}", "cascade": json.dumps(steps)}


def parity(
    content: bytes, thresholds: Sequence[float], chosen: Sequence[Network], data: Data, report: Report
) -> tuple[float, float]:
    """Largest difference from the scores of the parts, and share of validation images with the same class and step.
    Raises DynpruneError where they disagree."""
    images = some(data.val, PARITY_IMAGES)
    session, parts = open_session(content), [open_session(own.path) for own in chosen]
    difference = largest = 0.0
    same = count = 0
    for feed, labels in normalised(session, data, images):
        report("comparing the file with its parts", count, len(images))
        scores, step = run_all(session, dict(feed))
        pixels = next(iter(feed.values()))
        ours = np.stack([run_all(part, {part.get_inputs()[0].name: pixels})[0] for part in parts])
        alone = Said(np.stack([margin_of(own) for own in ours]), ours.argmax(2), labels)
        expected, everyone = steps_taken(range(len(parts)), thresholds, alone), np.arange(len(step))
        difference = max(difference, float(np.abs(scores - ours[step, everyone]).max()))
        largest = max(largest, float(np.abs(ours).max()))
        same += int(((step == expected) & (scores.argmax(1) == alone.said[expected, everyone])).sum())
        count += len(labels)
    if not difference <= TOLERANCE * max(largest, 1e-30) or same < ALIKE * count:
        raise DynpruneError(
            f"The cascade's file differs from its parts by {difference:.1e}, with {same} of {count} images answered by "
            "the same network. No file was written. Please report the networks' names."
        )
    return difference, same / count


def spread(samples: np.ndarray, ends: np.ndarray) -> tuple[float, float, float]:
    """Mean, median and 95th percentile. ends: which network had the last word; images of one such network take as long
    as each other, so the mean is that of their medians, which other work beside it does not spoil."""
    medians = [(ends == own).mean() * np.median(samples[ends == own]) for own in np.unique(ends)]
    return float(sum(medians)), float(np.percentile(samples, 50)), float(np.percentile(samples, 95))


def verdict(
    rows: Sequence[Row],
    share: float,
    static: float,
    static_ms: float | None,
    as_quick: float,
    cascade: float | None = None,
    cost: str = "macs",
) -> str:
    """One honest line: beside the last network, beside static ones of this cost and of this accuracy, and, of networks
    that lie in one another, beside a cascade."""
    *parts, own = rows
    last = parts[-1]
    at, alike, static = (
        (f"{share:.3f} of {last.name}'s multiply-accumulates", "of this cost", static)
        if cost == "macs"
        else (f"{own.mean_ms / last.mean_ms:.3f} of {last.name}'s milliseconds", "as quick", as_quick)
    )
    gain = 100 * (own.accuracy - static)
    said = (
        f"{100 * own.accuracy:.2f} % on test images at {at} "
        f"({last.name}: {100 * last.accuracy:.2f} %); a static network {alike}: {100 * static:.2f} %, so the "
        f"cascade {'gains' if gain > 0 else 'loses'} {abs(gain):.2f} points"
    )
    if cascade is not None:
        said += f"; a cascade of networks that do not lie in one another: {100 * cascade:.2f} %"
    beside = f"{digits(static_ms)} of a static network as accurate, " if static_ms else ""
    return f"{said}; {digits(own.mean_ms)} ms in the mean, {beside}{digits(last.mean_ms)} of {last.name}"


def table_of(data: Data, test: Said, best: Plan, names: Sequence[str], step: np.ndarray) -> str:
    """Of every test image: which class it is, which network had the last word, what that said, and how sure the first
    was."""
    out = io.StringIO()
    lines = csv.writer(out, lineterminator="\n")
    lines.writerow(("image", "class", "answered_by", "predicted", "first_margin"))
    for number, own in enumerate(step):
        network = best.chain[own]
        lines.writerow(
            (
                image_name(data.test, number),
                data.classes[test.labels[number]],
                names[network],
                data.classes[test.said[network, number]],
                f"{test.margin[best.chain[0], number]:.4f}",
            )
        )
    return out.getvalue()


def thinned(found: Sequence[Plan], most: int = 60) -> list[Plan]:
    """So many of them, evenly."""
    places = np.unique(np.linspace(0, len(found) - 1, min(most, len(found))).round().astype(int))
    return [found[place] for place in places]
