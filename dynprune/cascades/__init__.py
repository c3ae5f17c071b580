"""Networks one after another: a compact one for every image, a larger one where it is unsure.

In: ONNX files of networks for the same classes and inputs (`networks.py`), and their data. Out: which of them, with
thresholds chosen on validation images (`choice.py`), one ONNX file that holds them (`graph.py`), and what it reaches
and costs on test images (`build.py`). Nothing is trained here. Read `choice.py` first.

Others use `make` (`build.py`).
"""
