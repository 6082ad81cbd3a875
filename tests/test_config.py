"""Options to configuration: defaults, what implies what, and every fault at once."""

import argparse
import dataclasses

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from oneb.cli.options import add_config_options, config_from_args
from oneb.config import compute_dtype, device_defaults, sections
from oneb.errors import ConfigErrors
from oneb.presets import SIZES

VARIANTS = ("decoupled", "baseline", "gqa", "gqa_kv2", "bottleneck")


PARSER = argparse.ArgumentParser(allow_abbrev=False)
add_config_options(PARSER)


def parse(*words: str):
    return config_from_args(PARSER.parse_args(words))


def by_flag(config) -> dict[str, object]:
    """Flag -> value of every option of a configuration."""
    return {
        field.metadata["flag"]: getattr(getattr(config, name), field.name)
        for name, cls in sections().items() for field in dataclasses.fields(cls)
    }


def faults(*words: str) -> tuple[str, ...]:
    with pytest.raises(ConfigErrors) as caught:
        parse(*words)
    return caught.value.faults


# -- What the user's guide and the launcher's description promise ---------------------------------

DEFAULTS = {
    "--device": "cuda", "--data": "fineweb_1b.npy", "--data-format": "npy", "--vocab-size": 50257,
    "--run-root": "runs", "--tag": "oneb", "--seed": 1337, "--if-exists": "suffix", "--variant": "decoupled",
    "--null-attn": False, "--tie-qk": False, "--rope": True, "--learned-temp": True,
    "--d-model": 2048, "--layers": 22, "--n-head": 32, "--d-ff": 5632, "--block": 2048,
    "--sem-dim": 2048 // 16, "--geo-dim": 2048 // 8, "--attn-dim": 2048 // 16 + 2048 // 8,
    "--steps": 20000, "--optimizer": "auto", "--lr": 2e-4, "--grad-clip": 1.0, "--batch-size": None,
    "--grad-accum": 16, "--batch-tokens": None, "--grad-checkpoint": "auto", "--vram-limit-gib": None, "--price": None,
    "--seq-schedule": ((0, 1024), (10000, 2048)), "--eval-every": 500, "--eval-iters": 10, "--log-every": 20,
    "--save-every": 0, "--save-minutes": 15.0, "--keep-last": 0,
    "--ckpt": None, "--resume": False, "--save-optim": True, "--opt-fused": True, "--amp": None,
    "--analysis-every": 0, "--live": "auto", "--wandb": False,
}
CHOICES = {
    "--if-exists": ("suffix", "skip", "error", "resume"), "--variant": VARIANTS,
    "--optimizer": ("auto", "lion", "adamw", "lion8bit", "adamw8bit"),
    "--lr-schedule": ("constant", "cosine", "linear", "wsd"), "--param-dtype": ("bf16", "fp32", "fp16"),
    "--precision": ("bf16", "fp8", "fp16", "fp32"),
    "--amp-dtype": ("bf16", "fp16"), "--instrument": ("off", "basic", "medium", "full"),
    "--live": ("auto", "off", "basic", "rich"), "--device": ("cuda", "mps", "cpu", "auto"),
}
SWITCHES = (
    "--null-attn", "--tie-qk", "--no-rope", "--no-learned-temp", "--resume", "--save-optim", "--no-save-optim",
    "--amp", "--no-amp", "--opt-fused", "--no-opt-fused", "--compile",
    "--no-compile", "--wandb",
)
WANDB = ("project", "entity", "name", "group", "tags", "mode", "id")


def test_defaults_are_the_promised_ones():
    actual = by_flag(parse())
    assert {flag: actual[flag] for flag in DEFAULTS} == DEFAULTS


@pytest.mark.parametrize("flag", CHOICES)
def test_every_promised_choice_is_taken(flag):
    for value in CHOICES[flag]:
        assert by_flag(parse(flag, value))[flag] == value


@pytest.mark.parametrize("switch", SWITCHES)
def test_every_promised_switch_switches(switch):
    flag, wanted = switch.replace("--no-", "--"), not switch.startswith("--no-")
    assert by_flag(parse("--variant", "baseline", switch))[flag] is wanted


@pytest.mark.parametrize(("words", "layers"), [
    ("", None), ("--grad-checkpoint auto", None), ("--grad-checkpoint", 22), ("--grad-checkpoint all", 22),
    ("--no-grad-checkpoint", 0), ("--grad-checkpoint none", 0), ("--grad-checkpoint 7", 7), ("--grad-checkpoint=0", 0),
])
def test_recomputation_is_asked_for_in_layers(words, layers):
    assert parse(*words.split()).train.recomputed_layers(22) == layers


