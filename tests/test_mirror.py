"""Copies of checkpoints on an S3 server behind a faulty proxy: sent, read back, sent again."""

import json
import time

import pytest
from mirror_helpers import MB, PATIENCE_S, copied, killed_while_copying, names, save, until
from s3_server import BUCKET, S3, client, stored, uploads_under_way

from oneb.checkpoints import place
from oneb.checkpoints.mirror import fetch_newest
from oneb.checkpoints.rundir import read_sidecar
from oneb.files import sha256_file

pytest_plugins = ["mirror_fixtures"]


def test_checkpoints_are_copied_read_back_and_the_newest_two_kept(tmp_path, port, proxy, mirrors):
    run = tmp_path / "run"
    one = mirrors(S3, run)
    contents = {}
    for step in (10, 20, 30, 40):
        contents[step] = save(run, step, 12 * MB + step)
        proxy.requests.clear()
        one.submit(run / "last.pt")
        assert one.finish(PATIENCE_S)
        assert names(one.poll()) == [(step, "verified")]
        assert one.verified_step == step
        # Three parts, and ranges over all of it, which come after the last part and before the sidecar.
        own = [(method, target.split("/")[-1]) for method, target in proxy.requests if f"{step:08d}.pt" in target]
        kinds = [("json" if ".json" in target else "data", method) for method, target in own]
        assert kinds.count(("data", "PUT")) == kinds.count(("data", "GET")) == 3
        assert kinds.index(("data", "GET")) > max(i for i, kind in enumerate(kinds) if kind == ("data", "PUT"))
        assert kinds.index(("json", "PUT")) > max(i for i, kind in enumerate(kinds) if kind == ("data", "GET"))
    found = stored(port)
    assert {name for name in found if name.startswith("step")} == {
        "step00000030.pt", "step00000030.pt.json", "step00000040.pt", "step00000040.pt.json"}
    assert found["step00000040.pt"] == contents[40]
    assert json.loads(found["step00000040.pt.json"])["sha256"] == sha256_file(run / "last.pt")

    other = tmp_path / "new machine" / "run"
    said = []
    assert fetch_newest(S3, other, said.append) == other / "last.pt"
    assert (other / "last.pt").read_bytes() == contents[40]
    assert read_sidecar(other / "last.pt") == read_sidecar(run / "last.pt")
    assert not list(other.glob(".*"))
    assert "fetched step 40" in said[-1]


@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_an_answer_altered_on_its_way_is_found_and_the_checkpoint_sent_again(tmp_path, port, proxy, mirrors, damage):
    run = tmp_path / "run"
    answers = iter([damage] * (3 if damage == "cut" else 1))  # the client itself asks again for what was cut
    proxy.fault = lambda method, target: next(answers, None) if method == "GET" and target.endswith(".pt") else None
    content = save(run, 7)
    one = mirrors(S3, run)
    one.submit(run / "last.pt")
    assert one.finish(PATIENCE_S)
    assert names(one.poll()) == [(7, "failed"), (7, "verified")]
    assert stored(port)["step00000007.pt"] == content


@pytest.mark.parametrize("damage", ["truncated", "altered", "gone"])
def test_an_object_that_is_damaged_at_rest_is_found_and_sent_again(tmp_path, port, proxy, mirrors, damage):
    """It is damaged past the proxy, after the upload and before the first byte is read back."""
    run, key = tmp_path / "run", "here/run/step00000007.pt"
    content = save(run, 7, 6 * MB)
    bad = {"truncated": content[:-1], "altered": content[:-1] + bytes([content[-1] ^ 4])}.get(damage)
    done = []

    def fault(method, target):
        if method == "HEAD" and target.endswith(key) and not done:
            done.append(target)
            s3 = client(port)
            s3.delete_object(Bucket=BUCKET, Key=key) if bad is None else s3.put_object(Bucket=BUCKET, Key=key, Body=bad)

    proxy.fault = fault
    one = mirrors(S3, run)
    one.submit(run / "last.pt")
    assert one.finish(PATIENCE_S)
    assert names(one.poll()) == [(7, "failed"), (7, "verified")]
    assert stored(port)["step00000007.pt"] == content
    assert proxy.count("POST", "uploadId=") == 2  # sent twice


