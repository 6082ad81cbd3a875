"""The model against independent references: naive fp64 attention, transformers' Llama, plain cross-entropy."""

import pytest
import reference
import torch
from model_cases import CASES, OPTIONS, VARIANTS, model_config, relative_error

from oneb import accounting
from oneb.kernels.loss_head import head_loss, head_loss_twin
from oneb.model.kv_cache import KVCache
from oneb.model.layers import rotary_table
from oneb.model.transformer import build_model


def randomised_attention(config, seed=0):
    """The first attention module, with every parameter away from its neutral start."""
    model = build_model(config, seed=seed, backend="cpu")
    attention = model.blocks[0].attention
    generator = torch.Generator().manual_seed(seed)
    for parameter in attention.parameters():
        scale = 0.5 if parameter.ndim == 1 else 0.3
        parameter.data = torch.randn(parameter.shape, generator=generator) * scale
    return model, attention


@pytest.mark.parametrize(("variant", "option"), CASES)
def test_attention_and_gradients_match_the_fp64_definition(variant, option):
    config = model_config(variant, **OPTIONS[option])
    model, attention = randomised_attention(config)
    x = torch.randn(2, 11, config.d_model, generator=torch.Generator().manual_seed(1)).requires_grad_()
    dout = torch.randn(2, 11, config.d_model, generator=torch.Generator().manual_seed(2))

    out = attention(x, model.rotary.slice(0, 11))
    out.backward(dout)

    x64 = x.detach().double().requires_grad_()
    weights = {name: p.detach().double().requires_grad_() for name, p in attention.named_parameters()}
    expected = reference.attention(x64, weights, config)
    expected.backward(dout.double())

    assert relative_error(out, expected) < 1e-5
    assert relative_error(x.grad, x64.grad) < 5e-5
    for name, parameter in attention.named_parameters():
        assert relative_error(parameter.grad, weights[name].grad) < 5e-5, name


def test_baseline_logits_match_transformers_llama():
    transformers = pytest.importorskip("transformers")
    config = model_config("baseline", learned_temp=False)
    model = build_model(config, seed=3, backend="cpu")
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=config.d_model, intermediate_size=config.d_ff,
        num_hidden_layers=config.n_layers, num_attention_heads=config.n_heads, num_key_value_heads=config.n_kv_heads,
        max_position_embeddings=64, rms_norm_eps=1e-5, tie_word_embeddings=True, attention_bias=False, mlp_bias=False,
    )).eval()
    state = {"model.embed_tokens.weight": model.embedding[: config.vocab_size], "model.norm.weight": model.norm.weight}
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    for i, block in enumerate(model.blocks):
        prefix = f"model.layers.{i}."
        # Norm gains other than 1, so that a mix-up shows.
        for norm in (block.attention_norm, block.feed_forward_norm):
            norm.weight.data.normal_(1, 0.3)
        state[prefix + "input_layernorm.weight"] = block.attention_norm.weight
        state[prefix + "post_attention_layernorm.weight"] = block.feed_forward_norm.weight
        for name, part in zip("qkv", block.attention.qkv.weight.chunk(3), strict=True):
            state[f"{prefix}self_attn.{name}_proj.weight"] = part
        state[prefix + "self_attn.o_proj.weight"] = block.attention.out.weight
        gate, up = block.feed_forward.gate_up.weight.chunk(2)
        state |= {prefix + "mlp.gate_proj.weight": gate, prefix + "mlp.up_proj.weight": up,
                  prefix + "mlp.down_proj.weight": block.feed_forward.down.weight}
    llama.load_state_dict(state)
    tokens = torch.randint(0, config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        torch.testing.assert_close(model.logits(model(tokens)), llama(tokens).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("null_attn", [False, True])
def test_parameters_are_what_the_plan_counts(variant, null_attn):
    config = model_config(variant, null_attn=null_attn)
    model = build_model(config)
    padding = (config.padded_vocab_size - config.vocab_size) * config.d_model
    assert sum(p.numel() for p in model.parameters()) - padding == sum(accounting.parameter_counts(config).values())


@pytest.mark.parametrize("variant", VARIANTS)
def test_cached_generation_sees_what_a_full_pass_sees(variant):
    config = model_config(variant, null_attn=True)
    model, _ = randomised_attention(config)
    tokens = torch.randint(0, config.vocab_size, (1, 24), generator=torch.Generator().manual_seed(5))
    cache = KVCache(config, 1, 24, torch.float32, model.device)
    with torch.no_grad():
        pieces = [model(part, cache) for part in (tokens[:, :9], tokens[:, 9:10], tokens[:, 10:13], tokens[:, 13:])]
        torch.testing.assert_close(torch.cat(pieces, dim=1), model(tokens), rtol=1e-4, atol=1e-5)
    assert cache.n_bytes == 24 * accounting.kv_bytes_per_token(config, bytes_per_value=4)


def test_no_token_sees_the_future():
    config = model_config("decoupled", null_attn=True)
    model, _ = randomised_attention(config)
    tokens = torch.randint(0, config.vocab_size, (1, 32), generator=torch.Generator().manual_seed(6))
    changed = tokens.clone()
    changed[0, 20:] = (changed[0, 20:] + 1) % config.vocab_size
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :20], after[:, :20], rtol=0, atol=0)
    assert not torch.equal(before[:, 20:], after[:, 20:])


