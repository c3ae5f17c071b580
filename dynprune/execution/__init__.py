"""Which arms run in a step, and the narrow network that runs them.

In: a `ChannelGraph`, widths and a full-width module. Out: the bandit's selections (`bandit.py`, `explore.py`), the
rewards of arms (`saliency.py`), and the active model over the reservoir of all arms (`reservoir.py`). Read `bandit.py`
first.

Others use `Explorer` and `Exploration` (`explore.py`), `Reservoir` (`reservoir.py`), `magnitude` (`saliency.py`).
"""
