"""Runs that go wrong and go back: gradients and losses that some of the data makes bad, in whole runs at nano size.

What is bad depends on the data alone (the offset of a step's first sequence), so passing over it is the cure.
"""

import json
import math
import signal
from pathlib import Path

import pytest
import torch
from forked_runs import NAME, PATIENCE_S, TINY, reached, train_here, whole_steps, within
from test_trainer import assert_same_weights, losses, weights

from oneb.checkpoints.checkpoint import load_checkpoint
from oneb.errors import OnebError
from oneb.files import read_json_lines
from oneb.presets import resolve
from oneb.train import saving, watch
from oneb.train.run import train
from oneb.train.stepper import Stepper
from oneb.train.trainer import Diverged, Trainer

# One length, files to go back to, and a watch that needs tens of steps and not hundreds.
LONG = {"phases": "16@0", "steps": 60, "eval_every": 0, "analysis_every": 0, "save_every": 10, "warmup_steps": 2}
QUICK = {"WINDOW_STEPS": 16, "MIN_READINGS": 8, "SPIKE_STEPS": 4, "LEAD_STEPS": 3}


# ---- in the child

def poison(kind: str, bad: list[int]) -> None:
    """From now on in this process, steps that read these offsets have NaN gradients, a NaN loss or a high one."""
    plain = Stepper._gradients

    def gradients(self, batch):
        offset = int(self.order.offsets(self.step)[0])
        if offset not in bad:
            return plain(self, batch)
        total, norm = plain(self, batch)
        if kind == "gradient":
            return total, norm * math.nan
        if kind == "loss":
            return total * math.nan, norm + 0 * total * math.nan
        return total + 30.0, norm

    Stepper._gradients = gradients


def train_with(kind: str, bad: list[int], quick: bool = False, mark: str = "", **given) -> int:
    """Train with :func:`poison`; with ``mark`` make that file once the run has gone back, and wait to be killed."""
    poison(kind, bad)
    for name, value in QUICK.items() if quick else ():
        setattr(watch, name, value)
    if mark:
        _linger_after_rollback(Path(mark))
    return train_here({**LONG, **given})


def _linger_after_rollback(mark: Path) -> None:
    plain = Trainer._go_back

    def go_back(self, verdict):
        plain(self, verdict)
        mark.touch()
        within(2 * PATIENCE_S, lambda: self.stop.signum)

    Trainer._go_back = go_back


# ---- the tests

def offsets_of(steps, **given) -> list[int]:
    """Where the first sequences of these steps of an undisturbed run start."""
    from oneb.train.setup import build

    parts = build(resolve({**TINY, **LONG, **given}), lambda text: None)
    return [int(parts.order.offsets(step)[0]) for step in steps]


@pytest.fixture(scope="module")
def bad() -> list[int]:
    """The data of steps 33 to 45, counted from 0."""
    return offsets_of(range(33, 46))


def rows_of(root: Path) -> list[dict]:
    return read_json_lines(root / NAME / "train.jsonl")


def events(rows, name) -> list[dict]:
    return [row for row in rows if row.get("event") == name]


def assert_each_step_once(root: Path, steps: int = 60) -> None:
    assert [row["step"] for row in rows_of(root) if row["type"] == "train"] == list(range(1, steps + 1))


@pytest.fixture(scope="module")
def rolled_back(forked, tmp_path_factory, bad) -> Path:
    """A run whose gradients are NaN from its 34th step on; it goes back to step 10 once."""
    root = tmp_path_factory.mktemp("rolled")
    process = forked(train_with, kind="gradient", bad=bad, root=str(root))
    assert process.wait() == 0, process.told()
    return root


def test_gradients_that_stay_nan_take_the_run_back_past_their_data(rolled_back, bad, forked, tmp_path):
    rows = rows_of(rolled_back)
    [event] = events(rows, "rollback")
    # 10 in a row were skipped; the 20 steps before them are suspected as well.
    assert (event["first_step"], event["last_step"]) == (33 - watch.LEAD_STEPS, 33 + watch.SKIP_STEPS - 1)
    assert (event["step"], event["checkpoint"]) == (10, "step00000010.pt")
    assert_each_step_once(rolled_back)
    cut = read_json_lines(rolled_back / NAME / "train.cut-1.jsonl")
    assert [row["step"] for row in cut if row["type"] == "train"] == list(range(11, 44))
    assert len([row for row in cut if row.get("event") == "warning" and "was skipped" in row["message"]]) == 10
    assert load_checkpoint(rolled_back / NAME / "last.pt")["skips"] == [[13, 30]]
    # Up to the first suspect it is the run without poison, and from there on one that reads what follows later.
    assert forked(train_here, given={**LONG, "root": str(tmp_path)}).wait() == 0
    plain = losses(rows_of(tmp_path))
    found = losses(rows)
    assert {step: found[step] for step in range(1, 14)} == {step: plain[step] for step in range(1, 14)}
    assert found[14] != plain[14]
    assert found[60] < 5.0
    # The data of step 43 + n is read at step 13 + n: three of the poisoned batches, which do no lasting harm.
    late = [row["step"] for row in events(rows, "warning") if "was skipped" in row["message"]]
    assert late == [14, 15, 16]


