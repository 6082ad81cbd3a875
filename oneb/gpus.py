"""What GPUs can do: peak arithmetic, memory bandwidth, size and price, each with its source; and which one is here.

Peaks are dense (no structured sparsity) and, on consumer cards, with fp32 accumulation, which is
what training uses. A card that is not listed has no MFU: a guess would be worse than none.
"""

from __future__ import annotations

import difflib
import re
import subprocess
from dataclasses import dataclass
from typing import NamedTuple

from oneb.errors import OnebError

_MIB, _GIB = 2**20, 2**30
# What the driver keeps of a card for itself, beside 1% of it: torch reports 14.56 GiB of a T4's 15360 MiB
# (github.com/Zheng-Chong/CatVTON/issues/133), 23.64 of a 4090's 24564 MiB (3DTopia/Phidias-Diffusion/issues/8),
# 79.11 of an H100's 81559 MiB (vllm-project/vllm/issues/27508). The rule stays below each of them.
_DRIVER_BYTES = 0.3 * _GIB
_DRIVER_SHARE = 0.01


@dataclass(frozen=True)
class Gpu:
    """One GPU model.

    Attributes:
        key: short name on the command line.
        marks: words that the device name that CUDA reports must all have.
        flops_16bit: peak dense bf16 (fp16 where the card has no bf16) FLOP/s.
        bytes_per_s: memory bandwidth.
        vram_gib: memory, as sold.
        memory_mib: memory as nvidia-smi's memory.total shows it, error correction on where the card has it.
        flops_per_exponential: 16-bit tensor FLOPs in the time of one exponential. Special-function units give 16
            results a clock and multiprocessor (CUDA C++ Programming Guide, table of arithmetic throughput, compute
            capability 7.0 to 12.0); tensor cores, by generation, 512 (GeForce) to 8192 FLOPs.
        source: where peak and bandwidth come from.
        fp32_per_exponential: fp32 FLOPs, outside of the tensor cores, in the same time.
        has_bf16: native bf16 arithmetic (compute capability 8.0 and later).
        flops_fp8: peak dense fp8 FLOP/s, of the same source; None where the card has no fp8 (compute capability
            below 8.9).
        measured: whether expected speeds (:func:`oneb.roofline.table_speed`) were calibrated on this card; they are
            estimates on every other.
    """

    key: str
    marks: tuple[str, ...]
    flops_16bit: float
    bytes_per_s: float
    vram_gib: int
    memory_mib: int
    flops_per_exponential: int
    source: str
    fp32_per_exponential: int = 16
    has_bf16: bool = True
    flops_fp8: float | None = None
    measured: bool = False

    @property
    def exponentials_per_s(self) -> float:
        """Peak of the special-function units, at the clock of the other peaks."""
        return self.flops_16bit / self.flops_per_exponential

    @property
    def flops_fp32(self) -> float:
        """Peak fp32 FLOP/s outside of the tensor cores: products stay in full fp32, without TF32."""
        return self.exponentials_per_s * self.fp32_per_exponential

    @property
    def usable_bytes(self) -> int:
        """What CUDA can give to processes of an idle card, never more than it really is: see ``_DRIVER_BYTES``."""
        return int(self.memory_mib * _MIB * (1 - _DRIVER_SHARE) - _DRIVER_BYTES)

    @property
    def price_per_hour(self) -> float | None:
        """An approximate on-demand price in dollars, to compare cards by; None where none was found."""
        return PRICES[self.key][0] if self.key in PRICES else None

    @property
    def price_source(self) -> str | None:
        """Whose price it is, and of which day."""
        return PRICES[self.key][1] if self.key in PRICES else None


