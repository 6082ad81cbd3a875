"""What a resumed run is to do otherwise than the one it continues: what matters, what does not, and what is said."""

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_trainer import NANO

from oneb import changes as module
from oneb.changes import as_before, changes, known_options, notes, refusal
from oneb.config import device_defaults, sections
from oneb.presets import resolve
from oneb.schedules import LR_SCHEDULES, lr_at


def saved_by(config) -> dict:
    """The configuration as it comes back from a sidecar."""
    return known_options(json.loads(json.dumps(config.to_dict())))


def settled(config, has_bf16=True):
    """As it is once the device is known."""
    return dataclasses.replace(config, train=device_defaults(config.train, config.train.device, has_bf16))


def found(before: dict, after: dict, step: int = 6, **more) -> dict[str, bool]:
    """Flag -> whether it matters, of a change from NANO with ``before`` to NANO with ``after``."""
    def configuration(changed):
        options = {name: value for name, value in {**NANO, **changed}.items() if value is not None}
        return settled(resolve(options))

    return {change.flag: change.matters
            for change in changes(saved_by(configuration(before)), configuration(after), step, **more)}


# ---- what comes to the same, and what does not

@pytest.mark.parametrize(("change", "expected"), [
    ({"seed": 7}, {"--seed": True}),
    ({"weight_decay": 0.25}, {"--weight-decay": True}),
    ({"grad_clip": 0.5}, {"--grad-clip": True}),
    ({"lr": 2e-3}, {"--lr": True, "--min-lr": False}),  # a constant rate has no minimum
    ({"warmup_steps": 5}, {"--warmup-steps": False}),  # over by step 6, either way
    ({"warmup_steps": 8}, {"--warmup-steps": True}),
    ({"steps": 30}, {"--steps": False}),
    ({"steps": 30, "lr_schedule": "cosine"}, {"--steps": True, "--lr-schedule": True}),
    ({"batch_size": 8, "grad_accum": 1}, {"--batch-size": False, "--grad-accum": False}),
    ({"batch_size": None, "grad_accum": 8}, {"--batch-size": False, "--grad-accum": False}),
    ({"batch_size": None, "batch_tokens": 512, "grad_accum": None}, {
        "--batch-size": False, "--grad-accum": False, "--batch-tokens": False}),
    ({"grad_accum": 4}, {"--grad-accum": True}),
    ({"batch_size": None, "batch_tokens": 256, "grad_accum": None}, {
        "--batch-size": True, "--grad-accum": True, "--batch-tokens": True}),
    ({"phases": "64@0,64@20", "train_seq_len": None}, {"--seq-schedule": False}),  # never reached
    ({"phases": "64@0,64@9", "train_seq_len": None}, {"--seq-schedule": True}),
    ({"phases": "32@0,64@20", "train_seq_len": None}, {"--seq-schedule": True}),
    ({"phases": "64@0,32@9", "train_seq_len": None}, {"--seq-schedule": True}),
    ({"optimizer": "adamw"}, {"--optimizer": True}),
    ({"param_dtype": "bf16"}, {"--param-dtype": True, "--precision": True, "--amp": False}),
    ({"precision": "fp16"}, {"--precision": True, "--param-dtype": True, "--amp": False, "--amp-dtype": False}),
    ({"fused_blocks": True}, {"--fused": False}), ({"deterministic": True}, {"--deterministic": False}),
    ({"save_every": 3, "save_minutes": 1.0, "keep_last": 2, "price": 2.0}, {
        "--save-every": False, "--save-minutes": False, "--keep-last": False, "--price": False}),
    ({"log_every": 5, "instrument": "full", "live": "off"}, {"--log-every": False, "--instrument": False,
                                                              "--live": False}),
    ({"eval_every": 7, "eval_iters": 2}, {"--eval-every": False, "--eval-iters": False}),
    ({"max_seq_len": 128}, {"--block": False}), ({"grad_checkpoint": "all"}, {"--grad-checkpoint": False}),
    ({"tag": "other", "root": "/elsewhere", "resume": True, "ckpt": "x.pt", "if_exists": "resume"}, {}),
    ({}, {}),
])
def test_what_matters_and_what_does_not(change, expected):
    kept = {name: True for name, matters in expected.items() if matters}
    reported = found({"weight_decay": 0.5, "min_lr": None}, {"weight_decay": 0.5, "min_lr": None, **change})
    assert {name: True for name, matters in reported.items() if matters} == kept
    assert reported.items() >= {name: m for name, m in expected.items() if name not in ("--amp", "--amp-dtype")}.items()
    assert set(reported) <= set(expected) | {"--amp-dtype", "--amp"}


