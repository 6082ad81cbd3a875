"""The plan: what it adds up to, what it warns of, and what it looks like."""

import dataclasses
import io
import json
import math
import random
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oneb.accounting import parameter_counts
from oneb.advice import advice, usual_lr
from oneb.cli.data_size import count_tokens
from oneb.gpus import get_gpu
from oneb.model.transformer import DTYPES, build_model
from oneb.optim import build_optimizer
from oneb.planner import ASIDE_SHARE, disk_use, fit_to, make_plan, seconds_before, settled, steps_for_seconds
from oneb.presets import resolve
from oneb.schedules import LR_SCHEDULES, lr_at, tokens_before
from oneb.sketch import sketch

H100 = get_gpu("h100")


def planned(gpu=H100, price=None, **options):
    config = resolve(options)
    return make_plan(config, gpu=gpu, fit=fit_to(config, gpu, gpu.usable_bytes), price=price), config


@st.composite
def schedules(draw):
    starts = sorted(draw(st.sets(st.integers(1, 60), max_size=3)))
    return tuple((start, draw(st.sampled_from((256, 512, 1024, 2048)))) for start in [0, *starts])


# ---- money

@given(schedules(), st.dictionaries(st.sampled_from((256, 512, 1024, 2048)), st.integers(1, 9), min_size=4),
       st.integers(0, 700))
def test_steps_for_seconds_is_the_last_step_that_is_paid_for(phases, cost, seconds):
    # Whole seconds, added up step by step.
    spent, steps = 0, 0
    while True:
        spent += cost[next(seq_len for start, seq_len in reversed(phases) if start <= steps)]
        if spent > seconds:
            break
        steps += 1
    assert steps_for_seconds(phases, seconds, cost.__getitem__) == steps


@given(schedules(), st.lists(st.floats(1e-3, 100), min_size=4, max_size=4), st.floats(0, 1e7))
def test_rounding_never_goes_over_budget(phases, costs, seconds):
    cost = dict(zip((256, 512, 1024, 2048), costs, strict=True)).__getitem__
    steps = steps_for_seconds(phases, seconds, cost)
    assert seconds_before(phases, steps, cost) <= seconds < seconds_before(phases, steps + 1, cost)
    exact = [next(seq_len for start, seq_len in reversed(phases) if start <= step) for step in range(min(steps, 100))]
    if steps <= 100:
        assert sum(Fraction(cost(seq_len)) for seq_len in exact) <= Fraction(seconds) * (1 + Fraction(1, 10**12))


def test_time_and_money_add_up():
    plan, _ = planned(phases="512@0,2048@100", steps=300, price=2.5)
    assert [phase.steps for phase in plan.phases] == [100, 200]
    assert plan.tokens == 16 * (100 * 512 + 200 * 2048)
    hours = sum(phase.tokens / phase.tok_s for phase in plan.phases) / 3600
    assert plan.seconds / 3600 == pytest.approx(hours / 0.98)
    assert plan.dollars == pytest.approx(2.5 * hours / 0.98)
    assert ASIDE_SHARE == 0.02
    assert (plan.price, plan.price_source, plan.speed_source) == (2.5, None, "estimated")


def test_the_users_price_wins_over_the_tables():
    table, config = planned()
    assert (table.price, table.price_source) == (H100.price_per_hour, H100.price_source)
    asked, _ = planned(price=1.0)
    assert (asked.price, asked.price_source) == (1.0, None)
    given_too = dataclasses.replace(config, run=dataclasses.replace(config.run, price=3.0))
    assert make_plan(given_too, gpu=H100, fit=fit_to(config, H100, None)).price == 3.0
    assert make_plan(given_too, gpu=H100, fit=fit_to(config, H100, None), price=4.0).price == 4.0


def test_without_a_gpu_there_is_neither_speed_nor_memory():
    plan = make_plan(resolve({"price": 2.0}))
    assert (plan.seconds, plan.dollars, plan.peak_bytes, plan.fits, plan.tok_s) == (None,) * 5
    assert plan.optimizer == "lion"


