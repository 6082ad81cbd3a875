"""Fixtures that every test file may use."""

from data_helpers import *  # noqa: F403
