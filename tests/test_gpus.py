"""GPUs: the table against data sheets, names that users give, the card of this machine (by a stand-in nvidia-smi)."""

import random
import stat
import string
import time

import pytest

from oneb.errors import OnebError
from oneb.gpus import GPUS, PRICES, detect, find_gpu, get_gpu

# Names as CUDA reports them -> (key, peak dense 16-bit TFLOP/s of the data sheet, GB).
DEVICES = {
    "NVIDIA B200": ("b200", 2250, 180),
    "NVIDIA GH200 480GB": ("gh200", 989, 96),
    "NVIDIA H200": ("h200", 989, 141),
    "NVIDIA H100 80GB HBM3": ("h100", 989, 80),
    "NVIDIA H100 PCIe": ("h100-pcie", 756, 80),
    "NVIDIA H100 NVL": ("h100-nvl", 835, 94),
    "NVIDIA A100-SXM4-80GB": ("a100-80", 312, 80),
    "NVIDIA A100 80GB PCIe": ("a100-80", 312, 80),
    "NVIDIA A100-SXM4-40GB": ("a100-40", 312, 40),
    "NVIDIA A100-PCIE-40GB": ("a100-40", 312, 40),
    "A100-SXM4-40GB": ("a100-40", 312, 40),
    "NVIDIA L40S": ("l40s", 362, 48),
    "NVIDIA L40": ("l40", 181, 48),
    "NVIDIA L4": ("l4", 121, 24),
    "NVIDIA RTX 6000 Ada Generation": ("a6000-ada", 364, 48),
    "NVIDIA RTX A6000": ("a6000", 155, 48),
    "NVIDIA A40": ("a40", 150, 48),
    "NVIDIA A10": ("a10", 125, 24),
    "NVIDIA GeForce RTX 5090": ("5090", 209.5, 32),
    "NVIDIA GeForce RTX 4090": ("4090", 165.2, 24),
    "NVIDIA GeForce RTX 3090": ("3090", 71, 24),
    "NVIDIA RTX PRO 6000 Blackwell Server Edition": ("pro6000", 503.8, 96),
    "NVIDIA RTX PRO 6000 Blackwell Workstation Edition": ("pro6000", 503.8, 96),
    "NVIDIA RTX A5000": ("a5000", 111, 24),
    "NVIDIA RTX A4000": ("a4000", 76.7, 16),
    "NVIDIA GeForce RTX 5080": ("5080", 112.6, 16),
    "NVIDIA GeForce RTX 4080": ("4080", 97.5, 16),
    "NVIDIA GeForce RTX 4070": ("4070", 58.3, 12),
    "NVIDIA GeForce RTX 4060 Ti": ("4060ti-16", 44.1, 16),
    "NVIDIA GeForce RTX 4060": ("4060", 30.2, 8),
    "NVIDIA GeForce RTX 3080": ("3080", 59.5, 10),
    "NVIDIA GeForce RTX 3070": ("3070", 40.6, 8),
    "NVIDIA GeForce RTX 3060": ("3060", 25.5, 12),
    "NVIDIA GeForce RTX 2080 Ti": ("2080ti", 53.8, 11),
    "Tesla V100-SXM2-32GB": ("v100-32", 125, 32),
    "Tesla V100-SXM2-16GB": ("v100", 125, 16),
    "Tesla T4": ("t4", 65, 16),
}
# Cards that are not listed, though some names come close.
UNLISTED = ("NVIDIA GB200", "NVIDIA H200 NVL", "NVIDIA A10G", "NVIDIA GeForce RTX 4090 D", "Tesla P100-PCIE-16GB",
            "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 3090 Ti", "NVIDIA T400", "AMD Instinct MI300X",
            "NVIDIA GeForce RTX 4080 SUPER", "NVIDIA GeForce RTX 3060 Ti", "NVIDIA RTX A4000 Laptop GPU",
            "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", "cpu", "")