def test_where_nothing_arrives_whole_nothing_is_verified_and_the_older_ones_stay(tmp_path, port, proxy, mirrors):
    run = tmp_path / "run"
    one = mirrors(S3, run)
    contents = {}
    for step in (1, 2):
        contents[step] = save(run, step)
        one.submit(run / "last.pt")
        assert one.finish(PATIENCE_S)
    proxy.fault = lambda method, target: "flip" if method == "GET" and target.endswith("3.pt") else None
    save(run, 3)
    one.submit(run / "last.pt")
    began = time.monotonic()
    assert not one.finish(600)  # bytes move, again and again: not for ever
    assert time.monotonic() - began < 500
    events = one.poll()
    assert names(events)[-1] == (3, "failed")
    assert "DamagedError" in events[-1].message
    assert one.verified_step == 2
    found = stored(port)
    assert found.keys() >= {"step00000001.pt.json", "step00000002.pt.json"}
    assert "step00000003.pt.json" not in found
    assert fetch_newest(S3, tmp_path / "other" / "run", print)
    assert (tmp_path / "other" / "run" / "last.pt").read_bytes() == contents[2]


# ---- a network that fails


@pytest.mark.parametrize("fault", ["refuse", "busy", "stall", "silent", "die"])
def test_all_faults_of_the_network_are_got_over(
        tmp_path, port, proxy, mirrors, fault, monkeypatch):
    if fault in ("stall", "silent"):
        monkeypatch.setattr(place, "READ_TIMEOUT_S", 1.0)
        monkeypatch.setattr(place, "REQUEST_S", 2.0)
    run = tmp_path / "run"
    one = mirrors(S3, run)
    first = save(run, 1)
    one.submit(run / "last.pt")
    until(lambda: one.verified_step == 1)
    one.poll()

    hit = []

    def always(method, target):
        # From the second part on, so that there is something half done.
        if method == "PUT" and "step00000002.pt?partNumber=2" in target:
            hit.append(target)
            return fault
        return None

    proxy.fault = always
    second = save(run, 2, 11 * MB)
    for _ in range(5):
        one.submit(run / "last.pt")
        time.sleep(0.02)
    failed = until(lambda: [event for event in one.poll() if event.name == "failed" and event.step == 2])
    assert failed
    assert hit
    assert stored(port)["step00000001.pt"] == first
    assert "step00000002.pt" not in stored(port)
    assert one.verified_step == 1

    proxy.fault = lambda method, target: None
    proxy.released.set()
    until(lambda: one.verified_step == 2)  # as often as it takes: a slow machine may be silent for a second, too
    assert one.finish(PATIENCE_S)
    assert stored(port)["step00000002.pt"] == second
    until(lambda: not uploads_under_way(port))


def test_a_network_that_hangs_does_not_hold_up_submit_and_a_copy_that_waits_is_replaced_by_a_newer_one(
        tmp_path, port, proxy, mirrors):
    run = tmp_path / "run"
    proxy.fault = lambda method, target: "stall" if proxy.held and "1.pt" in target else None
    proxy.held = True
    one = mirrors(S3, run)
    contents = {}
    for step in (1, 2, 3, 4):
        contents[step] = save(run, step, 50_000)  # each a new file under the name of the one before
        began = time.monotonic()
        one.submit(run / "last.pt")
        assert time.monotonic() - began < PATIENCE_S / 2  # after which the request that hangs would be given up
        if step == 1:
            until(lambda: proxy.count("DELETE", "1.pt") + proxy.count("PUT", "1.pt"))
    proxy.held = False
    proxy.released.set()
    assert one.finish(PATIENCE_S)
    verified = [event.step for event in one.poll() if event.name == "verified"]
    assert verified[-1] == 4
    assert 2 not in verified
    assert 3 not in verified
    assert stored(port)["step00000004.pt"] == contents[4]


