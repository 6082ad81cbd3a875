"""The device a run trains on, and what it can do."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from oneb.errors import OnebError
from oneb.gpus import Gpu, find_gpu


@dataclass(frozen=True)
class Device:
    """A device that is there.

    Attributes:
        torch: as torch names it.
        name: as people name it ("NVIDIA H200", "cpu").
        gpu: the card's figures, or None where they are not known.
        has_bf16: native bf16 arithmetic.
        free_bytes: memory that is free now; None where it is the host's.
    """

    torch: torch.device
    name: str
    gpu: Gpu | None
    has_bf16: bool
    free_bytes: int | None

    @property
    def is_cuda(self) -> bool:
        """Whether this is a CUDA GPU."""
        return self.torch.type == "cuda"

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
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, found in there.items() if found)
    if not there[name]:
        raise OnebError(f"--device {name} was asked for, and this PyTorch ({torch.__version__}) sees none; "
                        "use --device auto, or check `nvidia-smi` and that PyTorch is a CUDA build")
    if name != "cuda":
        return Device(torch.device(name), name, None, True, None)
    device = torch.device("cuda", torch.cuda.current_device())
    card = torch.cuda.get_device_name(device)
    # is_bf16_supported() says yes to slow emulation as well; the capability does not.
    has_bf16 = torch.cuda.get_device_capability(device)[0] >= 8
    return Device(device, card, find_gpu(card), has_bf16, torch.cuda.mem_get_info(device)[0])
