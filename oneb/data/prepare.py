"""Files of text, or of ready tokens, to a token file: ``X.npy``, its sidecar, its document index.

The input is cut into units in an order that depends on it alone (``units``). Processes encode them (``workers``) and,
told how many tokens are before these, write them where they belong (``parts``). This one tells them (``assemble``), and
keeps a journal of how far the file is whole (``journal``), so that the finished bytes are the same for any number of
processes and any history of kills.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from oneb.data.assemble import Progress, Work
from oneb.data.encode import Fast, checked_fast, write_vocabulary
from oneb.data.journal import Journal, parts_folder
from oneb.data.parts import Job
from oneb.data.sidecar import Sidecar
from oneb.data.sources import InputFile, Skipped, check_kinds
from oneb.data.tokenizer import TOKENIZERS, FileTokenizer, Tokenizer, load_tokenizer
from oneb.data.units import UNIT_BYTES
from oneb.data.workers import InProcess, Pool, disk_trouble
from oneb.errors import OnebError
from oneb.units import format_gib

_FORMAT = 1  # of the units: another number starts unfinished work over


@dataclass(frozen=True)
class Prepared:
    """What was written."""

    path: Path
    sidecar: Sidecar  # its `tokens` is the true count
    short_by: int  # tokens asked for that the input did not have
    skipped: Skipped
    text_bytes: int


def check_output(output: Path, n_tokens: int | None, itemsize: int = 2, *, force: bool = False) -> None:
    """Look at everything about ``output`` that could fail after an hour of tokenizing.

    Raises:
        OnebError: if it is not a .npy path, exists already without ``force``, or its folder is not there or not
            to be written to, or the disk is too small.
    """
    if output.suffix != ".npy":
        raise OnebError(f"--output {output}: wanted a file name ending in .npy")
    if output.is_dir():
        raise OnebError(f"--output {output} is a folder; wanted a file, such as {output / 'tokens.npy'}")
    unfinished = parts_folder(output)
    if output.exists() and not force and not (unfinished / "final.json").exists():
        raise OnebError(f"--output {output} exists already. Use it as it is, choose another name, "
                        "or replace it with --force")
    folder = output.parent
    if not folder.is_dir():
        raise OnebError(f"--output {output}: there is no folder {folder.absolute()}; create it with: "
                        f"mkdir -p {folder}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OnebError(f"--output {output}: this user may not write to {folder.absolute()}; choose another folder")
    done = sum(path.stat().st_size for path in unfinished.glob("*")) if unfinished.is_dir() else 0
    needed, free = itemsize * (n_tokens or 0) - done, shutil.disk_usage(folder).free
    if needed > free:
        raise OnebError(f"--output {output}: {n_tokens} tokens take {format_gib(needed)}, the disk has "
                        f"{format_gib(free)} free; ask for fewer --tokens or write to another disk")


def prepare(files: Sequence[InputFile], tokenizer: Tokenizer | str, output: Path, *, source: str,
            revision: str | None = None, n_tokens: int | None = None, text_column: str = "text", n_workers: int = 1,
            force: bool = False, say: Callable[[str], None] = lambda message: None,
            progress: Callable[[Progress], None] = lambda progress: None) -> Prepared:
    """Tokenize ``files`` into ``output``, the end-of-text id after each document.

    The file appears under its name only when whole. Killed at any moment, the same call continues; until then the
    work lies in ``X.npy.parts``.

    Args:
        tokenizer: or its name; then it is loaded while the processes start.
        source, revision: where the documents come from, for the sidecar.
        n_tokens: exactly so many tokens, the last document cut; None takes all there is.
        n_workers: processes; 1 works in this one.
        say: told a sentence about what is not as usual.
        progress: called about twice a second.

    Raises:
        OnebError: as ``check_output`` and ``load_tokenizer``; if there is no text at all; if a file, its disk or the
            Hub fails.
    """
    kinds = {file.kind for file in files}
    with (_disk_trouble_told(parts_folder(output)),
          contextlib.closing(Pool(n_workers, kinds) if n_workers > 1 else InProcess()) as workers):
        if isinstance(tokenizer, str):
            tokenizer = load_tokenizer(tokenizer)
        dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
        check_output(output, n_tokens, dtype.itemsize, force=force)
        check_kinds(files, tokenizer.name)
        key = {"format": _FORMAT, "tokens": n_tokens, "tokenizer": tokenizer.name,
               "tokenizer_sha256": tokenizer.sha256, "text_column": text_column, "source": source,
               "input": [[file.name, file.size, file.version] for file in files]}
        journal = Journal(output, dtype, key, say)
        try:
            sidecar = journal.finished()
            if sidecar is not None:
                journal.publish()
                return Prepared(output, sidecar, max(0, (n_tokens or 0) - sidecar.tokens), Skipped(), 0)
            if (journal.folder / "final.json").exists():  # of other options: that file is whole, so it gets its name
                journal.publish()
                journal.close()
                check_output(output, n_tokens, dtype.itemsize, force=force)
                journal = Journal(output, dtype, key, say)
            check_output(output, n_tokens, dtype.itemsize, force=force)  # another process may have been faster
            journal.begin(n_tokens)
            job = _begin(workers, files, tokenizer, journal, text_column, say)
            Work(files, job, journal, workers, n_tokens, progress).run()
            if not journal.state.tokens:
                raise _no_text(journal.state.skipped, text_column)
            return _finish(journal, files, tokenizer, source, revision, n_tokens)
        finally:
            workers.close()  # they write no more
            journal.give_up()
            journal.close()


@contextlib.contextmanager
def _disk_trouble_told(folder: Path) -> Iterator[None]:
    """Where a file or its disk fails inside, say so as of a mistake."""
    try:
        yield
    except BrokenPipeError:  # of those who read what we print
        raise
    except OSError as error:
        raise disk_trouble(error, folder) from error


def _begin(workers: InProcess | Pool, files: Sequence[InputFile], tokenizer: Tokenizer, journal: Journal,
           text_column: str, say: Callable[[str], None]) -> Job:
    """Tell the workers what the job is. The vocabulary they load while it is checked here."""
    job = Job(journal.folder, tokenizer.name, None, tokenizer.eot, tokenizer.vocab_size, journal.dtype.name,
              text_column, len(files))
    encoder: Fast | None = None
    if all(file.kind == "tokens" for file in files):
        vocabulary = None
    elif (vocabulary := write_vocabulary(tokenizer, journal.folder)) is None and tokenizer.name not in TOKENIZERS:
        say("warning: several words of this tokenizer have one id, or an added token has another than it says, so the "
            "tokenizers package does its work, many times slower than gigatoken would")
    if vocabulary is not None:
        workers.begin(replace(job, vocabulary=vocabulary))
        encoder, trouble = checked_fast(tokenizer, vocabulary)
        if encoder is None:
            say(f"warning: {trouble}")
        else:
            job = replace(job, vocabulary=vocabulary)
            if isinstance(tokenizer, FileTokenizer):
                tokenizer.forget()
    workers.begin(job, encoder)
    return job


def _finish(journal: Journal, files: Sequence[InputFile], tokenizer: Tokenizer, source: str, revision: str | None,
            n_tokens: int | None) -> Prepared:
    state = journal.state
    documents = state.documents + (not state.ended)  # the last one may be cut
    sources = [{"name": files[number].name, "size": files[number].size, "sha256": done.sha256,
                "tokens": done.tokens, "documents": done.documents} for number, done in enumerate(state.files)]

    def sidecar(sha256: str) -> Sidecar:
        return Sidecar(
            tokens=state.tokens, documents=documents, encoding=tokenizer.name, vocab_size=tokenizer.vocab_size,
            eot=tokenizer.eot, source=source, format=f"npy {journal.dtype.name}", sha256=sha256,
            max_id=state.max_id, revision=revision, tokenizer_sha256=tokenizer.sha256)

    made = journal.finish(sidecar, sources)
    short_by = 0 if n_tokens is None else n_tokens - state.tokens
    return Prepared(journal.output, made, short_by, state.skipped, state.text_bytes)


def _no_text(skipped: Skipped, text_column: str) -> OnebError:
    """Of an input that gave no token: why."""
    if skipped.damaged:
        return OnebError(f"the input holds no text that can be read; copy it again: {'; '.join(skipped.examples[:3])}")
    left_out = f"documents left out: {skipped}" if str(skipped) else "it has no documents"
    return OnebError(f"the input holds no text in {text_column!r} ({left_out}). Check --input and --text-column")


def default_workers(files: Sequence[InputFile], n_tokens: int | None, most: int) -> int:
    """Processes worth starting for ``files``, of at most so many: each should have a few units."""
    n_bytes = sum(file.size for file in files)
    if n_tokens is not None:
        n_bytes = min(n_bytes, 4 * n_tokens)
    return max(1, min(most, n_bytes // (2 * UNIT_BYTES)))
