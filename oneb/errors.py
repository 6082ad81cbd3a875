"""What a user sees when something they gave cannot work."""

from __future__ import annotations

from collections.abc import Iterable


class OnebError(Exception):
    """A user's mistake: the message says what was given, what was wanted, and the fix.

    The command line prints it without a traceback. Bugs of ours stay ``AssertionError`` and
    friends, so that the two are never confused.
    """


class ConfigErrors(OnebError):
    """Every fault of a configuration at once, so that nobody fixes them one run at a time.

    Args:
        faults: one message each, in the form "what was given: what was wanted; the fix".
    """

    def __init__(self, faults: Iterable[str]) -> None:
        self.faults = tuple(faults)
        noun = "problem" if len(self.faults) == 1 else "problems"
        lines = [f"{len(self.faults)} {noun} with this configuration:"]
        lines += [f"  {number}. {fault}" for number, fault in enumerate(self.faults, 1)]
        super().__init__("\n".join(lines))
