"""Parameters, FLOPs and KV cache, against arithmetic written out by hand for each variant."""

import dataclasses

import pytest

from oneb.accounting import flops_per_token, kv_bytes_per_token, parameter_counts, qkv_widths
from oneb.config import ModelConfig
from oneb.gpus import find_gpu
from oneb.planner import longest_seq_len, make_plan, mfu
from oneb.presets import resolve

D, LAYERS, HEADS, FF, VOCAB = 2048, 22, 32, 5632, 50257
VARIANTS = ("decoupled", "baseline", "gqa", "gqa_kv2", "bottleneck")


def model(variant: str, **changes) -> ModelConfig:
    return resolve({"variant": variant, **changes}).model


def attention_weights(variant: str) -> int:
    """Weights of one attention block: queries, keys, values, output."""
    if variant == "baseline":
        return 4 * D * D
    if variant.startswith("gqa"):
        shared = {"gqa": 8, "gqa_kv2": 2}[variant] * 64
        return 2 * D * D + 2 * D * shared
    if variant == "bottleneck":
        return 4 * D * 384
    # decoupled: semantic and geometric queries and keys, values and output of their joint width.
    return 2 * D * 128 + 2 * D * 256 + 2 * D * 384


@pytest.mark.parametrize(("variant", "billions"), [
    ("baseline", "1.23"), ("gqa", "1.09"), ("gqa_kv2", "1.06"), ("bottleneck", "0.93"), ("decoupled", "0.93"),
])
def test_parameters_of_the_1b_shape(variant, billions):
    by_hand = VOCAB * D + LAYERS * (attention_weights(variant) + 3 * D * FF + 2 * D + HEADS) + D
    counted = sum(parameter_counts(model(variant)).values())
    assert counted == by_hand
    assert f"{counted / 1e9:.2f}" == billions


@pytest.mark.parametrize(("variant", "entries"), [
    ("baseline", 2 * D), ("gqa", 2 * 8 * 64), ("gqa_kv2", 2 * 2 * 64), ("bottleneck", 2 * 384),
    ("decoupled", 128 + 256 + 384),
])
def test_kv_cache_a_token(variant, entries):
    assert kv_bytes_per_token(model(variant)) == LAYERS * entries * 2
    assert kv_bytes_per_token(model(variant), bytes_per_value=1) == LAYERS * entries


@pytest.mark.parametrize(("variant", "saved"), [("baseline", D * D), ("bottleneck", D * 384), ("decoupled", D * 384)])
def test_tied_queries_and_keys_save_one_projection(variant, saved):
    apart, tied = model(variant), model(variant, tie_qk=True)
    assert sum(parameter_counts(apart).values()) - sum(parameter_counts(tied).values()) == LAYERS * saved
    assert kv_bytes_per_token(tied) == kv_bytes_per_token(apart)


@pytest.mark.parametrize(("variant", "null"), [
    ("baseline", 2 * D), ("gqa", 2 * 8 * 64), ("decoupled", 128 + 256 + 384)])
def test_the_null_token_is_one_key_and_value_a_layer(variant, null):
    difference = sum(parameter_counts(model(variant, null_attn=True)).values()) \
        - sum(parameter_counts(model(variant)).values())
    assert difference == LAYERS * null


def test_temperatures_are_one_a_head():
    difference = sum(parameter_counts(model("baseline")).values()) \
        - sum(parameter_counts(model("baseline", learned_temp=False)).values())
    assert difference == LAYERS * HEADS


def test_padding_rows_never_count():
    """The embedding is stored with 50304 rows; 50257 are parameters."""
    config = model("baseline")
    assert config.padded_vocab_size == 393 * 128
    assert parameter_counts(config)["embedding"] == VOCAB * D


def count_flops_by_walking(variant: str, seq_len: int) -> float:
    """Multiply-adds of every product, for every query and key of one causal sequence; backward costs twice forward."""
    forward = 2 * seq_len * (LAYERS * (attention_weights(variant) + 3 * D * FF) + VOCAB * D)
    qk = {"bottleneck": 384, "decoupled": 384}.get(variant, D)
    v = qk
    pairs = sum(query + 1 for query in range(seq_len))
    forward += LAYERS * 2 * pairs * (qk + v)
    return 3 * forward / seq_len


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("seq_len", [256, 2048, 8192])
def test_flops_a_token(variant, seq_len):
    """The convention counts S/2 keys a query; a causal sequence has (S+1)/2."""
    assert flops_per_token(model(variant), seq_len) == pytest.approx(count_flops_by_walking(variant, seq_len), rel=2e-3)


def test_flops_of_the_baseline_agree_with_measured_runs():
    """A prototype of this shape ran at 65.1k tokens/s and 517 TFLOP/s: 7.94 GFLOP a token."""
    assert flops_per_token(model("baseline"), 2048) == pytest.approx(517e12 / 65.1e3, rel=3e-3)


def plan(**given):
    config = resolve(given)
    return make_plan(config), config


def test_the_plan_adds_up():
    made, config = plan(batch_size=2, grad_accum=8, phases="512@0,1024@2000,2048@12000", steps=13_000)
    assert made.tokens == 16 * (2000 * 512 + 10_000 * 1024 + 1000 * 2048) == sum(phase.tokens for phase in made.phases)
    assert [phase.steps for phase in made.phases] == [2000, 10_000, 1000]
    assert [phase.tokens_per_step for phase in made.phases] == [16 * 512, 16 * 1024, 16 * 2048]
    assert made.parameters == sum(parameter_counts(config.model).values())
    assert longest_seq_len(config.train) == 2048
    shorter, config = plan(phases="512@0,1024@2000", steps=2000)
    assert [phase.seq_len for phase in shorter.phases] == [512]
    assert longest_seq_len(config.train) == 512


def test_mfu():
    _, config = plan(variant="baseline", phases="1024@0,2048@10", steps=20)
    h100 = find_gpu("NVIDIA H100 80GB HBM3")
    for seq_len in (1024, 2048):
        flops = count_flops_by_walking("baseline", seq_len)
        assert mfu(config, 50_000.0, seq_len, h100) == pytest.approx(50_000 * flops / 989e12, rel=2e-3)
    assert mfu(config, 50_000.0, 2048, None) is None


def test_qkv_widths_of_shared_heads():
    assert qkv_widths(model("gqa", n_kv_heads=4)) == (D, 4 * 64, 4 * 64)
    assert qkv_widths(dataclasses.replace(model("baseline"), tie_qk=True)) == (0, D, D)