def test_a_card_that_nobody_knows_has_memory_but_no_speed():
    config = resolve({})
    plan = make_plan(config, fit=fit_to(config, None, 24 * 2**30))
    assert plan.seconds is None
    assert 0 < plan.peak_bytes <= 24 * 2**30
    assert plan.fits


def test_measured_speeds_replace_the_guess():
    plan, _ = planned(phases="512@0,2048@100", steps=300, price=3.6)
    measured = plan.measured({2048: 1000.0})
    assert [phase.tok_s for phase in measured.phases] == [plan.phases[0].tok_s, 1000.0]
    assert measured.speed_source == "measured"
    tokens_512, tokens_2048 = (phase.tokens for phase in plan.phases)
    assert measured.seconds == pytest.approx((tokens_512 / plan.phases[0].tok_s + tokens_2048 / 1000) / 0.98)
    assert measured.dollars == pytest.approx(measured.seconds / 1000)


@pytest.mark.parametrize("step", [0, 1, 99, 100, 101, 250, 299, 300, 350])
def test_what_is_left_and_what_is_done_make_the_whole(step):
    plan, config = planned(phases="512@0,1024@100,2048@200", steps=300)
    left = plan.after(step)
    done = tokens_before(config.train.phases, min(step, 300), config.train.sequences)
    assert left.tokens + done == plan.tokens
    assert left.steps == max(0, 300 - step) == sum(phase.steps for phase in left.phases)
    if step == 0:
        assert left == plan


def test_the_limit_on_memory_is_the_budget():
    config = resolve({"vram_limit_gib": 16.0})
    assert fit_to(config, H100, H100.usable_bytes).budget_bytes == 16 * 2**30
    assert fit_to(config, H100, 8 * 2**30).budget_bytes == 8 * 2**30
    assert fit_to(config, H100, None).budget_bytes == 16 * 2**30


def test_a_card_without_bf16_is_planned_in_fp16():
    config = resolve({})
    assert settled(config, get_gpu("t4")).train.precision == "fp16"
    assert settled(config, H100).train.precision == "bf16"


def test_plan_json_is_whole():
    plan, _ = planned(phases="512@0,2048@100", steps=300, batch_tokens=65536)
    values = json.loads(json.dumps(plan.to_dict()))
    assert values["seconds"] == plan.seconds
    assert values["dollars"] == plan.dollars
    assert values["peak_bytes"] == max(phase["peak_bytes"] for phase in values["phases"])
    assert [phase["tokens_per_step"] for phase in values["phases"]] == [65536, 65536]
    assert [phase["sequences"] for phase in values["phases"]] == [128, 32]
    for phase, found in zip(plan.phases, values["phases"], strict=True):
        assert found["seconds"] == pytest.approx(phase.tokens / phase.tok_s)
        assert sum(found["memory_bytes"].values()) == found["peak_bytes"]
        assert found["batch_size"] * found["grad_accum"] == found["sequences"]
    json.dumps(make_plan(resolve({})).to_dict())


# ---- disk

@pytest.mark.parametrize("optimizer", ["lion", "adamw", "lion8bit", "adamw8bit"])
@pytest.mark.parametrize("param_dtype", ["bf16", "fp32"])
def test_checkpoints_are_as_large_as_planned(optimizer, param_dtype):
    config = resolve({"size": "nano", "variant": "baseline", "path": "demo", "optimizer": optimizer,
                      "param_dtype": param_dtype, "device": "cpu"})
    model = build_model(config.model, device=torch.device("cpu"), param_dtype=DTYPES[param_dtype],
                        compute_dtype=DTYPES[param_dtype], seed=1, backend="math")
    built = build_optimizer(model.named_parameters(), kind=optimizer, betas=config.optim.betas, eps=1e-8,
                            weight_decay=0.1, seed=1, fused=False)
    disk = disk_use(settled(config))
    for contents, size in (
        ({"model": model.state_dict(), "optimizer": built.state_dict()}, disk.last_bytes),
        ({"model": model.state_dict()}, disk.best_bytes),
    ):
        # Norms stay in fp32 beside 16-bit weights, which is more of so small a model than of a large one.
        assert sum(tensor.nbytes for tensor in tensors_in(contents)) == pytest.approx(size, rel=3e-3)
        torch.save(contents, buffer := io.BytesIO())
        # Names and alignment come on top: some hundred bytes a tensor, whatever the model's size.
        assert size * 0.997 <= buffer.tell() < size * 1.003 + 600 * len(tensors_in(contents))


