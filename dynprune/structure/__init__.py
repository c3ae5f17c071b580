"""Which channels belong together, and what is left of a network without some of them.

In: a module and an example input. Out: a `ChannelGraph` of arms and groups (`tracing.trace`), and compact copies of the
module (`surgery.slim`). No network is known by name here: the module runs once on labels. Read `channels.py` first,
then `labels.py`, `rules.py` and `tracing.py`.
"""
