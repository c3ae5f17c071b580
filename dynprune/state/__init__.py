"""What a network holds: parameters, buffers, and the values in its attributes, which no state dict has.

In: any module. Out: copies of it (`copies.py`), the paths and values in its attributes (`attributes.py`), and all of
its state as named tensors and plain values, which another instance can be filled with (`tensors.py`). Read `tensors.py`
first.

Others use `copied` and `same_randomness` (`copies.py`), `state_of`, `fill` and `named_tensors` (`tensors.py`).
"""
