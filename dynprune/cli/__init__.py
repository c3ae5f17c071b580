"""The command line: options to settings, settings to calls, results to a report. No logic of its own."""

from dynprune.cli.program import app, main

__all__ = ["app", "main"]
