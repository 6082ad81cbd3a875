"""The roofline of a step, part by part and by hand; and the expected speeds against every row that was measured."""

import dataclasses
import json
import statistics
from pathlib import Path

import pytest

from oneb import accounting
from oneb.config import VARIANTS, device_defaults
from oneb.gpus import GPUS, get_gpu
from oneb.presets import resolve
from oneb.roofline import (
    Ceilings,
    Efficiency,
    elementwise_bytes,
    gemm_seconds,
    gemms,
    loss_bytes,
    optimizer_bytes,
    predict,
    table_ceilings,
    table_speed,
    weight_cast_bytes,
)

ROOT = Path(__file__).parents[1]


def settled(variant, seq_len=2048, precision="bf16", **given):
    config = resolve({"variant": variant, "max_seq_len": max(2048, seq_len), "train_seq_len": seq_len,
                      "precision": precision, "path": "x.npy", "device": "cuda", **given})
    return dataclasses.replace(config, train=device_defaults(config.train, "cuda"))


def roofline(config, seq_len=2048, *, batch_size=8, grad_accum=4, recomputed_layers=0, eight_bit=False, **ceilings):
    """At 750 TFLOP/s in 16 bit, twice that in 8, and 4.2 TB/s."""
    found = gemms(config.model, batch_size * seq_len, eight_bit)
    rates = {(gemm.name, gemm.phase): 750e12 * (2 if gemm.eight_bit else 1) for gemm in found}
    return predict(config, seq_len, Ceilings(rates, 4.2e12, **ceilings), batch_size=batch_size, grad_accum=grad_accum,
                   recomputed_layers=recomputed_layers, eight_bit=eight_bit)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_the_products_are_the_flops_of_the_model(variant, batch_size):
    config = settled(variant)
    tokens = batch_size * 2048
    model = config.model
    padding = (model.padded_vocab_size - model.vocab_size) * model.d_model
    found = gemms(model, tokens, False)
    # A last chunk of the head that is shorter than the others counts as whole: less than a chunk's worth.
    head = sum(gemm.flops for gemm in found if gemm.name == "head")
    head_tokens = -(-tokens // min(tokens, accounting.HEAD_CHUNK_TOKENS)) * min(tokens, accounting.HEAD_CHUNK_TOKENS)
    blocks = sum(gemm.flops for gemm in found) - head
    assert head == 6 * head_tokens * model.padded_vocab_size * model.d_model
    vocabulary = model.vocab_size * model.d_model
    assert blocks == 6 * tokens * (accounting.matmul_parameters(model) - vocabulary)
    assert padding >= 0


def test_fp8_products_are_those_of_the_blocks_and_only_where_widths_allow():
    config = settled("decoupled")
    eight = {gemm.name for gemm in gemms(config.model, 16384, True) if gemm.eight_bit}
    assert eight == {"qkv", "out", "gate_up", "down"}
    assert not any(gemm.eight_bit for gemm in gemms(config.model, 16384 + 8, True))


def test_elementwise_bytes_of_baseline_by_hand():
    """d 2048, F 5632, W 3 x 2048; what each kernel reads and writes, in values of 2 bytes."""
    config = settled("baseline")
    d, f = 2048, 5632
    forward = [2 * d, 2 * 2 * d, 4 * d, 3 * f, 3 * d]  # norm, rotary of q and k, add and norm, SwiGLU, add
    backward = [5 * f, 4 * d, 4 * d, 3 * d + d + 3 * d]  # SwiGLU, norms, rotary: dq dk dv q in, dqkv out
    outside = 2 * d + 3 * d + 2 * d + 4 * d
    by_hand = 2 * (22 * (sum(forward) + sum(backward)) + outside)
    assert elementwise_bytes(config.model, 2, False) == by_hand
    assert elementwise_bytes(config.model, 2, False, recomputed=0.5) == by_hand + 2 * 11 * sum(forward)
    one_byte = 22 * (2 * d + f + 2 * f + 3 * d)
    assert elementwise_bytes(config.model, 2, True) == by_hand - one_byte
    vocabulary = 50304 * d
    chunk = accounting.HEAD_CHUNK_TOKENS
    assert loss_bytes(config.model, 2, chunk) == pytest.approx(4 * 50304 + vocabulary * 6 / chunk + 4 * d)
    assert loss_bytes(config.model, 2, 4 * chunk) == pytest.approx(
        4 * 50304 + vocabulary * (10 / chunk + 6 / (4 * chunk)) + 4 * d)


def test_narrow_heads_are_bound_by_exponentials_and_wide_ones_by_products():
    """Two exponentials a score: 22 layers x 32 heads x 1024 keys; 132 SMs x 16 a clock x 1.755 GHz: 0.39 us."""
    per_s = 132 * 16 * 1.755e9
    attention = roofline(settled("decoupled"), exponentials_per_s=per_s)["us_per_token"]["attention"]
    assert attention == pytest.approx(2 * 22 * 32 * 1024 / per_s * 1e6)
    assert attention == pytest.approx(0.389, abs=0.001)
    attention = roofline(settled("baseline"), exponentials_per_s=per_s)["us_per_token"]["attention"]
    assert attention == pytest.approx(22 * 32 * 1024 * (4 + 10) * 64 / 750e12 * 1e6)
    half_as_fast = roofline(settled("baseline"), attention_flops_per_s=375e12)["us_per_token"]["attention"]
    assert half_as_fast == pytest.approx(2 * attention)
    longer = roofline(settled("baseline"), extra_keys=512)["us_per_token"]["attention"]
    assert longer == pytest.approx(1.5 * attention)


@pytest.mark.parametrize(("variant", "copies"), [("baseline", 8), ("gqa", 8), ("decoupled", 0), ("bottleneck", 0)])
def test_a_null_key_costs_its_passes_beside_wide_heads_only(variant, copies):
    without, null = (roofline(settled(variant, null_attn=null))["us_per_token"] for null in (False, True))
    # Each pass moves 2048 values of 2 bytes a token and layer.
    assert null["attention"] - without["attention"] == pytest.approx(22 * copies * 4096 / 4.2e12 * 1e6)
    again = roofline(settled(variant, null_attn=True), recomputed_layers=22)["us_per_token"]["attention"]
    plain = roofline(settled(variant), recomputed_layers=22)["us_per_token"]["attention"]
    assert again - plain == pytest.approx(22 * copies * 11 / 8 * 4096 / 4.2e12 * 1e6)


def test_fp32_weights_are_cast_for_every_micro_batch():
    config = settled("baseline", param_dtype="fp32")
    assert weight_cast_bytes(settled("baseline")) == 0
    assert weight_cast_bytes(config) == 2 * accounting.matmul_parameters(config.model) * 6
    parts = [roofline(config, batch_size=size)["us_per_token"]["elementwise"] for size in (2, 4)]
    assert parts[0] - parts[1] == pytest.approx(weight_cast_bytes(config) / 8192 / 4.2e12 * 1e6)


@pytest.mark.parametrize(("optimizer", "state"), [("lion", 8), ("adamw", 16), ("lion8bit", 2), ("adamw8bit", 4),
                                                  ("auto", 8)])
def test_optimizers_move_weights_gradients_and_state(optimizer, state):
    """Gradients read twice, weights read and written, in 2 bytes; moments read and written, 4 bytes or 1 and a bit."""
    config = settled("baseline", optimizer=optimizer)
    stored = sum(accounting.parameter_counts(config.model).values()) + 47 * 2048
    assert optimizer_bytes(config) / stored == pytest.approx(8 + state, rel=0.01)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_roofline_is_the_sum_of_its_parts_and_moves_the_right_way(variant):
    config = settled(variant)
    plain = roofline(config, exponentials_per_s=3.5e12)
    assert 1e6 / plain["tok_s"] == pytest.approx(sum(plain["us_per_token"].values()))
    found = gemms(config.model, 8 * 2048, False)
    limits = Ceilings({(gemm.name, gemm.phase): 750e12 for gemm in found}, 4.2e12)
    assert plain["us_per_token"]["gemm"] == pytest.approx(gemm_seconds(found, limits) / (8 * 2048) * 1e6)
    # Near the ceiling of products alone at 750 TFLOP/s: 92k tokens/s for baseline.
    assert 60_000 < plain["tok_s"] < 130_000
    speed = {size: roofline(config, batch_size=size, grad_accum=32 // size)["tok_s"] for size in (1, 8, 32)}
    assert roofline(config, 8192, batch_size=2)["tok_s"] < speed[8]
    assert roofline(config, eight_bit=True)["tok_s"] > 1.2 * speed[8]
    assert speed[1] < speed[8] < speed[32]
    slow_host = roofline(config, batch_size=1, launch_s=1e-4)
    assert slow_host["bound"] == "host"
    assert slow_host["tok_s"] == pytest.approx(2048 / (slow_host["launches"] * 1e-4), rel=1e-3)


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_recomputed_block_costs_one_more_of_its_forward_pass(variant):
    config = settled(variant)
    none, some, every = (roofline(config, recomputed_layers=layers) for layers in (0, 7, 22))
    for name in ("gemm", "attention", "elementwise"):
        steps = [parts["us_per_token"][name] for parts in (none, some, every)]
        assert steps[1] - steps[0] == pytest.approx((steps[2] - steps[0]) * 7 / 22)
    model = config.model
    forward = 2 * (accounting.matmul_parameters(model) - model.vocab_size * model.d_model) / 750e12 * 1e6
    assert every["us_per_token"]["gemm"] - none["us_per_token"]["gemm"] == pytest.approx(forward)
    for name in ("loss", "optimizer", "grad_accumulation"):
        assert every["us_per_token"][name] == none["us_per_token"][name]
    assert every["launches"] > none["launches"]


def test_without_measured_ceilings_the_table_of_gpus_serves():
    config = settled("baseline")
    found = gemms(config.model, 16384, True)
    ceilings = table_ceilings(get_gpu("h200"), found)
    assert ceilings.flops_per_s["head", "wgrad"] == 989e12
    assert ceilings.flops_per_s["qkv", "forward"] > 989e12
    assert predict(config, 2048, ceilings, batch_size=8, grad_accum=4, recomputed_layers=0,
                   eight_bit=True)["source"] == "GPU table"


# ---- expected speeds

def measured_rows():
    """What ``oneb bench`` measured with the fused blocks."""
    rows = []
    for path in sorted((ROOT / "bench/results").glob("*_h200.json")):
        found = json.loads(path.read_text()).get("rows", [])
        rows += [pytest.param(row, id=f"{path.stem}-{number}") for number, row in enumerate(found)
                 if "train" in row and not row["error"] and row["train"]["fused_blocks"]
                 and not row["options"].get("doc_mask")]  # what attention costs then is the data's affair
    return rows


def recomputed_layers(row, n_layers):
    """As the row says, or in older ones their configuration: a switch once, a word or a number since."""
    if "recomputed_layers" in row:
        return row["recomputed_layers"]
    given = row["train"]["grad_checkpoint"]
    words = {False: 0, None: 0, "none": 0, True: n_layers, "all": n_layers}
    return words[given] if given in words else int(given)


def expected(row):
    config = settled(row["variant"], row["seq_len"], row["precision"], size=row["size"], null_attn=row["null_attn"],
                     **row["options"])
    return table_speed(config, get_gpu("h200"))(
        row["seq_len"], row["batch_size"], row["grad_accum"], recomputed_layers(row, config.model.n_layers))


@pytest.mark.parametrize("row", measured_rows())
def test_expected_speeds_of_an_h200_are_those_that_were_measured(row):
    # With so little to do at once the host sets the pace, and hosts of the same GPU differ.
    rel = 0.15 if row["batch_size"] * row["seq_len"] > 2048 else 0.3
    assert expected(row) == pytest.approx(row["tok_s"], rel=rel)


def test_expected_speeds_are_calibrated_on_many_rows_and_lean_to_no_side():
    rows = [row.values[0] for row in measured_rows()]
    assert len(rows) >= 30
    assert {row["precision"] for row in rows} >= {"bf16", "fp8"}
    assert min(row["batch_size"] for row in rows) == 1
    assert statistics.fmean(expected(row) / row["tok_s"] for row in rows) == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.key)
@pytest.mark.parametrize("variant", ["baseline", "decoupled"])
def test_expected_speeds_stay_below_the_roofline_and_move_the_right_way(gpu, variant):
    config = settled(variant, precision="bf16" if gpu.has_bf16 else "fp16")
    speed = table_speed(config, gpu)
    found = gemms(config.model, 4 * 2048, False)
    limit = predict(config, 2048, table_ceilings(gpu, found), batch_size=4, grad_accum=8, recomputed_layers=0,
                    eight_bit=False)["tok_s"]
    assert 0.35 * limit < speed(2048, 4, 8, 0) < 0.75 * limit
    assert speed(2048, 1, 32, 0) < speed(2048, 4, 8, 0) < speed(2048, 16, 2, 0)
    assert speed(8192, 1, 8, 0) < speed(2048, 4, 8, 0)
    shares = [speed(2048, 4, 8, layers) / speed(2048, 4, 8, 0) for layers in (7, 22)]
    assert 0.65 < shares[1] < shares[0] < 1
    eight = table_speed(settled(variant, precision="fp8"), gpu)(2048, 16, 2, 0)
    assert (eight > 1.05 * speed(2048, 16, 2, 0)) == (gpu.flops_fp8 is not None)
    assert table_speed(settled(variant, precision="fp32"), gpu)(2048, 4, 8, 0) < 0.8 * speed(2048, 4, 8, 0)


def test_a_cards_size_orders_expected_speeds():
    config = settled("baseline")
    cards = ("3060", "3090", "4090", "a100", "h100", "h200")
    speeds = [table_speed(config, get_gpu(key))(2048, 8, 4, 0) for key in cards]
    assert speeds == sorted(speeds)
    assert [gpu.key for gpu in GPUS if gpu.measured] == ["h200"]


def test_a_slow_host_is_felt_at_small_micro_batches():
    config = settled("decoupled")
    usual, slow = (table_speed(config, get_gpu("h200"), Efficiency(launch_s=launch_s)) for launch_s in (36e-6, 72e-6))
    assert slow(2048, 1, 32, 0) < 0.6 * usual(2048, 1, 32, 0)
    assert slow(2048, 32, 1, 0) > 0.98 * usual(2048, 32, 1, 0)
