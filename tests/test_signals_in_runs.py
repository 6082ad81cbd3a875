"""Signals to whole runs, in every phase of one: what the first leaves behind, and how fast the second is.

Real processes and real signals; what a phase would do for long is replaced in the child by a wait of known length.
"""

import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from forked_runs import NAME, PATIENCE_S, reached, train_here, whole_steps, within
from test_trainer import assert_same_weights, losses, val_losses, weights

from oneb.checkpoints.rundir import previous_path, read_sidecar, whole_sidecar
from oneb.data import loader
from oneb.files import read_json_lines
from oneb.train import evaluate, signals, trainer, writer
from oneb.train.stepper import Stepper

REPOSITORY = Path(__file__).parents[1]
# Where a run is when the signal comes: the steps it has done then, and whether that phase can be broken off.
PHASES = {
    "start": (0, False), "first step": (0, True), "step": (3, False), "update": (3, False), "analysis": (3, False),
    "data": (3, True), "evaluation": (5, True), "first step of a length": (6, True), "save": (None, False),
    "last save": (12, False), "final evaluation": (12, True),
}
HANGS_S = 600.0  # longer than any test waits


# ---- in the child

def run_with(phase: str, folder: str, command: list[str] | None = None, **given) -> int:
    """Train; in that phase make the file ``mark`` once, and wait for the file ``go``, or for ``command``.

    A second signal counts from when there is a file ``heard``.
    """
    mark, go = Path(folder) / "mark", Path(folder) / "go"

    def linger() -> None:
        if not mark.exists():
            mark.touch()
            if command:
                subprocess.run(command, check=True)
            else:
                within(HANGS_S, go.exists)

    def before(owner, name: str, when=lambda *args: True) -> None:
        plain = getattr(owner, name)

        def slow(*args, **kwargs):
            if when(*args):
                linger()
            return plain(*args, **kwargs)

        setattr(owner, name, slow)

    calls = []
    done = PHASES[phase][0]
    if phase == "start":
        before(trainer.Trainer, "describe")
    elif phase == "data":
        reading = "oneb-batch-loader"  # and no evaluation
        before(loader, "gather", lambda *args: threading.current_thread().name == reading and len(calls) == done
               or calls.append(1))
        loader._CLOSE_S = 0.2
    elif phase in ("evaluation", "final evaluation"):
        before(evaluate.Validation, "_loss", lambda *args: calls.append(1) or len(calls) == (done + 4) // 5)
    elif phase == "analysis":
        before(trainer, "analyse")
    elif phase == "update":
        before(Stepper, "train_step", lambda self, batch: _slow_update(self, linger) if self.step == done else False)
    elif phase == "save":
        before(writer, "save_checkpoint")
    elif phase == "last save":
        before(writer, "save_checkpoint", lambda path, contents: contents["step"] == done)
    else:
        before(Stepper, "_gradients", lambda self, batch: self.step == done)
    _tell_when_heard(Path(folder) / "heard")
    return train_here({"root": folder, **given})


def _tell_when_heard(heard: Path) -> None:
    def monotonic() -> float:
        now = time.monotonic()
        heard.touch()
        return now

    signals.time, signals._SAME_REQUEST_S = SimpleNamespace(monotonic=monotonic), 0.0


def run_until_signalled(after: int, seconds: float, signum: int, **given) -> int:
    """Train; this process sends itself a signal ``seconds`` after its ``after``-th step, and makes but three more.

    Whoever waited for the step and then sent the signal could be too late, the run having ended.
    """
    plain, number, reached_it = trainer.Trainer._next_step, itertools.count(1), threading.Event()

    def next_step(self, batches) -> None:
        plain(self, batches)
        made = next(number)
        if made == after:
            reached_it.set()
        if made == after + 3:
            within(HANGS_S, lambda: self.stop.signum)

    def send() -> None:
        reached_it.wait()
        time.sleep(seconds)
        os.kill(os.getpid(), signum)

    trainer.Trainer._next_step = next_step
    if after == 0:
        reached_it.set()
    threading.Thread(target=send, daemon=True).start()
    return train_here(given)


def _slow_update(self, linger) -> bool:
    plain = self.parts.optimizer.step

    def slow(*args):
        result = plain(*args)
        linger()
        return result

    self.parts.optimizer.step = slow
    return False


# ---- the tests

@pytest.fixture(scope="module")
def whole(forked, tmp_path_factory) -> Path:
    """The same run, undisturbed."""
    root = tmp_path_factory.mktemp("whole")
    assert forked(train_here, given={"root": str(root)}).wait() == 0
    return root / NAME


def assert_equal_runs(whole: Path, cut: Path) -> None:
    """The same numbers, each once, and the same weights."""
    a, b = read_json_lines(whole / "train.jsonl"), read_json_lines(cut / "train.jsonl")
    assert losses(a) == losses(b)
    assert val_losses(a) == val_losses(b)
    for kind in ("train", "eval", "analysis"):
        assert [row["step"] for row in a if row["type"] == kind] == [row["step"] for row in b if row["type"] == kind]
    assert_same_weights(weights(whole), weights(cut))
    assert not list(cut.glob(".*.tmp*"))


@pytest.mark.parametrize(("phase", "signum"), [
    pytest.param(phase, signum, id=f"{phase}-{signum.name}", marks=[pytest.mark.slow] * ((number + which) % 2))
    for number, phase in enumerate(PHASES) for which, signum in enumerate((signal.SIGTERM, signal.SIGINT))
])
def test_the_first_signal_saves_the_step_reached_and_the_run_continues(forked, whole, tmp_path, phase, signum):
    done, breaks_off = PHASES[phase]
    process = forked(run_with, phase=phase, folder=str(tmp_path))
    reached(process, tmp_path / "mark")
    if phase == "data":  # the steps before that are done, then it waits for this one's
        assert within(PATIENCE_S, lambda: f'"step": {done},' in (tmp_path / NAME / "train.jsonl").read_text())
        time.sleep(0.1)
    process.signal(signum)
    if not breaks_off:  # else that phase would take longer than the test waits
        (tmp_path / "go").touch()
    assert process.wait() == 128 + signum, process.told()
    rows = read_json_lines(tmp_path / NAME / "train.jsonl")
    if done is None:
        done = max(losses(rows))
    elif phase in ("step", "update", "analysis"):
        done += 1  # that step was ended
    assert max(losses(rows), default=0) == done
    assert whole_steps(tmp_path / NAME).get("last.pt", 0) == done
    if done:
        assert rows[-1 if done < 12 else -2].get("event") in ("stopped", "checkpoint")
        assert "--resume" in process.told()
    again = forked(train_here, given={"root": str(tmp_path), "if_exists": "resume"})
    assert again.wait() == 0, again.told()
    assert_equal_runs(whole, tmp_path / NAME)


@pytest.mark.parametrize("phase", [phase for phase, (_, breaks_off) in PHASES.items() if not breaks_off])
def test_the_second_signal_ends_the_process_at_once(forked, whole, tmp_path, phase):
    """In the middle of what the first one lets come to its end, which here would be longer than the test waits."""
    process = forked(run_with, phase=phase, folder=str(tmp_path), save_minutes=1e-9)
    reached(process, tmp_path / "mark")
    assert phase in ("start", "save") or within(PATIENCE_S, lambda: last_step(tmp_path / NAME))
    process.signal(signal.SIGTERM)
    reached(process, tmp_path / "heard")
    process.signal(signal.SIGINT)
    assert process.wait() == 130, process.told()
    last = tmp_path / NAME / "last.pt"  # or what it was, for the moment in which the next one takes its place
    assert phase in ("start", "save") or any(map(whole_sidecar, (last, previous_path(last))))
    again = forked(train_here, given={"root": str(tmp_path), "if_exists": "resume"})
    assert again.wait() == 0, again.told()
    assert_equal_runs(whole, tmp_path / NAME)


@pytest.mark.parametrize("phase", ["first step of a length", "step"])
def test_a_signal_to_all_of_a_terminal_reaches_a_compiler_too(forked, whole, tmp_path, phase):
    compiles = tmp_path / "compiles"
    process = forked(run_with, phase=phase, folder=str(tmp_path),
                     command=["sh", "-c", f"touch '{compiles}'; exec sleep {HANGS_S:.0f}"])
    reached(process, compiles)
    process.signal_group(signal.SIGINT)
    assert process.wait() == 130, process.told()
    done = PHASES[phase][0]
    assert whole_steps(tmp_path / NAME) == {"last.pt": done}
    if phase == "step":
        assert "while stopping: CalledProcessError" in (tmp_path / NAME / "train.jsonl").read_text()
    assert forked(train_here, given={"root": str(tmp_path), "if_exists": "resume"}).wait() == 0
    assert_equal_runs(whole, tmp_path / NAME)


def test_an_evaluation_that_kill_9_broke_off_is_made_up_for(forked, whole, tmp_path):
    for phase in ("evaluation", "final evaluation"):
        root = tmp_path / phase
        root.mkdir()
        process = forked(run_with, phase=phase, folder=str(root))
        reached(process, root / "mark")
        done = PHASES[phase][0]
        # What is saved before it is written beside it.
        assert within(PATIENCE_S, lambda: last_step(root / NAME) == done)  # noqa: B023
        process.signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        for _ in range(2):
            again = forked(train_here, given={"root": str(root), "if_exists": "resume"})
            assert again.wait() == 0, again.told()
        assert_equal_runs(whole, root / NAME)


@pytest.mark.parametrize("steps", [120, pytest.param(2000, marks=pytest.mark.slow)])
def test_signals_at_random_moments_one_after_another(forked, tmp_path, steps):
    given = {"steps": steps, "eval_every": 7, "phases": f"16@0,32@{steps // 2}", "if_exists": "resume"}
    assert forked(train_here, given={**given, "root": str(tmp_path / "whole")}).wait(PATIENCE_S + steps / 5) == 0
    chance, stops, code = random.Random(steps), 0, None
    while code != 0:
        after = max(0, chance.randrange(-8, 32))
        process = forked(run_until_signalled, after=after, seconds=chance.uniform(0, 0.1 if after else 0.6),
                         signum=chance.choice([signal.SIGTERM, signal.SIGINT, signal.SIGHUP]),
                         **given, root=str(tmp_path / "cut"))
        code = process.wait()
        stops += code > 128
        # Before the run and after it: the system's own answers, or KeyboardInterrupt.
        assert code in (0, 129, 130, 143, -1, -2, -15, 70), process.told()
    assert stops >= 2
    assert_equal_runs(tmp_path / "whole" / NAME, tmp_path / "cut" / NAME)


def test_ctrl_c_while_torch_is_loaded_leaves_nothing(tmp_path):
    """In a process of its own; how it says so depends on how far it had come."""
    words = [sys.executable, "-X", "importtime", "-m", "oneb.train", "--size", "nano", "--layers", "1",
             "--data", "demo", "--device", "cpu", "--steps", "100000", "--live", "off", "--run-root", str(tmp_path)]
    for module in ("torch._C", "torch"):  # in the middle of torch, and of what comes after it
        process = subprocess.Popen(words, cwd=REPOSITORY, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                   env={**os.environ, "OMP_NUM_THREADS": "1"})
        for line in process.stderr:
            if line.split("|")[-1].strip() == module:
                break
        time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=PATIENCE_S)
        assert process.returncode in (130, -2), (module, process.returncode, told)
        assert "Traceback" not in told, (module, told)
    for path in tmp_path.glob("*/*.pt"):
        assert read_sidecar(path)


