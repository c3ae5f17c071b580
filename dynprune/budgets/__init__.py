"""From what may be spent to widths.

In: a `ChannelGraph` and limits on MACs, parameters or milliseconds (`limits.py`). Out: a width for every group
(`allocation.py`, `fit.py`), and what layers and networks take in onnxruntime on this machine (`latency.py`). Read
`allocation.py` first.

Others use `Budget` (`limits.py`), `Fitter` and `Fit` (`fit.py`), `allocate` (`allocation.py`), `interleaved`
(`latency.py`).
"""
