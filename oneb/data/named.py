"""The data of a run, wherever it is from: files, or a name, whose data is prepared or arrives while the run trains.

A named data set made of ready shards lies in a folder of its own. ``dataset.json`` says which shards it is made of,
from the Hub's listing; so its lengths, its fingerprint and the order of its batches are known before it is there.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oneb.config import GPT2_VOCAB_SIZE, DataConfig
from oneb.data.arriving import ArrivingFile, ArrivingTokens, locked
from oneb.data.formats import BIN_HEADER_BYTES
from oneb.data.names import MANIFEST, VALIDATION, WHOLE, DataName, named_folder, parse_name, train_name
from oneb.data.order import split_tokens
from oneb.data.reading import allow_open_files
from oneb.data.sidecar import Sidecar
from oneb.data.sources import READY_TOKENS, HubDataset
from oneb.data.tokens import Shard, Tokens, open_tokens
from oneb.errors import OnebError
from oneb.files import write_json
from oneb.units import format_count, format_duration, format_gib

if TYPE_CHECKING:
    from oneb.data.assemble import Progress
    from oneb.data.download import Download
    from oneb.data.hub import HubFile

Say = Callable[[str], None]

_REPORT_S = 10.0
_LOCK_POLL_S = 0.5
_FORMAT = 2  # of the manifest


@dataclass(frozen=True)
class Data:
    """What a run reads.

    Attributes:
        tokens: all of it, the training part first.
        n_train, n_val: tokens of the two parts.
        groups: for :class:`oneb.data.order.BatchOrder`.
    """

    tokens: Tokens
    n_train: int
    n_val: int
    groups: tuple[int, ...] = ()


def open_data(config: DataConfig, vocab_size: int, say: Say) -> Data:
    """Open what ``--data`` stands for. Data that has a name and is not there yet is brought.

    Args:
        vocab_size: ids must lie in [0, vocab_size).
        say: told what is being waited for, later on by the thread that reads.

    Raises:
        OnebError: what is missing or wrong, as ``open_tokens``; the Hub cannot be reached, or the disk is too small.
    """
    name = parse_name(config.path)
    if name is None:
        if (folder := named_folder(config.path)) is not None:  # its val.bin is for validation
            return _arriving(_read_plan(folder / MANIFEST), folder, vocab_size, say)
        return _whole(config.path, config.format, vocab_size, say)
    folder = name.folder(config.data_root)
    if not (folder / WHOLE).exists():
        plan = _plan(name, folder, say)
        if plan is not None:
            return _arriving(plan, folder, vocab_size, say)
        _prepare(name, folder, say)
    return _whole(str(folder / WHOLE), "npy", vocab_size, say)


def _whole(path: str, data_format: str, vocab_size: int, say: Say) -> Data:
    tokens = open_tokens(path, data_format, vocab_size=vocab_size, log=say)
    return Data(tokens, *split_tokens(tokens.n_tokens))


# -- Of ready shards -----------------------------------------------------------------------------

def _plan(name: DataName, folder: Path, say: Say) -> dict[str, Any] | None:
    """The manifest, made from the Hub's listing if there is none; None where there are not enough ready tokens.

    Raises:
        OnebError: the Hub does not say what there is; the manifest is damaged.
    """
    path = folder / MANIFEST
    if path.exists():
        return _read_plan(path)
    if name.source not in READY_TOKENS:
        return None
    from oneb.data.hub import list_files

    ready = READY_TOKENS[name.source]
    files = list_files(replace(ready, pattern=ready.pattern.replace("train_*", "*")), say)
    left, n_val = split_tokens(name.n_tokens)
    pieces = [_piece(VALIDATION, n_val, file) for file in files if "_val_" in file.path and _held(file) >= n_val][:1]
    if pieces:
        for file in files:
            if "_train_" in file.path and left and _held(file):
                pieces.append(_piece(train_name(len(pieces)), min(left, _held(file)), file))
                left -= pieces[-1]["tokens"]
    if left:
        say(f"{ready.repo} holds fewer than {format_count(name.n_tokens)} ready tokens; tokenizing the text instead")
        return None
    return {"format": _FORMAT, "tokens": name.n_tokens, "repo": ready.repo, "files": pieces}


def _held(file: HubFile) -> int:
    """Tokens in a ready shard."""
    return max(0, file.size - BIN_HEADER_BYTES) // 2


def _piece(name: str, n_tokens: int, file: HubFile) -> dict[str, Any]:
    return {"name": name, "tokens": n_tokens, "shard": asdict(file)}


def _read_plan(path: Path) -> dict[str, Any]:
    try:
        plan = json.loads(path.read_text(encoding="utf-8"))
        if plan["format"] == _FORMAT and plan["tokens"] == sum(file["tokens"] for file in plan["files"]):
            return plan
        fault = "it is of another version of oneb"
    except OSError as error:
        fault = error.strerror or str(error)
    except (ValueError, TypeError, KeyError) as error:
        fault = f"{type(error).__name__}: {error}"
    raise OnebError(f"{path} cannot be read ({fault}); delete it, and --data SOURCE:TOKENS with the --data-root above "
                    "that folder makes it again. The other files there can stay")


def _arriving(plan: dict[str, Any], folder: Path, vocab_size: int, say: Say) -> Data:
    if vocab_size < GPT2_VOCAB_SIZE:
        raise OnebError(f"{folder} holds GPT-2 tokens, with ids below {GPT2_VOCAB_SIZE}; the model has {vocab_size}; "
                        f"wanted --vocab-size {GPT2_VOCAB_SIZE} or more")
    validation, *training = plan["files"]
    allow_open_files(len(plan["files"]))
    complete = all((folder / file["name"]).exists() for file in plan["files"])
    download = None if complete else _download(plan, folder)
    vouched = Sidecar(encoding="gpt2", vocab_size=GPT2_VOCAB_SIZE)
    shards = [Shard(ArrivingFile(folder / file["name"], file["tokens"], download), vouched)
              for file in (*training, validation)]
    tokens = ArrivingTokens(shards, _fingerprint(plan), say, download)
    if download:
        download.start()
    groups = tuple(file["tokens"] for file in training)
    return Data(tokens, sum(groups), validation["tokens"], groups)


def _download(plan: dict[str, Any], folder: Path) -> Download:
    """See that there is room, write the manifest; what brings the missing files, not begun."""
    # Here: a run whose data is all there needs no client of the Hub.
    from oneb.data.download import Download, Piece
    from oneb.data.hub import HubFile, check_space

    dataset = HubDataset(plan["repo"], plan["files"][0]["shard"]["revision"], "*")
    pieces = [Piece(file["name"], file["tokens"], HubFile(**file["shard"])) for file in plan["files"]]
    make_folder(folder)
    download = Download(folder, dataset, pieces)
    check_space(dataset, [piece.shard for piece in download.missing()])
    _check_room(folder, download.bytes_to_write(folder))
    if not (folder / MANIFEST).exists():
        write_json(folder / MANIFEST, plan)
    return download


def make_folder(folder: Path) -> None:
    """Create ``folder`` where it is not there.

    Raises:
        OnebError: it cannot be.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OnebError(f"{folder} cannot be created: {error.strerror or error}; choose another --data-root") from error


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OnebError(f"the data takes {format_gib(needed)} more, the disk of {folder} has {format_gib(free)} free: "
                        "make room, name fewer tokens, or choose another --data-root (what is downloaded lies below "
                        "HF_HOME; on the same disk it takes no room twice, where that disk has hard links)")