def last_step(directory: Path) -> int:
    found = whole_sidecar(directory / "last.pt")
    return found["step"] if found else 0


@pytest.mark.parametrize("kills", [6, pytest.param(60, marks=pytest.mark.slow)])
def test_kill_9_with_a_second_place_and_a_new_best_at_every_evaluation(forked, tmp_path, kills):
    steps = 10 * kills
    given = {"eval_every": 2, "save_minutes": 1e-9, "save_every": 7, "steps": steps, "phases": f"16@0,32@{steps // 2}"}
    assert forked(train_here, given={**given, "root": str(tmp_path / "whole")}).wait() == 0
    given |= {"root": str(tmp_path / "cut"), "save_to": str(tmp_path / "drive")}
    chance, here, killed = random.Random(kills), tmp_path / "cut" / NAME, 0
    (tmp_path / "drive").mkdir()
    for _ in range(kills):
        process = forked(run_until_signalled, after=chance.randrange(1, 8), seconds=chance.uniform(0, 0.1),
                         signum=signal.SIGKILL, **given, if_exists="resume")
        assert process.wait() in (0, -signal.SIGKILL), process.told()
        killed += process.wait() != 0
        best = here / "best.pt"
        if best.exists():  # the best so far, under one of its two names
            assert any(map(whole_sidecar, (best, previous_path(best))))
    assert forked(train_here, given={**given, "if_exists": "resume"}).wait() == 0
    assert killed > kills / 2
    assert_equal_runs(tmp_path / "whole" / NAME, here)
    assert whole_steps(here)["last.pt"] == steps
    assert read_sidecar(here / "best.pt")["step"] == read_sidecar(tmp_path / "whole" / NAME / "best.pt")["step"]
    # On a new machine: nothing is there but the second place.
    shutil.rmtree(tmp_path / "cut")
    given |= {"steps": steps + 4, "if_exists": "resume"}
    for where in ({"root": str(tmp_path / "whole"), "save_to": None}, {}):
        process = forked(train_here, given={**given, **where})
        assert process.wait() == 0, process.told()
    assert_same_weights(weights(tmp_path / "whole" / NAME), weights(here))


