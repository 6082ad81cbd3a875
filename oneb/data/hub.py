"""Files of a dataset on the Hugging Face Hub: what there is, and one of them as a whole, verified file on this disk.

huggingface_hub does the talking (its session, token, offline switch, errors and cache), with four exceptions, for
which the download itself is here:

- From 1.18 on it begins a file again after every kill (huggingface_hub issue 4196); here a partial file is kept,
  and continued by range.
- Its Xet transfers have hung for good (xet-core issues 850, 869, 898); these are plain GETs, a timeout at each read.
- It does not compare what arrived with the hash that the Hub lists, and of a full disk it only warns.
- Its listing knows no timeout, and nothing without a network.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from huggingface_hub import constants, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.utils import WeakFileLock, build_hf_headers, get_session, hf_raise_for_status

from oneb.data.hub_failures import FAILURES, Patience, Say, Unreachable, give_up, status_of
from oneb.errors import OnebError
from oneb.files import sha256_file, write_json, write_text
from oneb.units import format_gib

if TYPE_CHECKING:
    from oneb.data.sources import HubDataset

Progress = Callable[[int, int], None]

_CHUNK = 16 * 2**10  # what requests waits for until it is there; httpx hands over what arrives
_SLOWEST = (60.0, 60 * 2**10)  # a connection that brings fewer bytes in so many seconds is dropped for another
_FEW_WAITS = 2  # for a listing, where there is that of last time
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class HubFile:
    """A file of a dataset at one commit."""

    path: str  # inside the repository
    size: int  # bytes
    sha256: str | None  # None: a small file kept in git itself, where the Hub lists no SHA-256
    revision: str  # commit, also where a branch was asked for


# -- What there is -------------------------------------------------------------------------------

def list_files(dataset: HubDataset, say: Say = lambda message: None) -> list[HubFile]:
    """The files of ``dataset`` that match its pattern, by path (``*`` also crosses folders).

    The listing of a commit never changes: it is asked for once and then read from the assets folder of the Hub's
    cache. That of a branch is asked for each time; without a network the last one serves, soon, or what the cache
    holds, if in the end nobody answers.

    Args:
        say: told about waits, and about a listing that is not the Hub's of now.

    Raises:
        OnebError: if the Hub has no such dataset, revision or files, or is out of reach with nothing in the cache.
    """
    saved = _saved_listing(dataset)
    files = _read_listing(saved)
    if files and _COMMIT.fullmatch(dataset.revision):
        return files
    try:
        found = _ask_listing(dataset, say, _FEW_WAITS if files else None)
    except Unreachable as error:
        found = files or _cached_files(dataset)
        if not found:
            raise
        kept = "the listing from last time" if files else f"the {len(found)} files in the cache, there may be more"
        say(f"{str(error).partition('. ')[0]}. Going on with {kept}.")
        return found
    if not found:
        raise OnebError(f"{dataset.repo} has no files {dataset.pattern} at revision {dataset.revision}; "
                        f"see {constants.ENDPOINT}/datasets/{dataset.repo}/tree/{dataset.revision}")
    with contextlib.suppress(OSError):  # a cache that can only be read serves, too
        saved.parent.mkdir(parents=True, exist_ok=True)
        write_json(saved, [asdict(file) for file in found])
        if not _COMMIT.fullmatch(dataset.revision):  # so that the client finds the branch's files offline
            reference = _storage(dataset) / "refs" / dataset.revision
            reference.parent.mkdir(parents=True, exist_ok=True)
            write_text(reference, found[0].revision)
    return found


def _ask_listing(dataset: HubDataset, say: Say, waits: int | None) -> list[HubFile]:
    api = f"{constants.ENDPOINT}/api/datasets/{dataset.repo}"
    what = f"the listing of {dataset.repo}"
    commit = dataset.revision
    if not _COMMIT.fullmatch(commit):
        answer, _ = _ask_json(f"{api}/revision/{quote(commit, safe='')}", Patience(what, say, waits))
        commit = answer["sha"]
    folder = "/".join([commit, *filter(None, [quote(_fixed_folder(dataset.pattern))])])
    url: str | None = f"{api}/tree/{folder}?recursive=true"
    found = []
    while url:
        entries, url = _ask_json(url, Patience(what, say, waits))
        for entry in entries:
            if entry["type"] == "file" and fnmatch.fnmatchcase(entry["path"], dataset.pattern):
                large = entry.get("lfs") or {}
                sha256 = large.get("oid") if _SHA256.fullmatch(large.get("oid") or "") else None
                found.append(HubFile(entry["path"], large.get("size", entry["size"]), sha256, commit))
    return sorted(found, key=lambda file: file.path)


def _ask_json(url: str, patience: Patience) -> tuple[Any, str | None]:
    """A JSON answer and, of a paged one, the next page's address."""
    while True:
        try:
            response = get_session().get(url, headers=build_hf_headers(), timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)
            hf_raise_for_status(response)
            break
        except FAILURES as error:
            patience.wait_after(error)
    try:
        return json.loads(response.text), response.links.get("next", {}).get("url")
    except ValueError as error:  # a web page, as a hotel's network answers
        raise OnebError(f"{url} did not answer as the Hugging Face Hub does ({error}); check the network, "
                        "and HF_ENDPOINT if you set it") from error


