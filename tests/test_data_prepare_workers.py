"""Worker processes of preparing data: a dead one is replaced, one left over writes nothing, none takes much memory."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing import resource_tracker
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import psutil
import pytest
from forked_runs import within

from oneb.data.growing import GrowingHash
from oneb.data.parts import ENDS, HEADER_BYTES, TOKENS, Counts, Job, Place
from oneb.data.units import Unit
from oneb.data.workers import Pool, Worker, _receive, _Waiting, usable_workers
from oneb.errors import OnebError

ROOT = Path(__file__).parents[1]
# A file, not -c: then worker processes are told of these sizes, too.
SCRIPT = """
import os
import sys
import oneb.data.assemble as assemble, oneb.data.journal as journal, oneb.data.units as units
import oneb.data.workers as workers
from oneb.cli.prepare import main

units.UNIT_BYTES = 3000
assemble._COMMIT_SECONDS = 0.0
workers._KEPT_BYTES = 0
journal._TAKE_OVER_SECONDS = float(os.environ.get("TAKE_OVER_SECONDS", 0.5))
if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
"""


def lines(n: int) -> list[str]:
    return [f"line {number} " + "x" * (number * 7919 % 97) for number in range(n)]


def in_bytes(texts: list[str]) -> list[int]:
    return [token for text in texts for token in (*text.encode(), 256)]


def write_lines(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(f'{{"text": "{text}"}}\n' for text in texts))
    return path


def bytes_job(folder: Path) -> Job:
    for name in (TOKENS, ENDS):
        (folder / name).write_bytes(b"")
    return Job(folder, "bytes", None, 256, 257, "uint16", "text", 1)


def some_units(folder: Path, n: int) -> list[Unit]:
    """Units of a .jsonl file, and their texts are ``lines(100 * n)``."""
    path = write_lines(folder / "in.jsonl", lines(100 * n))
    bounds = [path.stat().st_size * number // n for number in range(n + 1)]
    return [Unit(0, number, path, "jsonl", bounds[number], bounds[number + 1], 1 / n, number == n - 1)
            for number in range(n)]


def workers_of(pool: Pool) -> list[psutil.Process]:
    return [psutil.Process(hand.process.pid) for hand in pool._hands]


# -- Death ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("when", ["encoding", "counted", "placing"])
def test_a_worker_that_dies_is_replaced_and_its_units_go_where_they_would_have_gone(tmp_path, when):
    """Whatever it was doing; and the one that asks is told of each thing once more at most."""
    todo = some_units(tmp_path, 4)
    pool = Pool(1)
    try:
        pool.begin(bytes_job(tmp_path))
        for unit in todo:
            pool.submit(unit)
        if when == "encoding":
            workers_of(pool)[0].kill()
        counts: dict[Unit, Counts] = {}
        while len(counts) < 4:
            counts |= {unit: answer for unit, answer in pool.results(1.0) if isinstance(answer, Counts)}
        places, tokens, documents = [], 0, 0
        for unit in todo:
            places.append(Place(unit, tokens, documents, counts[unit].tokens))
            tokens, documents = tokens + counts[unit].tokens, documents + counts[unit].documents
        if when == "counted":
            workers_of(pool)[0].kill()
            assert pool.results(5.0) == []  # it is seen to be dead: its units are encoded again
        if when == "placing":
            (process,) = workers_of(pool)
            process.suspend()
            for place in places[:2]:
                pool.submit(place)
            process.kill()
            places[:2] = []
        for place in places:
            pool.submit(place)
        placed = set()
        while len(placed) < 4:
            placed |= {task for task, _ in pool.results(1.0) if isinstance(task, Place)}
        expected = in_bytes(lines(400))
        assert np.fromfile(tmp_path / TOKENS, "<u2", offset=HEADER_BYTES).tolist() == expected
        ends = np.fromfile(tmp_path / ENDS, "<i8")
        assert ends.tolist() == (np.flatnonzero(np.array(expected) == 256) + 1).tolist()
    finally:
        pool.close()


def test_a_unit_that_kills_its_worker_twice_is_an_error(tmp_path):
    os.mkfifo(tmp_path / "ranks")  # nobody writes to it: a worker waits there until it is killed
    for name in (TOKENS, ENDS):
        (tmp_path / name).write_bytes(b"")
    pool = Pool(1)
    try:
        pool.begin(Job(tmp_path, "gpt2", tmp_path / "ranks", 50256, 50257, "uint16", "text", 1))
        pool.submit(Unit(0, 0, Path("giant.jsonl"), "jsonl", 0, 1, 1.0, True))
        killers = threading.Thread(target=kill_workers, args=(pool, 2), daemon=True)
        killers.start()
        with pytest.raises(OnebError, match="ended by signal 9 while it read giant.jsonl.*fewer --workers"):
            list(iter(lambda: pool.results(0.1), "never"))
        killers.join()
    finally:
        pool.close()


def kill_workers(pool: Pool, count: int) -> None:
    killed: set[int | None] = set()
    while len(killed) < count:
        for hand in list(pool._hands):
            if hand.process.pid not in killed:
                hand.process.kill()
                killed.add(hand.process.pid)
        time.sleep(0.05)


def counted_and_killed(folder: Path) -> tuple[Pool, list[Unit], list[Counts]]:
    """The one worker died after two units were encoded, and before it was told where they go."""
    todo = some_units(folder, 2)
    pool = Pool(1)
    pool.begin(bytes_job(folder))
    for unit in todo:
        pool.submit(unit)
    counts: dict[Unit, Counts] = {}
    while len(counts) < 2:
        counts |= {unit: answer for unit, answer in pool.results(1.0) if isinstance(answer, Counts)}
    workers_of(pool)[0].kill()
    return pool, todo, [counts[unit] for unit in todo]


def test_a_unit_that_is_gone_when_it_is_encoded_again_is_named(tmp_path):
    pool, todo, counts = counted_and_killed(tmp_path)
    with contextlib.closing(pool):
        todo[0].path.unlink()
        pool.submit(Place(todo[0], 0, 0, counts[0].tokens))
        with pytest.raises(OnebError, match="in.jsonl cannot be read: No such file"):
            list(iter(lambda: pool.results(5.0), "never"))


@pytest.mark.parametrize("threads", [1, 2])
def test_processes_are_forked_where_that_is_safe_and_replaced_by_new_ones(tmp_path, monkeypatch, threads):
    """Safe without threads. A fork later on would hold the journal's lock, perhaps for longer than its parent."""
    monkeypatch.setattr("oneb.data.workers._n_threads", lambda: threads)
    with contextlib.closing(Pool(2)) as pool:
        kinds = {type(hand.process).__name__ for hand in pool._hands}
        assert kinds == {"ForkProcess" if threads == 1 else "SpawnProcess"}
        first = pool._hands[0].process
        first.kill()
        while pool._hands[0].process is first:
            pool.results(5.0)
        assert type(pool._hands[0].process).__name__ == "SpawnProcess"


