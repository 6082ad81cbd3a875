"""A configuration to options or JSON, and back."""

import dataclasses
import json
import math

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_config import VARIANTS, parse

from oneb.cli.options import config_to_args
from oneb.config import OPTIMIZERS, LogConfig, RunConfig, model_differences, model_from_dict
from oneb.presets import SIZES

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12)
EVERY = st.integers(0, 1000)


def instances(cls, **strategies):
    """Strategy of a configuration section: bools and choices from the fields, the rest as given."""
    for field in dataclasses.fields(cls):
        if field.name not in strategies:
            assert field.metadata["type"] is bool or field.metadata["choices"], field.name
            values = st.booleans() if field.metadata["type"] is bool else st.sampled_from(field.metadata["choices"])
            strategies[field.name] = values
    return st.fixed_dictionaries(strategies)


@st.composite
def configs(draw):
    """Valid configurations, built from whole head widths up."""
    model = parse("--variant", draw(st.sampled_from(VARIANTS)), "--size", draw(st.sampled_from(tuple(SIZES)))).model
    heads, width = draw(st.sampled_from([2, 4, 6, 8])), 2 * draw(st.integers(1, 8))
    wide = heads * width
    if model.variant == "decoupled":
        sem = heads * draw(st.integers(1, 8))
        dims = {"sem_dim": sem, "geo_dim": wide, "attn_dim": heads * draw(st.integers(1, 8)), "n_kv_heads": heads}
    elif model.variant == "bottleneck":
        dims = {"geo_dim": wide, "attn_dim": wide, "n_kv_heads": heads}
    else:
        groups = draw(st.sampled_from([n for n in (1, 2, heads) if heads % n == 0]))
        dims = {"d_model": wide, "geo_dim": wide, "attn_dim": wide,
                "n_kv_heads": heads if model.variant == "baseline" else groups}
    block = draw(st.integers(1, 5000))
    model = dataclasses.replace(
        model, n_heads=heads, d_ff=draw(st.integers(1, 9000)), max_seq_len=block, n_layers=draw(st.integers(1, 50)),
        vocab_size=draw(st.integers(1, 200_000)), null_attn=draw(st.booleans()), rope=draw(st.booleans()),
        learned_temp=draw(st.booleans()), tie_qk=draw(st.booleans()) and dims["n_kv_heads"] == heads, **dims)
    steps, lr = draw(st.integers(1, 10**6)), draw(st.floats(1e-9, 10))
    starts = [0, *sorted(draw(st.sets(st.integers(1, 10**6), max_size=3)))]
    phases = tuple((start, draw(st.integers(1, block))) for start in starts)
    base = parse()
    optim = dataclasses.replace(
        base.optim, optimizer=draw(st.sampled_from(["auto", *OPTIMIZERS])), lr=lr, min_lr=lr * draw(st.floats(0, 1)),
        warmup_steps=draw(st.integers(0, steps)), weight_decay=draw(st.floats(0, 10)),
        lr_schedule=draw(st.sampled_from(["constant", "cosine", "linear", "wsd"])), fused=draw(st.booleans()))
    param_dtype = draw(st.sampled_from([None, "bf16", "fp32", "fp16"]))
    amp_dtype = param_dtype if param_dtype in ("bf16", "fp16") else draw(st.sampled_from([None, "bf16", "fp16"]))
    # Of the precisions, the one that says what these say; fp8 also depends on the widths.
    arithmetic = param_dtype if param_dtype in ("bf16", "fp16") else amp_dtype
    amp = draw(st.sampled_from([None, True] if amp_dtype else [None, True, False]))
    batch_size, batch_tokens = draw(st.none() | st.integers(1, 64)), None
    if draw(st.booleans()):
        batch_tokens = math.lcm(*(seq_len for _, seq_len in phases)) * (batch_size or 1) * draw(st.integers(1, 9))
    train = dataclasses.replace(
        base.train, precision=draw(st.sampled_from([None, arithmetic])), steps=steps,
        phases=phases, batch_size=batch_size, batch_tokens=batch_tokens,
        grad_accum=base.train.grad_accum if batch_tokens else draw(st.integers(1, 64)), seed=draw(EVERY),
        eval_every=draw(EVERY), param_dtype=param_dtype, amp_dtype=amp_dtype,
        amp=amp, grad_checkpoint=draw(st.sampled_from(["auto", "none", "all", "0", str(model.n_layers)])),
        vram_limit_gib=draw(st.none() | st.floats(0.5, 200)),
        compile=draw(st.sampled_from([None, True, False])))
    run = RunConfig(**draw(instances(
        RunConfig, root=TEXT, tag=st.from_regex(r"\A\w[\w.-]{0,9}\Z"), save_every=EVERY, ckpt=st.none() | TEXT,
        save_minutes=st.floats(0, 99), keep_last=EVERY, price=st.none() | st.floats(0, 99),
        save_to=st.none() | TEXT)))
    names = {f"wandb_{name}": st.none() | TEXT for name in ("entity", "name", "group", "tags", "id")}
    log = LogConfig(**draw(instances(LogConfig, log_every=st.integers(1, 99), analysis_every=EVERY,
                                     wandb_project=TEXT, **names)))
    return dataclasses.replace(base, model=model, optim=optim, train=train, run=run, log=log,
                               data=dataclasses.replace(base.data, path=draw(TEXT)))


@settings(max_examples=80, suppress_health_check=[HealthCheck.too_slow])
@given(configs())
def test_a_configuration_survives_the_command_line(config):
    assert parse(*[word for line in config_to_args(config) for word in line]) == config


@settings(max_examples=30, suppress_health_check=[HealthCheck.too_slow])
@given(configs())
def test_a_model_survives_json(config):
    saved = json.loads(json.dumps(config.to_dict()))["model"]
    assert model_from_dict(saved) == config.model
    assert model_differences(config.model, model_from_dict(saved)) == []


def test_differences_between_models_are_named_by_flag():
    saved = parse().model
    wanted = dataclasses.replace(saved, n_layers=23, null_attn=True, max_seq_len=4096)
    found = model_differences(saved, wanted)
    assert len(found) == 2
    assert "--layers is 23, the checkpoint has 22" in found
    assert any(difference.startswith("--null-attn") for difference in found)