def test_a_run_that_went_back_continues_with_the_data_that_it_would_have_read(rolled_back, forked, tmp_path, bad):
    given = {"kind": "gradient", "bad": bad, "root": str(tmp_path), "if_exists": "resume"}
    for steps in (30, 60):
        process = forked(train_with, **given, steps=steps, mark="" if steps == 60 else str(tmp_path / "mark"))
        if steps == 30:  # ends before it goes wrong
            assert process.wait() == 0, process.told()
    assert process.wait() == 0, process.told()
    # The first part saved its last step as last.pt, too.
    assert losses(rows_of(tmp_path)) == losses(rows_of(rolled_back))
    assert_same_weights(weights(tmp_path / NAME), weights(rolled_back / NAME))
    assert_each_step_once(tmp_path)
    for _ in range(2):  # it is finished
        assert forked(train_with, **given).wait() == 0


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_ends_right_after_it_went_back_is_the_same(rolled_back, forked, tmp_path, bad, ending):
    # last.pt is of a later step than that which the run goes back to.
    given = {"kind": "gradient", "bad": bad, "root": str(tmp_path), "if_exists": "resume"}
    process = forked(train_with, **given, mark=str(tmp_path / "mark"))
    reached(process, tmp_path / "mark")
    process.signal(ending)
    assert process.wait() == (143 if ending == signal.SIGTERM else -9), process.told()
    if ending == signal.SIGTERM:
        assert whole_steps(tmp_path / NAME)["last.pt"] == 10
        assert load_checkpoint(tmp_path / NAME / "last.pt")["skips"] == [[13, 30]]
    process = forked(train_with, **given)
    assert process.wait() == 0, process.told()
    assert losses(rows_of(tmp_path)) == losses(rows_of(rolled_back))
    assert_same_weights(weights(tmp_path / NAME), weights(rolled_back / NAME))
    assert_each_step_once(tmp_path)


def test_a_spike_takes_the_run_back_and_passes_with_other_data(forked, tmp_path):
    bad = offsets_of(range(35, 39))
    process = forked(train_with, kind="spike", bad=bad, quick=True, root=str(tmp_path))
    assert process.wait() == 0, process.told()
    rows = rows_of(tmp_path)
    [event] = events(rows, "rollback")
    assert event["last_step"] == 38
    assert event["first_step"] in range(29, 33)
    assert event["step"] in (20, 30)
    assert event["step"] <= event["first_step"]
    assert "rose at step" in event["message"]
    assert_each_step_once(tmp_path)
    assert max(losses(rows).values()) < 7  # the spike is in the cut rows
    cut = read_json_lines(tmp_path / NAME / "train.cut-1.jsonl")
    assert max(losses(cut)) == 39
    assert load_checkpoint(tmp_path / NAME / "last.pt")["skips"] == [[event["first_step"], 39 - event["first_step"]]]


def test_a_single_odd_batch_is_no_reason_to_go_back(forked, tmp_path):
    process = forked(train_with, kind="loss", bad=offsets_of([35]), root=str(tmp_path))
    assert process.wait() == 0, process.told()
    rows = rows_of(tmp_path)
    assert not events(rows, "rollback")
    [warning] = [row for row in events(rows, "warning") if "was skipped" in row["message"]]
    assert warning["step"] == 36
    # A loss that is not finite is enough for a skip, whatever the gradients are.
    by_step = {row["step"]: row for row in rows if row["type"] == "train"}
    assert by_step[36]["loss"] is None
    assert (by_step[35]["skipped"], by_step[36]["skipped"], by_step[60]["skipped"]) == (0, 1, 1)
    assert all(torch.isfinite(tensor).all() for tensor in weights(tmp_path / NAME).values())