@pytest.mark.parametrize(("before", "after", "step", "expected"), [
    # A longer cosine is another one, at any step; at the last one, too: the rate would jump up.
    ({"lr_schedule": "cosine"}, {"lr_schedule": "cosine", "steps": 24}, 6, {"--steps"}),
    ({"lr_schedule": "cosine"}, {"lr_schedule": "cosine", "steps": 24}, 12, {"--steps"}),
    ({"lr_schedule": "linear"}, {"lr_schedule": "linear", "steps": 11}, 6, {"--steps"}),
    ({"lr_schedule": "wsd", "steps": 100}, {"lr_schedule": "wsd", "steps": 200}, 50, {"--steps"}),
    ({"lr_schedule": "cosine"}, {"lr_schedule": "cosine", "warmup_steps": 3}, 6, {"--warmup-steps"}),
    ({"lr_schedule": "cosine"}, {"lr_schedule": "cosine", "min_lr": 2e-4}, 6, {"--min-lr"}),
    # Nothing is left to do: no rate, no change.
    ({"lr_schedule": "cosine"}, {"lr_schedule": "cosine", "min_lr": 2e-4}, 12, set()),
    ({"lr_schedule": "cosine"}, {"lr_schedule": "linear", "min_lr": 1e-3}, 2, {"--lr-schedule", "--min-lr"}),
    ({"lr_schedule": "cosine", "min_lr": 1e-3}, {"lr_schedule": "constant", "min_lr": 1e-3}, 2, set()),
])
def test_the_learning_rate_is_compared_as_a_function(before, after, step, expected):
    assert {flag for flag, matters in found(before, after, step).items() if matters} == expected


RATES = st.fixed_dictionaries({
    "schedule": st.sampled_from(LR_SCHEDULES), "peak_lr": st.sampled_from([1e-3, 2e-3]),
    "min_lr": st.sampled_from([1e-4, 1e-3]), "warmup_steps": st.sampled_from([0, 1, 5, 40]),
    "steps": st.sampled_from([41, 60, 61, 500])})


@settings(max_examples=400, deadline=None)
@given(RATES, RATES, st.integers(0, 520))
def test_a_rate_is_refused_exactly_where_it_differs_at_a_step_to_come(old, new, step):
    """By brute force over every step; the flags that are named are such as differ."""
    names = {"schedule": "lr_schedule", "peak_lr": "lr", "min_lr": "min_lr", "warmup_steps": "warmup_steps",
             "steps": "steps"}
    before, after = ({names[name]: value for name, value in rate.items()} for rate in (old, new))
    refused = {flag for flag, matters in found(before, after, step).items() if matters}
    differs = any(lr_at(at, **old) != lr_at(at, **new) for at in range(step, new["steps"]))
    assert bool(refused) == differs
    assert refused <= {"--lr-schedule", "--lr", "--min-lr", "--warmup-steps", "--steps"}


@pytest.mark.parametrize("schedule", LR_SCHEDULES)
@pytest.mark.parametrize("changed", [{"warmup_steps": 2001}, {"steps": 1_000_001}, {"steps": 999_999},
                                     {"min_lr": 1.01e-4}, {"lr": 1.0001e-3}])
def test_a_long_run_is_compared_at_the_steps_that_tell(schedule, changed):
    """Not at each of a million, and at the one that is another all the same."""
    base = {"lr_schedule": schedule, "steps": 1_000_000, "warmup_steps": 2000, "min_lr": 1e-4}
    rates = [{"schedule": rate["lr_schedule"], "peak_lr": rate.get("lr", 1e-3), "min_lr": rate["min_lr"],
              "warmup_steps": rate["warmup_steps"], "steps": rate["steps"]} for rate in (base, {**base, **changed})]
    for step in (0, 2000, 500_000):
        differs = any(lr_at(at, **rates[0]) != lr_at(at, **rates[1])
                      for at in {*range(step, rates[1]["steps"], 997), *range(max(step, 1990), 2010),
                                 *range(max(step, 799_990), 800_010), *range(999_990, rates[1]["steps"])})
        assert any(found(base, {**base, **changed}, step).values()) == differs, (step, schedule)