def _fingerprint(plan: dict[str, Any]) -> str:
    """Of the shards' names, sizes and hashes, and of how much of them is used."""
    shards = [[file["tokens"], *(file["shard"][key] for key in ("path", "size", "sha256"))] for file in plan["files"]]
    return hashlib.sha256(json.dumps(shards).encode()).hexdigest()[:16]


# -- Of text -------------------------------------------------------------------------------------

def _prepare(name: DataName, folder: Path, say: Say) -> None:
    """Tokenize the source into the folder's one file; where that was broken off, go on with it.

    Raises:
        OnebError: as ``prepare``; no such data set.
    """
    # Here: training on files that are there needs neither pyarrow nor a tokenizer.
    from oneb.data.hub_sources import hub_inputs
    from oneb.data.prepare import default_workers, prepare
    from oneb.data.tokenizer import load_tokenizer
    from oneb.data.workers import usable_workers

    output = folder / WHOLE
    files, source, revision = hub_inputs(name.source, "*.parquet", tokenizer="gpt2", n_tokens=name.n_tokens,
                                         retokenize=True, say=say)
    make_folder(folder)
    say(f"{name} is prepared from {source} before the first step, in {folder}; broken off, it continues")
    began = said = time.monotonic()
    first: float | None = None

    def progress(done: Progress) -> None:
        nonlocal said, first
        now = time.monotonic()
        first = done.fraction if first is None else first
        if now - said < _REPORT_S:
            return
        said = now
        gained = done.fraction - first
        left = f", {format_duration((now - began) * (1 - done.fraction) / gained)} left" if gained > 0 else ""
        arriving = f", downloading {done.arriving}" if done.arriving else ""
        say(f"{done.fraction:.0%} of {name}: {format_count(done.tokens)} tokens{left}{arriving}")

    workers = default_workers(files, name.n_tokens, usable_workers())
    while not output.exists():
        with locked(folder) as alone:
            if not alone:
                if time.monotonic() - said > _REPORT_S:
                    said = time.monotonic()
                    say(f"another process prepares {name}; waiting for it")
                time.sleep(_LOCK_POLL_S)
            elif not output.exists():
                done = prepare(files, load_tokenizer("gpt2"), output, source=source, revision=revision,
                               n_tokens=name.n_tokens, n_workers=workers, say=say, progress=progress)
                if done.short_by:
                    say(f"warning: {source} holds {format_count(done.sidecar.tokens or 0)} tokens, fewer than {name}")
