"""A run's checkpoints brought back from an S3 server, and whether a place can be used at all."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mirror_helpers import PATIENCE_S, copied, save
from s3_server import BUCKET, S3, client, stored

from oneb.checkpoints import place
from oneb.checkpoints.mirror import check_place, fetch_newest
from oneb.checkpoints.rundir import read_sidecar
from oneb.errors import OnebError

ROOT = Path(__file__).parents[1]

pytest_plugins = ["mirror_fixtures"]


def test_a_damaged_newest_one_is_named_and_the_one_before_it_taken(tmp_path, port, proxy, mirrors):
    contents = copied(mirrors, S3, tmp_path / "run", 1, 2)
    bad = bytes([contents[2][0] ^ 1]) + contents[2][1:]
    client(port).put_object(Bucket=BUCKET, Key="here/run/step00000002.pt", Body=bad)
    said, other = [], tmp_path / "other" / "run"
    assert fetch_newest(S3, other, said.append) == other / "last.pt"
    assert (other / "last.pt").read_bytes() == contents[1]
    assert read_sidecar(other / "last.pt")["step"] == 1
    assert any("passed over" in line and "step00000002.pt" in line for line in said)

    client(port).put_object(Bucket=BUCKET, Key="here/run/step00000001.pt", Body=b"")
    with pytest.raises(OnebError, match=r"no checkpoint in .* is whole: step00000002.*step00000001"):
        fetch_newest(S3, tmp_path / "third" / "run", said.append)
    assert not (tmp_path / "third" / "run" / "last.pt").exists()


@pytest.mark.parametrize("fault", ["refuse", "silent", "cut"])
def test_a_place_that_cannot_be_read_is_never_taken_for_an_empty_one(tmp_path, proxy, mirrors, fault, monkeypatch):
    copied(mirrors, S3, tmp_path / "run", 1)
    monkeypatch.setattr(place, "READ_TIMEOUT_S", 0.4)
    proxy.fault = lambda method, target: fault
    with pytest.raises(OnebError, match="cannot be fetched"):
        fetch_newest(S3, tmp_path / "other" / "run", print)
    proxy.fault = lambda method, target: fault if target.endswith(".pt") else None
    with pytest.raises(OnebError, match="cannot be fetched"):
        fetch_newest(S3, tmp_path / "other" / "run", print)
    assert not list(tmp_path.glob("other/run/*"))
    monkeypatch.setattr(place, "READ_TIMEOUT_S", PATIENCE_S)
    # Short disturbances are got over.
    proxy.released.set()
    answers = iter([fault])
    proxy.fault = lambda method, target: next(answers, None)
    assert fetch_newest(S3, tmp_path / "other" / "run", print)


def test_what_is_fetched_where_there_is_nothing(tmp_path, proxy):
    assert fetch_newest(S3, tmp_path / "run", print) is None
    (tmp_path / "drive").mkdir()
    assert fetch_newest(str(tmp_path / "drive"), tmp_path / "run", print) is None
    for nowhere in ("s3://not-there/x", str(tmp_path / "not mounted")):
        with pytest.raises(OnebError, match="--save-to"):
            fetch_newest(nowhere, tmp_path / "run", print)
    assert not (tmp_path / "run").exists()


def test_the_runs_small_files_come_along_and_best_is_kept(tmp_path, port, proxy, mirrors):
    run = tmp_path / "run"
    best = save(run, 3, seed=1)
    for suffix in ("", ".json"):
        os.replace(run / f"last.pt{suffix}", run / f"best.pt{suffix}")
    (run / "train.jsonl").write_text('{"step": 1}\n')
    (run / "wandb_id.txt").write_text("abc\n")
    (run / "config.json").write_text("{}\n")
    one = mirrors(S3, run)
    save(run, 4)
    one.submit(run / "last.pt")
    assert one.finish(PATIENCE_S)
    found = stored(port)
    assert found["best.pt"] == best
    assert json.loads(found["best.pt.json"])["step"] == 3
    assert found["config.json"] == b"{}\n"
    with open(run / "train.jsonl", "a") as file:
        file.write('{"step": 2}\n')
    proxy.requests.clear()
    assert one.finish(PATIENCE_S)  # nothing new was saved, and the record is copied all the same
    assert {target.split("/")[-1] for method, target in proxy.requests if method == "PUT"} == {"train.jsonl"}
    other = tmp_path / "other" / "run"
    fetch_newest(S3, other, print)
    assert {path.name: path.read_bytes() for path in other.iterdir() if path.suffix in (".jsonl", ".txt")} == {
        path.name: path.read_bytes() for path in run.iterdir() if path.suffix in (".jsonl", ".txt")}


def test_a_run_fetched_elsewhere_goes_on_in_its_folder_and_its_new_checkpoints_are_the_newest(
        tmp_path, port, proxy, mirrors):
    copied(mirrors, S3, tmp_path / "run", 50, 60)
    other = tmp_path / "other" / "run"
    fetch_newest(S3, other, print)
    one = mirrors(S3, other)
    # It went back to step 50, and the count of its saves starts again.
    content = save(other, 55, serial=1)
    one.submit(other / "last.pt")
    assert one.finish(PATIENCE_S)
    assert {name for name in stored(port) if name.endswith(".pt")} == {"step00000055.pt", "step00000060.pt"}
    third = tmp_path / "third" / "run"
    fetch_newest(S3, third, print)
    assert (third / "last.pt").read_bytes() == content


def test_another_run_of_the_same_name_never_takes_the_first_ones_checkpoints(tmp_path, port, proxy, mirrors):
    contents = copied(mirrors, S3, tmp_path / "run", 50_000, 60_000)
    fresh = tmp_path / "fresh" / "run"
    one = mirrors(S3, fresh)
    for step in (1, 2, 3):
        save(fresh, step)
        one.submit(fresh / "last.pt")
        assert one.finish(PATIENCE_S)
    one.poll()
    assert any("another run's" in line and "here/run_2" in line for line in one.said)
    found = stored(port)
    assert found["step00060000.pt"] == contents[60_000]
    assert found["step00050000.pt"] == contents[50_000]
    assert {"here/run_2/step00000002.pt", "here/run_2/step00000003.pt"} <= found.keys()
    with pytest.raises(OnebError, match=r"several runs of this name: run, run_2"):
        fetch_newest(S3, tmp_path / "third" / "run", print)
    (fresh / "last.pt").unlink()
    assert fetch_newest(S3, fresh, print)  # which of them this directory's is, is known
    assert read_sidecar(fresh / "last.pt")["step"] == 3


# ---- whether a place can be used


def test_a_place_that_can_be_used_is_left_as_it_was(tmp_path, port, proxy):
    check_place(S3)
    assert stored(port) == {}
    check_place(str(tmp_path))
    check_place(f"file://{tmp_path}")
    assert list(tmp_path.iterdir()) == []


def test_places_that_cannot_be_used_are_refused_with_the_fix(tmp_path, proxy, monkeypatch):
    with pytest.raises(OnebError, match=r"bucket does not exist.*make the bucket first"):
        check_place("s3://no-such-bucket/x")
    with pytest.raises(OnebError, match="a drive must be mounted first"):
        check_place(str(tmp_path / "not there"))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(OnebError, match="--save-to"):
        check_place(str(tmp_path / "file"))
    with pytest.raises(OnebError, match="pip install"):
        check_place("nosuchprotocol://x/y")
    for fault in ("refuse", "silent", "busy"):
        monkeypatch.setattr(place, "READ_TIMEOUT_S", 0.4)
        monkeypatch.setattr(place, "REQUEST_S", 2.0)
        proxy.fault = lambda method, target, fault=fault: fault
        began = time.monotonic()
        with pytest.raises(OnebError, match="AWS_ENDPOINT_URL"):
            check_place(S3)
        assert time.monotonic() - began < PATIENCE_S / 2, fault
    monkeypatch.setattr(place, "READ_TIMEOUT_S", PATIENCE_S)
    monkeypatch.setattr(place, "REQUEST_S", PATIENCE_S)
    proxy.fault = lambda method, target: None
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(OnebError, match="aws configure"):
        check_place(S3)


def test_without_s3fs_the_line_that_installs_it_is_said():
    code = """
import sys
sys.modules["s3fs"] = None  # what an import of a package that is not there meets
from oneb.checkpoints.mirror import check_place
check_place("s3://bucket/x")
"""
    failed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "python3 -m pip install s3fs" in failed.stderr
