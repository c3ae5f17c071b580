"""The guide: one page per topic, as `dynprune guide TOPIC` shows it.

In: a topic. Out: its page as Markdown. The pages lie here, beside this file, and their code and commands are run or
parsed by the tests.

Others use `page` and `TOPICS`.
"""

from __future__ import annotations

import difflib
from pathlib import Path

from dynprune.errors import DynpruneError

# in the order in which they are best read
TOPICS = {
    "start": "from photos to a fast file, step by step",
    "trained": "a trained network in, a compact one out, in a minute",
    "budgets": "what may be spent, and how widths follow from it",
    "structure": "which channels belong together, and how removal is proven",
    "training": "what runs in a step, what it costs, data and weights",
    "gates": "channels that each image decides on",
    "cascades": "a compact network for most images, a larger one for the rest",
    "ship": "int8 with proof, photos as they are, a report to look at",
    "predict": "classes of new photos, and ten lines for other programs",
    "runs": "run directories, files, resuming, several processes",
    "python": "everything without the command line",
    "loop": "dynamic execution in a training loop of your own, for any task",
    "segmentation": "a U-Net, and what other tasks than classes need",
    "detection": "torchvision's detectors",
    "ultralytics": "YOLO: compact, save, load, train on, validate, export",
    "lightning": "dynamic execution as a callback of Lightning",
    "transformers": "dynamic execution in Hugging Face's Trainer",
    "evidence": "what was measured, and what did not help",
    "ablations": "what each setting is worth",
    "troubleshooting": "messages and symptoms, their causes, what to do",
    "words": "every term in one sentence",
    "contributing": "how to add a rule, an option, a command",
}


def page(topic: str) -> str:
    """The Markdown of a topic. Raises DynpruneError for one that there is not."""
    if topic not in TOPICS:
        close = difflib.get_close_matches(topic, TOPICS, 1)
        raise DynpruneError(
            f'No topic "{topic}". {f"Did you mean {close[0]}? " if close else ""}Topics: {", ".join(TOPICS)}.'
        )
    return (Path(__file__).parent / f"{topic}.md").read_text(encoding="utf-8")