def test_a_run_that_ends_without_the_network_ends(tmp_path, proxy, mirrors):
    run = tmp_path / "run"
    proxy.fault = lambda method, target: "refuse"
    save(run, 5)
    one = mirrors(S3, run)
    one.submit(run / "last.pt")
    events = until(one.poll)
    began = time.monotonic()
    assert not one.finish(2)
    assert 1.5 < time.monotonic() - began < 60
    events += one.poll()
    assert names(events) == [(5, "failed")]  # told once, however often it was tried
    assert "step 5 could not be copied to s3://bucket/here" in events[0].message
    assert any("step 5" in line for line in one.said)


@pytest.mark.parametrize("kills", [3, pytest.param(40, marks=pytest.mark.slow)])
def test_kill_9_while_uploading_leaves_the_older_checkpoint_whole(tmp_path, port, proxy, mirrors, kills):
    assert killed_while_copying(S3, tmp_path, kills, 11 * MB, 0.4, kills)
    # What a killed upload left on the server is found by the next process of the run.
    save(tmp_path / "run", 10**6)
    one = mirrors(S3, tmp_path / "run")
    one.submit(tmp_path / "run" / "last.pt")
    assert one.finish(PATIENCE_S)
    assert not uploads_under_way(port)


# ---- what is submitted


def test_a_step_that_is_saved_again_with_other_content_takes_nothing_away_before_it_is_verified(
        tmp_path, port, proxy, mirrors):
    run = tmp_path / "run"
    contents = copied(mirrors, S3, run, 5)
    again = save(run, 5, serial=9, seed=1)
    one = mirrors(S3, run)
    proxy.fault = lambda method, target: "flip" if method == "GET" and target.endswith(".pt") else None
    one.submit(run / "last.pt")
    assert not one.finish(PATIENCE_S)
    assert stored(port)["step00000005.pt"] == contents[5]
    assert "step00000005.pt.json" in stored(port)
    proxy.fault = lambda method, target: None
    assert one.finish(PATIENCE_S)
    assert stored(port)["step00000005-9.pt"] == again
    fetch_newest(S3, tmp_path / "other" / "run", print)
    assert (tmp_path / "other" / "run" / "last.pt").read_bytes() == again


def test_a_checkpoint_that_is_damaged_here_is_not_sent_for_ever(tmp_path, port, proxy, mirrors):
    run = tmp_path / "run"
    save(run, 5)
    with open(run / "last.pt", "r+b") as file:
        file.seek(500)
        file.write(b"damage")
    one = mirrors(S3, run)
    one.submit(run / "last.pt")
    assert not one.finish(PATIENCE_S)
    events = one.poll()
    assert names(events) == [(5, "failed")]
    assert "on this machine is damaged" in events[0].message
    assert not [name for name in stored(port) if name.startswith("step")]
    (run / "last.pt").write_bytes(b"short")
    one.submit(run / "last.pt")
    assert not one.finish(PATIENCE_S)
    assert "cannot be copied" in one.poll()[0].message


def test_a_mirror_that_is_closed_in_the_middle_leaves_no_half_object(tmp_path, port, proxy, mirrors):
    run = tmp_path / "run"
    save(run, 5, 25 * MB)
    one = mirrors(S3, run)

    def fault(method, target):
        if method == "PUT" and "partNumber=3" in target:
            until(lambda: one._closed)

    proxy.fault = fault
    one.submit(run / "last.pt")
    until(lambda: proxy.count("PUT", "partNumber=3"))
    one.close()
    until(lambda: not uploads_under_way(port))
    assert "step00000005.pt" not in stored(port)
