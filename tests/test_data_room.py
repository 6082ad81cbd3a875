"""Named data lies on a disk once: the Hub's cache and the data set's folder share their files where they can."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import numpy as np
from hub_server import Hub
from named_helpers import FILES, NAME, REPO, Machine, finish, hold, ids, shard, shard_name

from oneb.data.formats import open_file
from oneb.data.verify import verify

pytest_plugins = ["named_fixtures"]

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://x"}
READ_ALL = """
import hashlib
from oneb.config import DataConfig
from oneb.data.named import open_data
tokens = open_data(DataConfig(path=sys.argv[2], data_root=sys.argv[1]), 50257, lambda text: None).tokens
print(hashlib.sha256(tokens.read(0, len(tokens)).tobytes()).hexdigest())
"""


def read_all(machine: Machine, name: str = NAME, code: int = 0, **environment: str) -> str:
    """A hash of all tokens, or what went wrong."""
    return finish(machine.start(READ_ALL, str(machine.data), name, **environment), code)[code]


def inodes(folder: Path, pattern: str) -> list[int]:
    return sorted(path.stat().st_ino for path in folder.glob(pattern))


def blobs(machine: Machine) -> Path:
    folder, = (machine.folder / "home").glob("hub/datasets--*/blobs")
    return folder


def large_shards(hub: Hub) -> None:
    """The Hub's shards have 2 MiB, and fineweb-edu:3M four of them."""
    for number in range(4):
        drawn = np.random.default_rng(number).integers(0, 50256, 2**20).astype("<u2")
        hub.datasets[REPO][shard_name(number)] = shard(drawn)


def test_the_caches_shards_are_the_files_and_of_other_data_sets_too(hub, machine):
    whole = read_all(machine)
    assert inodes(machine.files, "*.bin") == inodes(blobs(machine), "*")
    read_all(machine, "fineweb-edu:5K")
    assert inodes(machine.data / "fineweb-edu-5K", "*.bin") == inodes(blobs(machine), "*")
    assert len(hub.asked("cdn")) == 4
    # Either may be deleted without the other's losing anything.
    shutil.rmtree(machine.files)
    assert read_all(machine, **OFFLINE) == whole
    shutil.rmtree(machine.folder / "home")
    assert read_all(machine, **OFFLINE) == whole
    for name in FILES:
        verify(machine.files / name)


def test_on_another_disk_there_are_copies_of_what_is_wanted(machine, disk):
    whole = read_all(machine)
    cached = machine.folder / "home"
    machine.data = disk(2**20)
    assert read_all(machine) == whole
    for (name, size), number in zip(FILES.items(), range(4), strict=True):
        tokens = open_file(machine.files / name, "bin")
        assert np.array_equal(tokens.read(0, len(tokens)), ids(number)[:size])
        verify(machine.files / name)
    assert [os.stat(file).st_nlink for file in machine.files.glob("*.bin")] == [1] * 4
    shutil.rmtree(cached)
    assert read_all(machine, **OFFLINE) == whole


def test_a_disk_that_holds_the_shards_once_is_large_enough(hub, machine, disk):
    """Where cache and data are on it; and what is asked for where they are not is the second time."""
    large_shards(hub)
    small = disk(10 * 2**20)
    machine.data = small / "data"
    read_all(machine, "fineweb-edu:3M", HF_HOME=str(small / "home"))
    assert shutil.disk_usage(small).free > 2**20
    tight = Machine(hub, machine.folder / "tight")
    tight.data = disk(5 * 2**20)
    assert "the data takes 5.7 MiB more" in read_all(tight, "fineweb-edu:3M", 1)
    assert not list(tight.data.rglob("*.bin"))


def test_checkpoints_and_data_that_is_to_come_need_room_together(hub, machine, disk):
    large_shards(hub)
    hold(hub, *range(4))
    options = ["--optimizer", "lion"]  # or what comes first counts the smallest
    refused = finish(machine.train("fineweb-edu:3M", *options, "--run-root", str(disk(2**20))), 2)[1]
    needed = float(re.search(r"the run's checkpoints take ([\d.]+) MiB", refused)[1])
    both = disk(int((needed + 5) * 2**20))
    refused = finish(machine.train("fineweb-edu:3M", *options, "--run-root", str(both), "--data-root",
                                   str(both / "data"), HF_HOME=str(both / "home")), 2)[1]
    assert f"checkpoints take {needed} MiB" in refused
    assert "free, of which data that is still to come takes 8.0 MiB" in refused
