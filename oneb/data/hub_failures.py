"""What to do when the Hugging Face Hub does not deliver: wait, or say why waiting is of no use."""

from __future__ import annotations

import errno
import re
import time
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from typing import NoReturn

from huggingface_hub import constants
from huggingface_hub.utils import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from oneb.errors import OnebError
from oneb.units import format_duration

Say = Callable[[str], None]

# Its bases hold the error of the client's HTTP library: requests before huggingface_hub 1.0, httpx since.
FAILURES = (OSError, *HfHubHTTPError.__bases__)
_WAITS = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 60.0)  # seconds after each failure in a row; then it is given up
_LONGEST_WAIT = 900.0  # that a server may ask for: three of the Hub's rate-limit windows (hub docs, "Rate limits")
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ENOTDIR}


class Unreachable(OnebError):
    """No answer: another time, or what is on this disk, may help."""


class Patience:
    """Waits after each failure, as the server asks or longer and longer, and gives up after too many in a row.

    Args:
        waits: this often at most, where there is something else to go on with.
    """

    def __init__(self, what: str, say: Say, waits: int | None = None) -> None:
        self.what, self.say, self.failures, self.most = what, say, 0, 0
        self.waits = _WAITS[:waits]

    def arrived(self, n_bytes: int) -> None:
        """So many bytes are here. More than ever before is progress; what is lost and brought again is not."""
        if n_bytes > self.most:
            self.failures, self.most = 0, n_bytes

    def wait_after(self, error: Exception) -> None:
        """Raises OnebError instead where waiting is of no use."""
        cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) else None
        error = cause if isinstance(cause, Exception) else error
        asked = _asked_wait(error)
        if _is_final(error) or self.failures == len(self.waits) or (asked or 0) > _LONGEST_WAIT:
            give_up(self.what, error)
        ours = self.waits[self.failures]
        seconds = max(ours, asked or 0)
        self.failures += 1
        reason = "as the server asks" if seconds > ours else f"try {self.failures + 1} of {len(self.waits) + 1}"
        self.say(f"{self.what}: {_in_words(error)}; again in {format_duration(seconds)} ({reason}).")
        time.sleep(seconds)


def status_of(error: Exception) -> int | None:
    """The HTTP status that ``error`` is about, None if it is about something else."""
    return getattr(getattr(error, "response", None), "status_code", None)


def _is_final(error: Exception) -> bool:
    if isinstance(error, (OfflineModeIsEnabled, RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError)):
        return True
    if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
        return True
    status = status_of(error) or 0
    if status == 403:  # of a CDN: it does not accept the signed address (yet, or any more), and the next one it may
        return str(error.response.url).startswith(constants.ENDPOINT)
    return 400 <= status < 500 and status not in (408, 416, 425, 429)


def _asked_wait(error: Exception) -> float | None:
    """Seconds that the answer asks to wait: Retry-After (RFC 9110) or the Hub's RateLimit (IETF ratelimit-headers)."""
    headers = getattr(getattr(error, "response", None), "headers", None)
    if headers is None:
        return None
    if limit := re.search(r"\br\s*=\s*0\b.*?\bt\s*=\s*(\d+)", headers.get("RateLimit") or ""):
        return float(limit[1])
    after = (headers.get("Retry-After") or "").strip()
    if after.isdigit():
        return float(after)
    try:
        return max(0.0, parsedate_to_datetime(after).timestamp() - time.time())
    except (TypeError, ValueError):
        return None


def _in_words(error: Exception) -> str:
    status = status_of(error)
    return f"the server answered {status}" if status else f"{type(error).__name__} {str(error)[:200]}".strip()


def give_up(what: str, error: Exception) -> NoReturn:
    """Raises OnebError that says why ``what`` did not come, and what would help."""
    if isinstance(error, OfflineModeIsEnabled):
        raise Unreachable(f"HF_HUB_OFFLINE is set, and {what} is not in the cache at {constants.HF_HUB_CACHE}. "
                          "Unset it, or copy the cache from a machine that has it") from error
    if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
        raise OnebError(f"{what}: {error.strerror} ({error.filename or constants.HF_HUB_CACHE}). Make room, or set "
                        "HF_HOME to a folder on another disk; the download continues where it stopped") from error
    if isinstance(error, RepositoryNotFoundError) or status_of(error) == 401:
        raise OnebError(f"{what}: {constants.ENDPOINT} has no such dataset, or not for you. Check the name; if it is "
                        "gated or private, accept its terms there and set HF_TOKEN") from error
    if isinstance(error, (RevisionNotFoundError, EntryNotFoundError)):
        raise OnebError(f"{what}: the Hub has the dataset, but not this revision or file. Check the revision and the "
                        f"pattern ({_in_words(error)})") from error
    asked = _asked_wait(error)
    then = f"in {format_duration(asked)}" if asked else "later"
    raise Unreachable(f"{what}: the Hugging Face Hub did not deliver ({_in_words(error)}). Check the network and run "
                      f"the command again {then}; what has arrived is kept. A token in HF_TOKEN raises the Hub's "
                      "limits. Files from elsewhere can be given with --input") from error
