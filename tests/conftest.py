"""Fixtures that every test file may use."""

import os

# Before anything imports torch, and inherited by what tests start: threads of several workers that wait for each other
# on the same cores make a small model's step tens of times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from data_helpers import *  # noqa: E402, F403
from forked_runs import *  # noqa: E402, F403
from small_disk import *  # noqa: E402, F403
