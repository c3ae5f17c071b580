"""Networks one after another: a compact one for every image, a larger one where it is unsure.

In: ONNX files of two or three networks for the same classes and inputs (`networks.py`), and their data. Out: thresholds
chosen on validation images (`choice.py`), one ONNX file that holds them all (`graph.py`), and what it reaches and costs
on test images (`build.py`). Nothing is trained. Read `choice.py` first.

Others use `make` (`build.py`).
"""
