"""Data by name: ready shards from a Hub on loopback that arrive while a run reads them, in processes of their own."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_server import COMMIT, Fault, Hub, serve

from oneb.data.order import BatchOrder
from oneb.data.verify import verify
from oneb.files import read_json_lines

ROOT = Path(__file__).parents[1]
REPO = "kjj0/finewebedu10B-gpt2"
SHARD = 2000
NAME = "fineweb-edu:6K"
N_VAL = 600
GROUPS = (2000, 2000, 1400)  # of 5400 training tokens
FILES = {"val.npy": N_VAL, **{f"train_{number:06d}.npy": size for number, size in enumerate(GROUPS, 1)}}
TEXTS = [f"document {number} " + "word " * (number % 50) for number in range(600)]


def ids(number: int) -> np.ndarray:
    """The tokens of shard ``number``: documents of some 50 tokens; 0 is for validation."""
    drawn = np.random.default_rng(number).integers(0, 50256, SHARD)
    drawn[np.random.default_rng(number).integers(0, SHARD, SHARD // 50)] = 50256
    return drawn.astype("<u2")


def shard(tokens: np.ndarray) -> bytes:
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(tokens)
    return header.tobytes() + tokens.tobytes()


def shard_name(number: int) -> str:
    return f"finewebedu_train_{number:06d}.bin" if number else "finewebedu_val_000000.bin"


def parquet(texts: list[str]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": texts}), buffer)
    return buffer.getvalue()


def ready() -> dict[str, bytes]:
    return {shard_name(number): shard(ids(number)) for number in range(5)}


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve(Hub({REPO: ready(), "somebody/books": {"a.parquet": parquet(TEXTS)},
                    "HuggingFaceFW/fineweb-edu": {"sample/10BT/000.parquet": parquet(TEXTS)}})) as hub:
        yield hub
        for event in hub.held.values():
            event.set()


def hold(hub: Hub, *numbers: int) -> list[threading.Event]:
    """Withhold these shards until their events are set."""
    events = [threading.Event() for _ in numbers]
    hub.held.update(zip(map(shard_name, numbers), events, strict=True))
    return events


# argv: the code to run with the waits between tries shortened, then its own arguments.
PATIENT = ("import sys; from oneb.data import download, hub_failures; hub_failures._WAITS = (0.1, 0.1); "
           "download._PAUSE_S = 0.5; download._REPORT_S = 1.0; code = sys.argv.pop(1); exec(code)")
# argv: data root, name. Prints batch after batch a hash, and then the fingerprint.
READ = """
import hashlib
from oneb.config import DataConfig
from oneb.data.loader import BatchLoader
from oneb.data.named import open_data
from oneb.data.order import BatchOrder
data = open_data(DataConfig(path=sys.argv[2], data_root=sys.argv[1]), 50257, lambda text: print(text, file=sys.stderr))
order = BatchOrder(data.n_train, 3, ((0, 16), (40, 32)), (4, 4), groups=data.groups)
with BatchLoader(data.tokens, order, vocab_size=50257, start_step=0, total_steps=220) as loader:
    for batch in loader:
        print(hashlib.sha256(batch.tokens.numpy().tobytes()).hexdigest(), flush=True)
