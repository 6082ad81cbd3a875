"""The ``oneb`` command: one subcommand a file of :mod:`oneb.cli`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from oneb import __version__

_COMMANDS = {
    "launch": "plan a run; with --run, start it",
    "plan": "compare GPUs and variants: memory, time and money of a run",
    "train": "train (what launch prints)",
    "prepare": "make a token file from FineWeb-Edu or local text",
    "data": "look into a token file: statistics and decoded samples",
    "sample": "generate text from a checkpoint",
    "report": "redraw the plots and summary of a run directory",
    "bench": "measure the training step: speed, where its time goes, the hardware's ceilings",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``oneb COMMAND …``; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] in _COMMANDS:
        # Imported on use: `oneb launch` must not wait for torch.
        return importlib.import_module(f"oneb.cli.{words[0]}").main(words[1:])
    if words and words[0] == "--version":
        print(f"oneb {__version__}")
        return 0
    asked = words and words[0] in ("-h", "--help")
    if words and not asked:
        print(f"error: {words[0]!r} is not a command of oneb; choose one of {', '.join(_COMMANDS)}", file=sys.stderr)
        return 2
    print("usage: oneb COMMAND [options]   (oneb COMMAND --help shows a command's options)\n")
    for name, text in _COMMANDS.items():
        print(f"  {name:<8} {text}")
    return 0 if asked else 2
