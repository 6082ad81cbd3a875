"""Runs whose disk fills up, becomes read-only, or loses the run directory, in the middle of training."""

import errno
import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from forked_runs import NAME, PATIENCE_S, reached, train_here, whole_steps, within
from small_disk import fill
from test_trainer import assert_same_weights, losses, val_losses, weights

from oneb.files import read_json_lines
from oneb.train import saving
from oneb.train.trainer import Trainer

SAVING = {"phases": "16@0", "steps": 40, "save_every": 5, "keep_last": 2, "eval_every": 10}
DISK_BYTES = 16 * 2**20  # a checkpoint has 1.7 MB


# ---- in the child

def at_steps(actions) -> None:
    """From now on in this process, call ``actions[step]`` once so many steps are done; their saves have ended."""
    plain = Trainer._next_step

    def next_step(self, loader):
        plain(self, loader)
        self.saver.flush()  # after each: none is left out since another is under way
        if action := actions.get(self.step):
            action()

    Trainer._next_step = next_step


def train_on_full_disk(root: str, look: str, until: int, room_is_known: bool = True, **given) -> int:
    """Train; the disk is full from step 12 to ``until``, before which ``look`` gets the names of the run's files."""
    saving._RETRY_S = saving._FINAL_RETRY_S = 0.0
    if not room_is_known:  # quotas, network drives
        saving.room_for = lambda path, n_bytes: None
    large = []
    at_steps({
        12: lambda: large.append(fill(Path(root))),
        until - 1: lambda: Path(look).write_text(json.dumps(os.listdir(Path(root) / NAME))),
        until: lambda: large[0].unlink(),
    })
    return train_here({**SAVING, "root": root, **given})


def train_with_break(root: str, mark: str, breaks: tuple[int, ...] = (12,), **given) -> int:
    """Train; at these steps make ``mark`` and go on once it is gone."""
    saving._RETRY_S = saving._FINAL_RETRY_S = 0.0

    def wait() -> None:
        Path(mark).touch()
        assert within(2 * PATIENCE_S, lambda: not Path(mark).exists())

    at_steps(dict.fromkeys(breaks, wait))
    return train_here({**SAVING, "root": root, **given})


def train_with_torn_save(root: str, **given) -> int:
    """Train; the disk fails with EIO in the middle of every file that is written at steps 10 and 20."""
    from oneb.checkpoints import checkpoint

    saving._RETRY_S = saving._FINAL_RETRY_S = 0.0
    failing, plain = [], checkpoint._HashingFile.write

    def write(self, data):
        if failing and self._file.tell() > 300_000:
            self.error = self.error or OSError(errno.EIO, os.strerror(errno.EIO))
        return plain(self, data)

    checkpoint._HashingFile.write = write
    at_steps({9: lambda: failing.append(1), 11: failing.clear, 19: lambda: failing.append(1), 22: failing.clear})
    return train_here({**SAVING, "root": root, **given})


# ---- the tests

@pytest.fixture(scope="module")
def whole(forked, tmp_path_factory) -> Path:
    """The same run, undisturbed."""
    root = tmp_path_factory.mktemp("whole")
    assert forked(train_here, given={**SAVING, "root": str(root)}).wait() == 0
    return root / NAME


def assert_equal_runs(whole: Path, other: Path) -> None:
    a, b = read_json_lines(whole / "train.jsonl"), read_json_lines(other / "train.jsonl")
    assert losses(a) == losses(b)
    assert val_losses(a) == val_losses(b)
    assert [row["step"] for row in b if row["type"] == "train"] == list(range(1, 41))
    assert_same_weights(weights(whole), weights(other))
    assert not list(other.glob(".*.tmp*"))


def messages(directory: Path, event: str) -> list[str]:
    return [row["message"] for row in read_json_lines(directory / "train.jsonl") if row.get("event") == event]


@pytest.mark.parametrize("room_is_known", [True, False])
def test_a_disk_that_is_full_for_a_while_costs_saves_and_nothing_else(forked, whole, disk, tmp_path, room_is_known):
    root = disk(DISK_BYTES)
    process = forked(train_on_full_disk, root=str(root), look=str(tmp_path / "look"), until=23,
                     room_is_known=room_is_known)
    assert process.wait() == 0, process.told()
    during = json.loads((tmp_path / "look").read_text())
    assert not [name for name in during if ".tmp" in name]
    assert {"step00000010.pt", "last.pt", "last.pt.json"} <= set(during)
    warned = messages(root / NAME, "warning")
    failed = [text for text in warned if "could not be saved" in text]
    assert any("step00000015.pt of step 15" in text and "step 10 is kept" in text for text in failed)
    assert len(failed) > 2  # it was tried again
    assert all(("needed" if room_is_known else "No space left") in text for text in failed)
    assert len([text for text in warned if "rows are kept in memory" in text]) == 1
    assert len([text for text in warned if "can be written again" in text]) == 1
    saved = [text.split()[1] for text in messages(root / NAME, "checkpoint")]
    assert saved[:2] == ["step00000005.pt", "step00000010.pt"]
    assert {"step00000025.pt", "step00000040.pt"} <= set(saved)
    assert whole_steps(root / NAME) == {"last.pt": 40, "step00000035.pt": 35, "step00000040.pt": 40}
    assert_equal_runs(whole, root / NAME)


