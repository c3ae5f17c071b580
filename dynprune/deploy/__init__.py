"""From a trained run to files that ship.

In: a run directory. Out: the compact file (`compact.py`), ONNX (`export.py`), measured speed-ups (`bench.py`), and what
other ways to train would have given (`compare.py`).
"""
