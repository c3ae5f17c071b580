"""Two tests at a time (see pyproject.toml), one thread each: workers that share cores with several threads each wait
for one another."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
