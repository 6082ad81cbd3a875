"""Checkpoints under kill -9, and the one that a run continues from. Real processes, killed for real.

Processes are forked from one that has imported everything: a kill costs milliseconds, and not the start of torch.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from second_process import python
from test_trainer import NANO, assert_same_weights, each_save_is_waited_for, losses, run, val_losses, weights

from oneb.checkpoints import checkpoint
from oneb.checkpoints.rundir import checkpoints, claimed, previous_path, read_sidecar, run_directory, sidecar_path
from oneb.errors import OnebError
from oneb.files import read_json_lines
from oneb.planner import disk_use, settled
from oneb.presets import resolve
from oneb.show import recorder
from oneb.train.run import train

NAME = "oneb_decoupled_seed1337"
SAVING = {"size": "nano", "path": "demo", "resume": True}
TRAINING = {**NANO, "n_layers": 1, "train_seq_len": 32, "batch_size": 2, "grad_accum": 1, "eval_every": 0,
            "live": "off", "save_minutes": 0, "save_every": 1, "keep_last": 2, "if_exists": "resume"}
CALLS = [(os, "replace"), (os, "link"), (os, "unlink"), (os, "fsync")]


def contents(step: int) -> dict:
    """A checkpoint's, every number of which follows from the step."""
    generator = torch.Generator().manual_seed(step)
    return {"step": step, "tokens": 8 * step, "best_val_loss": 1 / step,
            "config": {"model": {}, "optim": {"optimizer": "lion"}},
            "model": {"w": torch.rand(64, generator=generator)}}


def save(directory: Path, step: int) -> None:
    """As the trainer does it: mostly last.pt alone, now and then with a file for the step, of which two are kept."""
    if step % 3:
        checkpoint.save_checkpoint(directory / "last.pt", contents(step))
        return
    path = directory / f"step{step:08d}.pt"
    checkpoint.save_checkpoint(path, contents(step))
    checkpoint.link_checkpoint(path, directory / "last.pt")
    checkpoint.prune_checkpoints(directory, 2)


def newest_step(directory: Path) -> int:
    """Step of the checkpoint that a run would continue from, and all of those there are read."""
    steps = []
    for path in checkpoints(directory)[0]:
        found = checkpoint.load_checkpoint(path)
        assert torch.equal(found["model"]["w"], contents(found["step"])["model"]["w"]), path
        assert read_sidecar(path)["step"] == found["step"], path
        steps.append(found["step"])
    assert steps[0] == max(steps)
    return steps[0]


def without_pictures(setattr) -> None:
    """Saves draw no plots, which take longer than all else in these runs."""
    setattr(recorder, "write_plots", lambda directory: None)
    setattr(recorder, "write_summary", lambda directory: None)


