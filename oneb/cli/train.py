"""``python -m oneb.train`` and ``oneb train``: the training process."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from oneb.cli.guard import reports_mistakes
from oneb.cli.options import OptionParser, add_config_options, config_from_args
from oneb.errors import OnebError


def build_parser() -> argparse.ArgumentParser:
    """The options of a run; ``run_1b_launch.py`` takes the same and prints this command in full."""
    parser = OptionParser(prog="python -m oneb.train", usage="python -m oneb.train [options]", allow_abbrev=False,
                          description="Train. `run_1b_launch.py` plans first, and prints this command.")
    add_config_options(parser)
    return parser


@reports_mistakes
def main(argv: Sequence[str] | None = None) -> int:
    """Train; returns the exit code (0, 2 for a user's mistake, 128 + signal after a stop)."""
    args = build_parser().parse_args(argv)
    # Segments that grow in place keep long schedules from fragmenting memory. Read when torch first allocates.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    config = config_from_args(args)
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is repeatable with a fixed workspace only
    try:
        import torch
    except ImportError:
        raise OnebError(f"{sys.executable} has no PyTorch; `bash quickstart.sh` sets everything up, or install the "
                        "build for your machine") from None
    from oneb.train.trainer import train

    try:
        return train(config)
    except KeyboardInterrupt:  # before the first step: there is nothing to save
        print("\nstopped before the first step", file=sys.stderr)
        return 130
    except torch.OutOfMemoryError as error:
        raise OnebError(
            f"the GPU ran out of memory ({str(error).splitlines()[0]}); what helps, in this order: a smaller "
            f"--batch-size with more --grad-accum (now {config.train.batch_size} x {config.train.grad_accum}), "
            "--grad-checkpoint, a shorter --seq-schedule, --optimizer lion, a smaller --size"
        ) from error
