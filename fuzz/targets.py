"""What is fuzzed: each parser of something that users, other programs or a failing disk wrote.

A target takes bytes. It may refuse them with an :class:`OnebError`; what it accepts must have the properties that it
asserts. Anything else that it raises is a finding.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import io
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from oneb.checkpoints import rundir
from oneb.config import Config
from oneb.data.sidecar import read_sidecar as read_token_sidecar
from oneb.data.tokens import open_tokens
from oneb.errors import OnebError
from oneb.inspect.rows import median, phase_rows, read_run
from oneb.presets import resolve
from oneb.schedules import format_seq_schedule, parse_seq_schedule, reached, seq_len_at
from oneb.show.sinks import JsonlSink
from oneb.units import format_count, parse_count

VOCAB = 50257


@dataclass(frozen=True)
class Target:
    """A parser under test; ``seeds`` are inputs that it accepts, ``words`` what its inputs are made of."""

    run: Callable[[bytes], None]
    seeds: tuple[bytes, ...]
    words: tuple[bytes, ...] = ()


@functools.cache
def folder() -> Path:
    """A temporary one of this process."""
    path = Path(tempfile.mkdtemp(prefix="oneb_fuzz"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


def written(name: str, content: bytes) -> Path:
    """A file of that content in :func:`folder`."""
    path = folder() / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return path


# -- Options -------------------------------------------------------------------------------------

def token_count(content: bytes) -> None:
    """``--target-tokens 10B``."""
    value = parse_count(content.decode("utf-8", errors="replace"))
    assert value >= 1
    assert parse_count(str(value)) == value
    assert format_count(value)


def seq_schedule(content: bytes) -> None:
    """``--seq-schedule 1024@0,2048@10000``."""
    phases = parse_seq_schedule(content.decode("utf-8", errors="replace"))
    assert phases
    assert all(seq_len >= 1 for _, seq_len in phases)
    assert list(phases) == sorted(set(phases))
    assert parse_seq_schedule(format_seq_schedule(phases)) == phases
    start, seq_len = phases[-1]
    assert seq_len_at(phases, start) == seq_len
    assert reached(phases, start + 1) == phases


# -- Data ----------------------------------------------------------------------------------------

def token_sidecar(content: bytes) -> None:
    """``X.npy.meta``."""
    path = folder() / "x.npy"
    written("x.npy.meta", content)
    sidecar = read_token_sidecar(path)
    for name in ("tokens", "documents", "vocab_size", "eot", "max_id"):
        value = getattr(sidecar, name)
        assert value is None or 0 <= value < 2**63


def token_file(name: str, data_format: str) -> Callable[[bytes], None]:
    """``--data NAME --data-format FORMAT``: what opens, reads to its end."""

    def run(content: bytes) -> None:
        path = written(f"data/{name}", content)
        tokens = open_tokens(str(path), data_format, vocab_size=VOCAB)
        assert 2 <= tokens.n_tokens <= len(content)
        ids = tokens.read(0, tokens.n_tokens)
        assert ids.shape == (tokens.n_tokens,)
        assert 0 <= int(ids.min()) <= int(ids.max()) < VOCAB
        assert tokens.locate(tokens.n_tokens - 1) == (str(path), tokens.n_tokens - 1)

    return run


def _npy(dtype: str, n_tokens: int = 20) -> bytes:
    file = io.BytesIO()
    np.save(file, np.arange(n_tokens).astype(dtype))
    return file.getvalue()


def _bin(n_tokens: int = 20) -> bytes:
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, n_tokens
    return header.tobytes() + np.arange(n_tokens, dtype="<u2").tobytes()


def _pt(zipped: bool) -> bytes:
    import torch

    file = io.BytesIO()
    torch.save(torch.arange(20, dtype=torch.int32), file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


# -- Runs ----------------------------------------------------------------------------------------

_CHECKPOINT = b"a checkpoint"


@functools.cache
def _config() -> Config:
    run = folder() / "runs" / "oneb_decoupled_seed1337"
    run.mkdir(parents=True, exist_ok=True)
    (run / "last.pt").write_bytes(_CHECKPOINT)
    return resolve({"size": "nano", "path": "demo", "device": "cpu", "resume": True, "root": str(run.parent)})


def checkpoint_sidecar(content: bytes) -> None:
    """``last.pt.json``, by itself and as the launcher asks whether the run can be continued."""
    config = _config()
    checkpoint = Path(config.run.root) / config.name / "last.pt"
    rundir.sidecar_path(checkpoint).write_bytes(content)
    found, faults = rundir.checkpoints(checkpoint.parent)
    assert len(found) + len(faults) == 1
    if found:
        sidecar = rundir.read_sidecar(checkpoint)
        assert sidecar["bytes"] == len(_CHECKPOINT)
        assert type(sidecar["step"]) is int
        assert sidecar["step"] >= 0
    rundir.check_resume(config)


def _checkpoint_sidecar_seed() -> bytes:
    config = _config().to_dict()
    config["optim"]["optimizer"] = "lion"  # what "auto" has become when a run saves
    return json.dumps({"step": 7, "tokens": 4096, "best_val_loss": 3.5, "sha256": "ab" * 32, "bytes": len(_CHECKPOINT),
                       "model": config["model"], "optimizer": "lion", "serial": 3, "config": config}).encode()


def train_jsonl(content: bytes) -> None:
    """``train.jsonl``, by the report and by a run that resumes at step 2."""
    path = written("run/train.jsonl", content)
    with contextlib.suppress(OnebError):
        run = read_run(path.parent)
        assert run.step >= 0
        assert run.tokens >= 0
        assert sum(len(phase.rows) for phase in phase_rows(run.train)) == len(run.train)
        assert median(run.train, "loss") is None or run.train
    try:
        sink = JsonlSink(path, 2)
        try:
            sink.log({"type": "train", "step": 3, "tokens": 1, "loss": 1.0, "seq_len": 8})
        finally:
            sink.close()
        assert 3 in (row["step"] for row in read_run(path.parent).train)
    finally:
        for cut in path.parent.glob("train.cut-*"):
            cut.unlink()


_ROWS = b"\n".join(json.dumps(row).encode() for row in (
    {"type": "meta", "name": "x", "time": 1.0, "steps": 4, "start_step": 0},
    {"type": "train", "step": 1, "tokens": 512, "loss": 5.5, "lr": 1e-3, "grad_norm": None, "seq_len": 64},
    {"type": "eval", "step": 1, "tokens": 512, "val_loss": 5.4, "best_val_loss": 5.4, "seq_len": 64},
    {"type": "event", "step": 1, "event": "checkpoint", "message": "saved last.pt"},
    {"type": "analysis", "step": 2, "layers": {"0": 1.0}},
    {"type": "train", "step": 3, "tokens": 1024, "loss": 5.1, "seq_len": 128},
)) + b"\n"

_JSON = (b'"type"', b'"train"', b'"step"', b"null", b"NaN", b"Infinity", b"-1", b"1e999", b"[[", b"{}", b'"\\ud800"',
         b"true", b"9" * 30, b"\xe2\x80\xa8", b"\n")
_DESCR = (b"'descr'", b"'<u2'", b"'>i8'", b"'|O'", b"'shape'", b"(20,)", b"()", b"(-1,)", b"True", b"((", b"\0", b"{",
          b"9" * 30)


@functools.cache
def targets() -> dict[str, Target]:
    """Every target by name."""
    from_meta = (b"tokens: 20\ndocuments: 3\nencoding: gpt2\nvocab_size: 50257\neot: 50256\nsource: books\n"
                 b"format: npy uint16\nsha256: ab\nmax_id: 19\n", b"tokens: 5,000\nnote: x\n")
    return {
        "token_count": Target(token_count, (b"10B", b"1.5M", b"2e9", b"1_000", b" 4096 "),
                              (b"e", b".", b"T", b"9" * 30, b"_", b"\xd9\xa3")),
        "seq_schedule": Target(seq_schedule, (b"1024@0,2048@10000", b" 64 @ 0 "), (b"@", b",", b"9" * 30, b"\xd9\xa3")),
        "token_sidecar": Target(token_sidecar, from_meta, (b"tokens:", b"max_id:", b":", b"\n", b"9" * 30, b"\xff")),
        "npy": Target(token_file("x.npy", "npy"), tuple(map(_npy, ("<u2", "<u4", "<i4", "<i8", ">u2", "<f4"))), _DESCR),
        "bin": Target(token_file("x.bin", "bin"), (_bin(),)),
        "raw": Target(token_file("x.bin", "auto"), (bytes(range(40)), _bin())),
        "txt": Target(token_file("x.txt", "txt"), (b"1 2\n3", b"0 50256"), (b"\xd9\xa3", b" ", b"9" * 20)),
        "pt": Target(token_file("x.pt", "pt"), (_pt(True), _pt(False)), (b"PK\3\4", b"PK\1\2", b"PK\5\6", b"/data/0")),
        "checkpoint_sidecar": Target(checkpoint_sidecar, (_checkpoint_sidecar_seed(),), _JSON),
        "train_jsonl": Target(train_jsonl, (_ROWS, _ROWS[:-9]), _JSON),
    }


def accepts(target: Target, content: bytes) -> bool:
    """Whether the parser took ``content`` and did not refuse it; raises whatever else it raises."""
    try:
        target.run(content)
    except OnebError:
        return False
    return True
