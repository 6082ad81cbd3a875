"""The Triton kernels against their twins, bit for bit.

On a machine with CUDA the ``gpu`` tests compare them there. Without, this file runs itself in a second
process under Triton's interpreter (it must be switched on before Triton is imported), and compiles the
kernels for the GPUs that matter, since the interpreter accepts more than the compiler does.
"""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from oneb.kernels import optimizer_step, optimizer_step8
from oneb.kernels.runtime import triton_available
from oneb.optim import LossScaler, build_optimizer, clip_scale, grad_norm

KINDS = ("lion", "adamw", "lion8bit", "adamw8bit")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = (1, 7, 1024, 4099)
SCALES = (0.37, 1.0, float("nan"), float("inf"), float("-inf"))

needs_triton = pytest.mark.skipif(not triton_available(), reason="Triton is not installed")


def tensors(
    kind: str, dtype: torch.dtype, grad_dtype: torch.dtype, n: int, device: str,
) -> list[torch.Tensor]:
    """Weight, gradient and state with the values that go wrong: zeros, subnormals, exact and huge ones."""
    generator = torch.Generator().manual_seed(n)

    def mixed(scale: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        # The interpreter, unlike a GPU, loads bf16 subnormals as zeros.
        tiny = 1e-37 if dtype == torch.bfloat16 and device == "cpu" else 1e-40
        special = torch.tensor([0.0, -0.0, 1.0, -0.5, 1e-7, -3e-6, 6e4, -65504.0, tiny])
        values = torch.randn(n, generator=generator) * scale
        values[::17] = special.repeat(n // len(special) + 1)[: len(values[::17])]
        return values.to(dtype)

    def codes(lowest: int, dtype: torch.dtype) -> list[torch.Tensor]:
        """Any codes with scales from none to large; the last block is short."""
        scales = 10.0 ** torch.randint(-9, 0, (optimizer_step8.n_state_blocks(n),), generator=generator)
        scales[::3] = 0
        return [torch.randint(lowest, torch.iinfo(dtype).max + 1, (n,), generator=generator).to(dtype), scales]

    values = [mixed(0.02, dtype), mixed(1.0, grad_dtype)]
    values += codes(-127, torch.int8) if "8bit" in kind else [mixed(0.1)]
    if "adamw" in kind:
        values += codes(0, torch.uint8) if "8bit" in kind else [mixed(1.0).square()]
    return [value.to(device) for value in values]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view({4: torch.int32, 2: torch.int16, 1: torch.int8}[tensor.element_size()])


def step_of(kind: str, version: str):
    return getattr(optimizer_step8 if "8bit" in kind else optimizer_step, f"{kind}_step_{version}")


def kernel_of(kind: str):
    return getattr(optimizer_step8 if "8bit" in kind else optimizer_step, f"_{kind}_kernel")


def compare(kind: str, dtype: torch.dtype, n: int, device: str) -> None:
    """Some steps of kernel and twin side by side; every tensor must stay equal in every bit."""
    settings = {"lr": 1e-3, "betas": (0.9, 0.98), "weight_decay": 0.1}
    for grad_dtype in {dtype, torch.float32}:
        plain = tensors(kind, dtype, grad_dtype, n, device)
        fused = [tensor.clone() for tensor in plain]
        for step, scale in enumerate(SCALES):
            before = [tensor.clone() for tensor in plain]
            extra = {"key": optimizer_step.rounding_key(5, step, 2)}
            if "adamw" in kind:
                extra |= {"eps": 1e-8, "n_updates": step + 1}
            grad_scale = torch.tensor(scale, device=device)
            step_of(kind, "plain")(*plain, grad_scale, **settings, **extra)
            step_of(kind, "fused")(*fused, grad_scale, **settings, **extra)
            for one, other, old in zip(plain, fused, before, strict=True):
                assert torch.equal(bits(one), bits(other)), (kind, dtype, grad_dtype, n, scale)
                if not grad_scale.isfinite():
                    assert torch.equal(bits(one), bits(old)), "a skipped step changed something"
            assert torch.isfinite(plain[0]).all()
        if n > 1:  # the only element of n = 1 is a zero
            assert not torch.equal(plain[0], tensors(kind, dtype, grad_dtype, n, device)[0])


def compare_all(device: str) -> None:
    for kind in KINDS:
        for dtype in DTYPES:
            for n in SIZES:
                compare(kind, dtype, n, device)


@needs_triton
def test_kernels_equal_twins_in_the_interpreter():
    from second_process import python

    assert "interpreted" in python("-m", "tests.test_optim_fused", TRITON_INTERPRET="1")


def test_without_triton_the_twins_remain():
    from second_process import python

    code = (
        "import sys; sys.modules['triton'] = None\n"  # makes `import triton` fail
        "import torch; from oneb.kernels import optimizer_step as s, runtime\n"
        "p, g, m = torch.zeros(3, 5).unbind()\n"
        "s.lion_step_plain(p, g + 1, m, torch.ones(()), lr=1., betas=(.9, .99), weight_decay=0., key=1)\n"
        "print(runtime.triton_available(), p.tolist())"
    )
    assert python("-c", code).strip() == "False [-1.0, -1.0, -1.0, -1.0, -1.0]"


@needs_triton
@pytest.mark.parametrize("capability", [75, 80, 90])  # T4; A100; H100 and H200
@pytest.mark.parametrize("kind", KINDS)
def test_kernels_compile_without_fused_multiply_add(kind, capability):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = kernel_of(kind)
    if not hasattr(kernel, "params"):
        pytest.skip("Triton's interpreter is on in this process")
    for dtype in ("bf16", "fp16"):
        constants = {p.name: 1024 if p.name == "BLOCK" else p.default for p in kernel.params if p.is_constexpr}
        types = {"param_ptr": f"*{dtype}", "grad_ptr": f"*{dtype}"} | dict.fromkeys(constants, "constexpr")
        types |= dict.fromkeys(("n_elements", "key"), "i32")
        if "8bit" in kind:
            types |= {"exp_avg_ptr": "*i8", "exp_avg_sq_ptr": "*u8"}
        signature = {
            name: types.get(name, "*fp32" if name.endswith("_ptr") else "fp32") for name in kernel.arg_names
        }
        source = ASTSource(kernel, signature, constants)
        options = {"enable_fp_fusion": False}
        ptx = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["ptx"]
        assert "fma." not in ptx  # would round once where the twin rounds twice
        # Nor may subnormals be flushed, which the twin keeps (floor may: below one it is zero anyway).
        assert not re.search(r"\b(add|sub|mul|div|sqrt)\.[\w.]*ftz", ptx)


def training_tensors(fused: bool, kind: str, dtype: torch.dtype) -> list[torch.Tensor]:
    """Weights, state and loss scale after a few whole steps on CUDA."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(33, 127), nn.GELU(), nn.Linear(127, 3)).to("cuda", dtype)
    inputs = torch.randn(16, 33).to("cuda", dtype)
    optimizer = build_optimizer(
        model.named_parameters(), kind=kind, betas=(0.9, 0.99), weight_decay=0.1, seed=3, fused=fused,
    )
    assert optimizer.fused == fused
    scaler = LossScaler(dtype == torch.float16, "cuda")
    previous_mode = torch.cuda.get_sync_debug_mode()
    for step in range(5):
        loss = model(inputs).float().square().mean()
        scaler.scale_loss(loss).backward()
        if step:  # the first compiles; from then on a wait for the device is an error
            torch.cuda.set_sync_debug_mode("error")
        norm = grad_norm(optimizer.params, scaler.inv_scale)
        optimizer.step(1e-3, step, clip_scale(norm, 1.0, scaler.inv_scale))
        scaler.update(norm)
        optimizer.zero_grad()
        torch.cuda.set_sync_debug_mode(previous_mode)
    states = [t for state in optimizer.state_dict()["state"].values() for t in state.values()]
    assert any(state.dtype == torch.int8 for state in states) == ("8bit" in kind)
    return [t.detach().cpu() for t in [*optimizer.params, *states, scaler.scale]]


@needs_triton
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
class TestOnGpu:
    @pytest.mark.parametrize("n", [*SIZES, 1_000_003])
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("kind", KINDS)
    def test_kernel_equals_twin(self, kind, dtype, n):
        compare(kind, dtype, n, "cuda")

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("kind", KINDS)
    def test_training_is_the_same_and_never_waits(self, kind, dtype):
        fused = training_tensors(True, kind, dtype)
        plain = training_tensors(False, kind, dtype)
        for one, other in zip(fused, plain, strict=True):
            assert torch.equal(one, other)

    def test_twin_on_cpu_equals_twin_on_gpu(self):
        for kind in KINDS:
            settings = {"lr": 1e-3, "betas": (0.9, 0.98), "weight_decay": 0.1, "key": 77}
            if "adamw" in kind:
                settings |= {"eps": 1e-8, "n_updates": 2}
            step = step_of(kind, "plain")
            on_cpu = tensors(kind, torch.bfloat16, torch.bfloat16, 4099, "cpu")
            on_gpu = [tensor.cuda() for tensor in on_cpu]
            step(*on_cpu, torch.tensor(0.5), **settings)
            step(*on_gpu, torch.tensor(0.5, device="cuda"), **settings)
            for one, other in zip(on_cpu, on_gpu, strict=True):
                assert torch.equal(bits(one), bits(other.cpu()))

    @pytest.mark.parametrize("kind", ["lion", "lion8bit"])
    def test_no_kernel_is_compiled_anew_at_a_later_step(self, kind):
        settings = {"betas": (0.9, 0.98), "weight_decay": 0.1}
        case = tensors(kind, torch.bfloat16, torch.bfloat16, 4099, "cuda")
        scale = torch.tensor(1.0, device="cuda")
        step = step_of(kind, "fused")

        def compiled() -> int:
            (cache, *_), = kernel_of(kind).device_caches.values()
            return len(cache)

        step(*case, scale, lr=1e-3, key=12345, **settings)
        count = compiled()
        for key in (0, 1, 16, 2**31 - 1, 2**31, 2**32 - 1):
            step(*case, scale, lr=key * 1e-12, key=key, **settings)
        assert compiled() == count


if __name__ == "__main__":
    assert not hasattr(optimizer_step._lion_kernel, "device_caches"), "Triton's interpreter is off"
    compare_all("cpu")
    print("interpreted")
