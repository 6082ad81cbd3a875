"""Signals to whole runs, in every phase of one: what the first leaves behind, and how fast the second is.

Real processes and real signals; what a phase would do for long is replaced in the child by a wait of known length.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from forked_runs import NAME, reached, train_here, whole_steps, within
from test_trainer import assert_same_weights, losses, val_losses, weights

from oneb.checkpoints.rundir import previous_path, read_sidecar, whole_sidecar
from oneb.data import loader
from oneb.files import read_json_lines
from oneb.train import evaluate, trainer, writer
from oneb.train.stepper import Stepper

REPOSITORY = Path(__file__).parents[1]
# Where a run is when the signal comes: the steps it has done then, and whether that phase can be broken off.
PHASES = {
    "start": (0, False), "first step": (0, True), "step": (3, False), "update": (3, False), "analysis": (3, False),
    "data": (None, True), "evaluation": (5, True), "first step of a length": (6, True), "save": (None, False),
    "final evaluation": (12, True),
}


# ---- in the child

def run_with(phase: str, folder: str, seconds: float, command: list[str] | None = None, **given) -> int:
    """Train; in that phase leave a mark once, and take ``seconds``, or wait for ``command``."""
    mark = Path(folder) / "mark"

    def linger() -> None:
        if not mark.exists():
            mark.touch()
            if command:
                subprocess.run(command, check=True)
            else:
                until = time.monotonic() + seconds
                while time.monotonic() < until:
                    time.sleep(seconds / 10)

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
        before(loader, "gather", lambda *args: calls.append(1) or len(calls) == 8)
        loader._CLOSE_S = 0.2
    elif phase in ("evaluation", "final evaluation"):
        before(evaluate.Validation, "_loss", lambda *args: calls.append(1) or len(calls) == (done + 4) // 5)
    elif phase == "analysis":
        before(trainer, "analyse")
    elif phase == "update":
        before(Stepper, "train_step", lambda self, batch: _slow_update(self, linger) if self.step == done else False)
    elif phase == "save":
        before(writer, "save_checkpoint")
    else:
        before(Stepper, "_gradients", lambda self, batch: self.step == done)
    return train_here({"root": folder, **given})


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
    # A phase that can be broken off would take longer than the test waits.
    process = forked(run_with, phase=phase, folder=str(tmp_path), seconds=60 if breaks_off else 0.5)
    reached(process, tmp_path / "mark")
    time.sleep(0.1 if phase != "data" else 0.5)
    process.signal(signum)
    assert process.wait(10) == 128 + signum, process.told()
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


@pytest.mark.parametrize("phase", PHASES)
def test_the_second_signal_ends_the_process_at_once(forked, whole, tmp_path, phase):
    process = forked(run_with, phase=phase, folder=str(tmp_path), seconds=60, save_minutes=1e-9)
    reached(process, tmp_path / "mark")
    # Of a phase that the first one breaks off, the save that follows is what the second one meets, or nothing.
    process.signal(signal.SIGTERM)
    time.sleep(1.1)
    began = time.monotonic()
    if process.poll() is None:
        process.signal(signal.SIGINT)
    assert process.wait(2) == (143 if PHASES[phase][1] else 130)
    assert time.monotonic() - began < 2
    steps = whole_steps(tmp_path / NAME) if (tmp_path / NAME).exists() else {}
    assert steps or phase in ("start", "first step", "save")
    again = forked(train_here, given={"root": str(tmp_path), "if_exists": "resume"})
    assert again.wait() == 0, again.told()
    assert_equal_runs(whole, tmp_path / NAME)


@pytest.mark.parametrize("phase", ["first step of a length", "step"])
def test_a_signal_to_all_of_a_terminal_reaches_a_compiler_too(forked, whole, tmp_path, phase):
    process = forked(run_with, phase=phase, folder=str(tmp_path), seconds=0, command=["sleep", "60"])
    reached(process, tmp_path / "mark")
    time.sleep(0.2)
    process.signal_group(signal.SIGINT)
    assert process.wait(10) == 130, process.told()
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
        process = forked(run_with, phase=phase, folder=str(root), seconds=60)
        reached(process, root / "mark")
        done = PHASES[phase][0]
        # What is saved before it is written beside it.
        assert within(10, lambda: last_step(root / NAME) == done)  # noqa: B023
        process.signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        for _ in range(2):
            again = forked(train_here, given={"root": str(root), "if_exists": "resume"})
            assert again.wait() == 0, again.told()
        assert_equal_runs(whole, root / NAME)


@pytest.mark.parametrize("steps", [120, pytest.param(2000, marks=pytest.mark.slow)])
def test_signals_at_random_moments_one_after_another(forked, tmp_path, steps):
    given = {"steps": steps, "eval_every": 7, "phases": f"16@0,32@{steps // 2}", "if_exists": "resume"}
    patience = 60 + steps / 5  # seconds: busy machines make 30 steps in one
    assert forked(train_here, given={**given, "root": str(tmp_path / "whole")}).wait(patience) == 0
    chance, stops, code = random.Random(steps), 0, None
    while code != 0:
        process = forked(train_here, given={**given, "root": str(tmp_path / "cut")})
        time.sleep(chance.uniform(0.05, 0.6))
        process.signal(chance.choice([signal.SIGTERM, signal.SIGINT, signal.SIGHUP]))
        code = process.wait(20)
        stops += code > 128
        assert code in (0, 129, 130, 143, -1, -15, 70), process.told()  # 70: KeyboardInterrupt before the run
    assert stops >= 2
    assert_equal_runs(tmp_path / "whole" / NAME, tmp_path / "cut" / NAME)


def test_ctrl_c_while_torch_is_loaded_leaves_nothing(tmp_path):
    """In a process of its own; how it says so depends on how far it had come."""
    words = [sys.executable, "-m", "oneb.train", "--size", "nano", "--layers", "1", "--data", "demo", "--device", "cpu",
             "--steps", "100000", "--live", "off", "--run-root", str(tmp_path)]
    for seconds in (0.8, 1.8):
        process = subprocess.Popen(words, cwd=REPOSITORY, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                   env={**os.environ, "OMP_NUM_THREADS": "1"})
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=20)
        assert process.returncode in (130, -2), (seconds, process.returncode, told)
        assert "Traceback" not in told, (seconds, told)
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
        process = forked(train_here, given={**given, "if_exists": "resume"})
        before = last_step(here)
        within(20, lambda: process.poll() is not None or last_step(here) > before)  # noqa: B023
        time.sleep(chance.uniform(0, 0.1))
        if process.poll() is None:
            process.signal(signal.SIGKILL)
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
        (tmp_path / "mark").unlink(missing_ok=True)
        process = forked(run_with, phase=done, folder=str(tmp_path), seconds=2, if_exists="resume")
        reached(process, tmp_path / "mark")
        time.sleep(0.3)
        process.signal(signal.SIGTERM)
        assert process.wait(10) == 143, process.told()
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