def tensors_in(value):
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for inner in value.values() for tensor in tensors_in(inner)] if isinstance(value, dict) else []


@pytest.mark.parametrize(("save_every", "steps", "step_files", "copies"), [
    (0, 100, 0, 2), (30, 100, 3, 5), (25, 100, 4, 5), (1000, 100, 0, 2),
])
def test_the_files_of_save_every_are_counted(save_every, steps, step_files, copies):
    """copies: those, last.pt if it is another file, and a new last.pt beside the old one."""
    disk = disk_use(settled(resolve({"optimizer": "lion", "save_every": save_every, "steps": steps})))
    assert disk.step_files == step_files
    assert disk.total_bytes == copies * disk.last_bytes + disk.best_bytes
    weights_only = disk_use(settled(resolve({"optimizer": "lion", "save_optim": False})))
    assert weights_only.last_bytes == weights_only.best_bytes == disk.best_bytes < disk.last_bytes


# ---- advice

def notes(data_tokens=None, **options):
    plan, config = planned(**options)
    return "\n".join(advice(plan, config, data_tokens))


USUAL = {"target_tokens": 20_000_000_000, "batch_tokens": 524_288, "train_seq_len": 2048}


@pytest.mark.parametrize(("said", "unusual"), [
    ("tokens a parameter", {"target_tokens": 5_000_000_000}),
    ("tokens a step", {"batch_tokens": 65536}),
    ("tokens a step", {"batch_tokens": 4_194_304}),
    ("--lr 0.003 is high for lion", {"lr": 3e-3}),
    ("--lr 1e-05 is low for lion", {"lr": 1e-5}),
    ("--lr 0.003 is high for adamw", {"lr": 3e-3, "optimizer": "adamw"}),
    ("--lr 2e-05 is low for adamw8bit", {"lr": 2e-5, "optimizer": "adamw8bit"}),
    ("never trains past 1024", {"train_seq_len": 1024}),
    ("never reached", {"phases": "2048@0,1024@90000"}),
    ("of the run; 1% to 5% is usual", {"warmup_steps": 20_000}),
    ("evaluations every 2 steps", {"eval_every": 2}),
    ("each about 2.0 times", {"data_tokens": 10_000_000_000}),
    ("teach little", {"data_tokens": 1_000_000_000}),
])
def test_what_is_unusual_is_said_and_only_that(said, unusual):
    assert notes(**USUAL) == ""
    text = notes(**{name: value for name, value in USUAL.items() if name != "train_seq_len" or "phases" not in unusual}
                 | unusual)
    assert said in text
    assert len(text.splitlines()) == 1


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_rates_in_use_for_adamw_are_usual(optimizer):
    assert notes(**USUAL, optimizer=optimizer, lr=4e-4) == ""


def test_usual_rates_follow_the_size():
    # Table 2.1 of the paper, between its points and at its ends.
    middles = [usual_lr(size, "adamw")[0] / 0.5 for size in (125e6, 350e6, 1.3e9, 2.7e9)]
    assert middles == pytest.approx([6e-4, 3e-4, 2e-4, 1.6e-4])
    rates = [usual_lr(size, "lion")[1] for size in np.geomspace(1e6, 1e11, 40)]
    assert rates == sorted(rates, reverse=True)
    low, high = usual_lr(1.0e9, "lion8bit")
    assert low < 1e-4 * 1.1 < 3e-4 < high * 1.1  # what the field uses at 1B


def test_a_demonstration_is_not_lectured():
    assert notes(size="nano", path="demo", train_seq_len=256) == ""


# ---- the size of data

