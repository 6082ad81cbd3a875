"""Copies of checkpoints in folders that fail for real: full, read-only, no longer mounted, hanging."""

import contextlib
import os
import subprocess
import threading
from pathlib import Path

import pytest
from mirror_helpers import MB, PATIENCE_S, copied, killed_while_copying, names, save, until

from oneb.checkpoints import mirror
from oneb.checkpoints.mirror import check_place, fetch_newest
from oneb.checkpoints.rundir import sidecar_path
from oneb.errors import OnebError

pytest_plugins = ["mirror_fixtures"]


@pytest.mark.parametrize("kills", [10, pytest.param(200, marks=pytest.mark.slow)])
def test_kill_9_while_copying_to_a_folder_leaves_the_older_checkpoint_whole(tmp_path, kills):
    (tmp_path / "drive").mkdir()
    assert killed_while_copying(str(tmp_path / "drive"), tmp_path, kills, 2 * MB, 0.05, kills)


@contextlib.contextmanager
def mounted(where: Path, *arguments: str):
    """``mount arguments where``, where that is allowed."""
    where.mkdir(exist_ok=True)
    if subprocess.run(["mount", *arguments, str(where)], capture_output=True).returncode:
        pytest.skip("mounts are not allowed here: it takes root")
    try:
        yield where
    finally:
        subprocess.run(["umount", "-l", str(where)], capture_output=True)


def test_a_folder_holds_the_same_as_a_bucket(tmp_path, mirrors):
    drive = tmp_path / "drive"
    drive.mkdir()
    contents = copied(mirrors, str(drive), tmp_path / "run", 1, 2, 3)
    assert {path.name for path in (drive / "run").iterdir()} == {
        "mirror_id.txt", "step00000002.pt", "step00000002.pt.json", "step00000003.pt", "step00000003.pt.json"}
    bad = drive / "run" / "step00000003.pt"
    bad.write_bytes(contents[3][:-1])
    other = tmp_path / "other" / "run"
    fetch_newest(str(drive), other, print)
    assert (other / "last.pt").read_bytes() == contents[2]
    sidecar_path(drive / "run" / "step00000002.pt").write_text("{")
    with pytest.raises(OnebError, match="no checkpoint in .* is whole"):
        fetch_newest(str(drive), tmp_path / "third" / "run", print)


def test_a_folder_that_is_full_keeps_what_it_has_and_takes_the_next_one_once_there_is_room(tmp_path, mirrors):
    with mounted(tmp_path / "drive", "-t", "tmpfs", "-o", "size=5m", "tmpfs") as drive:
        run = tmp_path / "run"
        one = mirrors(drive, run)
        contents = {}
        for step in (1, 2):
            contents[step] = save(run, step, MB)
            one.submit(run / "last.pt")
            assert one.finish(PATIENCE_S)
        one.poll()
        (drive / "others").write_bytes(bytes(2 * MB + MB // 2))
        contents[3] = save(run, 3, MB)
        one.submit(run / "last.pt")
        failed = until(lambda: one.poll())
        assert names(failed) == [(3, "failed")]
        assert "No space left" in failed[0].message
        assert not one.finish(0.5)
        assert one.verified_step == 2
        # Nothing of an attempt is left once it has failed, and both checkpoints are whole.
        whole = {"mirror_id.txt", *(f"step0000000{step}.pt{suffix}" for step in (1, 2) for suffix in ("", ".json"))}
        until(lambda: set(os.listdir(drive / "run")) == whole)
        for step in (1, 2):
            assert (drive / "run" / f"step0000000{step}.pt").read_bytes() == contents[step]
        (drive / "others").unlink()
        assert one.finish(PATIENCE_S)
        assert one.verified_step == 3
        assert (drive / "run" / "step00000003.pt").read_bytes() == contents[3]


def test_a_folder_that_becomes_read_only_is_told_and_used_again_when_it_can_be(tmp_path, mirrors):
    with mounted(tmp_path / "drive", "-t", "tmpfs", "-o", "size=5m", "tmpfs") as drive:
        run = tmp_path / "run"
        one = mirrors(drive, run)
        save(run, 1)
        one.submit(run / "last.pt")
        assert one.finish(PATIENCE_S)
        one.poll()
        subprocess.run(["mount", "-o", "remount,ro", str(drive)], check=True)
        with pytest.raises(OnebError, match="Read-only"):
            check_place(str(drive))
        save(run, 2)
        one.submit(run / "last.pt")
        failed = until(lambda: one.poll())
        assert names(failed) == [(2, "failed")]
        assert "Read-only" in failed[0].message
        subprocess.run(["mount", "-o", "remount,rw", str(drive)], check=True)
        assert one.finish(PATIENCE_S)
        assert one.verified_step == 2


def test_nothing_is_written_below_a_drive_that_is_no_longer_mounted(tmp_path, mirrors):
    real = tmp_path / "real"
    real.mkdir()
    drive = tmp_path / "drive"
    run = tmp_path / "run"
    with mounted(drive, "--bind", str(real)):
        one = mirrors(drive, run)
        save(run, 1)
        one.submit(run / "last.pt")
        assert one.finish(PATIENCE_S)
        one.poll()
    assert list(drive.iterdir()) == []  # where it was mounted there is a folder of this machine's own disk
    content = save(run, 2)
    one.submit(run / "last.pt")
    assert names(until(lambda: one.poll())) == [(2, "failed")]
    assert not one.finish(0.5)
    assert list(drive.iterdir()) == []
    with mounted(drive, "--bind", str(real)):
        assert one.finish(PATIENCE_S)
    assert one.verified_step == 2
    assert (real / "run" / "step00000002.pt").read_bytes() == content


def test_a_mount_that_hangs_is_left_alone_and_used_again_when_it_answers(tmp_path, mirrors, monkeypatch):
    """Reading a pipe that nobody writes to hangs in the kernel, as a dead network mount does."""
    monkeypatch.setattr(mirror, "STALL_S", 0.3)
    drive, run = tmp_path / "drive", tmp_path / "run"
    (drive / "run").mkdir(parents=True)
    pipe = drive / "run" / "mirror_id.txt"
    os.mkfifo(pipe)
    content = save(run, 1)
    before = threading.enumerate()
    one = mirrors(drive, run)
    one.submit(run / "last.pt")
    assert "nothing moved" in until(one.poll)[0].message
    # As often as it is tried, only so many attempts hang there at once.
    until(lambda: any("earlier attempts" in event.message for event in one.poll()))
    assert not one.finish(1)
    hanging = [thread for thread in threading.enumerate() if thread.name == "mirror-io" and thread not in before]
    assert len(hanging) == mirror.MAX_STUCK
    with contextlib.suppress(BrokenPipeError), open(pipe, "wb") as answer:  # they may look, and close it again
        answer.write(b"another run\n")
    pipe.unlink()
    monkeypatch.setattr(mirror, "STALL_S", PATIENCE_S)
    assert one.finish(PATIENCE_S)
    assert (drive / "run" / "step00000001.pt").read_bytes() == content
