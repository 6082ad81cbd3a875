"""Sequence lengths and learning rates as functions of the step, against loops that count step by step."""

import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from oneb.errors import OnebError
from oneb.schedules import (
    LR_SCHEDULES,
    format_seq_schedule,
    lr_at,
    parse_seq_schedule,
    reached,
    seq_len_at,
    steps_for_tokens,
    tokens_before,
)


@st.composite
def phases_from_step_0(draw):
    starts = [0, *sorted(draw(st.sets(st.integers(1, 60), max_size=4)))]
    return tuple((start, draw(st.integers(1, 40))) for start in starts)


def seq_len_by_walking(phases, step):
    """The length of the last phase passed on the way from step 0."""
    lengths = dict(phases)
    current = None
    for at in range(step + 1):
        current = lengths.get(at, current)
    return current


@given(phases_from_step_0())
def test_a_schedule_survives_its_text(phases):
    assert parse_seq_schedule(format_seq_schedule(phases)) == phases


def test_spaces_are_fine():
    assert parse_seq_schedule(" 512@0 , 1024 @ 2000,2048@12000") == ((0, 512), (2000, 1024), (12000, 2048))


@pytest.mark.parametrize(("text", "named"), [
    ("1024", "'1024' is not LENGTH@STEP"),
    ("", "'' is not LENGTH@STEP"),
    ("1024@0,", "'' is not LENGTH@STEP"),
    ("1024@0,x@5", "'x@5' is not LENGTH@STEP"),
    ("1024@-1", "'1024@-1' is not LENGTH@STEP"),
    ("1024@0;2048@5", "'1024@0;2048@5' is not LENGTH@STEP"),
    ("10.5@0", "'10.5@0' is not LENGTH@STEP"),
    ("0@0", "'0@0' has no length"),
    ("1024@0,2048@0", "'2048@0' starts at or before"),
    ("1024@0,2048@500,512@100", "'512@100' starts at or before"),
])
def test_a_malformed_entry_is_named(text, named):
    with pytest.raises(OnebError) as caught:
        parse_seq_schedule(text)
    assert named in str(caught.value)
    assert "--seq-schedule" in str(caught.value)


def test_every_malformed_entry_is_named_at_once():
    with pytest.raises(OnebError) as caught:
        parse_seq_schedule("a@0,1024@0,b,0@7,512@0")
    for entry in ("'a@0'", "'b'", "'0@7'", "'512@0'"):
        assert entry in str(caught.value)


# Sequences a step: the same at all lengths, or as many as make so many tokens.
SEQUENCES = st.integers(1, 7).map(lambda n: lambda _: n) | st.just(lambda seq_len: 1 + 5000 // seq_len)


@given(phases_from_step_0(), st.integers(0, 100), SEQUENCES)
def test_tokens_before_is_a_sum_over_steps(phases, step, sequences):
    lengths = [seq_len_by_walking(phases, s) for s in range(step)]
    assert tokens_before(phases, step, sequences) == sum(n * sequences(n) for n in lengths)


@given(phases_from_step_0(), st.integers(0, 100))
def test_seq_len_at_is_the_phase_last_passed(phases, step):
    assert seq_len_at(phases, step) == seq_len_by_walking(phases, step)


@given(phases_from_step_0(), st.integers(1, 100))
def test_reached_is_every_phase_with_a_step(phases, steps):
    seen = {seq_len_by_walking(phases, s): None for s in range(steps)}
    assert {seq_len for _, seq_len in reached(phases, steps)} == set(seen)
    assert reached(phases, steps) == phases[:len(reached(phases, steps))]


@given(phases_from_step_0(), st.integers(1, 5000), SEQUENCES)
def test_steps_for_tokens_is_the_smallest_by_brute_force(phases, target, sequences):
    done = steps = 0
    while done < target:
        seq_len = seq_len_by_walking(phases, steps)
        done += seq_len * sequences(seq_len)
        steps += 1
    assert steps_for_tokens(phases, target, sequences) == steps


def rate(step, **changes):
    return lr_at(step, **{"schedule": "cosine", "peak_lr": 1.0, "min_lr": 0.1, "warmup_steps": 10, "steps": 110,
                          **changes})


RUNS = st.fixed_dictionaries({
    "schedule": st.sampled_from(LR_SCHEDULES), "peak_lr": st.floats(1e-5, 1), "warmup_steps": st.integers(0, 50),
    "steps": st.integers(2, 300), "share": st.floats(0, 1),
})


@given(RUNS)
def test_the_rate_rises_to_its_peak_then_falls_to_its_end(run):
    run["min_lr"] = run["peak_lr"] * run.pop("share")
    assume(run["warmup_steps"] < run["steps"] - 1)
    rates = [lr_at(step, **run) for step in range(run["steps"])]
    warm, rest = rates[:run["warmup_steps"]], rates[run["warmup_steps"]:]
    assert warm == sorted(warm)
    assert rest == sorted(rest, reverse=True)
    assert rest[0] == pytest.approx(run["peak_lr"])
    assert all(0 < value <= run["peak_lr"] * (1 + 1e-12) for value in rates[:-1])
    if run["schedule"] == "constant":
        assert set(rest) == {run["peak_lr"]}
    else:
        assert rates[-1] == pytest.approx(run["min_lr"], rel=1e-6, abs=1e-12)
        # Past the end nothing jumps.
        assert lr_at(run["steps"] + 1000, **run) == rates[-1]


@given(st.sampled_from(LR_SCHEDULES), st.integers(200, 2000))
def test_the_rate_has_no_jumps(schedule, steps):
    """Between steps it moves by a share of the peak that shrinks as the run grows (wsd's root is steepest)."""
    warmup = steps // 10
    rates = [rate(step, schedule=schedule, warmup_steps=warmup, steps=steps) for step in range(steps)]
    largest = max(abs(after - before) for before, after in zip(rates, rates[1:], strict=False))
    assert largest <= max(1 / warmup, 2 / math.sqrt(0.2 * steps - 1))


@pytest.mark.parametrize(("schedule", "step", "value"), [
    ("cosine", 0, 0.1), ("cosine", 9, 1.0), ("cosine", 10, 1.0), ("cosine", 109, 0.1),
    ("linear", 10, 1.0), ("linear", 109, 0.1), ("linear", 43, 0.7),
    ("cosine", 43, 0.1 + 0.9 * 0.75), ("cosine", 76, 0.1 + 0.9 * 0.25),
    ("constant", 109, 1.0), ("wsd", 87, 1.0), ("wsd", 88, 1.0), ("wsd", 109, 0.1),
])
def test_rates_known_by_hand(schedule, step, value):
    """After 10 steps of warm-up, 99 intervals lead to the last step: a third of the way is step 43."""
    assert rate(step, schedule=schedule) == pytest.approx(value)
