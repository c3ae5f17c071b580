"""What the networks of a cascade cost in milliseconds, in one file with each other: measured in onnxruntime, batch 1.

Takes networks and data; returns costs as `choice.py` weighs them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import onnxruntime

from dynprune.budgets.latency import Report, run_ms
from dynprune.cascades.graph import joined
from dynprune.cascades.networks import Network
from dynprune.data.loading import Data, Images, some
from dynprune.deploy.answers import normalised
from dynprune.files.onnxfile import open_session

IMAGES, REPEATS = 48, 3
NOBODY, EVERYBODY = -1.0, 2.0  # thresholds below and above every margin


def timed(
    sessions: Sequence[onnxruntime.InferenceSession], data: Data, images: Images, report: Report, what: str
) -> np.ndarray:
    """Milliseconds of single images, every session in turn, each the median of its repeats; (sessions, images)."""
    samples: list[list[float]] = []
    for feed, labels in normalised(sessions[0], data, images):
        pixels = next(iter(feed.values()))
        for number in range(len(labels)):
            report(what, len(samples), len(images))
            pairs = [(own, {own.get_inputs()[0].name: pixels[number : number + 1]}) for own in sessions]
            turns = [[run_ms(*pair) for pair in pairs] for _ in range(REPEATS + 1)]
            samples.append(np.median(turns[1:], axis=0).tolist())
    return np.array(samples).T


def latencies(
    networks: Sequence[Network], data: Data, threads: int, report: Report
) -> tuple[list[float], dict[tuple[int, int], float]]:
    """Milliseconds of each network as the first of a cascade, asking who goes on included, and of every pair what
    an image takes that goes on from one to the other. Medians over validation images:
    what computes is the same for all, and other work beside it spoils only some."""
    images = some(data.val, IMAGES)
    alone = timed([open_session(own.path, threads) for own in networks], data, images, report, "timing every network")
    asking, added = [], {}
    for inner, outer in itertools.combinations(range(len(networks)), 2):
        pair = [networks[inner].proto, networks[outer].proto]
        sessions = [open_session(joined(pair, [threshold], {}), threads) for threshold in (NOBODY, EVERYBODY)]
        what = f"timing {networks[inner].name} and {networks[outer].name} in one file"
        single = open_session(networks[inner].path, threads)
        own, stays, goes = np.median(timed([single, *sessions], data, images, report, what), axis=1)
        asking.append(stays - own)
        added[inner, outer] = float(goes - stays)
    return (np.median(alone, axis=1) + max(0.0, float(np.median(asking)))).tolist(), added
