"""The real W&B client against a server on loopback that refuses, hangs or dies, and a client that dies itself: training
goes on to its end, with every row in train.jsonl, and waits no longer than is known."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_disk import fill

from oneb.config import Config, LogConfig
from oneb.files import read_json_lines
from oneb.show import wandb_sink
from oneb.show.wandb_sink import WandbSink

TESTS = Path(__file__).parent
# The waits of the quick tests, seconds: until the client gives up starting, until it gives up finishing, and until it
# counts as stuck; only the second of them is met. The slow ones have the real waits.
QUICK = (120.0, 3.0, 120.0)
REAL = (wandb_sink._INIT_TIMEOUT_S, wandb_sink._FINISH_TIMEOUT_S, wandb_sink._STUCK_S)
# What the client takes beside those: a request for the login, and, once it has given up, its last messages.
CLIENT_S = 15.0
# What a run here takes without W&B on a busy machine: imports, steps, an evaluation, plots.
RUN_S = 60.0
# More than any machine takes for what does not hang.
HANGS_S = 240.0


class LoopbackServer:
    """tests/wandb_server.py as a process, with what is to go wrong."""

    def __init__(self, folder: Path, *faults: str) -> None:
        folder.mkdir()
        self.folder = folder
        self.process = subprocess.Popen([sys.executable, str(TESTS / "wandb_server.py"), str(folder), *faults])
        while not (folder / "port").exists():
            assert self.process.poll() is None
            time.sleep(0.02)
        self.url = f"http://127.0.0.1:{(folder / 'port').read_text()}"

    def rows(self) -> list[dict]:
        """The history lines that arrived."""
        path = self.folder / "history.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]  # it may have died in the middle of one

    def steps(self) -> list[int]:
        return [row["step"] for row in self.rows()]

    def end(self) -> None:
        self.process.kill()  # a stopped one, too
        self.process.wait()


@pytest.fixture
def serve(tmp_path):
    servers = []

    def start(*faults: str) -> LoopbackServer:
        servers.append(LoopbackServer(tmp_path / f"server{len(servers)}", *faults))
        return servers[-1]

    yield start
    for server in servers:
        server.end()


def environment(tmp_path: Path, url: str) -> dict[str, str]:
    """A client that knows this server, has a login and sees nothing of this machine's settings."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    home = tmp_path / "home"
    home.mkdir(exist_ok=True)
    return kept | {"HOME": str(home), "NETRC": str(home / "netrc"), "WANDB_BASE_URL": url, "WANDB_API_KEY": "a" * 40,
                   "OMP_NUM_THREADS": "1"}


CHILD = """
import sys
import oneb.show.wandb_sink as sink
sink._INIT_TIMEOUT_S, sink._FINISH_TIMEOUT_S, sink._STUCK_S = {waits}
{before}
from oneb.cli.train import main
if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
"""


NANO = ("--size nano --layers 2 --data demo --device cpu --train-seq-len 64 --batch-size 4 --grad-accum 1 --lr 1e-3 "
        "--log-every 1 --eval-every 0 --eval-iters 1 --live basic")


def sync(run_dir: Path, env: dict[str, str]) -> None:
    """``wandb sync`` of all that the client has left in a run directory."""
    runs = [str(path) for path in run_dir.glob("wandb/*run-*")]
    subprocess.run([str(Path(sys.executable).parent / "wandb"), "sync", "--include-online", *runs], check=True,
                   timeout=HANGS_S, env=env, stdin=subprocess.DEVNULL, capture_output=True)


