"""`dynprune inspect`: which channels can be removed, which cannot and why, and a proof."""

from dynprune.structure.inspect import inspect

__all__ = ["inspect"]
