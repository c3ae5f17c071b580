"""The command line: options to settings, settings to calls, results to a report. No logic of its own.

In: what was typed. Out: a table or JSON on stdout, progress on stderr, an exit code. Read `program.py` first, then
`train.py`, `deploy.py` and `look.py`, the commands. torch is imported only inside of them, so that `--help` is quick.
"""

from dynprune.cli.program import app, main

__all__ = ["app", "main"]