# The first match wins: a more specific name stands before the one it contains.
# memory_mib: nvidia-smi's tables as users post them in public repositories ("143771MiB" of an H200, …).
GPUS: tuple[Gpu, ...] = (
    Gpu("b200", ("B200",), 2.25e15, 8.0e12, 180, 183359, 512, "NVIDIA DGX B200 datasheet, per GPU", flops_fp8=4.5e15),
    Gpu("gh200", ("GH200",), 989e12, 4.0e12, 96, 97871, 256, "NVIDIA GH200 datasheet (96 GB HBM3)",
        flops_fp8=1979e12),
    Gpu("h200", ("H200",), 989e12, 4.8e12, 141, 143771, 256, "NVIDIA H200 SXM datasheet", flops_fp8=1979e12,
        measured=True),
    Gpu("h100-nvl", ("H100", "NVL"), 835e12, 3.9e12, 94, 95830, 256, "NVIDIA H100 NVL datasheet", flops_fp8=1671e12),
    Gpu("h100-pcie", ("H100", "PCIe"), 756e12, 2.0e12, 80, 81559, 256, "NVIDIA H100 PCIe datasheet",
        flops_fp8=1513e12),
    Gpu("h100", ("H100",), 989e12, 3.35e12, 80, 81559, 256, "NVIDIA H100 SXM datasheet", flops_fp8=1979e12),
    Gpu("a100-80", ("A100", "80GB"), 312e12, 2.0e12, 80, 81920, 128, "NVIDIA A100 80GB datasheet",
        fp32_per_exponential=8),
    Gpu("a100-40", ("A100",), 312e12, 1.555e12, 40, 40960, 128, "NVIDIA A100 40GB datasheet",
        fp32_per_exponential=8),
    Gpu("l40s", ("L40S",), 362e12, 864e9, 48, 46068, 64, "NVIDIA L40S datasheet", flops_fp8=733e12),
    Gpu("l40", ("L40",), 181e12, 864e9, 48, 46068, 32, "NVIDIA L40 datasheet", flops_fp8=362e12),
    Gpu("l4", ("L4",), 121e12, 300e9, 24, 23034, 64, "NVIDIA L4 datasheet", flops_fp8=242.5e12),
    Gpu("pro6000", ("PRO", "6000", "Blackwell"), 503.8e12, 1.792e12, 96, 97887, 64,
        "NVIDIA RTX PRO 6000 Blackwell whitepaper, fp32 accumulate", flops_fp8=1007.6e12),
    Gpu("a6000-ada", ("6000", "Ada"), 364e12, 960e9, 48, 49140, 64, "NVIDIA RTX 6000 Ada datasheet",
        flops_fp8=728.5e12),
    Gpu("a6000", ("A6000",), 155e12, 768e9, 48, 49140, 64, "NVIDIA RTX A6000 datasheet"),
    Gpu("a5000", ("A5000",), 111e12, 768e9, 24, 24564, 64, "NVIDIA RTX A5000 datasheet"),
    Gpu("a4000", ("A4000",), 76.7e12, 448e9, 16, 16376, 64, "NVIDIA RTX A4000 datasheet"),
    Gpu("a40", ("A40",), 150e12, 696e9, 48, 46068, 64, "NVIDIA A40 datasheet"),
    Gpu("a10", ("A10",), 125e12, 600e9, 24, 23028, 64, "NVIDIA A10 datasheet"),
    Gpu("5090", ("5090",), 209.5e12, 1.79e12, 32, 32607, 32, "NVIDIA Blackwell GeForce whitepaper, fp32 accumulate",
        flops_fp8=419e12),
    Gpu("5080", ("5080",), 112.6e12, 960e9, 16, 16303, 32, "NVIDIA Blackwell GeForce whitepaper, fp32 accumulate",
        flops_fp8=225.1e12),
    Gpu("4090", ("4090",), 165.2e12, 1.008e12, 24, 24564, 32, "NVIDIA Ada whitepaper, fp32 accumulate",
        flops_fp8=330.3e12),
    Gpu("4080", ("4080",), 97.5e12, 716.8e9, 16, 16376, 32, "NVIDIA Ada whitepaper, fp32 accumulate",
        flops_fp8=194.9e12),
    Gpu("4070", ("4070",), 58.3e12, 504e9, 12, 12282, 32, "NVIDIA RTX 4070 specifications: 29.15 fp32 TFLOPS, tensor "
        "cores with fp32 accumulation twice that (Ada whitepaper)", flops_fp8=116.6e12),
    # The 8 GB card has the same name; detect() reads how much there is.
    Gpu("4060ti-16", ("4060", "Ti"), 44.1e12, 288e9, 16, 16380, 32, "NVIDIA RTX 4060 Ti specifications: 22.06 fp32 "
        "TFLOPS, tensor cores with fp32 accumulation twice that (Ada whitepaper)", flops_fp8=88.2e12),
    Gpu("4060", ("4060",), 30.2e12, 272e9, 8, 8188, 32, "NVIDIA RTX 4060 specifications: 15.11 fp32 TFLOPS, tensor "
        "cores with fp32 accumulation twice that (Ada whitepaper)", flops_fp8=60.4e12),
    Gpu("3090", ("3090",), 71e12, 936e9, 24, 24576, 32, "NVIDIA Ampere GA102 whitepaper, fp32 accumulate"),
    Gpu("3080", ("3080",), 59.5e12, 760e9, 10, 10240, 32, "NVIDIA Ampere GA102 whitepaper, fp32 accumulate"),
    Gpu("3070", ("3070",), 40.6e12, 448e9, 8, 8192, 32, "NVIDIA Ampere GA102 whitepaper (appendix on the RTX 3070), "
        "fp32 accumulate"),
    Gpu("3060", ("3060",), 25.5e12, 360e9, 12, 12288, 32, "NVIDIA RTX 3060 specifications: 12.74 fp32 TFLOPS, tensor "
        "cores with fp32 accumulation twice that (Ampere GA102 whitepaper)"),
    Gpu("2080ti", ("2080", "Ti"), 53.8e12, 616e9, 11, 11264, 32, "NVIDIA Turing whitepaper, fp16, fp32 accumulate",
        fp32_per_exponential=8, has_bf16=False),
    Gpu("v100-32", ("V100", "32GB"), 125e12, 900e9, 32, 32768, 64, "NVIDIA V100 SXM2 datasheet, fp16",
        fp32_per_exponential=8, has_bf16=False),
    Gpu("v100", ("V100",), 125e12, 900e9, 16, 16384, 64, "NVIDIA V100 SXM2 datasheet, fp16",
        fp32_per_exponential=8, has_bf16=False),
    Gpu("t4", ("T4",), 65e12, 320e9, 16, 15360, 64, "NVIDIA T4 datasheet, fp16", fp32_per_exponential=8,
        has_bf16=False),
)

