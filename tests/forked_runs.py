"""Runs in processes of their own, forked from one that has imported everything: each costs no start of torch."""

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

__all__ = ["forked"]

NAME = "oneb_decoupled_seed1337"
# Only what hangs takes so long, however slow the machine and its disk are.
PATIENCE_S = 300.0
# One layer and short sequences: a step takes milliseconds. Two lengths, and all that happens beside the steps.
TINY = {
    "size": "nano", "n_layers": 1, "path": "demo", "device": "cpu", "phases": "16@0,32@6", "max_seq_len": 32,
    "batch_size": 2, "grad_accum": 1, "steps": 12, "log_every": 1, "eval_every": 5, "eval_iters": 1, "lr": 1e-3,
    "warmup_steps": 2, "lr_schedule": "constant", "live": "off", "instrument": "basic", "analysis_every": 4,
}


class Forked:
    """A process that was forked, in a group of its own; what it prints is in the file ``output``."""

    def __init__(self, server: "_Server", pid: int, output: Path) -> None:
        self.pid, self.output = pid, output
        self._server = server
        self._code: int | None = None

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def signal_group(self, number: int) -> None:
        os.killpg(self.pid, number)

    def poll(self) -> int | None:
        """Its exit code, -signal where one killed it; None while it runs."""
        if self._code is None:
            self._code = self._server.ask({"wait": self.pid})
        return self._code

    def wait(self, seconds: float = PATIENCE_S) -> int:
        """Its exit code, once it has ended; fails the test where it does not."""
        if not within(seconds, lambda: self.poll() is not None):
            with contextlib.suppress(ProcessLookupError):
                self.signal_group(signal.SIGKILL)
            pytest.fail(f"still running after {seconds}s; it printed: {self.told()}")
        return self._code

    def told(self) -> str:
        return self.output.read_text(errors="replace")


class _Server:
    def __init__(self, folder: Path) -> None:
        self._folder, self._count = folder, 0
        self._process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                         text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=folder)
        assert self.ask({"wait": None}) is None  # it has imported everything

    def ask(self, what: dict):
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def __call__(self, work: Callable[..., int], **given) -> Forked:
        """Call ``work``, a function of a test file, with what JSON can hold; its result is the exit code."""
        self._count += 1
        output = self._folder / f"output{self._count}"
        module = Path(work.__code__.co_filename).stem
        return Forked(self, self.ask({"module": module, "name": work.__name__, "given": given, "output": str(output)}),
                      output)

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(PATIENCE_S)


@pytest.fixture(scope="module")
def forked(tmp_path_factory) -> Iterator[_Server]:
    """Calls a function of the test file in a process of its own."""
    server = _Server(tmp_path_factory.mktemp("forked"))
    yield server
    server.close()


def within(seconds: float, condition: Callable[[], object]) -> bool:
    """Whether it came true in that time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def reached(process: Forked, mark: Path) -> None:
    """Wait until ``process`` has made the file ``mark``."""
    assert within(PATIENCE_S, lambda: mark.exists() or process.poll() is not None), process.told()
    assert mark.exists(), process.told()


def whole_steps(directory: Path) -> dict[str, int]:
    """Steps by name of all checkpoints there, each read and compared with its SHA-256."""
    from oneb.checkpoints.checkpoint import load_checkpoint
    from oneb.checkpoints.rundir import checkpoints

    found, faults = checkpoints(directory)
    assert not faults
    return {path.name: load_checkpoint(path)["step"] for path in found}


def train_here(given: dict) -> int:
    """For children: a run as ``oneb train`` makes it, with short evaluations and no pictures; returns its exit code."""
    from oneb.cli.guard import reports_mistakes
    from oneb.presets import resolve
    from oneb.show import recorder
    from oneb.train import setup
    from oneb.train.run import train

    setup.EVAL_ITER_TOKENS = 512

    for name in ("write_plots", "write_summary", "write_report"):
        setattr(recorder, name, lambda directory: None)
    return reports_mistakes(lambda _: train(resolve({**TINY, **given})))()


def _serve() -> None:
    sys.path.insert(0, str(Path(__file__).parent))
    sys.path.insert(0, str(Path(__file__).parents[1]))
    importlib.import_module("oneb.train.run")
    for line in sys.stdin:
        asked = json.loads(line)
        if "wait" not in asked:
            answer = _fork(asked)
        elif asked["wait"] is None:
            answer = None
        else:
            pid, status = os.waitpid(asked["wait"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        sys.__stdout__.write(json.dumps(answer) + "\n")
        sys.__stdout__.flush()


def _fork(asked: dict) -> int:
    if pid := os.fork():
        return pid
    os.setsid()
    for number, flags in ((0, os.O_RDONLY), (1, os.O_WRONLY | os.O_CREAT), (2, None)):
        os.dup2(1 if flags is None else os.open(os.devnull if number == 0 else asked["output"], flags, 0o600), number)
    try:
        code = getattr(importlib.import_module(asked["module"]), asked["name"])(**asked["given"])
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 70
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _serve()
