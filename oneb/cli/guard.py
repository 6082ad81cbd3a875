"""What every command does with a user's mistake."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Sequence

from oneb.errors import OnebError

Main = Callable[..., int]


def reports_mistakes(main: Main) -> Main:
    """Wrap a command's ``main``: an :class:`OnebError` becomes a message on stderr and exit code 2, no traceback."""

    @functools.wraps(main)
    def guarded(argv: Sequence[str] | None = None) -> int:
        try:
            return main(argv)
        except OnebError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except BrokenPipeError:  # `… | head` has seen enough; Python's own flush at exit must not complain either
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141

    return guarded
