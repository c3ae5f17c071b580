"""dynprune: compact CNNs by dynamic channel execution.

Every command of the command line is a function here. `trace` finds a network's channel structure, `load` opens a
compact or gated file.
"""

import importlib
from typing import TYPE_CHECKING

from dynprune.version import __version__

if TYPE_CHECKING:
    from dynprune.budgets.limits import Budget
    from dynprune.commands.bench import bench
    from dynprune.commands.cascade import cascade
    from dynprune.commands.compact import compact
    from dynprune.commands.compare import compare
    from dynprune.commands.export import export
    from dynprune.commands.gate import gate
    from dynprune.commands.inspect import inspect
    from dynprune.commands.plan import plan
    from dynprune.commands.predict import predict
    from dynprune.commands.report import report
    from dynprune.commands.save import save
    from dynprune.commands.train import train
    from dynprune.execution.dynamic import DynamicExecution
    from dynprune.execution.quick import quick_layers
    from dynprune.gates.file import load
    from dynprune.runs.config import CompactConfig, GateConfig, TrainConfig
    from dynprune.structure.tracing import trace

# torch takes seconds to import, and `dynprune --help` does without: names are looked up when they are used
WHERE = {
    "trace": "structure.tracing",
    "inspect": "commands.inspect",
    "plan": "commands.plan",
    "train": "commands.train",
    "compact": "commands.compact",
    "load": "gates.file",
    "predict": "commands.predict",
    "report": "commands.report",
    "save": "commands.save",
    "export": "commands.export",
    "bench": "commands.bench",
    "gate": "commands.gate",
    "cascade": "commands.cascade",
    "compare": "commands.compare",
    "DynamicExecution": "execution.dynamic",
    "quick_layers": "execution.quick",
    "Budget": "budgets.limits",
    "CompactConfig": "runs.config",
    "TrainConfig": "runs.config",
    "GateConfig": "runs.config",
}

__all__ = [
    "Budget",
    "CompactConfig",
    "DynamicExecution",
    "GateConfig",
    "TrainConfig",
    "__version__",
    "bench",
    "cascade",
    "compact",
    "compare",
    "export",
    "gate",
    "inspect",
    "load",
    "plan",
    "predict",
    "quick_layers",
    "report",
    "save",
    "trace",
    "train",
]


def __getattr__(name: str) -> object:
    if name not in WHERE:
        raise AttributeError(f"module 'dynprune' has no attribute {name!r}")
    return getattr(importlib.import_module(f"dynprune.{WHERE[name]}"), name)


def __dir__() -> list[str]:
    return __all__
