"""Data by name: ready shards from a Hub on loopback that arrive while a run reads them, in processes of their own."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import random
import signal
import struct
import subprocess
import sys
import termios
import time

import numpy as np
import pytest
from hub_server import COMMIT, Fault, Hub, serve
from named_helpers import (
    FILES,
    GROUPS,
    NAME,
    OPTIONS,
    PATIENT,
    READ,
    REPO,
    ROOT,
    STEPS_IN_FIRST,
    TRAIN,
    Machine,
    finish,
    hold,
    ids,
    read_until,
    ready,
    shard,
    shard_name,
)

from oneb.cli.data_size import count_tokens
from oneb.data.formats import open_file
from oneb.data.order import BatchOrder
from oneb.data.verify import verify

pytest_plugins = ["named_fixtures"]


# -- Arriving ------------------------------------------------------------------------------------

def test_the_files_are_the_shards_tokens(machine):
    out, _ = finish(machine.read())
    fingerprint, *rest = out.splitlines()[-1].split(" ", 1)
    assert rest == [f"5400 600 {GROUPS}"]
    assert len(fingerprint) == 16
    for number, name in enumerate(FILES):
        tokens = open_file(machine.files / name, "bin")
        assert np.array_equal(tokens.read(0, len(tokens)), ids(number))
        verify(machine.files / name)
        meta = dict(line.split(": ", 1) for line in (machine.files / f"{name}.meta").read_text().splitlines())
        assert meta["source"] == f"{REPO}@{COMMIT} {shard_name(number)}"
        assert int(meta["documents"]) == len(np.load(machine.files / f"{name}.idx.npy")) - 1
    assert not list(machine.files.glob(".*tmp*"))
    fetched = [request.path.rpartition("/")[2].partition("?")[0] for request in machine.hub.asked("cdn")]
    assert fetched == [shard_name(number) for number in range(4)]  # in order, and no more than needed
    # Everything is there now: no network is needed, and no cache.
    alone = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(machine.folder / "nothing"), "HF_ENDPOINT": "http://x"}
    for given in (NAME, str(machine.files)):  # its folder is the same data, val.bin for validation
        again, _ = finish(machine.read(given, **alone))
        assert again == out
        assert count_tokens(given, "npy") == 6000


@pytest.mark.parametrize("seeds", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_batches_do_not_depend_on_when_shards_arrive(hub, tmp_path, seeds):
    expected, _ = finish(Machine(hub, tmp_path / "all").read())
    for seed in range(seeds):
        order = random.Random(seed).sample(range(4), 4)
        hold(hub, *range(4))
        process = Machine(hub, tmp_path / str(seed)).read()
        for number in order:
            time.sleep(random.Random(seed + number).random() * 2)
            hub.held[shard_name(number)].set()
        assert finish(process)[0] == expected


def test_two_processes_share_one_download(hub, machine):
    first, second = machine.read(), machine.read()
    assert finish(first)[0] == finish(second)[0]
    assert len(hub.asked("cdn")) == 4


@pytest.mark.slow
def test_if_the_process_that_downloads_is_killed_the_other_takes_over(hub, machine):
    first_of, = hold(hub, 2)
    first = machine.read()
    while not (machine.files / "train_000001.bin").exists():
        time.sleep(0.05)
    second = machine.read()
    told = next(line for line in second.stderr if "train_000002" in line)
    assert "train_000002.bin, another process downloads" in told
    first.send_signal(signal.SIGKILL)
    first.communicate()
    first_of.set()
    assert finish(second)[0] == finish(Machine(hub, machine.folder.parent / "b").read())[0]


def test_shards_are_brought_from_the_one_that_is_waited_for(hub, machine):
    """As by a run that is continued on another machine."""
    order = BatchOrder(sum(GROUPS), 3, ((0, 16), (40, 32)), (4, 4), groups=GROUPS)
    step = next(step for step in range(100, 200) if order.offsets(step).min() >= GROUPS[0] + GROUPS[1])
    first, = hold(hub, 0)  # which comes first of all
    begin = f"import oneb.data.loader; oneb.data.loader._WAITING_S = 0.1; first_step = {step}"
    process = machine.start(READ.replace("first_step = 0", begin), str(machine.data), NAME)
    read_until(process.stderr, "train_000003.bin")
    first.set()
    finish(process)
    fetched = [request.path.rpartition("/")[2].partition("?")[0] for request in hub.asked("cdn")]
    assert fetched == [shard_name(number) for number in (0, 3, 1, 2)]


@pytest.mark.slow
def test_damage_on_the_disk_is_said(machine):
    finish(machine.read())
    with open(machine.files / "train_000002.bin", "r+b") as file:
        file.truncate(2000)
    assert "train_000002.bin is cut short" in finish(machine.read(), 1)[1]
    (machine.files / "train_000002.bin").write_bytes(shard(ids(2)[:100]))
    assert "holds 100 tokens, wanted 2000; delete it" in finish(machine.read(), 1)[1]
    (machine.files / "dataset.json").write_text("{")
    assert "dataset.json cannot be read" in finish(machine.read(), 1)[1]
    (machine.files / "dataset.json").unlink()
    (machine.files / "train_000002.bin").unlink()
    finish(machine.read())  # the cache's copy, which was the same file, is found to be damaged, too
    verify(machine.files / "train_000002.bin")


def test_a_failure_that_nobody_waits_for_is_told_once(hub, machine):
    code = """
