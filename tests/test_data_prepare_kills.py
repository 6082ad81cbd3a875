"""Preparing data is killed at every file operation, at random, and its workers too: the bytes are always the same."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_helpers import books_parquet
from forked_runs import within

from oneb.cli.prepare import main
from oneb.data import units
from oneb.data.assemble import Commits
from oneb.data.prepare import prepare
from oneb.data.sources import local_inputs
from oneb.data.tokenizer import BytesTokenizer, load_tokenizer
from oneb.errors import OnebError

ROOT = Path(__file__).parents[1]
# The command with small units, so that there are many.
COMMAND = ("import sys, oneb.data.units as units, oneb.data.assemble as assemble; units.UNIT_BYTES = 50_000; "
           "assemble._COMMIT_SECONDS = 0.05; from oneb.cli.prepare import main\n"
           "if __name__ == '__main__': sys.exit(main(sys.argv[1:]))")
# The same as a file, which worker processes read, too: none of them gets beyond the input's first file.
ENDLESS = """
import time
from oneb.data.units import Unit
from oneb.data.workers import Worker

do = Worker.do

def hold(self, task):
    if isinstance(task, Unit) and task.file:
        time.sleep(600)
    return do(self, task)

Worker.do = hold
""" + COMMAND
RESULTS = ("x.npy", "x.npy.meta", "x.npy.idx.npy", "x.npy.sources.json")


def write_inputs(folder: Path, texts: list[str]) -> Path:
    """A folder with ``texts`` in files of every kind of text."""
    folder.mkdir()
    quarter = len(texts) // 4
    pq.write_table(pa.table({"text": texts[:quarter]}), folder / "a.parquet", row_group_size=max(1, quarter // 5))
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    (folder / "b.jsonl").write_text("".join(lines[quarter:2 * quarter]))
    with gzip.open(folder / "c.jsonl.gz", "wt") as file:
        file.writelines(lines[2 * quarter:3 * quarter])
    (folder / "d.txt").write_text("\n".join(texts[3 * quarter:]))
    packed = pa.compress("".join(lines[:2]).encode(), "zstd", asbytes=True)
    (folder / "e.jsonl.zst").write_bytes(packed + packed)
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    texts = [f"text number {n}. " * (n % 7 + 1) for n in range(40)]
    return write_inputs(tmp_path_factory.mktemp("small") / "in", texts)


@pytest.fixture(scope="module")
def books(tmp_path_factory) -> Path:
    texts = [text for path in books_parquet() for text in pq.read_table(path)["text"].to_pylist()]
    return write_inputs(tmp_path_factory.mktemp("kills") / "in", random.Random(0).sample(texts, 200))


def results(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in RESULTS}


# -- At every file operation ---------------------------------------------------------------------

def small_run(inputs: Path, folder: Path) -> None:
    prepare(local_inputs([str(inputs)]), BytesTokenizer(), folder / "x.npy", source="test", n_tokens=2500)


def is_done(folder: Path) -> bool:
    """Whether the command would say that there is nothing to do: killed with nothing left but an empty folder."""
    return (folder / "x.npy").exists() and not list(folder.glob("x.npy.parts/*"))


def killed_at(operation: int, inputs: Path, folder: Path) -> bool:
    """Run in a process that is killed before its ``operation``-th file operation, or in the middle of it if that
    writes tokens; whether it got that far.
    """
    child = os.fork()
    if child == 0:
        left, pwrite = operation, os.pwrite

        def count(event: str, arguments: tuple) -> None:
            nonlocal left
            if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate",
                         "pwrite") and (str(folder) in str(arguments) or event in ("os.truncate", "pwrite")):
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        def write(descriptor: int, data: bytes, position: int) -> int:
            written = pwrite(descriptor, data[:len(data) // 2], position)
            count("pwrite", ())
            return written + pwrite(descriptor, data[len(data) // 2:], position + written)

        sys.addaudithook(count)
        os.pwrite = write
        try:
            if not is_done(folder):
                small_run(inputs, folder)
        except BaseException:  # fallback: shown, and not 0
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL)
    return status != 0


@pytest.fixture
def in_memory() -> Iterator[Path]:
    """A folder whose disk is memory, where there is one: nothing of a kill depends on a disk's waits."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        yield Path(folder)