@pytest.mark.parametrize("name", DEVICES)
def test_gpus_by_their_real_names(name):
    gpu = find_gpu(name)
    assert gpu is not None
    assert (gpu.key, gpu.flops_16bit / 1e12, gpu.vram_gib) == DEVICES[name]


@pytest.mark.parametrize("name", UNLISTED)
def test_other_gpus_are_unknown(name):
    assert find_gpu(name) is None


def test_the_gpu_table_is_whole():
    assert len({gpu.key for gpu in GPUS}) == len(GPUS)
    assert all(gpu.source for gpu in GPUS)
    # A listed card that no name reaches would be dead weight.
    assert {gpu.key for gpu in GPUS} == {key for key, _, _ in DEVICES.values()}
    # bf16 came with compute capability 8.0 (Ampere).
    assert {gpu.key for gpu in GPUS if not gpu.has_bf16} == {"t4", "v100", "v100-32", "2080ti"}
    # fp8 came with 8.9 (Ada) and 9.0 (Hopper), at twice the 16-bit rate.
    ampere = {"a100-80", "a100-40", "a6000", "a5000", "a4000", "a40", "a10", "3090", "3080", "3070", "3060"}
    assert {gpu.key for gpu in GPUS if gpu.flops_fp8 is None} == ampere | {"t4", "v100", "v100-32", "2080ti"}
    assert all(1.99 < gpu.flops_fp8 / gpu.flops_16bit < 2.03 for gpu in GPUS if gpu.flops_fp8)


# fp32 TFLOP/s outside of the tensor cores, as the data sheets have it: it hangs on exponentials a clock.
FP32 = {"a100-80": 19.5, "h100": 67, "h200": 67, "l4": 30.3, "l40s": 91.6, "l40": 90.5, "a6000-ada": 91.1, "t4": 8.1,
        "a6000": 38.7, "a40": 37.4, "a10": 31.2, "v100": 15.7, "5090": 104.8, "4090": 82.6, "3090": 35.6,
        "3080": 29.8, "3060": 12.7, "4080": 48.7, "2080ti": 13.4, "a4000": 19.2, "b200": 75}


@pytest.mark.parametrize("key", FP32)
def test_arithmetic_outside_of_the_tensor_cores_is_that_of_the_data_sheets(key):
    """Data sheets of Hopper quote it at a higher clock than their tensor cores; the table keeps to one clock."""
    assert get_gpu(key).flops_fp32 / 1e12 == pytest.approx(FP32[key], rel=0.1)


# The smallest "total capacity" of each, in GiB, that torch gave in users' reports of memory that ran out.
CAPACITY = {"t4": 14.56, "4090": 23.64, "h100": 79.11, "l4": 22.03, "a10": 22.06, "a100-40": 39.38, "h200": 139.72}


def test_usable_memory_is_a_little_less_than_cuda_reports_and_never_more():
    for key, gib in CAPACITY.items():
        assert 0.97 * gib < get_gpu(key).usable_bytes / 2**30 < gib, key
    for gpu in GPUS:
        # A GB is 1000**3 or 1024**3 bytes, as the maker likes; error correction takes 1/16 of GDDR.
        assert 0.9 * gpu.vram_gib * 1e9 < gpu.usable_bytes < gpu.vram_gib * 2**30, gpu.key


def test_prices_are_of_listed_cards_and_dated():
    assert set(PRICES) <= {gpu.key for gpu in GPUS}
    for gpu in GPUS:
        assert (gpu.price_per_hour is None) == (gpu.price_source is None)
        if gpu.price_per_hour:
            assert 0.05 < gpu.price_per_hour < 20
            assert "202" in gpu.price_source
    # A price that is not known must not read as free.
    assert get_gpu("3070").price_per_hour is None


# ---- names that users give

