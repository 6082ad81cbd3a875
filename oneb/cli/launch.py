"""``oneb launch`` and ``run_1b_launch.py``: plan a run, print its command, and with ``--run`` start it.

Imports no torch, so that a plan is there at once, on any machine.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oneb.advice import advice
from oneb.checkpoints.rundir import RunDirectory, check_resume, continued, read_sidecar, run_directory
from oneb.cli.budget import resolve_for, steps_for_budget
from oneb.cli.data_size import count_tokens, vocabulary
from oneb.cli.guard import reports_mistakes
from oneb.cli.machine import Machine, find_machine, plan_for
from oneb.cli.options import OptionParser, add_config_options, config_to_args, shell_command
from oneb.cli.plan_text import money_lines, need_lines, run_lines, stdout_is_plain, wrapped
from oneb.config import DEMO_DATA, Config
from oneb.data.names import parse_name
from oneb.errors import OnebError
from oneb.planner import Plan
from oneb.presets import resolve
from oneb.units import format_count, format_dollars, format_duration

_REPOSITORY = Path(__file__).resolve().parents[2]
_EPILOG = """\
examples:
  python3 run_1b_launch.py --device cuda --data fineweb_1b.npy            plan, and print the command
  python3 run_1b_launch.py --device cuda --data fineweb_1b.npy --run      rehearse for a minute, then train
  python3 run_1b_launch.py --data fineweb_1b.npy --gpu h100 --price 2.49  what it takes on a card to be rented
  python3 run_1b_launch.py --data fineweb_1b.npy --gpu h100 --budget 40   as many steps as $40 buy there
  python3 run_1b_launch.py --device auto --size nano --data demo --run    a demonstration on any machine
`oneb plan` compares GPUs and variants.
"""


@dataclass(frozen=True)
class Launch:
    """The launcher's own options: what to do, and with what machine and money."""

    run: bool
    rehearse: bool | None
    gpu: str | None
    budget: float | None

    def rehearses(self, config: Config, machine: Machine | None) -> bool:
        """Whether a rehearsal comes before the run: as asked, else before every run on a GPU."""
        if self.rehearse is not None:
            return self.rehearse
        return self.run and (config.train.device == "cuda" or machine is not None)


def build_parser() -> argparse.ArgumentParser:
    """The launcher's options: those of a run, and its own."""
    parser = OptionParser(
        prog="run_1b_launch.py", usage="run_1b_launch.py [options] [--run]",
        description="Plan a ~1B-parameter pretraining run; with --run, start it.",
        epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )
    add = parser.add_argument
    add("--run", action="store_true", help="start the run (default: a dry run that only prints)")
    add("--rehearse", action=argparse.BooleanOptionalAction, default=None,
        help="about a minute of the real thing first: data, disk, memory, save, reload, speed; alone: that only "
        "(default: before --run on a GPU)")
    add("--gpu", metavar="KEY", help="plan for this card: h100, a100-80, 4090, … (default: the one in this machine)")
    add("--budget", type=float, metavar="DOLLARS", help="as many steps as this buys at --price, or at the GPU table's "
        "approximate price; the learning rate then ends with the money")
    add_config_options(parser)
    return parser


@reports_mistakes
def main(argv: Sequence[str] | None = None) -> int:
    """Plan, print, rehearse, and with ``--run`` become the training process. Returns the exit code."""
    given = vars(build_parser().parse_args(argv))
    launch = Launch(**{name: given.pop(name) for name in Launch.__dataclass_fields__})
    config = resolve_for(given, launch.budget)
    machine = find_machine(launch.gpu, config.train.device, must_be_here=launch.run or bool(launch.rehearse))
    directory = run_directory(config)
    if launch.budget is not None:
        config = resolve({**given, "steps": steps_for_budget(launch.budget, config, machine, directory)})
    differences = check_resume(config)
    plan = plan_for(continued(config, directory), machine)
    _print_plan(plan, config, machine, launch, directory)
    for note in differences:
        for line in wrapped("[note] ", note):
            print(line)
    interpreter = find_interpreter()
    words = _print_command(interpreter, config)
    if (directory.skip or _is_done(config, directory)) and (launch.run or launch.rehearse):
        print("Nothing to do (--if-exists skip)." if directory.skip else
              "Nothing to do: every step is done; more --steps would go on, with --allow-change where the rate depends "
              "on them.")
        return 0
    if launch.run or launch.rehearse:
        _check_dependencies(interpreter)
        _make_importable()
    if launch.rehearses(config, machine):
        tok_s = _rehearsed(interpreter, words, config)
        plan = plan.measured(tok_s)
        if launch.budget is not None and directory.resume_from is None:
            config, plan, words = _budget_again(launch.budget, given, config, plan, machine, interpreter, words)
        for line in [*money_lines(plan), *_left(plan, directory)]:
            print(line)
    if not launch.run:
        print("This was a rehearsal: add --run to train." if launch.rehearse else
              "This was a dry run: add --run to start, or paste the command above.")
        return 0
    sys.stdout.flush()
    # The training process takes this one's place: signals and the exit code are its own, and no shell is involved.
    return os.execv(interpreter, [interpreter, "-m", "oneb.train", *words])


