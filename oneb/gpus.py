"""What GPUs can do: peak arithmetic, memory bandwidth and size, each with its source.

Peaks are dense (no structured sparsity) and, on consumer cards, with fp32 accumulation, which is
what training uses. A card that is not listed has no MFU: a guess would be worse than none.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """One GPU model.

    Attributes:
        key: short name on the command line.
        marks: words that the device name that CUDA reports must all have.
        flops_16bit: peak dense bf16 (fp16 where the card has no bf16) FLOP/s.
        flops_fp8: peak dense fp8 FLOP/s, of the same source; None where the card has no fp8 (compute capability
            below 8.9).
        bytes_per_s: memory bandwidth.
        vram_gib: memory, as sold.
        has_bf16: native bf16 arithmetic (compute capability 8.0 and later).
        source: where the figures come from.
    """

    key: str
    marks: tuple[str, ...]
    flops_16bit: float
    bytes_per_s: float
    vram_gib: int
    source: str
    has_bf16: bool = True
    flops_fp8: float | None = None


# The first match wins: a more specific name stands before the one it contains.
GPUS: tuple[Gpu, ...] = (
    Gpu("b200", ("B200",), 2.25e15, 8.0e12, 180, "NVIDIA DGX B200 datasheet, per GPU", flops_fp8=4.5e15),
    Gpu("gh200", ("GH200",), 989e12, 4.0e12, 96, "NVIDIA GH200 datasheet (96 GB HBM3)", flops_fp8=1979e12),
    Gpu("h200", ("H200",), 989e12, 4.8e12, 141, "NVIDIA H200 SXM datasheet", flops_fp8=1979e12),
    Gpu("h100-nvl", ("H100", "NVL"), 835e12, 3.9e12, 94, "NVIDIA H100 NVL datasheet", flops_fp8=1671e12),
    Gpu("h100-pcie", ("H100", "PCIe"), 756e12, 2.0e12, 80, "NVIDIA H100 PCIe datasheet", flops_fp8=1513e12),
    Gpu("h100", ("H100",), 989e12, 3.35e12, 80, "NVIDIA H100 SXM datasheet", flops_fp8=1979e12),
    Gpu("a100-80", ("A100", "80GB"), 312e12, 2.0e12, 80, "NVIDIA A100 80GB datasheet"),
    Gpu("a100-40", ("A100",), 312e12, 1.555e12, 40, "NVIDIA A100 40GB datasheet"),
    Gpu("l40s", ("L40S",), 362e12, 864e9, 48, "NVIDIA L40S datasheet", flops_fp8=733e12),
    Gpu("l40", ("L40",), 181e12, 864e9, 48, "NVIDIA L40 datasheet", flops_fp8=362e12),
    Gpu("l4", ("L4",), 121e12, 300e9, 24, "NVIDIA L4 datasheet", flops_fp8=242.5e12),
    Gpu("a6000-ada", ("6000", "Ada"), 364e12, 960e9, 48, "NVIDIA RTX 6000 Ada datasheet", flops_fp8=728.5e12),
    Gpu("a6000", ("A6000",), 155e12, 768e9, 48, "NVIDIA RTX A6000 datasheet"),
    Gpu("a40", ("A40",), 150e12, 696e9, 48, "NVIDIA A40 datasheet"),
    Gpu("a10", ("A10",), 125e12, 600e9, 24, "NVIDIA A10 datasheet"),
    Gpu("5090", ("5090",), 209.5e12, 1.79e12, 32, "NVIDIA Blackwell GeForce whitepaper, fp32 accumulate",
        flops_fp8=419e12),
    Gpu("4090", ("4090",), 165.2e12, 1.008e12, 24, "NVIDIA Ada whitepaper, fp32 accumulate", flops_fp8=330.3e12),
    Gpu("3090", ("3090",), 71e12, 936e9, 24, "NVIDIA Ampere GA102 whitepaper, fp32 accumulate"),
    Gpu("v100", ("V100",), 125e12, 900e9, 16, "NVIDIA V100 SXM2 datasheet, fp16", has_bf16=False),
    Gpu("t4", ("T4",), 65e12, 320e9, 16, "NVIDIA T4 datasheet, fp16", has_bf16=False),
)

# Words that make another card of a listed name, such as "RTX 4090 D", unless the entry has them itself.
_OTHER_CARD = frozenset({"D", "Laptop", "NVL", "SUPER", "Ti"})


def find_gpu(device_name: str) -> Gpu | None:
    """The table's entry for a CUDA device name ("NVIDIA H100 80GB HBM3"), or None if it is not listed."""
    # Whole words: "L40S" contains "L4", and "GB200" contains "B200".
    words = set(device_name.replace("-", " ").replace("_", " ").split())
    for gpu in GPUS:
        if words.issuperset(gpu.marks) and not (words & _OTHER_CARD).difference(gpu.marks):
            return gpu
    return None
