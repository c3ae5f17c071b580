"""From settings and data to a trained run.

In: a `TrainConfig` and `Data`. Out: a run directory with a checkpoint. `train.py` is the loop, `session.py` one step of
it and all that it holds, `checkpoint.py` that written down, `recipe.py` what settings mean for torch, `rehearsal.py`
what is tried before, `trainee.py` what all of them need of what is trained. Read `train.py` first.

Others use `train` (`train.py`), `Session` (`session.py`), `plan` (`plan.py`), `rehearse` (`rehearsal.py`); gates also
take what `checkpoint.py` and `recipe.py` know of any training.
"""