def test_a_worker_cannot_be_interrupted_not_even_while_it_begins(monkeypatch):
    """Ctrl-C is the parent's."""
    monkeypatch.setattr("oneb.data.workers._n_threads", lambda: 2)
    resource_tracker._resource_tracker._stop()
    with contextlib.closing(Pool(1)) as pool:
        ready = pool._hands[0].process
        until = time.monotonic() + 1.5
        while time.monotonic() < until:
            os.kill(ready.pid, signal.SIGINT)
            time.sleep(0.01)
        assert ready.is_alive()


@pytest.mark.parametrize("error", [MemoryError(), ValueError("not a pickle"), EOFError()])
def test_a_worker_that_hears_nothing_more_ends(error):
    child = os.fork()
    if child == 0:
        class Deaf:
            def recv(self) -> None:
                raise error

        with contextlib.suppress(BaseException):
            _receive(Deaf(), SimpleQueue())
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1


# -- Memory ----------------------------------------------------------------------------------------

def test_a_worker_with_much_to_write_begins_nothing_that_comes_later(tmp_path, monkeypatch):
    monkeypatch.setattr("oneb.data.workers._KEPT_BYTES", 15_000)
    first, second, third, fourth = some_units(tmp_path, 4)
    worker = Worker()
    worker.begin(bytes_job(tmp_path))
    assert worker.may(third)
    counts = worker.do(second)
    assert counts.tokens * 2 < 15_000
    assert worker.may(fourth)
    kept = worker.do(third)
    assert not worker.may(fourth)
    assert worker.may(first)  # others may wait for it
    assert worker.may(Place(third, 0, 0, 1))
    worker.do(Place(third, 0, 0, kept.tokens))
    assert worker.may(fourth)