@pytest.mark.parametrize("signum", [None, signal.SIGTERM])
def test_a_last_save_that_finds_no_room_is_a_failure_that_says_what_is_kept(forked, whole, disk, tmp_path, signum):
    root = disk(DISK_BYTES)
    given = {"root": str(root), "mark": str(tmp_path / "mark"), "if_exists": "resume"}
    process = forked(train_with_break, **given)
    reached(process, tmp_path / "mark")
    large = fill(root)
    if signum:
        process.signal(signum)
    (tmp_path / "mark").unlink()
    assert process.wait() == 2, process.told()
    told = process.told()
    assert f"error: step {12 if signum else 40} could not be saved to {root / NAME}" in told
    assert "step 10 is kept" in told
    assert "make room there" in told
    assert "Traceback" not in told
    assert not list((root / NAME).glob(".*.tmp*"))
    assert whole_steps(root / NAME)["last.pt"] == 10
    large.unlink()
    again = forked(train_here, given={**SAVING, "root": str(root), "resume": True})
    assert again.wait() == 0, again.told()
    assert_equal_runs(whole, root / NAME)


def test_a_disk_that_becomes_read_only(forked, whole, disk, tmp_path):
    """By a mount over the run directory: what is opened from then on is refused, as after an error of the disk."""
    root = disk(DISK_BYTES)
    given = {"root": str(root), "mark": str(tmp_path / "mark")}
    process = forked(train_with_break, **given)
    reached(process, tmp_path / "mark")
    for words in (["--bind", str(root / NAME)], ["-o", "remount,bind,ro"]):
        subprocess.run(["mount", *words, str(root / NAME)], check=True)
    try:
        (tmp_path / "mark").unlink()
        assert process.wait() == 2, process.told()
        told = process.told()
        assert "read-only" in told
        assert "step 10 is kept" in told
        assert "Traceback" not in told
        assert whole_steps(root / NAME)["last.pt"] == 10
        refused = forked(train_here, given={**SAVING, "root": str(root), "resume": True})
        assert refused.wait() == 2
        assert "read-only" in refused.told().lower()
    finally:
        subprocess.run(["umount", str(root / NAME)], check=True)
    again = forked(train_here, given={**SAVING, "root": str(root), "resume": True})
    assert again.wait() == 0, again.told()
    assert_equal_runs(whole, root / NAME)


@pytest.mark.parametrize("how", ["deleted", "moved away"])
def test_a_run_directory_that_goes_away_ends_the_run_with_an_error(forked, whole, tmp_path, how):
    process = forked(train_with_break, root=str(tmp_path / "runs"), mark=str(tmp_path / "mark"))
    reached(process, tmp_path / "mark")
    if how == "deleted":
        shutil.rmtree(tmp_path / "runs" / NAME)
    else:
        (tmp_path / "runs" / NAME).rename(tmp_path / "elsewhere")
    (tmp_path / "mark").unlink()
    code, told = process.wait(), process.told()
    assert code == 2, told
    assert "Traceback" not in told
    assert f"step 40 could not be saved to {tmp_path / 'runs' / NAME}" in told
    assert "nothing of the run is saved" in told
    if how == "moved away":
        assert whole_steps(tmp_path / "elsewhere")["last.pt"] == 10
        (tmp_path / "elsewhere").rename(tmp_path / "runs" / NAME)
        again = forked(train_here, given={**SAVING, "root": str(tmp_path / "runs"), "resume": True})
        assert again.wait() == 0, again.told()
        assert_equal_runs(whole, tmp_path / "runs" / NAME)


def test_a_run_directory_that_is_away_for_a_while_costs_saves_and_nothing_else(forked, whole, tmp_path):
    mark, here, away = tmp_path / "mark", tmp_path / "runs" / NAME, tmp_path / "elsewhere"
    process = forked(train_with_break, root=str(tmp_path / "runs"), mark=str(mark), breaks=(12, 18))
    for source, target in ((here, away), (away, here)):
        reached(process, mark)
        source.rename(target)
        mark.unlink()
    assert process.wait() == 0, process.told()
    assert "step00000015.pt of step 15 could not be saved" in process.told()
    assert_equal_runs(whole, here)


def test_a_disk_that_fails_in_the_middle_of_a_file(forked, whole, tmp_path):
    process = forked(train_with_torn_save, root=str(tmp_path))
    assert process.wait() == 0, process.told()
    failed = [text for text in messages(tmp_path / NAME, "warning") if "Input/output error" in text]
    assert any("step00000010.pt of step 10" in text and "step 5 is kept" in text for text in failed)
    assert whole_steps(tmp_path / NAME)["last.pt"] == 40
    assert_equal_runs(whole, tmp_path / NAME)
