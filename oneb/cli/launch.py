"""``oneb launch`` and ``run_1b_launch.py``: plan a run, print its command, and with ``--run`` start it.

Imports no torch, so that a plan is there at once, on any machine.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from oneb.cli.guard import reports_mistakes
from oneb.cli.options import OptionParser, add_config_options, config_from_args, config_to_args, shell_command
from oneb.config import DEMO_DATA, Config
from oneb.errors import OnebError
from oneb.planner import make_plan, plan_lines, warnings
from oneb.train.rundir import check_resume, run_directory

_REPOSITORY = Path(__file__).resolve().parents[2]
_EPILOG = """\
examples:
  python3 run_1b_launch.py --device cuda --data fineweb_1b.npy            plan, and print the command
  python3 run_1b_launch.py --device cuda --data fineweb_1b.npy --run      train
  python3 run_1b_launch.py --device auto --size nano --data demo --run    a demonstration on any machine
"""


def build_parser() -> argparse.ArgumentParser:
    """The launcher's options: those of a run, and ``--run``."""
    parser = OptionParser(
        prog="run_1b_launch.py", usage="run_1b_launch.py [options] [--run]",
        description="Plan a ~1B-parameter pretraining run; with --run, start it.",
        epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )
    parser.add_argument("--run", action="store_true", help="start the run (default: a dry run that only prints)")
    add_config_options(parser)
    return parser


@reports_mistakes
def main(argv: Sequence[str] | None = None) -> int:
    """Plan, print, and with ``--run`` become the training process. Returns the exit code."""
    args = build_parser().parse_args(argv)
    start = vars(args).pop("run")
    config = config_from_args(args)
    check_resume(config)
    for line in plan_lines(make_plan(config), config):
        print(line)
    for note in [*warnings(config), *_data_notes(config)]:
        print(f"[note] {note}")
    directory = run_directory(config)
    print(f"[plan] run_directory={directory.path}{directory.note}")
    interpreter = find_interpreter()
    words = [[interpreter, "-m", "oneb.train"], *config_to_args(config)]
    # Python finds the package in the working directory; from anywhere else it must be told.
    elsewhere = [] if Path.cwd() == _REPOSITORY else [["env", f"PYTHONPATH={_REPOSITORY}"]]
    print(f"\n{shell_command([*elsewhere, *words])}\n")
    if not start:
        print("This was a dry run: add --run to start, or paste the command above.")
        return 0
    if directory.skip:
        print("Nothing to do (--if-exists skip).")
        return 0
    _check_dependencies(interpreter)
    sys.stdout.flush()
    # The training process takes this one's place: signals and the exit code are its own, and no shell is involved.
    _make_importable()
    return os.execv(interpreter, [word for line in words for word in line])


def _data_notes(config: Config) -> list[str]:
    path = config.data.path
    if path == DEMO_DATA or "*" in path or Path(path).exists():
        return []
    return [f"--data {path} is not there yet; make it with: python3 prepare_fineweb.py --tokens 1B --output {path}"]


def find_interpreter() -> str:
    """This Python if it can train, else the one that quickstart.sh set up in ``.venv``."""
    local = _REPOSITORY / ".venv" / "bin" / "python"
    if not _missing_modules() or not local.exists():
        return sys.executable
    return str(local)


def _missing_modules() -> list[str]:
    return [name for name in ("torch", "numpy") if importlib.util.find_spec(name) is None]


def _check_dependencies(interpreter: str) -> None:
    missing = _missing_modules()
    if missing and interpreter == sys.executable:
        raise OnebError(f"{interpreter} has no {' and no '.join(missing)}; `bash quickstart.sh` sets everything up, "
                        "or install PyTorch here, then `python3 -m pip install -r requirements_runtime.txt`")


def _make_importable() -> None:
    """Let the child find this checkout from any working directory, installed or not."""
    paths = [str(_REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