def test_killed_at_every_file_operation(small, in_memory, monkeypatch):
    monkeypatch.setattr(units, "UNIT_BYTES", 1200)
    monkeypatch.setattr(Commits, "offer", lambda self: (self.begin(), self.wait()))  # always at the same operations
    whole = in_memory / "whole"
    whole.mkdir()
    small_run(small, whole)
    expected = results(whole)
    operation = 0
    while True:
        operation += 1
        folder = in_memory / str(operation)
        folder.mkdir()
        if not killed_at(operation, small, folder):
            break
        if (folder / "x.npy").exists():
            assert (folder / "x.npy").read_bytes() == expected["x.npy"]  # never a part of it
        if operation % 2:
            killed_at(operation // 2 + 1, small, folder)  # the one that continues, too
        if not is_done(folder):
            small_run(small, folder)
        assert results(folder) == expected
        assert sorted(path.name for path in folder.iterdir() if path.name != "x.npy.parts") == sorted(RESULTS)
        shutil.rmtree(folder)
    assert operation > 80


def test_an_old_file_stays_until_the_new_one_is_whole(small, tmp_path, monkeypatch):
    monkeypatch.setattr(units, "UNIT_BYTES", 700)
    np.save(tmp_path / "x.npy", np.arange(5, dtype=np.uint16))
    old = (tmp_path / "x.npy").read_bytes()
    with pytest.raises(ZeroDivisionError):
        prepare(local_inputs([str(small)]), BytesTokenizer(), tmp_path / "x.npy", source="test", force=True,
                progress=lambda progress: 1 // (progress.tokens < 2000))
    assert (tmp_path / "x.npy").read_bytes() == old
    said: list[str] = []
    prepare(local_inputs([str(small)]), BytesTokenizer(), tmp_path / "x.npy", source="test", force=True,
            say=said.append)
    assert any(message.startswith("continuing after ") for message in said)
    (tmp_path / "other").mkdir()
    prepare(local_inputs([str(small)]), BytesTokenizer(), tmp_path / "other" / "x.npy", source="test")
    assert results(tmp_path) == results(tmp_path / "other")


def stop_early(small: Path, output: Path, **options) -> None:
    with pytest.raises(ZeroDivisionError):
        prepare(local_inputs([str(small)]), BytesTokenizer(), output, source="test",
                progress=lambda progress: 1 // (progress.tokens < 2000), **options)


@pytest.mark.parametrize("change", ["tokens", "input"])
def test_changed_options_or_input_start_over_and_say_so(small, tmp_path, monkeypatch, change):
    monkeypatch.setattr(units, "UNIT_BYTES", 700)
    inputs = tmp_path / "in"
    shutil.copytree(small, inputs)
    stop_early(inputs, tmp_path / "x.npy", n_tokens=2500)
    if change == "input":
        with open(inputs / "a.parquet", "ab"):
            os.utime(inputs / "a.parquet", ns=(1, 1))
    said: list[str] = []
    n_tokens = 2400 if change == "tokens" else 2500
    prepare(local_inputs([str(inputs)]), BytesTokenizer(), tmp_path / "x.npy", source="test", n_tokens=n_tokens,
            say=said.append)
    wanted = "tokens was 2500, is 2400" if change == "tokens" else "the input's files changed"
    assert any(wanted in message and "starting over" in message for message in said)
    assert not any("continuing" in message for message in said)
    assert len(np.load(tmp_path / "x.npy")) == n_tokens


def test_what_was_not_committed_is_not_trusted(small, tmp_path, monkeypatch):
    """What a power cut may leave: wrong bytes behind the committed ones, or a file that is too short."""
    monkeypatch.setattr(units, "UNIT_BYTES", 700)
    (tmp_path / "whole").mkdir()
    prepare(local_inputs([str(small)]), BytesTokenizer(), tmp_path / "whole" / "x.npy", source="test")
    stop_early(small, tmp_path / "x.npy", n_workers=2)
    for name in ("tokens", "ends"):
        with open(tmp_path / "x.npy.parts" / name, "ab") as file:
            file.write(b"\1" * 100)
    prepare(local_inputs([str(small)]), BytesTokenizer(), tmp_path / "x.npy", source="test")
    assert results(tmp_path) == results(tmp_path / "whole")
    for name, size in (("tokens", 300), ("ends", 16)):
        (tmp_path / "x.npy").unlink()
        stop_early(small, tmp_path / "x.npy")
        os.truncate(tmp_path / "x.npy.parts" / name, size)  # less than was committed
        prepare(local_inputs([str(small)]), BytesTokenizer(), tmp_path / "x.npy", source="test")
        assert results(tmp_path) == results(tmp_path / "whole")


def test_two_processes_do_not_write_the_same_file(small, tmp_path):
    def while_it_works(progress) -> None:
        with pytest.raises(OnebError, match="another process prepares"):
            small_run(small, tmp_path)

    prepare(local_inputs([str(small)]), BytesTokenizer(), tmp_path / "x.npy", source="test", progress=while_it_works)


# -- At random, with worker processes ------------------------------------------------------------

def command(books: Path, output: Path, workers: int, *more: str) -> list[str]:
    return [sys.executable, "-c", COMMAND, "--input", str(books), "--output", str(output), "--workers", str(workers),
            *more]


@pytest.fixture
def endless(books, tmp_path) -> list[str]:
    """The command with two workers, that comes to no end."""
    (tmp_path / "endless.py").write_text(ENDLESS)
    return [sys.executable, str(tmp_path / "endless.py"), *command(books, tmp_path / "x.npy", 2)[3:]]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def undisturbed(gpt2_cache, books, tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("undisturbed")
    subprocess.run(command(books, folder / "x.npy", 1), check=True, env=environment(), capture_output=True)
    return results(folder)


@pytest.mark.parametrize("workers", [2, 5])
def test_the_number_of_processes_does_not_matter(undisturbed, books, tmp_path, workers):
    done = subprocess.run(command(books, tmp_path / "x.npy", workers), env=environment(), check=True, text=True,
                          capture_output=True)
    assert results(tmp_path) == undisturbed
    assert "warning" not in done.stderr


def test_units_of_any_size_give_the_same_tokens(undisturbed, books, tmp_path):
    """The undisturbed run's units are small; the command's own hold a file each."""
    assert main(["--input", str(books), "--output", str(tmp_path / "x.npy")]) == 0
    assert results(tmp_path)["x.npy"] == undisturbed["x.npy"]


def kill_again_and_again(books: Path, folder: Path, kills: int, expected: dict[str, bytes]) -> None:
    """So many real kills, each after a random part of the time that a run takes."""
    chance = random.Random(kills)
    done, longest = 0, 6.0
    while done < kills:
        workers = chance.choice((1, 2, 3))
        started = time.monotonic()
        process = subprocess.Popen(command(books, folder / "x.npy", workers), env=environment(), text=True,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        try:
            process.wait(chance.uniform(0.3, longest))
        except subprocess.TimeoutExpired:
            process.kill()
            done += 1
        else:  # it was faster than the kill: from the beginning
            longest = 0.8 * (time.monotonic() - started)
            assert process.returncode == 0, process.stderr.read()
        process.communicate()
        if (folder / "x.npy").exists():
            assert (folder / "x.npy").read_bytes() == expected["x.npy"]
        if is_done(folder):
            assert results(folder) == expected
            for name in RESULTS:
                (folder / name).unlink()
    if not is_done(folder):
        subprocess.run(command(books, folder / "x.npy", 2), env=environment(), check=True, capture_output=True)
    assert results(folder) == expected


def test_random_kills(undisturbed, books, tmp_path):
    kill_again_and_again(books, tmp_path, 4, undisturbed)


@pytest.mark.slow
def test_fifty_random_kills(undisturbed, books, tmp_path):
    kill_again_and_again(books, tmp_path, 50, undisturbed)


def test_workers_end_with_their_parent_and_are_replaced_by_it(undisturbed, books, tmp_path, endless):
    process = subprocess.Popen(endless, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def spawned() -> list[psutil.Process]:
        return [child for child in psutil.Process(process.pid).children() if is_worker(child)]

    assert within(60, lambda: len(spawned()) == 2)
    dead, _ = spawned()
    dead.kill()
    assert within(60, lambda: len(spawned()) == 2 and dead not in spawned())
    replaced = spawned()
    process.kill()
    process.wait()
    gone, alive = psutil.wait_procs(replaced, timeout=60)
    assert not alive
    subprocess.run(command(books, tmp_path / "x.npy", 2), env=environment(), check=True, capture_output=True)
    assert results(tmp_path) == undisturbed


def is_worker(process: psutil.Process) -> bool:
    """Alive, and not multiprocessing's own helper."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE and "resource_tracker" not in " ".join(process.cmdline())
    return False


def test_ctrl_c_says_that_the_same_command_continues(undisturbed, books, tmp_path, endless):
    """As a terminal sends it: to every process of the command."""
    process = subprocess.Popen(endless, env=environment(), text=True, start_new_session=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    state = tmp_path / "x.npy.parts" / "state.json"
    assert within(60, lambda: state.exists() and json.loads(state.read_text())["tokens"])
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate()
    assert process.returncode == 130
    assert "run the same command again, and it continues" in error
    assert "Traceback" not in error
    done = subprocess.run(command(books, tmp_path / "x.npy", 2), env=environment(), check=True, text=True,
                          capture_output=True)
    assert "continuing after" in done.stderr
    assert results(tmp_path) == undisturbed


def test_the_reference_tokens(undisturbed, books):
    """Against a plain loop over the same files."""
    encoding = load_tokenizer("gpt2")
    texts = pq.read_table(books / "a.parquet")["text"].to_pylist()
    for name, opened in (("b.jsonl", open), ("c.jsonl.gz", gzip.open)):
        with opened(books / name, "rt") as file:
            texts += [json.loads(line)["text"] for line in file]
    texts.append((books / "d.txt").read_text())
    texts += pq.read_table(books / "a.parquet")["text"].to_pylist()[:2] * 2
    expected = [token for text in texts for token in (*encoding.encode(text), 50256)]
    assert np.frombuffer(undisturbed["x.npy"][128:], np.uint16).tolist() == expected
