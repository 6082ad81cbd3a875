"""``python -m oneb.train`` and ``oneb train``: the training process."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from oneb.cli.guard import reports_mistakes
from oneb.cli.options import OptionParser, add_config_options, config_from_args
from oneb.cli.rehearse import RESULT
from oneb.config import Config
from oneb.errors import OnebError
from oneb.files import write_json

_STOPPED = "stopped before the first step"


def build_parser() -> argparse.ArgumentParser:
    """The options of a run; ``run_1b_launch.py`` takes the same and prints this command in full."""
    parser = OptionParser(prog="python -m oneb.train", usage="python -m oneb.train [options]", allow_abbrev=False,
                          description="Train. `run_1b_launch.py` plans first, and prints this command.")
    # For oneb.cli.rehearse: the two halves of a rehearsal, and the folder that both know.
    for flag in ("--rehearsal", "--rehearsal-check"):
        parser.add_argument(flag, type=Path, help=argparse.SUPPRESS)
    add_config_options(parser)
    return parser


@reports_mistakes
def main(argv: Sequence[str] | None = None) -> int:
    """Train; returns the exit code (0, 2 for a user's mistake, 128 + signal after a stop)."""
    args = build_parser().parse_args(argv)
    rehearsal, rehearsal_check = vars(args).pop("rehearsal"), vars(args).pop("rehearsal_check")
    # Segments that grow in place keep long schedules from fragmenting memory. Read when torch first allocates.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    config = config_from_args(args)
    # W&B's reports about its own client, to a server that does not answer, would hold up the process's end by 15 s.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is repeatable with a fixed workspace only
    try:
        return _train(config, rehearsal, rehearsal_check)
    except KeyboardInterrupt:  # before the first step: there is nothing to save
        print(f"\n{_STOPPED}", file=sys.stderr)
        return 130


@contextlib.contextmanager
def _ended_by_ctrl_c() -> Iterator[None]:
    """While libraries are loaded: a KeyboardInterrupt that is raised inside their C++ would abort the process."""
    def end(signum: int, frame: object) -> None:
        os.write(2, f"\n{_STOPPED}\n".encode())
        os._exit(130)

    # Elsewhere than in the main thread, or where it is ignored, nothing is raised.
    raised = (threading.current_thread() is threading.main_thread()
              and signal.getsignal(signal.SIGINT) is signal.default_int_handler)
    if raised:
        signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        if raised:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _train(config: Config, rehearsal: Path | None, rehearsal_check: Path | None) -> int:
    try:
        with _ended_by_ctrl_c():
            import torch
    except ImportError:
        raise OnebError(f"{sys.executable} has no PyTorch; `bash quickstart.sh` sets everything up, or install the "
                        "build for your machine") from None
    try:
        if folder := rehearsal or rehearsal_check:
            return _rehearse(config, folder, is_check=rehearsal is None)
        with _ended_by_ctrl_c():
            from oneb.train.run import train
        return train(config)
    except torch.OutOfMemoryError as error:  # a step that runs out of memory is made smaller by the trainer
        raise OnebError(
            f"the GPU ran out of memory beside the steps ({str(error).splitlines()[0]}); what helps, in this order: to "
            "end other programs that use it (see `nvidia-smi`), --optimizer lion8bit, a smaller --batch-size (now "
            f"{config.train.batch_size or 'auto'}), a shorter --seq-schedule, a smaller --size"
        ) from error


def _rehearse(config: Config, folder: Path, *, is_check: bool) -> int:
    from oneb.train.rehearse import check, rehearse

    if is_check:
        found = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        found["reloaded_losses"] = check(config, folder, found)
    else:
        found = rehearse(config, folder)
    write_json(folder / RESULT, found)
    return 0
