"""From a trained run, or any trained network, to files that ship.

In: a run directory, or a network with its weights (`trained.py`). Out: the compact file (`compact.py`), ONNX
(`export.py`), measured speed-ups (`bench.py`), both for any module (`modules.py`), and what other ways to train would
have given (`compare.py`). Read
`compact.py` first.

Others use `compact`, `export`, `compare`, `bench_run` and `compact_trained`, with the dataclasses that they return;
gates also take `load_compact` and `check_classes` (`export.py`).
"""
