"""What the elementwise kernels' wrappers would launch, compiled for GPUs that matter: the interpreter accepts more."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from oneb.kernels import rms_norm, rotary, runtime, softmax_loss, swiglu
from oneb.kernels.float8 import Float8Cast

TRITON_NAMES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float8_e4m3fn: "fp8e4nv",
    torch.int32: "i32", torch.int64: "i64",
}
HEADS = {"wide": (32, 8, 64, 64, 32), "narrow": (32, 32, 12, 12, 4)}  # H, K, D, V, G/2


@pytest.fixture
def launches(monkeypatch):
    """(kernel, positional and keyword arguments) of every launch; none goes any further."""
    if not runtime.triton_available():
        pytest.skip("Triton is not installed")
    found = []

    class Recorder:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return lambda *arguments, **keywords: found.append((self.kernel, arguments, keywords))

    for module in (rms_norm, rotary, softmax_loss, swiglu):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            if not hasattr(getattr(module, name), "params"):
                pytest.skip("Triton's interpreter is on in this process")
            monkeypatch.setattr(module, name, Recorder(getattr(module, name)))
        if module is not softmax_loss:  # as on CUDA, where the kernels themselves store fp8
            monkeypatch.setattr(
                module, "stored_like", lambda x, shape, cast: x.new_empty(shape, dtype=cast.dtype if cast else x.dtype))
    return found


def launch_all(dtype: torch.dtype, cast: Float8Cast | None) -> None:
    def empty(*shape: int, dtype=torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, weight, angles_of = empty(64, 2048, dtype=dtype), empty(2048), lambda half: empty(64, half)
    rms_norm.rms_norm_fused(x, weight, 1e-5, x, cast)
    rms_norm.rms_norm_backward_fused(x, x, weight, empty(64), x)
    swiglu.swiglu_fused(x, cast)
    swiglu.swiglu_backward_fused(x, empty(64, 4096, dtype=dtype), cast)
    softmax_loss.softmax_cross_entropy_fused(x, empty(64, dtype=torch.int64), 2001)
    for h, k, d, v, half in HEADS.values():
        angles, scale = angles_of(half), empty(h, d)
        parts = rotary.rotary_fused(
            empty(1, 64, h * d + k * (d + v), dtype=dtype), angles, angles, scale, h, k, d, v, False)
        rotary.rotary_backward_fused(*parts, parts[0], angles, angles, scale, False, cast)


def ptx_of(kernel, arguments: tuple, keywords: dict, capability: int) -> str:
    """PTX of a launch whose tensors are all aligned."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    given = dict(zip(kernel.arg_names, arguments, strict=False)) | keywords
    options = {"num_warps": given.pop("num_warps")}
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = given[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[parameter.name] = "*" + TRITON_NAMES[value.dtype]
            attributes[index,] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["ptx"]


@pytest.mark.parametrize("capability", [75, 90])  # T4; H100 and H200
def test_kernels_compile_to_wide_memory_accesses(launches, capability):
    dtype, cast = torch.float16, None
    if capability == 90:
        dtype = torch.bfloat16
        cast = Float8Cast(torch.float8_e4m3fn, *torch.empty(2, device="meta"))
    launch_all(dtype, cast)
    assert len(launches) == 9
    for kernel, arguments, keywords in launches:
        ptx = ptx_of(kernel, arguments, keywords, capability)
        narrow = re.findall(r"(?:ld|st)\.global\S*\.b(?:8|16)\s", ptx)
        assert len(narrow) <= 1, kernel  # the target's logit
        if keywords.get("HEAD_DIM") != 12:
            assert re.search(r"ld\.global\S*\.v4\.b32|cp\.async\.cg\S*", ptx), kernel
