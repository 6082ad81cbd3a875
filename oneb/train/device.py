"""The device a run trains on, and what it can do."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from oneb.errors import OnebError
from oneb.gpus import Gpu, find_gpu
from oneb.memory import CONTEXT_BYTES
from oneb.units import GIB


@dataclass(frozen=True)
class Device:
    """A device that is there.

    Attributes:
        torch: as torch names it.
        name: as people name it ("NVIDIA H200", "cpu").
        gpu: the card's figures, or None where they are not known.
        has_bf16: native bf16 arithmetic.
        has_fp8: fp8 matrix products; on the CPU, where they are only imitated, if it was asked for by name.
    """

    torch: torch.device
    name: str
    gpu: Gpu | None
    has_bf16: bool
    has_fp8: bool

    @property
    def is_cuda(self) -> bool:
        """Whether this is a CUDA GPU."""
        return self.torch.type == "cuda"

    def limit_memory(self, limit_gib: float | None) -> int | None:
        """Keep this process within ``limit_gib`` GiB, what it holds outside of torch's allocator included.

        Returns:
            All the bytes that it may take, so counted: no more than it has and what is free; None off CUDA.
        """
        if not self.is_cuda:
            return None
        free, total = torch.cuda.mem_get_info(self.torch)
        # What is taken already is this process's context, if it is no more than one can be; the rest is others'.
        context = min(total - free - torch.cuda.memory_reserved(self.torch), CONTEXT_BYTES)
        budget = free + context
        if limit_gib is not None:
            budget = min(budget, int(limit_gib * GIB))
            allocator = max(0, budget - CONTEXT_BYTES)
            torch.cuda.set_per_process_memory_fraction(min(1.0, allocator / total), self.torch)
        return budget

    def synchronize(self) -> None:
        """Wait until everything asked of the device is done."""
        if self.is_cuda:
            torch.cuda.synchronize()
        elif self.torch.type == "mps":
            torch.mps.synchronize()

    def peak_gib(self) -> float | None:
        """Most memory that tensors have taken since the start, in GiB; None off CUDA."""
        return torch.cuda.max_memory_allocated() / 2**30 if self.is_cuda else None


def open_device(name: str) -> Device:
    """The device behind ``--device``: cuda, mps, cpu, or auto for the first of these that is there.

    Raises:
        OnebError: it is not there.
    """
    has_fp8 = name == "cpu"  # not where "auto" found nothing better
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, found in there.items() if found)
    if not there[name]:
        raise OnebError(f"--device {name} was asked for, and this PyTorch ({torch.__version__}) sees none; "
                        "use --device auto, or check `nvidia-smi` and that PyTorch is a CUDA build")
    if name != "cuda":
        return Device(torch.device(name), name, None, True, has_fp8)
    device = torch.device("cuda", torch.cuda.current_device())
    card = torch.cuda.get_device_name(device)
    # is_bf16_supported() says yes to slow emulation as well; the capability does not.
    capability = torch.cuda.get_device_capability(device)
    return Device(device, card, find_gpu(card), capability[0] >= 8, capability >= (8, 9))


def check_precision(device: Device, precision: str | None) -> None:
    """Refuse ``--precision fp8`` where there is no fp8.

    Raises:
        OnebError: the device cannot.
    """
    if precision != "fp8" or device.has_fp8:
        return
    needs = ("--precision fp8 needs a GPU with compute capability 8.9 or later (L4, L40S, RTX 4090, H100 and newer), "
             f"and this run is on {device.name}")
    if device.is_cuda:
        raise OnebError(f"{needs}; use --precision {'bf16' if device.has_bf16 else 'fp16'}")
    raise OnebError(f"{needs}; use --precision bf16 or fp32 (--device cpu imitates fp8, slowly)")