@pytest.mark.parametrize("wrong", ["some", "23", "-1", "1.5", ""])
def test_layers_that_are_not_there_cannot_be_recomputed(wrong):
    (fault,) = faults(f"--grad-checkpoint={wrong}")
    assert "0 to 22" in fault


@pytest.mark.parametrize(("words", "sequences"), [
    ("", (16, 16)), ("--batch-size auto --grad-accum 8", (8, 8)), ("--batch-size 4 --grad-accum 8", (32, 32)),
    ("--batch-tokens 512K", (500, 250)), ("--batch-tokens 65536 --batch-size 2", (64, 32)),
])
def test_the_global_batch_is_what_was_asked_for_at_every_length(words, sequences):
    train = parse(*words.split()).train
    assert tuple(train.sequences(seq_len) for _, seq_len in train.phases) == sequences


@pytest.mark.parametrize(("words", "named"), [
    ("--batch-tokens 64K --grad-accum 4", "--grad-accum 4"),
    ("--batch-tokens 2000", "less than one sequence of 2048"),
    ("--batch-tokens 40960 --batch-size 16", "--batch-size 16 does not divide"),
    ("--batch-size 0", "--batch-size 0"), ("--vram-limit-gib 0", "--vram-limit-gib 0"), ("--price -1", "--price -1"),
])
def test_batches_that_cannot_be_made_are_refused(words, named):
    assert any(named in fault for fault in faults(*words.split()))


def test_every_promised_wandb_option_is_there():
    values = {f"--wandb-{name}": "offline" if name == "mode" else f"my {name}" for name in WANDB}
    actual = by_flag(parse(*[word for pair in values.items() for word in pair]))
    assert {flag: actual[flag] for flag in values} == values


# -- What one option decides for others -----------------------------------------------------------

@pytest.mark.parametrize(("words", "phases"), [
    ((), ((0, 1024), (10000, 2048))),
    (("--train-seq-len", "512"), ((0, 512),)),
    (("--train-seq-len", "512", "--seq-schedule", "256@0,1024@7"), ((0, 256), (7, 1024))),
    (("--train-seq-len", "512", "--seq-schedule", "1024@7"), ((0, 512), (7, 1024))),
    (("--block", "1024"), ((0, 1024),)),
    (("--block", "600"), ((0, 600),)),
    (("--size", "nano"), ((0, 256),)),
])
def test_training_lengths(words, phases):
    assert parse(*words).train.phases == phases


@pytest.mark.parametrize("size", SIZES)
def test_sizes_and_that_explicit_widths_win(size):
    model = parse("--variant", "baseline", "--size", size).model
    assert (model.d_model, model.n_layers, model.n_heads, model.d_ff, model.max_seq_len) == SIZES[size]
    wider = parse("--variant", "baseline", "--size", size, "--d-ff", "999", "--layers", "3").model
    assert wider == dataclasses.replace(model, d_ff=999, n_layers=3)


