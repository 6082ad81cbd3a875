"""The rehearsal as the launcher sees it: two training processes, what they measured, and whether the disk is enough.

Imports no torch. What the processes do is :mod:`oneb.train.rehearse`.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from oneb.checkpoints.disk import check_room, check_start, least_disk_use
from oneb.checkpoints.rundir import run_directory
from oneb.cli.plan_text import wrapped
from oneb.config import Config
from oneb.errors import OnebError
from oneb.planner import Disk
from oneb.train.signals import StopRequest
from oneb.units import format_count, format_duration, format_gib

RESULT = "rehearsal.json"  # in the rehearsal's folder: what its processes measured
_FOLDER_PREFIX = ".rehearsal_"
_ABANDONED_S = 3600  # a rehearsal takes a minute or two


@dataclass(frozen=True)
class Rehearsal:
    """What a rehearsal measured.

    Attributes:
        seconds: the rehearsal itself.
        tok_s: tokens a second, by sequence length.
        peak_gib: most GPU memory taken, that of the CUDA context included, by sequence length; empty off CUDA.
        save_s, checkpoint_bytes: of a checkpoint such as the run will save.
        eval_s: a whole evaluation.
        loss, reloaded_loss: of the last step after the checkpoint, here and in the process that had reloaded it.
        batch: (batch_size, grad_accum, recomputed_layers) of the steps, by sequence length.
    """

    seconds: float
    tok_s: dict[int, float]
    peak_gib: dict[int, float]
    save_s: float
    checkpoint_bytes: int
    eval_s: float
    loss: float
    reloaded_loss: float
    batch: dict[int, tuple[int, int, int]]


def rehearse(interpreter: str, words: Sequence[str], config: Config) -> Rehearsal:
    """Rehearse a run. Nothing of it is left, on the disk or elsewhere.

    The children inherit the environment, in which ``interpreter`` must find the package.

    Args:
        interpreter: the Python that will train.
        words: what follows ``-m oneb.train`` on the run's command line; they describe ``config``.

    Raises:
        OnebError: something would go wrong, with the fix and the exit code of the process that found it.
        SystemExit: 128 + signal, after SIGINT, SIGTERM or SIGHUP.
    """
    began = time.perf_counter()
    root = Path(config.run.root).absolute()
    directory = run_directory(config)
    _remove_abandoned(root)
    check_start(config, directory)
    command = [interpreter, "-m", "oneb.train", *words]
    with _Child() as child, _scratch_folder(root) as folder:
        child.run([*command, "--rehearsal", str(folder)])
        found = _read(folder)
        check_room(config, directory, _measured_disk_use(config, found), reclaimed=found["checkpoint_bytes"])
        child.run([*command, "--rehearsal-check", str(folder)])
        found = _read(folder)
    lengths = {length["seq_len"]: length for length in found["lengths"]}
    return Rehearsal(
        seconds=time.perf_counter() - began,
        tok_s={seq_len: length["tok_s"] for seq_len, length in lengths.items()},
        peak_gib={seq_len: peak for seq_len, length in lengths.items() if (peak := length["peak_gib"]) is not None},
        save_s=found["save_s"], checkpoint_bytes=found["checkpoint_bytes"], eval_s=found["eval_s"],
        loss=found["losses"][-1], reloaded_loss=found["reloaded_losses"][-1],
        batch={seq_len: (length["batch_size"], length["grad_accum"], length["recomputed_layers"])
               for seq_len, length in lengths.items()},
    )


def rehearsal_lines(rehearsal: Rehearsal) -> list[str]:
    """What a rehearsal measured, for people."""
    lines = []
    for seq_len, tok_s in rehearsal.tok_s.items():
        rows, accumulated, recomputed = rehearsal.batch[seq_len]
        peak = f", peak {rehearsal.peak_gib[seq_len]:.1f} GiB" if seq_len in rehearsal.peak_gib else ""
        text = f"{seq_len} tokens: {format_count(tok_s)} tok/s{peak}, micro-batch {rows} x {accumulated}"
        if recomputed:
            text += f", {recomputed} layer{'s' * (recomputed > 1)} recomputed"
        lines += wrapped("[rehearsal] ", text)
    equal = rehearsal.loss == rehearsal.reloaded_loss
    same = f"equal ({rehearsal.loss:.4g})" if equal else f"{rehearsal.reloaded_loss:.6g} for {rehearsal.loss:.6g}"
    lines += wrapped("[rehearsal] ", f"checkpoint {format_gib(rehearsal.checkpoint_bytes)} saved in "
                     f"{rehearsal.save_s:.1f}s, reloaded, next loss {same}")
    return [*lines, f"[rehearsal] evaluation {rehearsal.eval_s:.1f}s | {format_duration(rehearsal.seconds)} in all"]


# -- The disk ------------------------------------------------------------------------------------

def _measured_disk_use(config: Config, found: dict[str, Any]) -> Disk:
    """What the checkpoints will take, from the size of a real one."""
    planned = least_disk_use(config)
    # So many of them, by the plan's own count.
    copies = (planned.total_bytes - planned.best_bytes) // planned.last_bytes
    size, weights = found["checkpoint_bytes"], found["weights_bytes"]
    return Disk(size, weights, planned.step_files, copies * size + weights)


def _remove_abandoned(root: Path) -> None:
    """Delete what rehearsals left whose launcher was killed: some GiB each."""
    for folder in root.glob(f"{_FOLDER_PREFIX}*"):
        with contextlib.suppress(FileNotFoundError):  # another launcher was as quick
            if time.time() - folder.stat().st_mtime > _ABANDONED_S:
                print(f"[note] removing {folder}, which a killed rehearsal left", flush=True)
                shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _scratch_folder(root: Path) -> Iterator[Path]:
    """A folder where the run will write, so that it is the real disk that is tried; removed, whatever happens."""
    made = [folder for folder in (root, *root.parents) if not folder.exists()]
    try:
        root.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=_FOLDER_PREFIX, dir=root))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            if folder.exists():
                print(f"[note] {folder} could not be removed; delete it", flush=True)
    finally:
        for parent in made:
            with contextlib.suppress(OSError):  # something else is there by now
                parent.rmdir()


def _read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / RESULT).read_text(encoding="utf-8"))


# -- The processes -------------------------------------------------------------------------------

class _Child:
    """Runs commands one at a time and sends them the signals that this process gets.

    The first signal goes on as it came; a second one kills. Each child has a session of its own, so that it gets a
    terminal's Ctrl-C once, and so that compile workers end with it.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._process: subprocess.Popen[str] | None = None
        self._previous: dict[int, Any] = {}

    def run(self, command: Sequence[str]) -> None:
        """Run a command to its end, its output indented.

        Raises:
            OnebError: it failed; the message is its own.
            SystemExit: after a signal.
        """
        self._leave_if_told()
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, encoding="utf-8", errors="replace", start_new_session=True,
        )
        if self.signum:  # it came while there was nobody to send it to
            self._send(self.signum)
        try:
            said = self._forward_output()
            code = self._process.wait()
        finally:
            self._send(signal.SIGKILL)  # it, if we are on the way out; else what it left behind
            self._process.wait()
            self._process.stdout.close()
            self._process = None
        self._leave_if_told()
        if code:
            how = f"exit code {code}" if code > 0 else f"ended by {signal.Signals(-code).name}"
            raise OnebError(f"the rehearsal failed ({how}): {said or 'it said nothing'}")

    def _forward_output(self) -> str:
        """Show what the child says; its error message, if there is one, is returned instead, else its last line."""
        error: list[str] = []
        last = ""
        for line in self._process.stdout:
            line = line.rstrip()
            last = line or last
            if error or line.startswith("error: "):
                error.append(line.removeprefix("error: "))
            else:
                print(f"  {line}", flush=True)
        return "\n".join(error) or last

    def _leave_if_told(self) -> None:
        if self.signum:
            print(f"the rehearsal was stopped by {signal.Signals(self.signum).name}; nothing of it is left", flush=True)
            raise SystemExit(128 + self.signum)

    def _send(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # all of them have ended (macOS: so the latter)
            os.killpg(self._process.pid, number)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        again, self.signum = self.signum is not None, number
        if self._process:
            self._send(signal.SIGKILL if again else number)

    def __enter__(self) -> _Child:
        for number in StopRequest.SIGNALS:
            # nohup has SIGHUP ignored.
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