def test_rope_depends_on_distance_alone():
    table = rotary_table(8, 64, torch.device("cpu"))
    from oneb.model.layers import rotate

    q, k = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(7)).unbind(0)

    def score(i, j):
        return (rotate(q, table.slice(i, i + 1)) * rotate(k, table.slice(j, j + 1))).sum()

    torch.testing.assert_close(score(5, 2), score(43, 40), rtol=1e-4, atol=1e-5)
    assert abs(score(5, 2) - score(5, 4)) > 1e-3


@pytest.mark.parametrize("n_tokens", [1, 70, 200])
def test_loss_head_matches_plain_cross_entropy(n_tokens, monkeypatch):
    # Chunks of 64 tokens, so that one, several, and a short last one occur.
    monkeypatch.setattr("oneb.kernels.loss_head.HEAD_CHUNK_TOKENS", 64)
    generator = torch.Generator().manual_seed(8)
    vocab_size, padded = 300, 384
    targets = torch.randint(0, vocab_size, (n_tokens,), generator=generator, dtype=torch.int32)
    inputs = [torch.randn(n_tokens, 32, generator=generator), torch.randn(padded, 32, generator=generator)]
    ours, twins = ([x.clone().requires_grad_() for x in inputs] for _ in range(2))
    loss, expected = head_loss(*ours, targets, vocab_size), head_loss_twin(*twins, targets, vocab_size)
    (3 * loss).backward()
    (3 * expected).backward()
    torch.testing.assert_close(loss, expected)
    for got, want in zip(ours, twins, strict=True):
        torch.testing.assert_close(got.grad, want.grad)
    # Padding rows neither win nor learn, however large their logits.
    assert ours[1].grad[vocab_size:].abs().max() == 0
    with torch.no_grad():
        torch.testing.assert_close(head_loss(*inputs, targets, vocab_size), expected.detach())


@pytest.mark.parametrize("variant", ["gqa", "decoupled"])
def test_recomputed_activations_give_the_same_gradients(variant):
    config = model_config(variant, null_attn=True)
    tokens = torch.randint(0, config.vocab_size, (2, 33), generator=torch.Generator().manual_seed(10))
    gradients = []
    for recompute in (False, True):
        model = build_model(config, seed=1, backend="cpu")
        model.grad_checkpoint = recompute
        model.loss(tokens).backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


def test_initial_loss_is_that_of_a_uniform_guess():
    config = model_config("decoupled")
    model = build_model(config, seed=1, backend="cpu")
    tokens = torch.randint(0, config.vocab_size, (4, 65), generator=torch.Generator().manual_seed(11))
    assert abs(model.loss(tokens).item() - torch.log(torch.tensor(300.0)).item()) < 0.1


def test_weights_in_16_bits_are_the_rounded_fp32_ones():
    config = model_config("decoupled", null_attn=True)
    wide = build_model(config, seed=5).state_dict()
    narrow = build_model(config, seed=5, param_dtype=torch.bfloat16).state_dict()
    for name, weight in wide.items():
        kept = weight.ndim == 1 or "null" in name
        assert narrow[name].dtype == (torch.float32 if kept else torch.bfloat16), name
        assert torch.equal(narrow[name], weight.to(narrow[name].dtype)), name