class Training:
    """A nano run with --wandb, in a process of its own."""

    def __init__(self, root: Path, url: str, steps: int, *options: str, waits=QUICK, before: str = "") -> None:
        self.root, self.url, self.steps = root, url, steps
        root.mkdir(exist_ok=True)
        # Not a pipe: it would stay open for as long as the client does.
        self.output = (root / "output.txt").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD.format(waits=waits, before=before), "--run-root", str(root), "--wandb",
             "--steps", str(steps), *NANO.split(), *options],
            env=environment(root, url), cwd=TESTS.parent, stdout=self.output, stderr=subprocess.STDOUT)

    @property
    def path(self) -> Path:
        return next(self.root.glob("oneb_*"))

    def rows(self, kind: str) -> list[dict]:
        return [row for row in read_json_lines(self.path / "train.jsonl") if row["type"] == kind]

    def told(self) -> str:
        """All of its output."""
        return (self.root / "output.txt").read_text()

    def wait_for_step(self, step: int) -> None:
        deadline = time.monotonic() + HANGS_S
        while not list(self.root.glob("oneb_*/train.jsonl")) or len(self.rows("train")) < step:
            assert self.process.poll() is None, self.told()
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def finish(self, within_s: float = RUN_S) -> str:
        """Its output, once it has ended well, in time, and with every row in train.jsonl."""
        try:
            code = self.process.wait(within_s)
        finally:
            self.process.kill()
        output = self.told()
        assert code == 0, output
        assert [row["step"] for row in self.rows("train")] == list(range(1, self.steps + 1)), output
        assert [row["step"] for row in self.rows("eval")] == [self.steps]
        return output

    def client(self) -> int:
        """The process id of its W&B client."""
        children = subprocess.run(["ps", "-o", "pid=,comm=", "--ppid", str(self.process.pid)], check=True,
                                  capture_output=True, text=True).stdout.splitlines()
        return next(int(line.split()[0]) for line in children if "wandb" in line)

    def sync(self, url: str) -> None:
        """What the run says to do once the server is there again."""
        sync(self.path, environment(self.root, url))


# Has a run wait after its 10th step until there is the file of that name.
WAITS_AT_10 = """
import os, time
log = sink.WandbSink.log
def waits(self, row):
    while row["type"] == "train" and row["step"] > 10 and not os.path.exists({!r}):
        time.sleep(0.02)
    log(self, row)
sink.WandbSink.log = waits
"""


def test_a_server_that_dies_or_hangs_midway(tmp_path, serve):
    """Both at once, as each run mostly waits. The stopped process still has its connections taken by the system."""
    runs, is_gone = {}, tmp_path / "is gone"
    for name, number in (("dies", signal.SIGKILL), ("hangs", signal.SIGSTOP)):
        server = serve()
        training = Training(tmp_path / name, server.url, 60, before=WAITS_AT_10.format(str(is_gone)))
        runs[name] = (server, number, training)
    for server, number, training in runs.values():
        training.wait_for_step(10)
        server.process.send_signal(number)
    is_gone.touch()
    for server, _, training in runs.values():
        output = training.finish(HANGS_S)
        assert "Syncing run" in output  # it was online
        assert "W&B has not taken all in 3 s; upload the rest with: wandb sync --include-online" in output
        assert len(server.steps()) < 60
    # Nothing is lost on W&B either.
    there = serve()
    runs["hangs"][2].sync(there.url)
    assert there.steps() == list(range(1, 61))


def row(step: int, loss: float, kind: str = "train") -> dict:
    return {"type": kind, "step": step, "tokens": step * 1024, "loss": loss}


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_no_step_is_sent_twice(tmp_path, serve, monkeypatch, mode):
    """A rollback, then a resume from an earlier step, each of which makes steps again that W&B has."""
    server = serve()
    for name, value in environment(tmp_path, server.url).items():
        monkeypatch.setenv(name, value)
    for name in ("_INIT_TIMEOUT_S", "_FINISH_TIMEOUT_S"):
        monkeypatch.setattr(wandb_sink, name, HANGS_S)
    config = dataclasses.replace(Config(), log=LogConfig(wandb=True, wandb_mode=mode))
    path = tmp_path / "oneb_decoupled_seed1337"
    path.mkdir()
    first = WandbSink(config, path)
    for step in (20, 40, 60):
        first.log(row(step, 3.0))
    first.rewind(20)
    for step in (40, 60, 80):
        first.log(row(step, 2.0))
    first.log(row(60, 2.0, "eval"))
    first.log(row(80, 2.5, "eval"))
    first.close()
    second = WandbSink(config, path, newest_step=80)
    for step in (60, 80, 100):
        second.log(row(step, 1.0))
    second.close()
    assert first.warnings == second.warnings == []
    if mode == "offline":
        sync(path, environment(tmp_path, server.url))
    assert [(sent["step"], sent["train/loss"], sent.get("eval/loss")) for sent in server.rows()] == [
        (20, 3.0, None), (40, 3.0, None), (60, 3.0, None), (80, 2.0, 2.5), (100, 1.0, None)]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["login", "start"])
