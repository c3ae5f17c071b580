"""What `dynprune VERB` does, as a function of the same name that neither prints nor exits.

In: settings, a run directory, or the name of a network. Out: a dataclass. One file per verb; `dynprune.VERB` is the
same function, and the command line is a thin shell over it. Progress goes to a `Listener`, silent unless one is given.
Read `train.py` first.
"""