def test_what_others_wait_for_is_not_held_up(tmp_path, monkeypatch):
    monkeypatch.setattr("oneb.data.workers._KEPT_BYTES", 0)
    first, second, third = some_units(tmp_path, 3)
    worker, received = Worker(), SimpleQueue()
    worker.begin(bytes_job(tmp_path))
    worker.do(second)
    waiting = _Waiting(received, worker)
    for task in (third, first):
        received.put(task)
    assert waiting.take() == first
    received.put(Place(second, 0, 0, 1))
    worker.do(waiting.take())
    assert waiting.take() == third


@pytest.fixture
def script(tmp_path) -> Path:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


def command(script: Path, inputs: Path, output: Path, workers: int) -> list[str]:
    return [sys.executable, str(script), "--input", str(inputs), "--output", str(output), "--tokenizer", "bytes",
            "--workers", str(workers)]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT)}


def test_workers_that_may_keep_nothing_do_not_wait_for_each_other_for_ever(script, tmp_path):
    inputs = write_lines(tmp_path / "in.jsonl", lines(3000))
    output = tmp_path / "x.npy"
    subprocess.run(command(script, inputs, output, 3), env=environment(), check=True, timeout=600, capture_output=True)
    assert np.load(output).tolist() == in_bytes(lines(3000))


def test_units_that_are_not_needed_do_not_hold_up_the_end(script, tmp_path):
    """Full, with units in every worker that get no place and let none of them begin another."""
    texts = ["enough", *["x" * 2500] * 19]  # each is a unit
    for number, text in enumerate(texts):
        write_lines(tmp_path / f"{number:02d}.jsonl", [text])
    output = tmp_path / "x.npy"
    slow_to_place = ("import time\nfrom oneb.data.parts import Target\nwrite = Target.write\n"
                     "Target.write = lambda *arguments: (time.sleep(0.3), write(*arguments))[1]\n")
    # By that time every worker keeps a unit that is not needed, and has two more to do.
    script.write_text(slow_to_place + SCRIPT.replace("_KEPT_BYTES = 0", "_KEPT_BYTES = 1000"))
    todo = command(script, tmp_path / "*.jsonl", output, 2)
    subprocess.run([*todo, "--tokens", "6"], env=environment(), check=True, timeout=600, capture_output=True)
    assert np.load(output).tolist() == in_bytes(texts)[:6]
    (source,) = json.loads((tmp_path / "x.npy.sources.json").read_text())
    assert source["sha256"] == hashlib.sha256((tmp_path / "00.jsonl").read_bytes()).hexdigest()


def test_a_machine_gets_as_many_processes_as_it_has_memory_for(monkeypatch):
    monkeypatch.setattr("oneb.data.workers._usable_cores", lambda: 8)
    for available, wanted in ((5 * 2**30 + 1, 5), (2**20, 1), (2**40, 8), (None, 8)):
        monkeypatch.setattr("oneb.data.workers.available_bytes", lambda available=available: available)
        assert usable_workers() == wanted


# -- Left over -------------------------------------------------------------------------------------

