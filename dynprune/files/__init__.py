"""What is written to disk and read back: whole or not at all, and never unpickled.

In: tensors and facts, or a network. Out: safetensors (`disk.py`), the compact file and the network in it
(`artifact.py`), any other module (`modules.py`), ONNX and its sessions (`onnxfile.py`). Read `artifact.py` first.

Others use `artifact`, `read_tensors`, `write_tensors` and `write_text` (`disk.py`), `write_onnx` and `open_session`
(`onnxfile.py`).
"""
