"""dynprune: compact CNNs by dynamic channel execution. `load(path)` opens a compact or gated file, `trace` finds channel structure."""

from dynprune.version import __version__

__all__ = ["__version__", "load", "trace"]


def __getattr__(name: str) -> object:  # torch takes seconds to import: `dynprune --help` does without
    if name == "load":
        from dynprune.gates.file import load
        return load
    if name == "trace":
        from dynprune.structure.tracing import trace
        return trace
    raise AttributeError(f"module 'dynprune' has no attribute {name!r}")
