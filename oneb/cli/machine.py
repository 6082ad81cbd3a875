"""The GPU that a plan is for: the one in this machine, or one that the user names."""

from __future__ import annotations

import os
from dataclasses import dataclass

from oneb.config import Config
from oneb.errors import OnebError
from oneb.gpus import Gpu, detect, get_gpu
from oneb.planner import Plan, fit_to, make_plan
from oneb.units import format_gib


@dataclass(frozen=True)
class Machine:
    """A GPU to plan for.

    Attributes:
        name: as the driver calls it, or the table's key.
        gpu: the table's entry; None for a card that is not in it.
        memory_bytes: what a run may take of it.
        is_here: it is in this machine, and its free memory was asked for.
    """

    name: str
    gpu: Gpu | None
    memory_bytes: int
    is_here: bool

    def described(self) -> str:
        """The card, its memory, and how well its speed is known."""
        memory = format_gib(self.memory_bytes)
        where = f"{self.name} (in this machine): {memory} free" if self.is_here else f"{self.name}: {memory} to use"
        if self.gpu is None:
            return f"gpu={where}; it is not in our table, so no speed is expected of it"
        if not self.gpu.measured:
            return f"gpu={where}; its speed is an estimate from its data sheet, as it was never measured"
        return f"gpu={where}"


def find_machine(key: str | None, device: str, *, must_be_here: bool) -> Machine | None:
    """The GPU called ``key``, or without one the GPU of this machine.

    Args:
        device: the run's ``--device``.
        must_be_here: a run is to start.

    Returns:
        None where no GPU is to be planned for.

    Raises:
        OnebError: no GPU is called that, or it is not the one that a run would be started on.
    """
    named = get_gpu(key) if key else None
    if device in ("cpu", "mps"):
        if named:
            raise OnebError(f"--gpu {key} plans for a GPU, and --device {device} trains without one; leave one of "
                            "them out")
        return None
    which = visible_gpu(os.environ.get("CUDA_VISIBLE_DEVICES"))
    found = None if which is None else detect(which)
    if found and (named is None or named == found.gpu):
        return Machine(found.name, found.gpu, found.free_bytes, is_here=True)
    if named is None:
        return None
    if must_be_here:
        there = f"the GPU here is {found.name}" if found else "nvidia-smi finds no GPU here"
        raise OnebError(f"--gpu {key} with --run or --rehearse: {there}; leave --gpu out to train on what is here, or "
                        "--run to plan only")
    return Machine(named.key, named, named.usable_bytes, is_here=False)


def visible_gpu(visible: str | None) -> str | None:
    """What ``nvidia-smi --id`` calls the first GPU that CUDA_VISIBLE_DEVICES shows; None if it shows none."""
    if visible is None:
        return "0"
    first = visible.split(",")[0].strip()
    return None if first in ("", "-1") else first


def plan_for(config: Config, machine: Machine | None, price: float | None = None) -> Plan:
    """The plan of ``config``, fitted to ``machine`` if there is one. ``price``: dollars an hour, wins over others."""
    if machine is None:
        return make_plan(config, price=price)
    return make_plan(config, gpu=machine.gpu, fit=fit_to(config, machine.gpu, machine.memory_bytes), price=price)