# Dollars an hour of one GPU, on demand, and whose price it was when. Prices move: --price is the user's own.
_SECURE = "RunPod Secure Cloud, "
_COMMUNITY = "RunPod Community Cloud, 2026-03 (as reported by deploybase.ai)"
_AKASH = "Akash, starting price, 2026-09-20"
PRICES: dict[str, tuple[float, str]] = {
    "b200": (6.79, _SECURE + "2026-10-07"), "h200": (4.59, _SECURE + "2026-10-07"),
    "h100": (3.99, _SECURE + "2026-11-09"), "h100-pcie": (2.89, _SECURE + "2026-11-09"),
    "h100-nvl": (3.19, _SECURE + "2026-11-09"), "a100-80": (1.79, _SECURE + "2026-11-09"),
    "a40": (0.44, _SECURE + "2026-08-19"), "a100-40": (1.99, "Lambda, 2026-11-16"),
    "a6000": (0.82, "Verda, 2026-10-29"),
    "l40s": (0.79, _COMMUNITY), "l40": (0.69, _COMMUNITY), "l4": (0.44, _COMMUNITY), "5090": (0.69, _COMMUNITY),
    "4090": (0.34, _COMMUNITY), "3090": (0.22, _COMMUNITY),
    "pro6000": (2.04, _AKASH), "4080": (0.15, _AKASH), "3060": (0.14, _AKASH), "v100": (0.36, _AKASH),
    "v100-32": (0.17, _AKASH), "t4": (0.15, _AKASH),
}

