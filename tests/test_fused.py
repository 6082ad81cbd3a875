"""The hand-written forward and backward of a block against the plain modules, whose backward is autograd's."""

import pytest
import torch
from model_cases import CASES, OPTIONS, model_config, relative_error

from oneb.kernels.attention import choose_backend
from oneb.memory import activation_bytes_per_token
from oneb.model.float8_state import Float8State
from oneb.model.fused import block_matrices
from oneb.model.transformer import build_model


def loss_and_gradients(config, tokens, *, fused, device="cpu", dtype=torch.float32, recompute=False, backend="cpu",
                       fp8=False):
    """The loss of ``tokens`` (B, T + 1) and each parameter's gradient, from weights away from their neutral start."""
    model = build_model(config, seed=1, device=device, param_dtype=dtype, compute_dtype=dtype, backend=backend)
    generator = torch.Generator(device).manual_seed(2)
    with torch.no_grad():
        for block in model.blocks:
            for parameter in block.parameters():
                if parameter.ndim == 1:
                    parameter += 0.3 * torch.randn(parameter.shape, generator=generator, device=device)
            for name in ("null_k", "null_v"):
                if hasattr(block.attention, name):
                    getattr(block.attention, name).normal_(generator=generator)
    model.recomputed_layers = config.n_layers if recompute else 0
    if fused:
        float8 = Float8State([block_matrices(block) for block in model.blocks], dtype) if fp8 else None
        model.fuse(float8)
        if fp8:
            with float8.calibrating():
                model.loss(tokens.to(device)).backward()
            model.zero_grad()
    loss = model.loss(tokens.to(device))
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def windows(config, rows=2, seq_len=33):
    return torch.randint(0, config.vocab_size, (rows, seq_len + 1), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(("variant", "option"), CASES)
def test_fused_blocks_equal_the_plain_ones(variant, option):
    config = model_config(variant, **OPTIONS[option])
    tokens = windows(config)
    loss, gradients = loss_and_gradients(config, tokens, fused=True)
    expected_loss, expected = loss_and_gradients(config, tokens, fused=False)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)
    for name, want in expected.items():
        assert relative_error(gradients[name], want) < 1e-5, name
        assert gradients[name].dtype == want.dtype, name


def test_fused_blocks_can_be_recomputed():
    config = model_config("decoupled", null_attn=True)
    tokens = windows(config)
    _, kept = loss_and_gradients(config, tokens, fused=True)
    _, recomputed = loss_and_gradients(config, tokens, fused=True, recompute=True)
    for name, want in kept.items():
        assert torch.equal(recomputed[name], want), name


def test_a_pass_without_gradients_sees_the_same():
    config = model_config("gqa")
    tokens = windows(config)
    model = build_model(config, seed=1, backend="cpu")
    with torch.no_grad():
        plain = model.loss(tokens)
        model.fuse()
        torch.testing.assert_close(model.loss(tokens), plain, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("variant", "given"), [("baseline", {}), ("baseline", {"tie_qk": True}),
                                                ("decoupled", {"sem_dim": 32, "geo_dim": 32})])
def test_memory_kept_for_the_backward_is_what_the_plan_counts(variant, given):
    config = model_config(variant, **given)  # shapes of which the CPU's attention, too, keeps views and no copies
    model = build_model(config, seed=1, backend="cpu")
    model.fuse()
    rows, seq_len = 2, 48
    x = torch.randn(rows, seq_len, config.d_model, requires_grad=True)
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    tables = {t.untyped_storage().data_ptr() for t in model.rotary if t is not None}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.blocks[0](x, model.rotary.slice(0, seq_len))
    found = sum(size for pointer, size in kept.items() if pointer not in weights | tables)
    planned = activation_bytes_per_token(config, 4, 4, fused=True) * rows * seq_len
    assert found == pytest.approx(planned, rel=0.02)


def gradient_errors(gradients, expected):
    return {name: relative_error(gradients[name], want) for name, want in expected.items()}


@pytest.mark.gpu
@pytest.mark.parametrize("seq_len", [96, 1000])
@pytest.mark.parametrize(("variant", "option"), CASES)
def test_kernels_in_a_whole_model_are_as_exact_as_plain_bf16(variant, option, seq_len):
    config = model_config(variant, **OPTIONS[option] | {"max_seq_len": 1024, "phases": "1024@0"})
    tokens = windows(config, seq_len=seq_len)
    wide_loss, wide = loss_and_gradients(config, tokens, fused=False, device="cuda", backend="math")
    backend = choose_backend(torch.device("cuda"), torch.bfloat16, max(config.qk_head_dim, config.v_head_dim))
    results = {}
    for fused in (False, True):
        loss, gradients = loss_and_gradients(config, tokens, fused=fused, device="cuda", dtype=torch.bfloat16,
                                             backend=backend if fused else "math")
        results[fused] = abs(loss - wide_loss).item(), gradient_errors(gradients, wide)
    assert results[True][0] < 2 * results[False][0] + 1e-3
    for name, error in results[True][1].items():
        # A temperature's gradient sums terms that nearly cancel, of which fused attention has 16 bits.
        slack = 0.02 if "temperature" in name else 2e-3
        assert error < 1.5 * results[False][1][name] + slack, name


@pytest.mark.gpu
@pytest.mark.parametrize("variant", ["baseline", "decoupled"])
def test_fp8_products_in_a_whole_model(variant):
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("fp8 products need compute capability 8.9")
    config = model_config(variant, d_model=256, d_ff=512, sem_dim=64, geo_dim=128) if variant == "decoupled" else \
        model_config(variant, d_model=256, d_ff=512)
    tokens = windows(config, seq_len=64)
    _, wide = loss_and_gradients(config, tokens, fused=True, device="cuda", dtype=torch.bfloat16, backend="math")
    loss, gradients = loss_and_gradients(config, tokens, fused=True, device="cuda", dtype=torch.bfloat16,
                                         backend="math", fp8=True)
    assert torch.isfinite(loss)
    for name, error in gradient_errors(gradients, wide).items():
        assert error < 0.25, name