# ---- several resumes, and clocks

def test_three_resumes_in_a_row_are_the_undisturbed_run(forked, whole, tmp_path):
    """Cut in the first phase, on its boundary, and in the second one."""
    for done in ("step", "first step of a length", "data"):
        for name in ("mark", "go"):
            (tmp_path / name).unlink(missing_ok=True)
        process = forked(run_with, phase=done, folder=str(tmp_path), if_exists="resume")
        reached(process, tmp_path / "mark")
        process.signal(signal.SIGTERM)
        if not PHASES[done][1]:
            (tmp_path / "go").touch()
        assert process.wait() == 143, process.told()
    assert forked(train_here, given={"root": str(tmp_path), "resume": True}).wait() == 0
    rows = read_json_lines(tmp_path / NAME / "train.jsonl")
    assert len([row for row in rows if row.get("event") == "resume"]) == 3
    assert_equal_runs(whole, tmp_path / NAME)


def run_with_jumping_clock(folder: str, seed: int, **given) -> int:
    """Train, with a wall clock that is set to another day whenever somebody looks."""
    plain, chance = time.time, random.Random(seed)
    time.time = lambda: plain() + chance.uniform(-30, 30) * 86400
    return train_here({"root": folder, **given})


def test_a_wall_clock_that_jumps_neither_saves_nor_keeps_from_saving(forked, whole, tmp_path):
    for seed, minutes in ((1, 15.0), (2, 1e-9)):
        root = tmp_path / str(seed)
        process = forked(run_with_jumping_clock, folder=str(root), seed=seed, save_minutes=minutes)
        assert process.wait() == 0, process.told()
        assert_equal_runs(whole, root / NAME)
        rows = read_json_lines(root / NAME / "train.jsonl")
        saved = {row["step"] for row in rows if row.get("event") == "checkpoint"}
        if minutes > 1:
            assert saved <= {5, 10, 12}  # those before evaluations, and the last
        else:
            assert saved > {12}