def test_data_that_stays_bad_ends_the_run_with_what_is_good(forked, tmp_path):
    """NaN from step 33 on, whatever is read instead."""
    bad = offsets_of(range(33, 400))
    process = forked(train_with, kind="gradient", bad=bad, root=str(tmp_path), max_rollbacks=2)
    assert process.wait() == 2, process.told()
    assert "gone back 2 times (--max-rollbacks 2)" in process.told()
    for flag in ("--lr", "--warmup-steps", "--grad-clip"):
        assert flag in process.told()
    assert "Traceback" not in process.told()
    steps = whole_steps(tmp_path / NAME)
    assert steps["last.pt"] <= 33
    for path in (tmp_path / NAME).glob("*.pt"):
        assert all(torch.isfinite(tensor).all() for tensor in load_checkpoint(path)["model"].values()), path
    assert "--max-rollbacks" in (tmp_path / NAME / "train.jsonl").read_text()


def test_none_allowed_is_none_made(forked, tmp_path, bad):
    process = forked(train_with, kind="gradient", bad=bad, root=str(tmp_path), max_rollbacks=0)
    assert process.wait() == 2, process.told()
    assert not events(rows_of(tmp_path), "rollback")
    assert whole_steps(tmp_path / NAME)["last.pt"] == 30


def test_without_a_checkpoint_from_before_the_run_says_so(forked, tmp_path):
    process = forked(train_with, kind="gradient", bad=offsets_of(range(5, 40)), root=str(tmp_path), save_every=0)
    assert process.wait() == 2, process.told()
    assert "no checkpoint from before" in process.told()
    assert not list((tmp_path / NAME).glob("*.pt"))


def test_what_goes_wrong_in_the_last_steps_counts_as_well(forked, tmp_path):
    """The verdict comes with the very last step."""
    process = forked(train_with, kind="gradient", bad=offsets_of(range(50, 60)), root=str(tmp_path))
    assert process.wait() == 0, process.told()
    assert len(events(rows_of(tmp_path), "rollback")) == 1
    assert_each_step_once(tmp_path)
    assert whole_steps(tmp_path / NAME)["last.pt"] == 60


def test_a_damaged_checkpoint_is_passed_over_on_the_way_back(forked, tmp_path, bad):
    process = forked(train_with, kind="gradient", bad=bad, root=str(tmp_path), steps=30)
    assert process.wait() == 0, process.told()
    damaged = tmp_path / NAME / "step00000010.pt"
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    process = forked(train_with, kind="gradient", bad=bad, root=str(tmp_path), resume=True)
    assert process.wait() == 0, process.told()
    [event] = events(rows_of(tmp_path), "rollback")
    assert event["step"] == 30  # there is none before the first suspect, but one from before the first NaN
    assert "step00000010.pt is damaged" in process.told()
    assert_each_step_once(tmp_path)


def test_a_stop_during_a_spike_keeps_the_checkpoint_from_before_it(forked, tmp_path):
    """Else the run that continues would have nothing left to go back to."""
    bad = offsets_of(range(35, 39))
    given = {"kind": "spike", "bad": bad, "quick": True, "root": str(tmp_path), "save_every": 0, "save_minutes": 1e-9,
             "if_exists": "resume"}
    process = forked(stop_at, step=37, **given)
    assert process.wait() == 143, process.told()
    process = forked(train_with, **given)
    assert process.wait() == 0, process.told()
    assert len(events(rows_of(tmp_path), "rollback")) == 1
    assert_each_step_once(tmp_path)


def stop_at(step: int, **given) -> int:
    """Train, with a SIGTERM once that step is done."""
    plain = Trainer._next_step

    def next_step(self, loader):
        plain(self, loader)
        if self.step == step:
            signal.raise_signal(signal.SIGTERM)

    Trainer._next_step = next_step
    return train_with(**given)


# ---- weights that are not finite

@pytest.mark.parametrize("given", [{}, {"save_every": 1}, {"save_minutes": 1e-9, "eval_every": 2}])
def test_weights_that_are_not_finite_are_never_saved(tmp_path, monkeypatch, given):
    monkeypatch.setattr(saving, "_FINAL_RETRY_S", 0.0)
    plain = Stepper.train_step

    def train_step(self, batch):
        result = plain(self, batch)
        if self.step == 7:
            next(self.parts.model.parameters()).data.view(-1)[5] = math.nan
        return result

    monkeypatch.setattr(Stepper, "train_step", train_step)
    config = resolve({**TINY, "root": str(tmp_path), **given})
    with pytest.raises((OnebError, Diverged), match="not finite"):
        train(config)
    for name, step in whole_steps(tmp_path / NAME).items():
        assert step <= 7, name
        assert all(torch.isfinite(tensor).all() for tensor in weights(tmp_path / NAME, name).values()), name
    best = tmp_path / NAME / "best.pt"
    assert not best.exists() or json.loads((tmp_path / NAME / "best.pt.json").read_text())["step"] <= 7