def fork(work) -> int:
    """The process id of a copy of this process that does ``work`` and ends."""
    if pid := os.fork():
        return pid
    try:
        work()
        os._exit(0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        os._exit(1)


def killed_by(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def until(pid: int, condition) -> None:
    while not condition():
        assert os.waitpid(pid, os.WNOHANG) == (0, 0), "ended"
        time.sleep(0.002)


# ---- what the second process runs

def kill_at_every_call(directory: Path, links: bool) -> None:
    """Save over and over, and die just before the n-th change to the directory, for every n of three saves."""
    def dying_before(count: int):
        left = iter(range(count))

        def wrapped(call):
            def dies(*args, **kwargs):
                if next(left, None) is None:
                    os.kill(os.getpid(), signal.SIGKILL)
                if call is os.link and not links:
                    raise PermissionError("no links on this disk")
                return call(*args, **kwargs)
            return dies

        def work():
            for module, name in CALLS:
                setattr(module, name, wrapped(getattr(module, name)))
            for step in range(start + 1, start + 4):
                save(directory, step)
                (directory / "done").write_text(str(step))
        return work

    save(directory, 1)
    count, killed, start = 0, 0, 1
    while True:
        (directory / "done").write_text(str(start))
        ended = killed_by(fork(dying_before(count)))
        done, found = int((directory / "done").read_text()), newest_step(directory)
        assert done <= found <= done + 1, (count, done, found)
        if ended == 0:
            break
        assert ended == -signal.SIGKILL
        count, killed, start = count + 1, killed + 1, found
    print(json.dumps({"killed": killed}))


def kill_at_random(directory: Path, kills: int, seed: int) -> None:
    """Kill a process that does nothing but save, ``kills`` times, at random moments of its first save and later."""
    chance = random.Random(seed)
    save(directory, start := 1)
    for _ in range(kills):
        (directory / "done").write_text(str(start))

        def work(start=start):
            for step in range(start + 1, start + 10_000):
                save(directory, step)
                (directory / "next").write_text(str(step))
                os.replace(directory / "next", directory / "done")

        pid = fork(work)
        if chance.random() < 0.5:  # however long a save takes, some are made
            until(pid, lambda start=start: (directory / "done").read_text() != str(start))
        time.sleep(chance.uniform(0, 0.1))
        os.kill(pid, signal.SIGKILL)
        assert killed_by(pid) == -signal.SIGKILL
        done, found = int((directory / "done").read_text()), newest_step(directory)
        assert done <= found <= done + 1, (done, found)
        start = found
    print(json.dumps({"steps": start}))


def kill_training(root: Path, kills: int, steps: int, seed: int) -> None:
    """Train once undisturbed, and once with a kill -9 every few steps, each followed by a resume."""
    chance = random.Random(seed)

    def training(name):
        return lambda: sys.exit(train(resolve({**TRAINING, "root": str(root / name), "steps": steps})))

    def work(name, stays=False):
        without_pictures(setattr)
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        try:
            training(name)()
        except SystemExit as ended:
            while stays and not ended.code:  # until it is killed, be that later than was meant
                time.sleep(1)
            os._exit(ended.code)

    assert killed_by(fork(lambda: work("whole"))) == 0
    whole = losses(read_json_lines(root / "whole" / NAME / "train.jsonl"))
    log, lost = root / "cut" / NAME / "train.jsonl", []
    for number in range(kills):
        goal = (number + 1) * steps // (kills + 1) - chance.randrange(3)
        pid = fork(lambda: work("cut", stays=True))
        until(pid, lambda: log.exists() and f'"step": {goal},' in log.read_text(errors="replace"))  # noqa: B023
        time.sleep(chance.uniform(0, 0.08))
        os.kill(pid, signal.SIGKILL)
        assert killed_by(pid) == -signal.SIGKILL
        found = losses(read_json_lines(log))
        assert found.items() <= whole.items()
        resumed = run_directory(resolve({**TRAINING, "root": str(root / "cut"), "steps": steps}))
        lost.append(max(found) - read_sidecar(resumed.resume_from)["step"])
    assert killed_by(fork(lambda: work("cut"))) == 0
    print(json.dumps({"lost": lost, "equal": losses(read_json_lines(log)) == whole, "steps": len(whole)}))


def second_process(call: str) -> dict:
    """What ``call``, of a function above, prints in a process whose only thread is its first."""
    code = ("import sys; sys.path.insert(0, 'tests'); import torch; torch.set_num_threads(1)\n"
            f"from pathlib import Path; import test_checkpoint as t; t.{call}")
    return json.loads(python("-c", code).splitlines()[-1])


# ---- kill -9

@pytest.mark.parametrize("links", [True, False])
def test_a_kill_before_any_change_to_the_directory_leaves_a_whole_checkpoint(tmp_path, links):
    found = second_process(f"kill_at_every_call(Path({str(tmp_path)!r}), {links})")
    assert found["killed"] > 40


@pytest.mark.parametrize("kills", [40, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_kill_at_a_random_moment_loses_nothing_but_the_save_under_way(tmp_path, kills):
    found = second_process(f"kill_at_random(Path({str(tmp_path)!r}), {kills}, seed=5)")
    assert found["steps"] > kills / 4  # there was something to interrupt


@pytest.mark.parametrize(("kills", "steps"), [(25, 130), pytest.param(200, 1000, marks=pytest.mark.slow)])
def test_a_run_killed_many_times_is_the_run_that_never_was(tmp_path, kills, steps):
    found = second_process(f"kill_training(Path({str(tmp_path)!r}), {kills}, {steps}, seed=7)")
    assert found["equal"]
    assert found["steps"] == steps
    assert len(found["lost"]) == kills
    assert max(found["lost"]) <= 2  # it saves every step, and a step's save is written while the next one is made
    directory = tmp_path / "cut" / NAME
    assert len(list(directory.glob("step*.pt"))) == 2
    assert not list(directory.glob("*previous*"))
    assert not list(directory.glob(".*tmp*"))


# ---- which one is continued

@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    without_pictures(monkeypatch.setattr)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of 12 steps, with a file at every fourth."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        without_pictures(monkeypatch.setattr)
        return run(tmp_path_factory.mktemp("finished"), save_every=4)[0]


@pytest.fixture(scope="module")
def longer(tmp_path_factory):
    """Weights of the same run after 14 steps."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        without_pictures(monkeypatch.setattr)
        return weights(run(tmp_path_factory.mktemp("longer"), steps=14)[0])


@pytest.fixture
def directory(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / NAME)


def resumed(tmp_path, **given):
    return resolve({**NANO, "root": str(tmp_path), "steps": 14, "resume": True, **given})


def spoil(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "flip":
        data[len(data) // 2] ^= 1
    path.unlink()  # last.pt and a step's file are one file
    if how != "missing":
        path.write_bytes(data[:-100] if how == "truncate" else data)
    if how == "no sidecar":
        sidecar_path(path).unlink()


@pytest.mark.parametrize("how", ["truncate", "flip", "no sidecar", "missing"])
@pytest.mark.parametrize("asked", [{"resume": True}, {"resume": False, "if_exists": "resume"}])
def test_a_damaged_newest_checkpoint_is_passed_over(directory, longer, tmp_path, capsys, how, asked):
    for name in ("last.pt", "step00000012.pt"):
        spoil(directory / name, how)
    assert train(resumed(tmp_path, **asked)) == 0
    assert_same_weights(longer, weights(directory))
    rows = read_json_lines(directory / "train.jsonl")
    assert [row["step"] for row in rows if row.get("event") == "resume"] == [8]
    assert sorted(losses(rows)) == list(range(1, 15))
    told = capsys.readouterr().out + " ".join(row.get("message", "") for row in rows)
    assert how == "missing" or "passed over" in told and "step00000012.pt" in told
    assert not list(directory.glob("*previous*"))


@pytest.mark.parametrize("how", ["truncate", "flip", "no sidecar"])
@pytest.mark.parametrize("asked", [{"resume": True}, {"resume": False, "if_exists": "resume"}])
def test_where_all_are_damaged_nothing_starts_anew(directory, tmp_path, how, asked):
    for path in (*directory.glob("step*.pt"), directory / "last.pt"):
        spoil(path, how)
    before = {path.name for path in directory.iterdir()}
    with pytest.raises(OnebError, match="is whole: ") as caught:
        train(resumed(tmp_path, **asked))
    for name in ("last.pt", "step00000004.pt", "step00000008.pt"):
        assert str(directory / name) in str(caught.value)
    assert {path.name for path in directory.iterdir()} == before


def test_a_checkpoint_that_is_named_is_taken_alone(directory, tmp_path):
    spoil(directory / "last.pt", "flip")
    with pytest.raises(OnebError, match=r"last\.pt is damaged"):
        train(resumed(tmp_path, ckpt=str(directory / "last.pt")))
    assert train(resumed(tmp_path, ckpt=str(directory / "step00000004.pt"))) == 0


def test_after_going_back_the_newest_is_the_one_saved_last(directory, tmp_path):
    back = str(directory / "step00000004.pt")
    assert train(resumed(tmp_path, ckpt=back, steps=6, lr=5e-4, allow_change=True)) == 0
    assert run_directory(resumed(tmp_path)).resume_from == directory / "last.pt"
    assert read_sidecar(directory / "last.pt")["step"] == 6
    assert run_directory(resumed(tmp_path)).older[0] == directory / "step00000012.pt"


def test_the_previous_one_is_kept_while_the_newest_is_damaged(tmp_path):
    """A run that goes on from last.previous.pt: its first save must not remove what it was continued from."""
    checkpoint.save_checkpoint(tmp_path / "last.pt", contents(2))
    checkpoint.save_checkpoint(tmp_path / "last.previous.pt", contents(1))
    spoil(tmp_path / "last.pt", "flip")
    checkpoint._keep_previous(tmp_path / "last.pt")
    assert checkpoint.load_checkpoint(previous_path(tmp_path / "last.pt"))["step"] == 1
    checkpoint.save_checkpoint(tmp_path / "last.pt", contents(3))
    assert newest_step(tmp_path) == 3
    assert not previous_path(tmp_path / "last.pt").exists()


# ---- when it saves, and what it keeps

def test_minutes_save_the_last_checkpoint_alone(tmp_path, monkeypatch):
    each_save_is_waited_for(monkeypatch.setattr)  # none is due while another is under way
    minutes = iter(range(10_000))
    monkeypatch.setattr(time, "monotonic", lambda: 60.0 * next(minutes))
    plain, rows = run(tmp_path, tag="plain", save_minutes=0, eval_every=0)
    assert not [row for row in rows if row.get("event") == "checkpoint" and row["step"] < 12]
    directory, rows = run(tmp_path, save_minutes=2.5, eval_every=0)
    saved = [row["step"] for row in rows if row.get("event") == "checkpoint"]
    assert len(saved) >= 4
    assert saved[-1] == 12
    assert not list(directory.glob("step*.pt"))
    assert_same_weights(weights(plain), weights(directory))


@pytest.mark.parametrize(("keep", "left"), [(0, [2, 4, 6, 8, 10, 12]), (1, [12]), (4, [6, 8, 10, 12]), (9, None)])
def test_the_newest_step_files_are_kept(tmp_path, keep, left):
    directory, _ = run(tmp_path, save_every=2, keep_last=keep)
    found = sorted(int(path.stem.removeprefix("step")) for path in directory.glob("step*.pt"))
    assert found == (left or [2, 4, 6, 8, 10, 12])
    for step in found:
        assert checkpoint.load_checkpoint(directory / f"step{step:08d}.pt")["step"] == step
    assert len(list(directory.glob("step*.json"))) == len(found)
    assert checkpoint.load_checkpoint(directory / "last.pt")["step"] == 12


@pytest.mark.parametrize("given", [
    {}, {"save_every": 5}, {"save_every": 2, "keep_last": 1},
    {"save_every": 5, "keep_last": 1},
])
def test_no_moment_of_a_run_takes_more_files_than_planned(tmp_path, monkeypatch, given):
    """With last.pt saved after every step, each on the disk before the next. Two names of one file are one."""
    given = {**given, "save_minutes": 1e-9, "eval_every": 0, "optimizer": "lion"}
    each_save_is_waited_for(monkeypatch.setattr)
    most, replace = 0, os.replace

    def counting(*names):
        nonlocal most
        large = {path.stat().st_ino for path in tmp_path.glob("*/*") if path.stat().st_size > 1e6}
        most = max(most, len(large - {path.stat().st_ino for path in tmp_path.glob("*/*best.pt*")}))
        replace(*names)

    monkeypatch.setattr(os, "replace", counting)
    run(tmp_path, **given)
    disk = disk_use(settled(resolve({**NANO, **given})))
    assert most == (disk.total_bytes - disk.best_bytes) // disk.last_bytes
    assert disk.step_files == len(list(tmp_path.glob("*/step*.pt")))


def test_a_best_checkpoint_that_was_cut_short_stops_no_resume(tmp_path):
    directory, rows = run(tmp_path, steps=8)
    sidecar_path(directory / "best.pt").unlink()
    assert train(resumed(tmp_path)) == 0
    more = read_json_lines(directory / "train.jsonl")
    assert val_losses(rows).items() <= val_losses(more).items()
    assert read_sidecar(directory / "best.pt")["best_val_loss"] == min(val_losses(more).values())


def test_what_a_killed_process_was_writing_is_removed(tmp_path):
    config = resolve({**SAVING, "resume": False, "root": str(tmp_path)})
    (tmp_path / NAME).mkdir()
    for name in (".last.pt.tmp17", ".step00000500.pt.tmp4711", ".last.pt.json.tmp17"):
        (tmp_path / NAME / name).write_bytes(b"half a checkpoint")
    chosen = run_directory(resolve({**SAVING, "resume": False, "if_exists": "resume", "root": str(tmp_path)}))
    with claimed(config, chosen):
        assert [path.name for path in (tmp_path / NAME).iterdir()] == [".lock"]
