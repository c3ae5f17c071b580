"""Settings and run directories.

In: options, or a directory. Out: a checked configuration (`config.py`), and a run's files with their checkpoints
(`directory.py`). Read `config.py` first.

Others use `TrainConfig`, `GateConfig` and `CompactConfig` (`config.py`), `open_any`, `Run` and `GateRun`
(`directory.py`).
"""
