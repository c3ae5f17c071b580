"""Images with their classes, and what a network says of them.

In: a folder of photos or the name of a dataset. Out: a `Data` with splits, batches and normalisation (`loading.py`,
`photos.py`), and the share of images that a network gets right (`scores.py`). Read `loading.py` first.

Others use `Data` and `load_data` (`loading.py`), `Scores` and `evaluate` (`scores.py`).
"""
