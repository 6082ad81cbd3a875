"""Downloads from the Hub: the real client, in a process of its own, against a Hub on loopback that fails to order."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path

import numpy as np
import pytest
from hub_client import FILES, FIRST, REPO, SIZE, Outcome, World
from hub_server import COMMIT, Fault, Hub, serve
from small_disk import fill, make_read_only


@pytest.fixture
def world(tmp_path) -> Iterator[World]:
    with serve(Hub({REPO: dict(FILES)})) as hub:
        yield World(hub, tmp_path / "home")


def assert_whole(outcome: Outcome, path: str = FIRST) -> None:
    assert not outcome.error
    assert Path(outcome.paths[0]).read_bytes() == FILES[path]
    assert outcome.client == outcome.paths
    assert outcome.steps[-1] == [len(FILES[path])] * 2


# -- Undisturbed ---------------------------------------------------------------------------------

def test_files_are_listed_over_several_pages(world):
    outcome = world.run(fetch=[])
    expected = {path: data for path, data in FILES.items() if path.startswith("sample/")}
    assert outcome.files == [[path, len(data), hashlib.sha256(data).hexdigest(), COMMIT]
                             for path, data in sorted(expected.items())]
    assert len(world.hub.asked()) > 1
    assert world.hub.asked() == world.hub.asked("api")
    at_the_root = world.run(fetch=[], pattern="train_*.bin").files
    assert [path for path, *_ in at_the_root] == ["train_000001.bin"]


@pytest.mark.parametrize("revision", [COMMIT, "main"])
def test_a_file_arrives_once_and_is_the_clients_own(world, revision):
    first = world.run(revision=revision)
    assert_whole(first)
    assert first.files[0][3] == COMMIT
    have = [n_bytes for n_bytes, _ in first.steps]
    assert have == sorted(have)
    assert not first.said
    assert not world.leftovers()
    download, = world.hub.asked("cdn")
    assert (download.start, download.sent) == (0, SIZE)
    assert not [request for request in world.hub.requests if "xet" in request.path]
    asked = len(world.hub.asked())
    again = world.run(revision=revision)
    assert again.paths == first.paths
    assert len(world.hub.asked("cdn")) == 1
    # A commit's listing is known; that of a branch is asked for anew.
    assert (len(world.hub.asked()) == asked) == (revision == COMMIT)


def test_files_in_git_itself_come_too(world):
    world.hub.small = 100
    outcome = world.run(pattern="*.bin", fetch=["train_000001.bin"])
    assert outcome.files == [["train_000001.bin", 11, None, COMMIT]]
    assert_whole(outcome, "train_000001.bin")


def test_the_token_stays_at_the_hub(world):
    world.hub.gated.add(REPO)
    refused = world.run()
    assert "no such dataset, or not for you" in refused.error
    assert "HF_TOKEN" in refused.error
    assert_whole(world.run({"HF_TOKEN": "hf_secret"}))
    asked = world.hub.asked()[-4:]
    assert {request.authorized for request in asked if request.where != "cdn"} == {True}
    assert {request.authorized for request in asked if request.where == "cdn"} == {False}


def test_offline_with_the_files_in_the_cache(world):
    world.run_each({}, {"revision": "main"})
    asked = len(world.hub.asked())
    *cached, missing = world.run_each({}, {"revision": "main"}, {"fetch": ["sample/001.parquet"]}, HF_HUB_OFFLINE="1")
    for offline in cached:
        assert_whole(offline)
        assert len(offline.files) == 5
    assert "HF_HUB_OFFLINE is set, and somebody/books/sample/001.parquet is not in the cache" in missing.error
    assert len(world.hub.asked()) == asked


@pytest.mark.parametrize("revision", [COMMIT, "main"])
def test_offline_with_files_that_the_client_itself_brought(world, revision):
    world.run(revision=revision)
    for listing in world.home.rglob("listings/*.json"):
        listing.unlink()
    offline = world.run({"HF_HUB_OFFLINE": "1"}, revision=revision)
    assert_whole(offline)
    assert [file[0] for file in offline.files] == [FIRST]
    assert "Going on with the 1 files in the cache, there may be more." in offline.said[0]


# -- Interrupted ---------------------------------------------------------------------------------

def test_a_killed_download_continues_by_range(world):
    for n_bytes in (500_000, 1_500_000, 2_500_000):
        world.kill_at(n_bytes)
    assert not world.blob().exists()
    assert_whole(world.run())
    assert not world.leftovers()
    starts = [request.start for request in world.hub.asked("cdn")]
    assert starts[0] == 0
    assert all(start >= wanted for start, wanted in zip(starts[1:], (500_000, 1_500_000, 2_500_000), strict=True))


@pytest.mark.slow
def test_downloads_survive_many_kills(world):
    rng = np.random.default_rng(0)
    for _ in range(50):
        reached = world.hub.asked("cdn")[-1].start if world.hub.asked("cdn") else 0
        world.kill_at(min(SIZE - 100_000, reached + int(rng.integers(1, 100_000))))
    assert_whole(world.run())
    assert not world.leftovers()


def test_cut_stalled_and_trickling_connections_continue(world):
    cut, stalled, trickled = (f"sample/00{number}.parquet" for number in range(3))
    world.hub.faults += [Fault("cdn", cut_after=1_000_000, path=cut), Fault("cdn", stall_after=1_000_000, path=stalled),
                         Fault("cdn", trickle_after=400_000, path=trickled)]
    outcomes = world.run_each({"fetch": [cut]}, {"fetch": [stalled], "timeout": 1.0},
                              {"fetch": [trickled], "slowest": [0.5, 30_000.0]})
    for outcome, path in zip(outcomes, (cut, stalled, trickled), strict=True):
        assert_whole(outcome, path)
        assert all(f"{REPO}/{path}: " in message for message in outcome.said)
        starts = [request.start for request in world.hub.asked("cdn") if path in request.path]
        # A slow machine's connections may stall and trickle, too.
        assert len(starts) == len(outcome.said) + 1 == 2 or path != cut
        assert starts[0] == 0
        # What was written at the cut does not come again.
        have = [n_bytes for n_bytes, _ in outcome.steps]
        assert have == sorted(have)
        assert set(starts[1:]) <= set(have)
    assert any("Timeout" in message or "timed out" in message for message in outcomes[1].said)
    assert any("only" in message for message in outcomes[2].said)
    assert outcomes[2].seconds < 300  # at that pace, the rest would take 520 s


def test_it_gives_up_only_after_failures_in_a_row(world):
    world.hub.faults += [Fault("cdn", cut_after=200_000) for _ in range(6)]
    assert_whole(world.run(tries=2))
    world.hub.faults += [Fault("cdn", cut_after=0) for _ in range(2)]
    other = "sample/001.parquet"
    given_up = world.run(tries=2, fetch=[other])
    assert "the Hugging Face Hub did not deliver" in given_up.error
    assert len(given_up.said) == 1
    assert_whole(world.run(fetch=[other]), other)


def test_ranges_that_are_ignored_or_refused_begin_again(world):
    world.kill_at(1_000_000)
    world.hub.faults += [Fault("cdn", no_ranges=True, cut_after=500_000), Fault("cdn", status=416)]
    outcome = world.run()
    assert_whole(outcome)
    assert len(outcome.said) == 2
    assert [request.start > 0 for request in world.hub.asked("cdn")] == [False, True, True, False]
    # A server without ranges that always cuts would keep a client busy for ever.
    other = "sample/001.parquet"
    world.hub.faults += [Fault("cdn", no_ranges=True, cut_after=500_000) for _ in range(9)]
    assert "did not deliver" in world.run(tries=3, fetch=[other]).error


# -- Refused -------------------------------------------------------------------------------------

def test_it_waits_as_long_as_the_server_asks(world):
    dates = []

    def date() -> str:
        dates.append(int(time.time() + 2))  # in whole seconds: at least one of them is left
        return formatdate(dates[-1], usegmt=True)

    world.hub.faults += [
        Fault("api", status=429, headers={"RateLimit": '"api";r=0;t=1',
                                          "RateLimit-Policy": '"fixed window";"api";q=500;w=300'}),
        Fault("resolve", status=429, headers={"Retry-After": "2"}),
        Fault("cdn", status=503, headers={"Retry-After": date}),
    ]
    outcome = world.run()
    assert_whole(outcome)
    assert len(outcome.said) == 3
    assert all("(as the server asks)" in message for message in outcome.said[:2])
    at = {where: [request.at for request in world.hub.asked(where)] for where in ("api", "resolve", "cdn")}
    assert at["api"][1] - at["api"][0] >= 1
    assert at["resolve"][1] - at["resolve"][0] >= 2
    assert at["resolve"][2] + time.time() - time.monotonic() > dates[0] - 0.1


def test_a_long_wait_is_left_to_the_user(world):
    world.hub.faults.append(Fault("resolve", status=429, headers={"Retry-After": "7200"}))
    outcome = world.run()
    assert "the server answered 429" in outcome.error
    assert "run the command again in 2h 00m" in outcome.error
    assert outcome.seconds < 300


def test_server_errors_are_tried_again_everywhere(world):
    world.hub.faults += [Fault("api", status=502), Fault("resolve", status=500), Fault("cdn", status=503),
                         Fault("cdn", status=403), Fault("head", status=504), Fault("head", status=504)]
    outcome = world.run(revision="main")
    assert_whole(outcome)
    assert {502, 500, 503, 403, 504} <= {int(word) for message in outcome.said
                                         for word in message.replace(";", " ").split() if word.isdigit()}


def test_what_will_not_change_is_not_tried_again(world):
    world.hub.faults.append(Fault("resolve", status=403, body=b"forbidden"))
    outcomes = world.run_each(
        {"repo": "nobody/nothing"}, {"revision": "0" * 40}, {"pattern": "elsewhere/*.parquet"},
        {"pattern": "sample/*.txt"}, {})
    words = ["no such dataset, or not for you. Check the name", "not this revision or file", "not this revision",
             f"{REPO} has no files sample/*.txt at revision {COMMIT}", "the server answered 403"]
    for outcome, word in zip(outcomes, words, strict=True):
        assert word in outcome.error
        assert not outcome.said
    world.hub.faults.append(Fault("api", status=200, body=b"<html>Welcome to our hotel</html>"))
    assert "did not answer as the Hugging Face Hub does" in world.run(revision="main").error


def test_without_a_network(world):
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    outcome = world.run(nowhere, tries=2)
    assert f"the listing of {REPO}: the Hugging Face Hub did not deliver" in outcome.error
    assert len(outcome.said) == 1
    world.run(revision="main")
    late = world.run(nowhere, revision="main", tries=9)
    assert_whole(late)
    assert len(late.said) == 3  # two waits, and then
    assert "Going on with the listing from last time." in late.said[-1]


# -- Damaged -------------------------------------------------------------------------------------

def test_another_hash_is_never_taken(world):
    world.hub.faults.append(Fault("cdn", flip=True))
    outcome = world.run()
    assert_whole(outcome)
    assert outcome.said == [f"{REPO}/{FIRST} does not have the hash that the Hub lists, downloading it again."]
    other = "sample/001.parquet"
    world.hub.faults += [Fault("cdn", flip=True), Fault("cdn", flip=True)]
    refused = world.run(fetch=[other])
    assert "arrived twice with another hash than the Hub lists" in refused.error
    assert not world.blob(other).exists()
    assert not world.leftovers()


def test_a_damaged_partial_file_is_found_at_the_end(world):
    world.kill_at(1_000_000)
    partial, = world.leftovers()
    with open(partial, "r+b") as file:
        file.seek(1234)
        file.write(b"\0\0\0\0damage")
    outcome = world.run()
    assert_whole(outcome)
    assert len(outcome.said) == 1


@pytest.mark.parametrize("damage", ["flip", "truncate"])
def test_a_damaged_file_in_the_cache_is_replaced(world, damage):
    world.run()
    blob = world.blob()
    with open(blob, "r+b") as file:
        if damage == "flip":
            file.seek(SIZE // 2)
            file.write(bytes([FILES[FIRST][SIZE // 2] ^ 1]))
        else:
            file.truncate(SIZE // 2)
    outcome = world.run()
    assert_whole(outcome)
    assert blob.read_bytes() == FILES[FIRST]
    assert len(world.hub.asked("cdn")) == 2


def test_two_processes_share_one_download(world):
    slow, quick = world.start({"pace": 0.01}), world.start({})
    for process in (slow, quick):
        assert_whole(world.outcomes(process)[0])
    assert sum(request.sent for request in world.hub.asked("cdn")) == SIZE


# -- The disk ------------------------------------------------------------------------------------

class _Huge(bytes):
    def __len__(self) -> int:
        return 2**60


def test_room_is_looked_for_first(world):
    world.hub.datasets[REPO]["sample/huge.parquet"] = _Huge(b"claims to be huge")
    refused, fits = world.run_each({"room": True}, {})
    assert "to download, the disk of" in refused.error
    assert "HF_HOME" in refused.error
    assert_whole(fits)


def test_a_disk_that_fills_up_meanwhile(world, disk):
    world.home = disk(8 * 2**20)
    process = world.start({"hold": 1})
    assert process.stdout.readline().startswith("at ")  # it is under way
    large = fill(world.home)
    full, = world.outcomes(process)
    assert "No space left on device" in full.error
    assert "HF_HOME" in full.error
    assert not full.said
    assert "to download, the disk of" in world.run().error
    large.unlink()
    assert_whole(world.run())
    assert world.hub.asked("cdn")[-1].start > 0


def test_a_cache_that_can_only_be_read(world, disk):
    world.home = disk(8 * 2**20)
    world.run_each({}, {"revision": "main"})
    make_read_only(world.home)
    commit, main, other = world.run_each({}, {"revision": "main"}, {"fetch": ["sample/001.parquet"]})
    assert_whole(commit)
    assert_whole(main)
    assert "Read-only file system" in other.error
    assert "HF_HOME" in other.error
