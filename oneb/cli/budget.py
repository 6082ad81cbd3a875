"""``--budget``: how many steps money buys."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from oneb.checkpoints.rundir import RunDirectory
from oneb.cli.machine import Machine, plan_for
from oneb.config import Config, TrainConfig
from oneb.errors import ConfigErrors, OnebError
from oneb.planner import ASIDE_SHARE, steps_for_seconds
from oneb.presets import resolve


def resolve_for(given: Mapping[str, Any], dollars: float | None) -> Config:
    """The configuration of ``given``; with a budget its number of steps is still to be found.

    Raises:
        ConfigErrors: every fault, those of the budget beside the others.
    """
    if dollars is None:
        return resolve(given)
    faults = [f"--budget {dollars:g} and {flag} {given[name]} both set the length of the run; give one of them"
              for name, flag in (("steps", "--steps"), ("target_tokens", "--target-tokens")) if name in given]
    if not 0 < dollars < math.inf:
        faults.append(f"--budget {dollars:g} must be above 0, and a number of dollars")
    if given.get("price") == 0:
        faults.append("--budget buys time, and at --price 0 there is no end of it; give what an hour costs")
    # Any length will do that the warm-up fits into.
    steps = max(TrainConfig.steps, given.get("warmup_steps") or 0)
    try:
        config = resolve({**{name: given[name] for name in given if name not in ("steps", "target_tokens")},
                          "steps": steps})
    except ConfigErrors as error:
        raise ConfigErrors([*faults, *error.faults]) from None
    if faults:
        raise ConfigErrors(faults)
    return config


def steps_for_budget(
    dollars: float, config: Config, machine: Machine | None, directory: RunDirectory | None,
    measured: Mapping[int, float] | None = None,
) -> int:
    """The most steps whose time, start, evaluations and saves included, costs no more than ``dollars``.

    A run that is continued keeps the length that it was begun with, which its learning rate is a function of.

    Args:
        config: valid; its own number of steps does not matter.
        directory: of the run; None = a new one.
        measured: tokens a second by sequence length, in place of the expected ones.

    Raises:
        OnebError: price or speed are not known, or the money does not last for a step.
    """
    if directory and directory.resume_from:
        return _steps_begun_with(directory)
    if machine is None or machine.gpu is None:
        known = "no GPU is here" if machine is None else f"{machine.name} is not in our table"
        raise OnebError(f"--budget {dollars:g} buys time on a GPU whose speed is known, and {known}; add --gpu h100 "
                        "(or another of the table) to plan for one, or give --target-tokens")
    price = config.run.price if config.run.price is not None else machine.gpu.price_per_hour
    if price is None:
        raise OnebError(f"--budget {dollars:g} needs to know what an hour costs, and no price of {machine.name} is in "
                        "our table; add --price X")
    # As if every phase were reached, so that there is a speed for each.
    train = config.train
    every = replace(config, train=replace(train, steps=train.phases[-1][0] + 1))
    tok_s = {phase.seq_len: phase.tok_s for phase in plan_for(every, machine).phases} | dict(measured or {})
    seconds = dollars / price * 3600 * (1 - ASIDE_SHARE)
    steps = steps_for_seconds(train.phases, seconds, lambda n: n * train.sequences(n) / tok_s[n])
    if steps < 1:
        raise OnebError(f"--budget {dollars:g} does not last for one step at ${price:g} an hour; give more, or make "
                        "steps smaller (--grad-accum)")
    return steps


def _steps_begun_with(directory: RunDirectory) -> int:
    """``--steps`` of the run that is continued, from its ``config.json``."""
    path = directory.resume_from.parent / "config.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))["train"]["steps"]
    except (OSError, ValueError, KeyError, TypeError):
        raise OnebError(f"--budget plans a new run, and how long the one that is continued was planned to be is not in "
                        f"{path}; give its --steps instead") from None