def _fixed_folder(pattern: str) -> str:
    """The folder that every match lies in, "" for the repository's root: fewer pages than the whole tree."""
    fixed = re.split(r"[*?\[]", pattern, maxsplit=1)[0]
    return fixed.rpartition("/")[0]


def _saved_listing(dataset: HubDataset) -> Path:
    key = hashlib.sha256(f"{dataset.repo} {dataset.revision} {dataset.pattern}".encode()).hexdigest()[:16]
    return Path(constants.HF_ASSETS_CACHE) / "oneb" / "listings" / f"{_storage(dataset).name}--{key}.json"


def _read_listing(path: Path) -> list[HubFile]:
    """A saved listing, empty if there is none that can be read."""
    try:
        return [HubFile(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError):
        return []


def _cached_files(dataset: HubDataset) -> list[HubFile]:
    """What the cache holds of ``dataset``, for when nobody can say what there is."""
    storage, commit = _storage(dataset), dataset.revision
    if not _COMMIT.fullmatch(commit):
        reference = storage / "refs" / commit
        commit = reference.read_text().strip() if reference.is_file() else ""
    snapshot = storage / "snapshots" / commit
    paths = sorted(path for path in snapshot.rglob("*") if commit and path.is_file())
    names = {path.relative_to(snapshot).as_posix(): path for path in paths}
    return [HubFile(name, path.stat().st_size, blob if _SHA256.fullmatch(blob) else None, commit)
            for name, path in names.items() if fnmatch.fnmatchcase(name, dataset.pattern)
            for blob in [path.resolve().name]]


# -- One file ------------------------------------------------------------------------------------

def fetch(dataset: HubDataset, file: HubFile, say: Say = lambda message: None,
          progress: Progress = lambda n_bytes, size: None) -> Path:
    """``file`` in the Hub's cache, verified; downloaded first where it is not there.

    A download continues where an earlier one stopped, whatever stopped it. One process downloads a file at a time, a
    second waits for it. An exception that ``say`` or ``progress`` raises ends the download and may be used to stop it.

    Args:
        say: told about waits, damage and new beginnings, a sentence each.
        progress: called with the bytes that are here and the file's size.

    Raises:
        OnebError: if it cannot be had: what the Hub answered, a full disk, twice another hash, no network.
    """
    name = f"{dataset.repo}/{file.path}"
    try:
        cached = _cached(dataset, file)
        if cached is not None and file.sha256 is not None and sha256_file(cached) != file.sha256:
            say(f"{name}: the copy in the cache is damaged; downloading it again.")
            cached.unlink()
            cached = None
        if cached is None:
            check_space(dataset, [file])
            if file.sha256 is not None:
                _download(dataset, file, name, say, progress)
            _link(dataset, file, name, say)
            cached = _cached(dataset, file)
    except OSError as error:
        give_up(name, error)
    if cached is None:
        raise OnebError(f"{name} did not arrive whole: wanted {file.size} bytes. Run the command again")
    progress(file.size, file.size)
    return cached


def bytes_to_fetch(dataset: HubDataset, files: Sequence[HubFile]) -> int:
    """What of ``files`` is not in the cache yet."""
    return sum(file.size - _size(_partial(dataset, file)) for file in files if _cached(dataset, file) is None)


def cache_disk(dataset: HubDataset) -> Path:
    """A folder that is there, on the disk of the cache."""
    return next(path for path in (_storage(dataset), *_storage(dataset).parents) if path.exists())


def can_link(dataset: HubDataset, folder: Path) -> bool:
    """Whether what is in the cache may have a second name in ``folder``: one file system, and of those that have
    hard links."""
    name = folder / f".link{os.getpid()}"
    try:
        with tempfile.NamedTemporaryFile(dir=cache_disk(dataset)) as file:
            os.link(file.name, name)
        name.unlink()
    except OSError:
        return False
    return True


def check_space(dataset: HubDataset, files: Sequence[HubFile]) -> None:
    """Raises OnebError unless the cache's disk has room for those of ``files`` that are not there yet."""
    needed, folder = bytes_to_fetch(dataset, files), cache_disk(dataset)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OnebError(f"{len(files)} file(s) of {dataset.repo}: {format_gib(needed)} to download, the disk of "
                        f"{folder} has {format_gib(free)} free. Make room, or set HF_HOME to a folder on another disk")


def _download(dataset: HubDataset, file: HubFile, name: str, say: Say, progress: Progress) -> None:
    """Bring the whole, verified blob into the cache."""
    blob, partial = _blob(dataset, file), _partial(dataset, file)
    lock = Path(constants.HF_HUB_CACHE) / ".locks" / _storage(dataset).name / f"{file.sha256}.lock"  # the client's own
    for folder in (blob.parent, lock.parent):
        folder.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        if blob.exists() and sha256_file(blob) == file.sha256:
            return
        for attempt in ("first", "second"):
            _receive(dataset, file, Patience(name, say), progress)
            if sha256_file(partial) == file.sha256:
                os.replace(partial, blob)
                return
            partial.unlink()
            if attempt == "first":
                say(f"{name} does not have the hash that the Hub lists, downloading it again.")
    raise OnebError(f"{name} arrived twice with another hash than the Hub lists (sha256 {file.sha256}). Something on "
                    "the way changes it: try another network, or without a proxy")


def _receive(dataset: HubDataset, file: HubFile, patience: Patience, progress: Progress) -> None:
    """Fill the partial file up to its size, by as many connections as it takes."""
    partial = _partial(dataset, file)
    url = hf_hub_url(dataset.repo, file.path, repo_type="dataset", revision=file.revision)
    while (have := _size(partial)) < file.size:
        try:
            # Each time by the Hub's own address: that of the CDN is signed, and expires.
            with _stream(url, have) as (status, headers, chunks):
                if status == 206 and not headers.get("Content-Range", "").startswith(f"bytes {have}-"):
                    raise OSError(f"asked for bytes from {have}, got {headers.get('Content-Range')!r}")
                with open(partial, "ab" if status == 206 else "wb") as out:
                    for chunk in _not_too_slow(chunks):
                        out.write(chunk)
                        out.flush()  # a kill loses nothing that was reported
                        patience.arrived(out.tell())
                        progress(min(out.tell(), file.size), file.size)
            if (have := _size(partial)) < file.size:
                raise OSError(f"the connection ended after {have} of {file.size} bytes")
        except FAILURES as error:
            if status_of(error) == 416:  # what is here is of no use
                partial.unlink(missing_ok=True)
            patience.wait_after(error)


@contextlib.contextmanager
def _stream(url: str, start: int) -> Iterator[tuple[int, Any, Iterator[bytes]]]:
    """Status, headers and body, in chunks, of a GET from byte ``start``."""
    headers = build_hf_headers() | {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    session, timeout = get_session(), constants.HF_HUB_DOWNLOAD_TIMEOUT
    if callable(session.stream):  # httpx, huggingface_hub 1.0 on; in requests it is a setting
        with session.stream("GET", url, headers=headers, timeout=timeout, follow_redirects=True) as response:
            hf_raise_for_status(response)
            yield response.status_code, response.headers, response.iter_bytes()
    else:
        with session.get(url, headers=headers, timeout=timeout, stream=True) as response:
            hf_raise_for_status(response)
            yield response.status_code, response.headers, response.iter_content(_CHUNK)


def _not_too_slow(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """``chunks``, until they trickle: a timeout at each read would let a byte a second pass."""
    seconds, wanted = _SLOWEST
    since, arrived = time.monotonic(), 0
    for chunk in chunks:
        yield chunk
        arrived += len(chunk)
        if (elapsed := time.monotonic() - since) > seconds:
            if arrived < wanted:
                raise TimeoutError(f"only {arrived} bytes in {elapsed:.0f} s")
            since, arrived = time.monotonic(), 0


def _link(dataset: HubDataset, file: HubFile, name: str, say: Say) -> None:
    """Have the client name the blob in its snapshot folder; a small file without SHA-256 it downloads, too."""
    patience = Patience(name, say)
    while True:
        try:
            with _retelling(say):
                hf_hub_download(dataset.repo, file.path, repo_type="dataset", revision=file.revision)
            return
        except FAILURES as error:
            patience.wait_after(error)


_LOGGER = threading.Lock()  # it is everybody's


class _Retold(logging.Handler):
    """Hands what is logged to ``say``."""

    def __init__(self, say: Say) -> None:
        super().__init__(logging.WARNING)
        self._say = say

    def emit(self, record: logging.LogRecord) -> None:
        self._say(record.getMessage())


@contextlib.contextmanager
def _retelling(say: Say) -> Iterator[None]:
    """What the client logs is told by ``say``: its own lines would cut through the progress line."""
    logger = logging.getLogger("huggingface_hub")
    with _LOGGER:
        before, logger.handlers = logger.handlers, [_Retold(say)]
        try:
            yield
        finally:
            logger.handlers = before


# -- The cache, as huggingface_hub's guide "Understand caching" lays it out ------------------------

def _storage(dataset: HubDataset) -> Path:
    return Path(constants.HF_HUB_CACHE) / f"datasets--{dataset.repo.replace('/', '--')}"


def _blob(dataset: HubDataset, file: HubFile) -> Path:
    return _storage(dataset) / "blobs" / str(file.sha256)


def _partial(dataset: HubDataset, file: HubFile) -> Path:
    # Not the client's own name for it: its Xet transfers leave files of the full size with holes there.
    return _storage(dataset) / "blobs" / f"{file.sha256}.oneb.incomplete"


def _cached(dataset: HubDataset, file: HubFile) -> Path | None:
    """Where the client would find ``file`` without a network, if it has the right size."""
    path = try_to_load_from_cache(dataset.repo, file.path, revision=file.revision, repo_type="dataset")
    return Path(path) if isinstance(path, str) and _size(Path(path)) == file.size else None


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