def _is_done(config: Config, directory: RunDirectory) -> bool:
    """Whether the run that is continued has reached its last step."""
    return directory.resume_from is not None and read_sidecar(directory.resume_from)["step"] >= config.train.steps


# ---- what is printed


def _print_plan(plan: Plan, config: Config, machine: Machine | None, launch: Launch, directory: RunDirectory) -> None:
    for line in run_lines(plan, config, plain=stdout_is_plain()):
        print(line)
    if machine:
        about = machine.described()
    elif config.train.device in ("cuda", "auto"):
        about = "no GPU here: add --gpu h100 (or a100-80, 4090, …) to plan memory, time and money for one"
    else:
        about = ""
    for line in [*wrapped("[plan] ", about), "", *need_lines(plan)]:
        print(line)
    if launch.budget is not None and directory.resume_from is None:
        for line in wrapped("[plan] ", f"budget={format_dollars(launch.budget)}: buys {plan.steps:,} steps, "
                            f"{format_count(plan.tokens)} tokens, for {format_dollars(plan.dollars)}"):
            print(line)
    for note in advice(plan, config, count_tokens(config.data.path, config.data.format)):
        for line in wrapped("[note] ", note):
            print(line)
    for line in [*_data_notes(config), *_left(plan, directory)]:
        print(line)
    print(f"[plan] run_directory={directory.path}{directory.note}")


def _left(plan: Plan, directory: RunDirectory) -> list[str]:
    """What a run that is continued has still to do."""
    if directory.resume_from is None:
        return []
    step = read_sidecar(directory.resume_from)["step"]
    left = plan.after(step)
    if not left.phases:
        return [f"[plan] resumes at step {step:,}: nothing is left to do"]
    text = f"resumes at step {step:,}: {left.steps:,} steps and {format_count(left.tokens)} tokens are left"
    if left.seconds is not None:
        text += f", {format_duration(left.seconds)}"
    if left.dollars is not None:
        text += f", {format_dollars(left.dollars)}"
    return wrapped("[plan] ", text)


def _print_command(interpreter: str, config: Config) -> list[str]:
    """Print the training command as a paragraph to paste; returns its arguments after ``-m oneb.train``."""
    words = config_to_args(config)
    # Python finds the package in the working directory; from anywhere else it must be told.
    elsewhere = [] if Path.cwd() == _REPOSITORY else [["env", f"PYTHONPATH={_REPOSITORY}"]]
    print(f"\n{shell_command([*elsewhere, [interpreter, '-m', 'oneb.train'], *words])}\n")
    return [word for line in words for word in line]


def _data_notes(config: Config) -> list[str]:
    path = config.data.path
    if (name := parse_name(path)) is not None:
        to_do = name.to_do(config.data.data_root)
        return wrapped("[note] ", to_do) if to_do else []
    if (size := vocabulary(path, config.data.format)) > config.model.vocab_size:
        return wrapped("[note] ", f"--data {path} was made with a vocabulary of {size}, the model has "
                       f"{config.model.vocab_size}: the run needs --vocab-size {size}")
    if path == DEMO_DATA or "*" in path or Path(path).exists():
        return []
    # A line of its own: it is there to be pasted.
    return [f"[note] --data {path} is not there yet; make it with:",
            f"       python3 prepare_fineweb.py --tokens 1B --output {path}"]


# ---- what is done


def _rehearsed(interpreter: str, words: list[str], config: Config) -> dict[int, float]:
    """Rehearse and report; returns tokens a second by sequence length."""
    from oneb.cli import rehearse

    sys.stdout.flush()
    rehearsal = rehearse.rehearse(interpreter, words, config)
    for line in rehearse.rehearsal_lines(rehearsal):
        print(line)
    return rehearsal.tok_s


def _budget_again(
    dollars: float, given: Mapping[str, Any], config: Config, plan: Plan, machine: Machine | None, interpreter: str,
    words: list[str],
) -> tuple[Config, Plan, list[str]]:
    """The length that the money buys at the speed that was measured."""
    tok_s = {phase.seq_len: phase.tok_s for phase in plan.phases}
    steps = steps_for_budget(dollars, config, machine, None, tok_s)
    if steps == config.train.steps:
        return config, plan, words
    print(f"[plan] at the measured speed {format_dollars(dollars)} buys {steps:,} steps instead of "
          f"{config.train.steps:,}:")
    config = resolve({**given, "steps": steps})
    return config, plan_for(config, machine).measured(tok_s), _print_command(interpreter, config)


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