# Words that make another card of a listed name, such as "RTX 4090 D", unless the entry has them itself.
_OTHER_CARD = frozenset({"D", "Laptop", "Max", "NVL", "SUPER", "Ti"})
# Further names, written as _plain leaves them.
_ALIASES = {"a100": "a100-80", "a100sxm": "a100-80", "a100pcie": "a100-80", "h100sxm": "h100", "h10080": "h100",
            "4060ti": "4060ti-16", "6000ada": "a6000-ada", "v10016": "v100"}


def find_gpu(device_name: str) -> Gpu | None:
    """The table's entry for a CUDA device name ("NVIDIA H100 80GB HBM3"), or None if it is not listed."""
    # Whole words: "L40S" contains "L4", and "GB200" contains "B200".
    words = set(device_name.replace("-", " ").replace("_", " ").split())
    for gpu in GPUS:
        if words.issuperset(gpu.marks) and not (words & _OTHER_CARD).difference(gpu.marks):
            return gpu
    return None


def get_gpu(key: str) -> Gpu:
    """The table's entry for what a user calls a card: ``h100``, ``A100-80GB``, ``rtx4090``, ``NVIDIA L4``.

    Raises:
        OnebError: if no listed card is called that.
    """
    keys = {_plain(gpu.key): gpu for gpu in GPUS}
    plain = _plain(key)
    found = keys.get(_plain(_ALIASES.get(plain, key))) or find_gpu(key)
    if found is None:
        close = [keys[match].key for match in difflib.get_close_matches(plain, keys, n=3, cutoff=0.5)]
        meant = f" Did you mean {' or '.join(close)}?" if close else ""
        raise OnebError(f"no GPU {key!r} is known here.{meant} Known: {', '.join(gpu.key for gpu in GPUS)}; "
                        "for another card, give one that is like it, with --vram-limit-gib for its memory")
    return found


def _plain(name: str) -> str:
    """Lower case, without makers' and series' names, signs and a closing "GB"."""
    return re.sub(r"nvidia|geforce|rtx|tesla|quadro|gb$|[^a-z0-9]", "", name.strip().lower())


class DetectedGpu(NamedTuple):
    """A GPU of this machine.

    Attributes:
        gpu: its entry in the table; None if it is not listed.
        name: as the driver calls it.
        total_bytes: what CUDA can give to all processes together.
        free_bytes: what it can give now.
    """

    gpu: Gpu | None
    name: str
    total_bytes: int
    free_bytes: int


def detect(which: str = "0", *, timeout_s: float = 5.0) -> DetectedGpu | None:
    """The GPU of this machine, asked of nvidia-smi, so that neither torch nor CUDA is loaded.

    Args:
        which: index (in the order of the PCI bus), UUID ("GPU-…") or PCI address.
        timeout_s: how long the driver may take to answer.

    Returns:
        None without nvidia-smi, without such a GPU, and where it gives no answer.
    """
    # Not memory.total: it holds what the driver keeps for itself, which used and free leave out.
    query = ["nvidia-smi", f"--id={which}", "--query-gpu=name,memory.used,memory.free", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=timeout_s)
    except (OSError, subprocess.TimeoutExpired):
        return None
    name, *sizes = (part.strip() for part in done.stdout.partition("\n")[0].rsplit(",", 2))
    # "[N/A]" where memory is shared with the host.
    if done.returncode or len(sizes) != 2 or not all(size.isdecimal() for size in sizes):
        return None
    used, free = (int(size) * _MIB for size in sizes)
    return DetectedGpu(find_gpu(name), name, used + free, free)
