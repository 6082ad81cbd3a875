"""A machine that downloads from the Hub on loopback: each order is carried out by a process of its own."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from hub_server import COMMIT, Hub

REPO = "somebody/books"
SIZE = 3_000_001
FILES = {
    "README.md": b"not data",
    **{f"sample/{number:03d}.parquet": np.random.default_rng(number).bytes(SIZE + number) for number in range(4)},
    "sample/deeper/004.parquet": b"of another folder",
    "train_000001.bin": b"at the root",
}
FIRST = "sample/000.parquet"

# argv: what to do, one thing after the other, as JSON. The outcomes are the last line of stdout. A download that is to
# be held says so at so many bytes, and goes on once stdin is closed.
CLIENT = """
import json, sys, time
from oneb.data import hub, hub_failures
from oneb.data.sources import HubDataset
from oneb.errors import OnebError
from huggingface_hub import constants, hf_hub_download

def follow(order):
    constants.HF_HUB_DOWNLOAD_TIMEOUT = order["timeout"]
    hub_failures._WAITS = (0.1,) * (order["tries"] - 1)
    hub._SLOWEST = tuple(order["slowest"])
    dataset = HubDataset(order["repo"], order["revision"], order["pattern"])
    said, steps, answer = [], [], {"paths": [], "client": []}
    def progress(n_bytes, size):
        steps.append([n_bytes, size])
        time.sleep(order["pace"])
        if order["hold"] is not None and n_bytes >= order["hold"]:
            order["hold"] = None
            print("at", n_bytes, flush=True)
            sys.stdin.read()
    started = time.monotonic()
    try:
        files = hub.list_files(dataset, said.append)
        answer["files"] = [[f.path, f.size, f.sha256, f.revision] for f in files]
        if order["room"]:
            hub.check_space(dataset, files)
        for f in files:
            if f.path in order["fetch"]:
                answer["paths"].append(str(hub.fetch(dataset, f, said.append, progress)))
                answer["client"].append(hf_hub_download(dataset.repo, f.path, repo_type="dataset",
                                                        revision=dataset.revision, local_files_only=True))
    except OnebError as error:
        answer["error"] = str(error)
    return answer | {"said": said, "steps": steps, "seconds": time.monotonic() - started}

print(json.dumps([follow(order) for order in json.loads(sys.argv[1])]))
"""
ORDER = {"fetch": [FIRST], "repo": REPO, "revision": COMMIT, "pattern": "sample/*.parquet", "tries": 8, "room": False,
         "pace": 0.0, "hold": None, "timeout": 600.0, "slowest": [600.0, 61440.0]}


@dataclass
class Outcome:
    """What the client's process tells."""

    files: list[list] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    client: list[str] = field(default_factory=list)  # of the real client, asked offline afterwards
    said: list[str] = field(default_factory=list)
    steps: list[list[int]] = field(default_factory=list)
    seconds: float = 0.0
    error: str = ""


class World:
    """A Hub, and a machine with a cache of its own."""

    def __init__(self, hub: Hub, home: Path) -> None:
        self.hub, self.home = hub, home

    def start(self, *orders: dict, **environment: str) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-c", CLIENT, json.dumps([ORDER | order for order in orders])],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            cwd=Path(__file__).parents[1],
            env={**os.environ, **self.hub.environment(self.home), **environment})

    def run(self, environment: dict[str, str] | None = None, **order) -> Outcome:
        return self.run_each(order, **environment or {})[0]

    def run_each(self, *orders: dict, **environment: str) -> list[Outcome]:
        """Orders one after the other in one process."""
        return self.outcomes(self.start(*orders, **environment))

    def outcomes(self, process: subprocess.Popen) -> list[Outcome]:
        out, err = process.communicate(timeout=600)
        assert process.returncode == 0, err
        assert not err  # the client's own words come through ``say``
        return [Outcome(**answer) for answer in json.loads(out.splitlines()[-1])]

    def kill_at(self, n_bytes: int) -> None:
        """Start a download of the first file and kill -9 it as soon as so many bytes are there."""
        process = self.start({"hold": n_bytes})
        assert process.stdout.readline().startswith("at ")
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL

    def blob(self, path: str = FIRST) -> Path:
        sha256 = hashlib.sha256(FILES[path]).hexdigest()
        return self.home / f"hub/datasets--{REPO.replace('/', '--')}/blobs/{sha256}"

    def leftovers(self) -> list[Path]:
        return list(self.home.rglob("*incomplete*"))