# Before SCRIPT: the command makes the file of that name once it has 100,000 bytes of tokens, and goes no further.
HOLD = """
import time
from pathlib import Path
from oneb.data.assemble import Work

report = Work._report

def hold(self):
    report(self)
    if self.journal.state.tokens > 50_000:
        Path({!r}).touch()
        time.sleep(600)

Work._report = hold
"""


@pytest.fixture
def stopped(script, tmp_path) -> Iterator[tuple[list[str], list[psutil.Process]]]:
    """A command that was killed while its workers were stopped, and these."""
    inputs = write_lines(tmp_path / "in.jsonl", lines(20_000))
    again = command(script, inputs, tmp_path / "x.npy", 2)
    script.write_text(HOLD.format(str(tmp_path / "held")) + SCRIPT)
    process = subprocess.Popen(again, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert within(60, lambda: (tmp_path / "held").exists() or process.poll() is not None)
    left = [child for child in psutil.Process(process.pid).children()
            if "resource_tracker" not in " ".join(child.cmdline())]  # multiprocessing's own helper
    assert len(left) == 2
    script.write_text(SCRIPT)
    for worker in left:
        worker.suspend()
    process.kill()
    process.wait()
    yield again, left
    for worker in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            worker.kill()


def test_what_a_killed_command_left_over_is_waited_for(stopped, tmp_path):
    again, left = stopped
    refused = subprocess.run(again, env=environment(), capture_output=True, text=True)
    assert refused.returncode == 2
    assert "worker processes of an earlier command still write" in refused.stderr
    waits = subprocess.Popen(again, env=environment() | {"TAKE_OVER_SECONDS": "120"}, stdout=subprocess.DEVNULL,
                             stderr=subprocess.DEVNULL)
    tokens = str(tmp_path / "x.npy.parts" / TOKENS)
    assert within(60, lambda: tokens in (file.path for file in psutil.Process(waits.pid).open_files()))
    for worker in left:
        worker.send_signal(signal.SIGCONT)
    assert waits.wait(600) == 0
    assert np.load(tmp_path / "x.npy").tolist() == in_bytes(lines(20_000))
    assert not psutil.wait_procs(left, timeout=60)[1]
    assert not (tmp_path / "x.npy.parts").exists()


# -- The hash --------------------------------------------------------------------------------------

@pytest.mark.parametrize("seed", range(3))
def test_the_hash_of_a_growing_file_is_that_of_the_whole(tmp_path, monkeypatch, seed):
    monkeypatch.setattr("oneb.data.growing._BLOCK_BYTES", 1000)
    chance = random.Random(seed)
    content = chance.randbytes(50_000)
    path = tmp_path / "grows"
    path.write_bytes(bytes(128))
    growing = GrowingHash(path, content[:128])
    size = 128
    with open(path, "r+b", buffering=0) as file:
        while size < len(content):
            more = chance.randrange(1, 5000)
            file.seek(size + more)
            file.write(b"not yet")  # others write further on
            file.seek(size)
            size += file.write(content[size:size + more])
            growing.extend(size)
        file.truncate(size)
        file.seek(0)
        file.write(content[:128])
    growing.extend(size, whole=True)
    assert growing.hexdigest() == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_file_that_is_cut_while_it_is_hashed_is_an_error(tmp_path):
    (tmp_path / "cut").write_bytes(bytes(1000))
    growing = GrowingHash(tmp_path / "cut", bytes(128))
    growing.extend(1001, whole=True)
    with pytest.raises(OSError, match="ends at byte 1000, before byte 1001"):
        growing.hexdigest()
    growing.stop()


def test_whatever_ends_the_hash_of_a_growing_file_is_raised(tmp_path, monkeypatch):
    monkeypatch.setattr("oneb.data.growing._BLOCK_BYTES", 2**62)  # no memory for that
    (tmp_path / "big").write_bytes(bytes(1000))
    growing = GrowingHash(tmp_path / "big", bytes(128))
    growing.extend(1000, whole=True)
    with pytest.raises(MemoryError):
        growing.hexdigest()
