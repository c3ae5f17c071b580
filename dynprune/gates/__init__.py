"""Gates that decide for each image which channels to compute.

In: a network with its `ChannelGraph`. Out: a gated network (`gating.py`) trained to a mean cost (`training.py` is the
run, `session.py` one step of it, `threshold.py` how gates settle, `checkpoint.py` a session written down), its file
(`file.py`), its ONNX file in which closed gates mean less work (`onnx.py`, `export.py`), and what it does to images
(`stats.py`, `bench.py`). Read `gating.py` first.

Others use `gate` (`training.py`), `export_gated` (`export.py`), `bench_gated` (`bench.py`), `load` (`file.py`).
"""