def test_a_server_that_hangs_from_the_beginning(tmp_path, serve, stage):
    server = serve("--hang-at", stage)
    began = time.monotonic()
    training = Training(tmp_path / "runs", server.url, 20, waits=REAL)
    training.wait_for_step(1)
    assert time.monotonic() - began < RUN_S / 2 + REAL[0] + CLIENT_S
    assert "logging offline" in training.finish()
    there = serve()
    training.sync(there.url)
    assert there.steps() == list(range(1, 21))


@pytest.mark.slow
def test_a_server_that_refuses(tmp_path, serve):
    server = serve()
    server.end()
    training = Training(tmp_path / "runs", server.url, 20, waits=REAL)
    assert "logging offline" in training.finish(RUN_S + REAL[0] + CLIENT_S)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["--die-at", "--hang-at"])
def test_a_server_that_goes_away_after_some_rows(tmp_path, serve, fault):
    """The client sends rows every 15 s: the first lot arrives, the second one meets the fault."""
    server = serve(fault, "rows", "--after", "1")
    training = Training(tmp_path / "runs", server.url, 3000, waits=REAL)
    training.finish(3 * RUN_S + REAL[1] + CLIENT_S)
    arrived = server.steps()
    assert 0 < len(arrived) < 3000
    assert arrived == list(range(1, len(arrived) + 1))
    there = serve()
    training.sync(there.url)
    assert there.steps() == list(range(1, 3001))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_client_that_is_gone(tmp_path, serve, number):
    server = serve()
    training = Training(tmp_path / "runs", server.url, 150, waits=REAL)
    training.wait_for_step(20)
    client = training.client()
    os.kill(client, number)
    try:
        output = training.finish(RUN_S + sum(REAL[1:]) + CLIENT_S)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(client, signal.SIGKILL)
    warnings = [event["message"] for event in training.rows("event") if event["event"] == "warning"]
    wanted = "W&B has failed" if number == signal.SIGKILL else "the W&B client does not answer"
    assert [wanted in warning for warning in warnings] == [True], output


@pytest.mark.slow
def test_without_a_network_or_a_client(tmp_path):
    nowhere = "http://127.0.0.1:9"
    training = Training(tmp_path / "runs", nowhere, 20, "--wandb-mode", "offline")
    assert "logging offline" not in training.finish()
    assert list(training.path.glob("wandb/offline-run-*/*.wandb"))
    absent = Training(tmp_path / "absent", nowhere, 20, before="sys.modules['wandb'] = None")
    assert absent.process.wait(RUN_S) == 2
    assert "python3 -m pip install wandb" in absent.told()


@pytest.mark.slow
def test_a_disk_that_fills_up_under_everything(tmp_path, disk):
    """train.jsonl, W&B's own file and TensorBoard's on one disk without a byte left, which is freed again."""
    root = disk(64 * 2**20)
    training = Training(root, "http://127.0.0.1:9", 1500, "--wandb-mode", "offline", "--tensorboard",
                        "--no-save-optim", "--save-minutes", "0")
    training.wait_for_step(50)
    large = fill(root)
    time.sleep(3)
    large.unlink()
    output = training.finish(3 * RUN_S)
    warnings = [event["message"] for event in training.rows("event") if event["event"] == "warning"]
    assert sum("train.jsonl cannot be written" in warning for warning in warnings) == 1, output
    assert sum("rows kept in memory are in it" in warning for warning in warnings) == 1