@pytest.mark.parametrize(("given", "key"), [
    ("a100", "a100-80"), ("A100-80GB", "a100-80"), ("a100-40gb", "a100-40"), ("rtx4090", "4090"),
    ("RTX 4090", "4090"), ("GeForce RTX 3060", "3060"), ("H100 SXM", "h100"), ("h100_pcie", "h100-pcie"),
    ("h100-80gb", "h100"), ("RTX A6000", "a6000"), ("RTX 6000 Ada", "a6000-ada"), ("Tesla T4", "t4"), (" L4 ", "l4"),
    ("4060 Ti", "4060ti-16"), ("NVIDIA H200", "h200"), ("NVIDIA A100-SXM4-40GB", "a100-40"), ("v100-16GB", "v100"),
    ("v100-32gb", "v100-32"), ("2080 Ti", "2080ti"),
    *((gpu.key, gpu.key) for gpu in GPUS), *((gpu.key.upper(), gpu.key) for gpu in GPUS),
])
def test_a_card_by_what_users_call_it(given, key):
    assert get_gpu(given).key == key


def test_every_real_name_is_also_a_key():
    for name in DEVICES:
        assert get_gpu(name) == find_gpu(name)


@pytest.mark.parametrize(("given", "close"), [("h1000", "h100"), ("rtx4900", "4090"), ("a100-90", "a100-80")])
def test_a_misspelt_card_is_told_what_was_meant(given, close):
    with pytest.raises(OnebError, match=rf"no GPU '{given}' is known.* Did you mean .*\b{close}\b"):
        get_gpu(given)


def test_no_other_text_is_a_card():
    rng = random.Random(5)
    for _ in range(200):
        given = "".join(rng.choices(string.ascii_lowercase, k=rng.randint(1, 12)))
        with pytest.raises(OnebError, match="Known: b200, .*t4"):
            get_gpu(given)
    with pytest.raises(OnebError, match="for another card"):
        get_gpu("")


# ---- the card of this machine

def install_nvidia_smi(monkeypatch, folder, script):
    """A program of that name, before all others on the PATH."""
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_the_card_here_is_found_with_what_cuda_may_take_of_it(monkeypatch, tmp_path):
    install_nvidia_smi(monkeypatch, tmp_path,
                       f'echo "$@" > {tmp_path}/asked; echo "NVIDIA H100 80GB HBM3, 1024, 79983"')
    found = detect()
    assert found.gpu == get_gpu("h100")
    assert found.name == "NVIDIA H100 80GB HBM3"
    assert (found.total_bytes, found.free_bytes) == (81007 * 2**20, 79983 * 2**20)
    assert (tmp_path / "asked").read_text().split() == [
        "--id=0", "--query-gpu=name,memory.used,memory.free", "--format=csv,noheader,nounits"]
    detect("GPU-1234")
    assert "--id=GPU-1234" in (tmp_path / "asked").read_text()


def test_a_card_that_is_not_listed_is_found_all_the_same(monkeypatch, tmp_path):
    install_nvidia_smi(monkeypatch, tmp_path, 'echo "Some, Other Card, 3, 8000"')
    gpu, name, total_bytes, free_bytes = detect()
    assert (gpu, name, total_bytes, free_bytes) == (None, "Some, Other Card", 8003 * 2**20, 8000 * 2**20)


@pytest.mark.parametrize("script", [
    "echo No devices were found; exit 6", "exit 9", "true", 'echo "NVIDIA GB10, [N/A], [N/A]"',
    'echo "NVIDIA H100 80GB HBM3, 1, 79983"; exit 1', 'echo "NVIDIA-SMI has failed because it could not talk"',
])
def test_a_driver_without_an_answer_is_no_gpu(monkeypatch, tmp_path, script):
    install_nvidia_smi(monkeypatch, tmp_path, script)
    assert detect() is None


def test_a_machine_without_nvidia_smi_has_no_gpu(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert detect() is None


def test_a_driver_that_hangs_is_not_waited_for(monkeypatch, tmp_path):
    install_nvidia_smi(monkeypatch, tmp_path, "exec sleep 60")
    start = time.monotonic()
    assert detect(timeout_s=0.3) is None
    assert time.monotonic() - start < 5
