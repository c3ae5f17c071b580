"""Gates that decide for each image which channels to compute.

In: a network with its `ChannelGraph`. Out: a gated network (`gating.py`) trained to a mean cost (`training.py`), its
file, its ONNX file in which closed gates mean less work (`onnx.py`, `export.py`), and what it does to images
(`stats.py`, `bench.py`). Read `gating.py` first.
"""