print(hashlib.sha256(data.tokens.read(data.n_train, data.n_val).tobytes()).hexdigest())
print(data.tokens.fingerprint, data.n_train, data.n_val, data.groups)
"""
TRAIN = "from oneb.cli.train import main; sys.exit(main(sys.argv[1:]))"
OPTIONS = """--size nano --layers 1 --d-model 32 --n-head 2 --d-ff 64 --device cpu --train-seq-len 32 --block 32
--batch-size 2 --grad-accum 1 --steps 70 --log-every 1 --eval-every 1000 --eval-iters 1 --lr 1e-3 --warmup-steps 2
--live basic --tag x --if-exists resume
"""
OPTIONS = OPTIONS.split()
STEPS_IN_FIRST = GROUPS[0] // 32 // 2


class Machine:
    """A folder with a cache, a data root and runs, whose Hub is ``hub``."""

    def __init__(self, hub: Hub, folder: Path) -> None:
        self.hub, self.folder, self.data = hub, folder, folder / "data"
        folder.mkdir(exist_ok=True)

    @property
    def files(self) -> Path:
        return self.data / "fineweb-edu-6K"

    def start(self, code: str, *arguments: str, **environment: str) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-c", PATIENT, code, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, cwd=ROOT, env={**os.environ, **self.hub.environment(self.folder / "home"),
                                      "HF_HUB_DOWNLOAD_TIMEOUT": "60", **environment})

    def read(self, name: str = NAME, **environment: str) -> subprocess.Popen:
        return self.start(READ, str(self.data), name, **environment)

    def train(self, name: str = NAME, *more: str, **environment: str) -> subprocess.Popen:
        return self.start(TRAIN, "--data", name, "--data-root", str(self.data), "--run-root",
                          str(self.folder / "runs"), *OPTIONS, *more, **environment)

    @property
    def run(self) -> Path:
        return next((self.folder / "runs").glob("x_*"))

    def losses(self) -> dict[int, float]:
        if not (self.folder / "runs").exists() or not list((self.folder / "runs").glob("x_*/train.jsonl")):
            return {}
        rows = read_json_lines(self.run / "train.jsonl")
        return {row["step"]: row["loss"] for row in rows if row["type"] == "train"}

    def wait_for_step(self, step: int, process: subprocess.Popen) -> None:
        deadline = time.monotonic() + 60
        while step not in self.losses():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)


def finish(process: subprocess.Popen, code: int = 0) -> tuple[str, str]:
    out, err = process.communicate(timeout=100)
    assert process.returncode == code, out + err
    return out, err


@pytest.fixture
def machine(hub, tmp_path) -> Machine:
    return Machine(hub, tmp_path / "a")


# -- Arriving ------------------------------------------------------------------------------------

def test_the_files_are_the_shards_tokens(machine):
    out, _ = finish(machine.read())
    fingerprint, *rest = out.splitlines()[-1].split(" ", 1)
    assert rest == [f"5400 600 {GROUPS}"]
    assert len(fingerprint) == 16
    for number, (name, size) in enumerate(FILES.items()):
        assert np.array_equal(np.load(machine.files / name), ids(number)[:size])
        verify(machine.files / name)
        meta = dict(line.split(": ", 1) for line in (machine.files / f"{name}.meta").read_text().splitlines())
        assert meta["source"] == f"{REPO}@{COMMIT} {shard_name(number)}"
        assert int(meta["documents"]) == len(np.load(machine.files / f"{name}.idx.npy")) - 1
    assert not list(machine.files.glob(".*tmp*"))
    fetched = [request.path.rpartition("/")[2].partition("?")[0] for request in machine.hub.asked("cdn")]
    assert fetched == [shard_name(number) for number in range(4)]  # in order, and no more than needed
    # Everything is there now: no network is needed, and no cache.
    again, _ = finish(machine.read(HF_HUB_OFFLINE="1", HF_HOME=str(machine.folder / "nothing"), HF_ENDPOINT="http://x"))
    assert again == out


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
    while not (machine.files / "train_000001.npy").exists():
        time.sleep(0.05)
    second = machine.read()
    assert "waiting for train_000002.npy" in next(line for line in second.stderr if "waiting for train" in line)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    first_of.set()
    assert finish(second)[0] == finish(Machine(hub, machine.folder.parent / "b").read())[0]


def test_shards_are_brought_from_the_one_that_is_waited_for(hub, machine):
    """As by a run that is continued on another machine."""
    order = BatchOrder(sum(GROUPS), 3, ((0, 16), (40, 32)), (4, 4), groups=GROUPS)
    step = next(step for step in range(100, 200) if order.offsets(step).min() >= GROUPS[0] + GROUPS[1])
    finish(machine.start(READ.replace("start_step=0", f"start_step={step}"), str(machine.data), NAME))
    fetched = [request.path.rpartition("/")[2].partition("?")[0] for request in hub.asked("cdn")]
    assert fetched == [shard_name(number) for number in (0, 3, 1, 2)]


@pytest.mark.slow
def test_damage_on_the_disk_is_said(machine):
    finish(machine.read())
    with open(machine.files / "train_000002.npy", "r+b") as file:
        file.truncate(2000)
    assert "train_000002.npy is cut short" in finish(machine.read(), 1)[1]
    np.save(machine.files / "train_000002.npy", ids(2)[:100])
    assert "holds 100 tokens of uint16, wanted 2000 of uint16; delete it" in finish(machine.read(), 1)[1]
    (machine.files / "dataset.json").write_text("{")
    assert "dataset.json cannot be read" in finish(machine.read(), 1)[1]
    (machine.files / "dataset.json").unlink()
    (machine.files / "train_000002.npy").unlink()
    finish(machine.read())


def test_ids_that_are_not_gpt2s_end_it(hub, machine):
    bad = ids(1)
    bad[777] = 50257
    hub.datasets[REPO][shard_name(1)] = shard(bad)
    assert "token id 50257 is outside the vocabulary" in finish(machine.read(), 1)[1]
    assert not (machine.files / "train_000001.npy").exists()


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
    machine.wait_for_step(STEPS_IN_FIRST - 1, process)
    time.sleep(1.5)  # it may not get further
    assert max(machine.losses()) == STEPS_IN_FIRST
    assert not (machine.files / "train_000002.npy").exists()
    second.set()
    third.set()
    out, _ = finish(process)
    assert machine.losses() == undisturbed
    assert "waiting for train_000002.npy" in out


def test_a_run_that_is_killed_while_shards_arrive_continues(hub, machine, undisturbed):
    hold(hub, 2)
    process = machine.train(NAME, "--save-every", "10")
    machine.wait_for_step(25, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    hub.held.clear()
    hub.faults.append(Fault("cdn", cut_after=1500))
    (machine.files / ".train_000003.npy.tmp99999").write_bytes(b"of a process that was killed")
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
    assert time.monotonic() - began < 4
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
    hub.faults.clear()
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
         str(machine.folder / "runs"), *OPTIONS[:-2], *arguments], text=True, capture_output=True, timeout=100,
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
    assert sorted(path.name for path in machine.files.glob("*.npy") if ".idx" not in path.name) == [
        "train_000001.npy", "val.npy"]


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
