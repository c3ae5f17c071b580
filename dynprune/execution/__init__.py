"""Which arms run in a step, and the narrow network that runs them.

In: a module, a budget or widths, and how to make an optimizer. Out: the bandit's selections (`bandit.py`,
`explore.py`), the rewards of arms (`saliency.py`), the active model over the reservoir of all arms (`reservoir.py`),
and all of it as one object that a training loop holds (`dynamic.py`). Read `bandit.py` first.

Others use `DynamicExecution` and `Execution` (`dynamic.py`), `Explorer` and `Exploration` (`explore.py`), `Reservoir`
(`reservoir.py`), `magnitude` (`saliency.py`).
"""