def test_sizes_are_the_promised_ones():
    promised = {"tiny": (512, 6, 8, 2048), "small": (768, 12, 12, 3072), "medium": (1024, 24, 16, 4096),
                "large": (1536, 24, 16, 6144), "1b": (2048, 22, 32, 5632)}
    assert {size: SIZES[size][:4] for size in promised} == promised
    assert "nano" in SIZES


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_exists_at_every_size(size, variant):
    model = parse("--size", size, "--variant", variant).model
    assert model.geo_head_dim % 2 == 0
    assert model.n_heads % model.n_kv_heads == 0
    assert model.n_kv_heads == {"gqa": model.n_heads // 4, "gqa_kv2": 2}.get(variant, model.n_heads)


def test_target_tokens_is_the_smallest_number_of_steps():
    config = parse("--target-tokens", "1M", "--train-seq-len", "1024", "--batch-size", "2", "--grad-accum", "8")
    assert (config.train.steps - 1) * 1024 * 16 < 1_000_000 <= config.train.steps * 1024 * 16


def test_demo_data_brings_its_vocabulary():
    assert parse("--data", "demo").model.vocab_size == 257
    assert parse("--data", "demo", "--vocab-size", "512").model.vocab_size == 512


@pytest.mark.parametrize(("words", "device", "has_bf16", "weights", "compute", "compiled"), [
    ((), "cuda", True, "bf16", "bf16", False),
    ((), "cuda", False, "fp16", "fp16", False),
    (("--param-dtype", "fp32"), "cuda", True, "fp32", "bf16", False),
    (("--param-dtype", "fp32"), "cuda", False, "fp32", "fp16", False),
    (("--param-dtype", "fp32", "--no-amp"), "cuda", True, "fp32", "fp32", False),
    (("--param-dtype", "bf16"), "cuda", False, "fp16", "fp16", False),
    (("--no-fused",), "cuda", True, "bf16", "bf16", True),
    (("--no-fused", "--no-compile"), "cuda", True, "bf16", "bf16", False),
    (("--compile",), "cuda", True, "bf16", "bf16", True),
    ((), "cpu", True, "fp32", "fp32", False),
    ((), "mps", True, "fp32", "fp32", False),
    (("--amp-dtype", "bf16"), "cpu", True, "fp32", "bf16", False),
    (("--param-dtype", "bf16", "--compile"), "cpu", True, "bf16", "bf16", True),
])
def test_what_the_device_decides(words, device, has_bf16, weights, compute, compiled):
    train = device_defaults(parse(*words).train, device, has_bf16)
    assert (train.param_dtype, compute_dtype(train), train.compile) == (weights, compute, compiled)


@pytest.mark.parametrize(("words", "device", "has_bf16", "weights", "compute", "precision"), [
    ("", "cuda", True, "bf16", "bf16", "bf16"),
    ("", "cuda", False, "fp16", "fp16", "fp16"),
    ("", "cpu", True, "fp32", "fp32", "fp32"),
    ("--param-dtype fp32", "cuda", True, "fp32", "bf16", "bf16"),
    ("--precision bf16", "cuda", True, "bf16", "bf16", "bf16"),
    ("--precision bf16", "cuda", False, "fp16", "fp16", "fp16"),
    ("--precision bf16", "cpu", True, "bf16", "bf16", "bf16"),
    ("--precision bf16 --param-dtype fp32", "cpu", True, "fp32", "bf16", "bf16"),
    ("--precision fp16", "cuda", True, "fp16", "fp16", "fp16"),
    ("--precision fp16 --param-dtype fp32", "cuda", True, "fp32", "fp16", "fp16"),
    ("--precision fp32", "cuda", True, "fp32", "fp32", "fp32"),
    ("--precision fp32 --no-amp --param-dtype fp32", "cuda", True, "fp32", "fp32", "fp32"),
    ("--precision fp8", "cuda", True, "bf16", "bf16", "fp8"),
    ("--precision fp8 --param-dtype fp32", "cuda", True, "fp32", "bf16", "fp8"),
    ("--precision fp8 --amp-dtype bf16", "cuda", True, "bf16", "bf16", "fp8"),
    ("--precision fp8 --device cpu", "cpu", True, "bf16", "bf16", "fp8"),
])
def test_precision_sets_what_is_left_open(words, device, has_bf16, weights, compute, precision):
    train = device_defaults(parse(*words.split()).train, device, has_bf16)
    assert (train.param_dtype, compute_dtype(train), train.precision) == (weights, compute, precision)
    assert device_defaults(train, device, has_bf16) == train
    assert train.fused_blocks or precision != "fp8"


# -- Faults ---------------------------------------------------------------------------------------

@pytest.mark.parametrize(("words", "said"), [
    ("--seq-schedule 1024@0,2048", ["'2048' is not LENGTH@STEP"]),
    ("--seq-schedule 1024@100", ["steps 0 to 99", "--train-seq-len"]),
    ("--seq-schedule 1024@0,4096@9", ["4096 tokens at step 9", "--block 4096"]),
    ("--train-seq-len 4096", ["4096", "--block 4096"]),
    ("--train-seq-len 0", ["--train-seq-len 0", "at least 1"]),
    ("--variant baseline --n-head 30", ["--d-model 2048", "30 heads", "2040 or 2070"]),
    ("--sem-dim 100", ["--sem-dim 100", "96 or 128"]),
    ("--geo-dim 16", ["--geo-dim 16", "use 32"]),
    ("--geo-dim 32", ["an odd number", "--no-rope"]),
    ("--variant bottleneck --attn-dim 32", ["an odd number", "--no-rope"]),
    ("--variant gqa --kv-head 5", ["--kv-head 5", "1, 2, 4, 8, 16, 32"]),
    ("--variant gqa --tie-qk", ["--tie-qk", "--kv-head 32"]),
    ("--variant gqa_kv2 --tie-qk", ["--tie-qk", "gqa_kv2"]),
    ("--variant baseline --kv-head 8", ["--kv-head 8", "--variant gqa"]),
    ("--variant baseline --sem-dim 64", ["--sem-dim 64", "--variant decoupled"]),
    ("--variant gqa --attn-dim 64", ["--attn-dim 64", "bottleneck or decoupled"]),
    ("--steps 10 --target-tokens 1B", ["--steps 10", "--target-tokens", "one of them"]),
    ("--lr 0", ["--lr 0", "above 0"]),
    ("--lr nan", ["--lr nan"]),
    ("--lr inf", ["--lr inf"]),
    ("--weight-decay -1", ["--weight-decay -1", "negative"]),
    ("--min-lr 1", ["--min-lr 1", "above --lr"]),
    ("--steps 10 --warmup-steps 11", ["--warmup-steps 11", "at most 10"]),
    ("--layers 0", ["--layers 0", "at least 1"]),
    ("--n-head 0", ["--n-head 0", "at least 1"]),
    ("--log-every 0", ["--log-every 0", "at least 1"]),
    ("--seed -1", ["--seed -1", "between 0 and"]),
    ("--no-amp --amp-dtype bf16", ["--amp-dtype bf16", "--no-amp", "leave one out"]),
    ("--param-dtype bf16 --amp-dtype fp16", ["--param-dtype bf16", "--amp-dtype"]),
    ("--precision fp32 --param-dtype bf16", ["computes in fp32", "leave --param-dtype bf16 out"]),
    ("--precision fp32 --amp", ["computes in fp32", "leave --amp out"]),
    ("--precision fp16 --param-dtype bf16", ["computes in fp16", "--param-dtype bf16"]),
    ("--precision bf16 --param-dtype fp32 --no-amp", ["computes in bf16", "leave --no-amp out"]),
    ("--precision fp8 --amp-dtype fp16", ["computes in bf16 around its fp8 products", "leave --amp-dtype fp16 out"]),
    ("--precision fp8 --param-dtype fp16", ["leave --param-dtype fp16 out", "the --precision that is meant"]),
    ("--precision fp8 --device mps", ["--device mps", "--precision bf16"]),
    ("--precision fp8 --no-fused", ["leave --no-fused out", "--precision bf16"]),
    ("--precision fp8 --compile", ["leave --compile out", "--precision bf16"]),
    ("--precision fp8 --d-ff 1000", ["--d-ff 1000 (use 992)", "multiples of 16"]),
    ("--precision fp8 --size nano", ["--attn-dim 24 (use 32)", "24 + 24 + 24 wide together"]),
    ("--precision fp8 --batch-size 1 --train-seq-len 1001", ["--batch-size 1 of 1001 tokens", "multiple of 16"]),
    ("--tag a/b", ["--tag 'a/b'", "letters"]),
])
def test_a_fault_says_what_was_given_and_the_fix(words, said):
    (fault,) = faults(*words.split())
    assert not [part for part in said if part not in fault]


@pytest.mark.parametrize("size", [size for size in SIZES if size != "nano"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_real_size_and_variant_runs_in_fp8(size, variant):
    assert parse("--precision", "fp8", "--size", size, "--variant", variant).train.precision == "fp8"


def test_tied_queries_are_fine_where_gqa_shares_nothing():
    assert parse("--variant", "gqa", "--kv-head", "32", "--tie-qk").model.tie_qk


def test_an_odd_head_is_fine_without_rope():
    assert parse("--geo-dim", "32", "--no-rope").model.geo_head_dim == 1


def test_every_fault_is_reported_at_once():
    found = faults("--seq-schedule", "x,9999@0", "--n-head", "30", "--variant", "baseline", "--kv-head", "2", "--lr",
                   "0", "--steps", "0", "--tag", "", "--batch-size", "0", "--min-lr", "1", "--layers", "-3")
    for flag in ("--seq-schedule", "--d-model", "--kv-head", "--lr 0", "--steps", "--tag", "--batch-size", "--min-lr",
                 "--layers"):
        assert any(flag in fault for fault in found), flag


INTEGER_FLAGS = ("--d-model", "--layers", "--n-head", "--d-ff", "--block", "--sem-dim", "--geo-dim", "--attn-dim",
                 "--kv-head", "--vocab-size", "--steps", "--batch-size", "--grad-accum", "--train-seq-len",
                 "--warmup-steps", "--eval-every", "--log-every", "--save-every", "--keep-last", "--seed",
                 "--target-tokens")


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from(INTEGER_FLAGS), st.integers(-5, 70), max_size=6), st.sampled_from(VARIANTS),
       st.sampled_from(["", "8@0,16@4", "1@0", "4@2", "0@0", "64@1,", "70@0"]))
def test_no_numbers_are_a_crash(numbers, variant, schedule):
    """Whatever is asked for is a configuration or a list of faults."""
    words = [f"{flag}={value}" for flag, value in numbers.items() if flag != "--target-tokens" or value > 0]
    words += ["--variant", variant, *(["--seq-schedule", schedule] if schedule else [])]
    try:
        config = parse(*words)
    except ConfigErrors:
        return
    assert config.train.steps >= 1
    assert config.model.n_heads % config.model.n_kv_heads == 0


def test_every_option_has_a_flag_of_its_own_and_a_line_of_help():
    options = [field for cls in sections().values() for field in dataclasses.fields(cls)]
    flags = [field.metadata["flag"] for field in options]
    assert len(set(flags)) == len(flags)
    assert all(field.metadata["help"] for field in options)