import time
from oneb.config import DataConfig
from oneb.data.named import open_data
tokens = open_data(DataConfig(path=sys.argv[2], data_root=sys.argv[1]), 50257, print).tokens
tokens.read(0, 100)
print("begins", flush=True)
while tokens.arrival.missing():
    time.sleep(0.1)
print(*tokens.arrival.faults(), sep=chr(10))
"""
    second, = hold(hub, 2)
    process = machine.start(code, str(machine.data), NAME)
    while process.stdout.readline() != "begins\n":
        assert process.poll() is None, process.communicate()
    hub.faults += [Fault("cdn", status=503) for _ in range(1000)]
    second.set()
    while len(hub.asked("cdn")) < 11:  # two shards have come; three attempts of three tries
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    hub.recover()
    told, = finish(process)[0].splitlines()
    assert "did not deliver (the server answered 503)" in told
    assert "the data for the next steps is there" in told


def test_ids_that_are_not_gpt2s_end_it(hub, machine):
    bad = ids(1)
    bad[777] = 50257
    hub.datasets[REPO][shard_name(1)] = shard(bad)
    assert "token id 50257 is outside the vocabulary" in finish(machine.read(), 1)[1]
    assert not (machine.files / "train_000001.bin").exists()


def test_a_disk_that_is_too_small_is_heard_of_first(hub, machine, disk):
    small = disk(8192)
    process = machine.start(READ, str(small), NAME)
    assert "the data takes 11.7 KiB more, the disk of" in finish(process, 1)[1]
    assert not hub.asked("cdn")


# -- Whole runs ----------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[int, float]:
    """Losses of a run whose data is all there."""
    with serve(Hub({REPO: ready()})) as hub:
        machine = Machine(hub, tmp_path_factory.mktemp("undisturbed"))
        finish(machine.read())
        finish(machine.train())
    losses = machine.losses()
    assert sorted(losses) == list(range(1, 71))
    return losses


def test_a_run_trains_while_shards_arrive(hub, machine, undisturbed):
    second, third = hold(hub, 2, 3)
    process = machine.train()
    out = read_until(process.stdout, "waiting for data: train_000002.bin, ")
    assert max(machine.losses()) == STEPS_IN_FIRST
    assert not (machine.files / "train_000002.bin").exists()
    second.set()
    third.set()
    out += finish(process)[0]
    assert machine.losses() == undisturbed
    assert "data 2/4" in out
    complete, = (row for row in machine.rows("event") if row["event"] == "data_complete")
    assert complete["files"] == 4
    assert complete["step"] >= STEPS_IN_FIRST
    assert complete["since_start_s"] > 1


@pytest.mark.slow
@pytest.mark.parametrize("live", ["auto", "rich"])
def test_a_terminal_shows_what_is_waited_for(hub, machine, undisturbed, live):
    hold(hub, 2, 3)
    terminal, theirs = pty.openpty()
    os.set_blocking(terminal, False)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 40, 120, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-c", PATIENT, TRAIN, *machine.arguments(), "--live", live], cwd=ROOT, stdout=theirs,
        env=machine.environment | {"TERM": "xterm"})
    os.close(theirs)
    shown = b""

    def read_until(text: str) -> None:
        nonlocal shown
        deadline = time.monotonic() + 300
        while text.encode() not in shown:
            assert time.monotonic() < deadline, shown.decode(errors="replace")
            time.sleep(0.05)
            with contextlib.suppress(BlockingIOError):
                shown += os.read(terminal, 2**16)

    read_until("waiting for data: train_000002.bin, the download begins")
    assert (b"data 2/4" if live == "auto" else b"files of data") in shown
    hub.held[shard_name(2)].set()
    read_until("waiting for data: train_000003.bin, ")
    hub.held[shard_name(3)].set()
    read_until("all 4 files of")
    read_until("70/70")
    while process.poll() is None:
        with contextlib.suppress(BlockingIOError, OSError):  # the latter once nobody writes any more
            os.read(terminal, 2**16)
    assert process.returncode == 0
    assert machine.losses() == undisturbed
    os.close(terminal)


def test_a_run_that_is_killed_while_shards_arrive_continues(hub, machine, undisturbed):
    hold(hub, 2)
    process = machine.train(NAME, "--save-every", "10")
    machine.wait_for_step(25, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    hub.held.clear()
    hub.faults.append(Fault("cdn", cut_after=1500))
    (machine.files / ".train_000003.bin.tmp99999").write_bytes(b"of a process that was killed")
    finish(machine.train(NAME, "--save-every", "10"))
    assert not list(machine.files.glob(".*tmp*"))
    assert machine.losses() == undisturbed


@pytest.mark.slow
def test_a_run_that_waits_for_data_stops_at_once(hub, machine):
    hold(hub, 2)
    process = machine.train()
    machine.wait_for_step(STEPS_IN_FIRST, process)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    finish(process, 128 + signal.SIGTERM)
    assert time.monotonic() - began < 120
    assert json.loads((machine.run / "last.pt.json").read_text())["step"] == STEPS_IN_FIRST


def test_a_server_that_fails_for_good_ends_the_run_after_saving(hub, machine, undisturbed):
    second, = hold(hub, 2)
    process = machine.train()
    machine.wait_for_step(10, process)
    hub.faults += [Fault("cdn", status=503) for _ in range(1000)]
    second.set()
    _, err = finish(process, 2)
    assert "the data does not arrive" in err
    assert "did not deliver" in err
    assert json.loads((machine.run / "last.pt.json").read_text())["step"] == STEPS_IN_FIRST
    hub.recover()
    finish(machine.train())
    assert machine.losses() == undisturbed


@pytest.mark.slow
def test_other_shards_are_not_continued_on(hub, machine, tmp_path):
    finish(machine.train(NAME, "--steps", "5"))
    other = ids(3)
    other[-1] += 1
    hub.datasets[REPO][shard_name(3)] = shard(other)
    hub.commit = "1" * 40
    hold(hub, *range(4))  # heard of before anything has arrived
    moved = Machine(hub, tmp_path / "moved")
    (tmp_path / "a" / "runs").rename(tmp_path / "moved" / "runs")
    assert "is not the data that" in finish(moved.train(NAME, "--allow-change"), 2)[1]


def test_a_model_of_another_vocabulary_is_refused_before_anything_is_downloaded(hub, machine):
    assert "wanted --vocab-size 50257 or more" in finish(machine.train(NAME, "--vocab-size", "257"), 2)[1]
    assert not hub.asked("cdn")


# -- The launcher --------------------------------------------------------------------------------

def launch(machine: Machine, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "run_1b_launch.py"), "--data", NAME, "--data-root", str(machine.data), "--run-root",
         str(machine.folder / "runs"), *OPTIONS[:-2], *arguments], text=True, capture_output=True, timeout=600,
        env={**os.environ, **machine.hub.environment(machine.folder / "home"), **environment})


def test_a_dry_run_says_what_would_come_and_asks_nobody(hub, machine):
    done = launch(machine, HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stdout.replace("[note]", "").split())
    assert "of ready tokens from kjj0/finewebedu10B-gpt2" in said
    assert str(machine.files) in said.replace(" ", "") or str(machine.files) in said
    assert not machine.data.exists()
    finish(machine.read())
    assert "ready tokens" not in launch(machine).stdout


@pytest.mark.slow
def test_a_rehearsal_waits_for_the_first_shard_and_the_validation_only(hub, machine):
    hold(hub, 2, 3)
    done = launch(machine, "--rehearse", "--seq-schedule", "16@0,32@40")
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(path.name for path in machine.files.glob("*.bin")) == ["train_000001.bin", "val.bin"]


# -- Without ready tokens ------------------------------------------------------------------------

@pytest.mark.parametrize("name", [
    "somebody/books:5K", pytest.param("fineweb-edu:500K", marks=pytest.mark.slow)])
def test_what_is_not_ready_is_prepared_first(hub, machine, gpt2_cache, name):
    if name.startswith("fineweb-edu"):  # more than the shards hold, and than the text
        hub.datasets[REPO].pop(shard_name(4))
    process = machine.read(name)
    out, err = finish(process)
    file, = machine.data.glob("*/train.npy")
    tokens = np.load(file)
    verify(file)
    assert "is prepared from" in err
    assert len(tokens) == 5000 or "fewer than fineweb-edu:500K" in err
    again, _ = finish(machine.read(name, HF_HUB_OFFLINE="1", HF_ENDPOINT="http://x"))
    assert again == out
