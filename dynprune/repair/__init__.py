"""A trained network in, a compact one out: which arms go, how wide every group stays, and weights that make up for it.

In: an untouched network with its channel graph, some images, a budget. Out: a narrow network that says nearly the same,
without a step of training, and training for some seconds if they are given. Read `trained.py` first: it is the whole
way in one function. Then `choice.py` (what repair cannot replace), `refit.py` (ridge regression layer after layer) and
`widths.py` (the bandit on frozen weights).

Any task: `says.py` is what two networks are compared by, `examples.py` what a batch of the user's own holds.

Others use `Compaction` (`trained.py`), `repair` (`refit.py`), `Lesson` and `tune` (`distill.py`), `divergence`
(`says.py`), `sample_images` (`images.py`), `Reader` (`examples.py`).
"""
