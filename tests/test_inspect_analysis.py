"""Analysis rows, against plain fp64 arithmetic."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from oneb.config import ModelConfig
from oneb.inspect.analysis import analyse
from oneb.model.transformer import Transformer, build_model
from oneb.presets import resolve

T = 24


def small_config(variant: str, **changes) -> ModelConfig:
    given = {"size": "nano", "variant": variant, "vocab_size": 61, "d_model": 64, "n_layers": 2, "n_heads": 4,
             "d_ff": 96, "max_seq_len": 64, **({"sem_dim": 16, "geo_dim": 32} if variant == "decoupled" else {})}
    return dataclasses.replace(resolve(given).model, **changes)


def trained_a_little(config: ModelConfig, **build) -> tuple[Transformer, torch.Tensor]:
    """A model with gradients, whose scalars and null tokens are away from their neutral start, and probe tokens."""
    model = build_model(config, seed=3, backend="cpu", **build)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or "null" in name:
                parameter += 0.5 * torch.randn(parameter.shape, generator=generator)
            elif "qkv" in name:
                parameter *= 10  # attention far from even
    tokens = torch.randint(0, config.vocab_size, (3, T + 1), generator=generator, dtype=torch.int32)
    model.loss(tokens.long()).backward()
    return model, tokens


def rms(*tensors: torch.Tensor) -> float:
    flat = torch.cat([x.detach().double().flatten() for x in tensors])
    return math.sqrt(float(flat @ flat) / len(flat))


def test_basic_sizes_by_part():
    config = small_config("decoupled", null_attn=True)
    model, _ = trained_a_little(config)
    model.embedding.grad[config.vocab_size :] = 1e6  # padding rows are nobody's business
    row = analyse(model, None, "basic", grad_scale=0.25)
    assert set(row) == {"weight_rms", "grad_rms"}
    parts = {"embedding": [model.embedding], "attention": [], "feed-forward": [], "norms": [model.norm.weight],
             "temperature": [], "null": []}
    for name, parameter in model.named_parameters():
        if "norm" in name and "blocks" in name:
            parts["norms"].append(parameter)
        elif "null" in name:
            parts["null"].append(parameter)
        elif "log_temperature" in name:
            parts["temperature"].append(parameter)
        elif "blocks" in name:
            parts["attention" if ".attention." in name else "feed-forward"].append(parameter)
    n_rows = {"embedding": config.vocab_size}
    for part, parameters in parts.items():
        n = n_rows.get(part)
        assert row["weight_rms"][part] == pytest.approx(rms(*(p[:n] for p in parameters)), rel=1e-5)
        assert row["grad_rms"][part] == pytest.approx(0.25 * rms(*(p.grad[:n] for p in parameters)), rel=1e-5)
    assert set(row["weight_rms"]) == set(parts)
    assert isinstance(row["weight_rms"]["norms"], float)


def test_medium_adds_layers():
    model, _ = trained_a_little(small_config("gqa", n_kv_heads=2, learned_temp=False))
    row = analyse(model, None, "medium")
    assert set(row["grad_rms_by_layer"]) == {"attention", "feed-forward", "norms"}
    second = model.blocks[1].feed_forward
    assert len(row["grad_rms_by_layer"]["feed-forward"]) == 2
    assert row["grad_rms_by_layer"]["feed-forward"][1] == pytest.approx(
        rms(second.gate_up.weight.grad, second.down.weight.grad), rel=1e-5
    )
    assert row["weight_rms_by_layer"]["attention"][0] == pytest.approx(
        rms(model.blocks[0].attention.qkv.weight, model.blocks[0].attention.out.weight), rel=1e-5
    )


def reference(model: Transformer, tokens: torch.Tensor) -> tuple[list, list, list]:
    """Entropies, their fractions and null masses by query-by-query fp64 arithmetic from the weights alone."""
    c = model.config
    wide = {name: p.detach().double() for name, p in model.named_parameters()}

    def norm(x, gain):
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * gain

    def rope(vector, position):
        half = len(vector) // 2
        out = vector.clone()
        for i in range(half):
            angle = position * 10000.0 ** (-2 * i / len(vector))
            a, b = vector[i], vector[i + half]
            out[i], out[i + half] = a * math.cos(angle) - b * math.sin(angle), b * math.cos(angle) + a * math.sin(angle)
        return out

    entropy = torch.zeros(c.n_layers, c.n_heads, dtype=torch.float64)
    fraction, null_mass = entropy.clone(), torch.zeros(c.n_layers, dtype=torch.float64)
    sem, dim, shared = c.sem_head_dim, c.qk_head_dim, c.n_heads // c.n_kv_heads
    for ids in tokens:
        x = wide["embedding"][ids.long()]
        for layer in range(c.n_layers):
            w = {n.split(".", 2)[2]: p for n, p in wide.items() if n.startswith(f"blocks.{layer}.")}
            rows = norm(x, w["attention_norm.weight"]) @ w["attention.qkv.weight"].T
            n_q, n_k = c.n_heads * dim, c.n_kv_heads * dim
            q, k, v = rows[:, :n_q], rows[:, n_q : n_q + n_k], rows[:, n_q + n_k :]
            attended = torch.zeros(len(ids), c.n_heads * c.v_head_dim, dtype=torch.float64)
            for h in range(c.n_heads):
                kv = h // shared
                temperature = math.exp(w["attention.log_temperature"][h]) if c.learned_temp else 1.0

                def head(rows, index):
                    part = rows[:, index * dim : (index + 1) * dim]
                    return [torch.cat([r[:sem], rope(r[sem:], t)]) for t, r in enumerate(part)]

                queries, keys = head(q, h), head(k, kv)
                values = list(v[:, kv * c.v_head_dim : (kv + 1) * c.v_head_dim])
                for t, query in enumerate(queries):
                    seen_k, seen_v = keys[: t + 1], values[: t + 1]
                    if c.null_attn:
                        seen_k = [w["attention.null_k"][kv], *seen_k]
                        seen_v = [w["attention.null_v"][kv], *seen_v]
                    scores = torch.stack([
                        (query[:sem] @ key[:sem] / math.sqrt(sem) if sem else 0.0)
                        + query[sem:] @ key[sem:] / math.sqrt(dim - sem) for key in seen_k
                    ]) * temperature
                    p = scores.softmax(0)
                    nats = -float((p * p.clamp_min(1e-300).log()).sum())
                    entropy[layer, h] += nats / len(ids) / len(tokens)
                    if len(p) > 1:
                        fraction[layer, h] += nats / math.log(len(p)) / (len(ids) - (not c.null_attn)) / len(tokens)
                    null_mass[layer] += p[0] / len(ids) / c.n_heads / len(tokens)
                    attended[t, h * c.v_head_dim : (h + 1) * c.v_head_dim] = p @ torch.stack(seen_v)
            x = x + attended @ w["attention.out.weight"].T
            gate, up = (norm(x, w["feed_forward_norm.weight"]) @ w["feed_forward.gate_up.weight"].T).chunk(2, -1)
            x = x + (gate * gate.sigmoid() * up) @ w["feed_forward.down.weight"].T
    return entropy.tolist(), fraction.tolist(), null_mass.tolist()


@pytest.mark.parametrize(("variant", "changes"), [
    ("decoupled", {"null_attn": True}), ("gqa", {"n_kv_heads": 2}), ("gqa", {"n_kv_heads": 1, "null_attn": True}),
])
def test_attention_entropy_and_null_mass(variant, changes):
    config = small_config(variant, **changes)
    model, tokens = trained_a_little(config)
    tokens = tokens[:2]
    row = analyse(model, tokens, "full")
    entropy, fraction, null_mass = reference(model, tokens[:, :-1])
    torch.testing.assert_close(row["attention_entropy"], entropy, rtol=2e-4, atol=2e-5)
    torch.testing.assert_close(row["attention_entropy_fraction"], fraction, rtol=2e-4, atol=2e-5)
    # Neither even nor certain: values that could be wrong.
    assert 0.1 < min(map(min, fraction)) < max(map(max, fraction)) < 0.95
    if config.null_attn:
        torch.testing.assert_close(row["null_mass"], null_mass, rtol=2e-4, atol=2e-5)
    else:
        assert "null_mass" not in row
    expected = [[math.exp(s) for s in block.attention.log_temperature.tolist()] for block in model.blocks]
    torch.testing.assert_close(row["temperature"], expected, rtol=1e-5, atol=0)


def test_even_attention_has_all_of_its_entropy():
    model = build_model(small_config("baseline"), seed=0, backend="cpu")
    with torch.no_grad():
        for block in model.blocks:
            block.attention.qkv.weight.zero_()
    row = analyse(model, torch.zeros(1, 9, dtype=torch.int32), "full")
    mean_log = sum(math.log(n) for n in range(1, 9)) / 8
    assert row["attention_entropy"][0] == pytest.approx([mean_log] * 4)
    assert row["attention_entropy_fraction"][1] == pytest.approx([1.0] * 4)


def test_nothing_changes():
    model, tokens = trained_a_little(small_config("decoupled", null_attn=True))
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    random_state, mode, probe = torch.get_rng_state(), model.training, tokens.clone()
    analyse(model, tokens, "full")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name])
        assert torch.equal(parameter.grad, grads[name])
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.equal(tokens, probe)
    assert model.training == mode


def test_full_without_a_probe_leaves_attention_out():
    model, _ = trained_a_little(small_config("baseline"))
    row = analyse(model, None, "full")
    assert "attention_entropy" not in row
    assert "temperature" in row


def test_only_the_first_512_tokens_of_a_probe_are_looked_at():
    model = build_model(small_config("baseline", max_seq_len=1024), seed=0, backend="cpu")
    tokens = torch.randint(0, 61, (1, 601), generator=torch.Generator().manual_seed(1))
    whole, cut = (analyse(model, probe, "full")["attention_entropy"] for probe in (tokens, tokens[:, :513]))
    assert whole == cut


def test_no_gradients_yet_and_16_bit_weights():
    model = build_model(small_config("decoupled"), seed=0, backend="cpu", param_dtype=torch.bfloat16,
                        compute_dtype=torch.bfloat16)
    row = analyse(model, torch.zeros(1, 9, dtype=torch.int32), "full")
    assert math.isnan(row["grad_rms"]["attention"])
    assert row["weight_rms"]["embedding"] == pytest.approx(0.02, rel=0.05)
