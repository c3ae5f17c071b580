"""Which channels belong together, and what is left of a network without some of them.

In: a module and an example input. Out: a `ChannelGraph` of arms and groups (`tracing.trace`), and compact copies of the
module (`surgery.slim`). No network is known by name here: the module runs once on labels. Read `channels.py` first,
then `labels.py` and the `record.py` that a run on them leaves, `tracer.py` that runs, `rules.py` and `tracing.py`. What
the tracer must know beside labels is in `layers.py` (which layer runs), `origins.py` (where a tensor comes from) and
`sizes.py` (what the sizes that a network remembers count).

Others use `trace` and `masked` (`tracing.py`), `slim` (`surgery.py`), `ChannelGraph` and `Selection` (`channels.py`).
"""