@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_tokens_are_counted_from_headers(tmp_path, version, dtype):
    rng = random.Random(repr((version, dtype)))
    counts = [rng.randrange(1, 5000) for _ in range(3)]
    for number, count in enumerate(counts):
        with open(tmp_path / f"part{number}.npy", "wb") as file:
            np.lib.format.write_array(file, np.zeros(count, dtype), version=version)
        (tmp_path / f"part{number}.npy.meta").write_text("tokens: 1\n")
    assert count_tokens(str(tmp_path / "part1.npy"), "npy") == counts[1]
    assert count_tokens(str(tmp_path), "npy") == sum(counts)
    assert count_tokens(str(tmp_path / "part[02]*"), "npy") == counts[0] + counts[2]
    assert count_tokens(str(tmp_path / "part1.npy"), "auto") == counts[1]


def test_tokens_of_other_formats(tmp_path):
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, 777
    (tmp_path / "a.bin").write_bytes(header.tobytes() + np.zeros(777, "<u2").tobytes())
    assert count_tokens(str(tmp_path / "a.bin"), "bin") == 777
    assert count_tokens(str(tmp_path / "a.bin"), "raw") == 777 + 512
    assert count_tokens(str(tmp_path / "a.pt"), "pt") is None
    (tmp_path / "a.txt").write_text("1 2 3")
    assert count_tokens(str(tmp_path / "a.txt"), "txt") is None
    assert count_tokens("demo", "npy") is None
    assert count_tokens(str(tmp_path / "none.npy"), "npy") is None


@pytest.mark.parametrize("contents", [b"", b"\x93NUMPY", b"\x93NUMPY\x01\x00\x05\x00{'sha", b"PK\x03\x04" * 40,
                                      b"\x93NUMPY\x01\x00\x02\x00{}", b"\x93NUMPY\x01\x00\x10\x00{'shape': (3,4)}"])
def test_a_damaged_header_has_no_count(tmp_path, contents):
    (tmp_path / "x.npy").write_bytes(contents)
    assert count_tokens(str(tmp_path / "x.npy"), "npy") is None


# ---- the sketch

@settings(max_examples=60)
@given(st.sampled_from(LR_SCHEDULES), st.integers(1, 300), st.floats(0, 1), st.floats(1e-6, 1.0),
       schedules(), st.integers(30, 60), st.booleans())
def test_the_sketch_shows_the_rate(schedule, steps, warmup, lr, phases, width, plain):
    text = ",".join(f"{seq_len}@{start}" for start, seq_len in phases)
    config = resolve({"lr_schedule": schedule, "steps": steps, "warmup_steps": int(warmup * steps), "lr": lr,
                      "phases": text})
    lines = sketch(config, width=width, plain=plain)
    assert len(lines) == 7
    assert max(map(len, lines)) <= width
    assert not plain or all(line.isascii() for line in lines)
    up = "|" if plain else "│"
    rows = [line.split(up, 1)[1] for line in lines[:5]]
    columns = width - lines[0].index(up) - 1
    optim = config.optim
    for column in range(columns):
        step = min(steps - 1, int((column + 0.5) / columns * steps))
        rate = lr_at(step, schedule=schedule, peak_lr=lr, min_lr=optim.min_lr, warmup_steps=optim.warmup_steps,
                     steps=steps) / lr
        filled = sum(row[column:column + 1] not in ("", " ") for row in rows)
        # Cells that have something in them; the top one may be all but empty, which ASCII leaves out.
        assert math.ceil(5 * rate - 0.5) - (0.5 if plain else 0) <= filled <= math.ceil(5 * rate + 0.13), (column, rate)


def test_the_sketch_marks_phases_and_steps():
    *_, axis, steps = sketch(resolve({"phases": "512@0,1024@2000,2048@12000", "steps": 20_000}))
    for seq_len, start in ((512, 0), (1024, 2000), (2048, 12_000)):
        assert axis[steps.index(f"{start:,}")] in "└┴"
        assert axis[steps.index(f"{start:,}") + 1:].startswith(str(seq_len))
    assert steps.rstrip().endswith("20,000")


def test_parameters_of_the_plan_are_the_models():
    plan, config = planned(variant="gqa", size="small")
    assert plan.parameters_by_part == parameter_counts(config.model)
    assert plan.parameters == sum(plan.parameters_by_part.values())