def test_every_option_can_be_read_back_and_is_classed():
    """A field of a type that known_options does not know would make every checkpoint a damaged one."""
    config = resolve({**NANO})
    assert changes(saved_by(settled(config)), settled(config), 3, has_bf16=True) == []
    named = {f"{section}.{field.name}" for section, cls in sections().items() for field in dataclasses.fields(cls)}
    for name in module._HARMLESS | module._ROUNDING | module._NOT_COMPARED | module._OPEN:
        assert name in named | set(sections()), name
    for cls in sections().values():
        for field in dataclasses.fields(cls):
            assert all(kind in module._KINDS for kind in field.type.split(" | ")), field


# ---- arithmetic that was left open

def test_what_is_left_open_is_as_it_was():
    was = settled(resolve({**NANO, "device": "cuda"}))
    assert (was.train.precision, was.train.param_dtype) == ("bf16", "bf16")
    here = as_before(resolve(NANO), saved_by(was))  # on the CPU, whose default is fp32
    assert settled(here).train.precision == settled(here).train.param_dtype == "bf16"
    asked = resolve({**NANO, "precision": "fp32"})
    assert as_before(asked, saved_by(was)) == asked
    assert {c.flag: c.matters for c in changes(saved_by(was), asked, 6)} == {"--precision": True, "--device": False}
    same = as_before(resolve({**NANO, "param_dtype": "bf16"}), saved_by(was))
    assert same.train.precision == "bf16"
    assert as_before(resolve(NANO), {}) == resolve(NANO)
    odd = saved_by(was) | {"train": {**saved_by(was)["train"], "param_dtype": "../x"}}
    assert as_before(resolve(NANO), odd) == resolve(NANO)


def test_a_gpu_without_bf16_continues_in_fp16_and_says_so():
    asked = resolve({**NANO, "device": "cuda", "precision": "bf16"})
    new, old = settled(asked), settled(asked, has_bf16=False)
    assert old.train.precision == "fp16"
    told = changes(saved_by(new), old, 6, has_bf16=False)
    assert {c.flag for c in told} == {"--precision", "--param-dtype", "--amp-dtype"}
    assert all(c.rounds and not c.matters for c in told)
    # Back on it: the same words again are no change, though they say bf16.
    assert changes(saved_by(old), asked, 6) == []
    assert changes(saved_by(old), old, 6, has_bf16=False) == []
    # And on one with bf16 they are.
    assert {c.flag for c in changes(saved_by(old), new, 6, has_bf16=True) if c.matters} >= {"--precision"}


def test_the_launcher_does_not_take_open_options_for_changes():
    was = settled(resolve({**NANO, "device": "cuda"}))
    assert changes(saved_by(was), resolve({**NANO, "device": "cuda"}), 6) == []


# ---- what is said

def test_one_refusal_names_everything(tmp_path):
    before = saved_by(settled(resolve(NANO)))
    now = settled(resolve({**NANO, "seed": 7, "grad_accum": 4, "save_every": 3, "phases": "64@0,32@9"}
                          | {"train_seq_len": 64}))
    told = changes(before, now, 6)
    text = refusal(told, Path("last.pt"), allow_change=False)
    assert text.splitlines() == [
        "last.pt would be continued with options that change the result (saved -> now):",
        "  --grad-accum: 2 -> 4", "  --seq-schedule: 64@0 -> 64@0,32@9", "  --seed: 1337 -> 7",
        "Give the run's own options, or add --allow-change to continue with these"]
    assert refusal(told, Path("last.pt"), allow_change=True) == ""
    sentences = notes(told)
    assert "--seed: 1337 -> 7" in sentences[0]
    assert "--allow-change" in sentences[0]
    assert "--save-every: 0 -> 3" in sentences[1]
    other = changes(before, settled(resolve({**NANO, "optimizer": "adamw"})), 6)
    assert "its optimizer's state is of use to no other" in refusal(other, Path("last.pt"), allow_change=True)


def test_values_out_of_a_file_are_shown_without_their_control_characters():
    before = saved_by(settled(resolve({**NANO, "tag": "x"})))
    before["log"] = {"wandb_name": "\x1b[2Jred\r\nerror: nothing", "wandb_project": "p" * 4000}
    for sentence in notes(changes(before, settled(resolve(NANO)), 6)):
        assert sentence.isprintable()
        assert len(sentence) < 500
