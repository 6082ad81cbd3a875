"""The watch over losses: silent on what training curves do, and quick where one goes wrong.

Curves are simulated: a power law down from 11 nats, as recorded runs fall, with noise of each kind that a loss has.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oneb.errors import OnebError
from oneb.optim.loss_scale import MIN_SCALE, LossScaler
from oneb.train import watch
from oneb.train.watch import LEAD_STEPS, SKIP_STEPS, SPIKE_STEPS, LossWatch, Reading, Verdict

RESULTS = Path(__file__).resolve().parents[1] / "bench" / "results"
ZSCORE = 10.0  # --spike-zscore's default
WARMUP = 10
SIGMA = 0.05  # of a batch of 65,536 tokens, as recorded


def curve(steps: int, noise: np.ndarray, floor: float = 2.5) -> np.ndarray:
    """A loss that falls from 11 nats to ``floor``, with ``noise``; Lion's first steps rise to 14 before that."""
    losses = floor + (11 - floor) * (1 + np.arange(steps) / 20) ** -0.35 + noise
    losses[3:8] = (11.5, 14.0, 12.5, 12.0, 11.4)
    return losses


def correlated(noise: np.ndarray, rho: float) -> np.ndarray:
    """First-order autoregression of the same standard deviation."""
    out, last = np.empty_like(noise), 0.0
    for number, value in enumerate(noise.tolist()):
        last = rho * last + math.sqrt(1 - rho * rho) * value
        out[number] = last
    return out


def documents(rng: np.random.Generator, steps: int, windows: int) -> np.ndarray:
    """Chunks read window by window over ``windows`` steps, each with a heavy-tailed loss of its own."""
    return np.repeat(rng.standard_t(2, steps // windows + 1), windows)[:steps]


def outliers(rng: np.random.Generator, steps: int, longest: int) -> np.ndarray:
    """1 in 200 steps begins up to ``longest`` steps that are 1 to 8 nats too high, then all is as before."""
    noise = np.zeros(steps)
    for at in np.flatnonzero(rng.random(steps) < 1 / 200):
        noise[at:at + rng.integers(1, longest + 1)] = rng.uniform(1, 8)
    return noise


def recoveries(rng: np.random.Generator, steps: int) -> np.ndarray:
    """Every 1,000 steps the loss rises by 0.3 to 2 nats and falls again with a time constant of 2 to 10 steps."""
    noise = np.zeros(steps)
    for at in range(500, steps, 1000):
        noise[at:] += rng.uniform(0.3, 2) * np.exp(-np.arange(steps - at) / rng.uniform(2, 10))
    return noise


# Name: (noise of so many steps, windows of a chunk).
ORDINARY = {
    "normal": (lambda rng, n: SIGMA * rng.standard_normal(n), 1),
    "large batches": (lambda rng, n: 0.002 * rng.standard_normal(n), 1),
    "no noise at all": (lambda rng, n: np.zeros(n), 1),
    "small batches, heavy tails (t2)": (lambda rng, n: 0.3 * rng.standard_t(2, n), 1),
    "tails without a mean (Cauchy)": (lambda rng, n: SIGMA * rng.standard_t(1, n), 1),
    "correlated over 10 steps": (lambda rng, n: SIGMA * correlated(rng.standard_normal(n), 0.9), 1),
    # Each batch's own noise is there as well, as always where batches are drawn anew.
    "correlated over 100 steps": (
        lambda rng, n: SIGMA * (rng.standard_normal(n) + correlated(rng.standard_normal(n), 0.99)), 1),
    "documents of 4 windows": (lambda rng, n: 0.03 * rng.standard_normal(n) + SIGMA * documents(rng, n, 4), 4),
    "documents of 16 windows": (lambda rng, n: 0.03 * rng.standard_normal(n) + SIGMA * documents(rng, n, 16), 16),
    "single outliers": (lambda rng, n: SIGMA * rng.standard_normal(n) + outliers(rng, n, 1), 1),
    "outliers of up to 8 steps": (lambda rng, n: SIGMA * rng.standard_normal(n) + outliers(rng, n, 8), 1),
    "spikes that recover": (lambda rng, n: SIGMA * rng.standard_normal(n) + recoveries(rng, n), 1),
    "slow drift, +1 nat in 1,000 steps": (lambda rng, n: SIGMA * rng.standard_normal(n) + np.arange(n) / 1000, 1),
}


def watched(losses, *, windows=1, seq_len=256, warmup=WARMUP, start=0, watching=None):
    """The first verdict on a curve, if any."""
    watching = watching or LossWatch(ZSCORE, warmup_steps=warmup, chunk_len=windows * seq_len)
    for step, loss in enumerate(np.asarray(losses).tolist(), start):
        if verdict := watching.add(Reading(step, seq_len, loss, 1.0)):
            return verdict
    return None


def false_alarms(name: str, runs: int, steps: int) -> list[Verdict]:
    noise, windows = ORDINARY[name]
    found = []
    for seed in range(runs):
        rng = np.random.default_rng((seed, len(name)))
        if verdict := watched(curve(steps, noise(rng, steps)), windows=windows):
            found.append(verdict)
    return found


@pytest.mark.parametrize("name", ORDINARY)
def test_no_false_alarm_on_ordinary_curves(name):
    assert false_alarms(name, runs=1, steps=6_000) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ORDINARY)
def test_no_false_alarm_in_millions_of_steps(name):
    """5 runs of 20,000 steps of each kind: 1.3M steps together."""
    assert false_alarms(name, runs=5, steps=20_000) == []


@pytest.mark.slow
def test_the_noise_that_it_was_not_made_for():
    """Where neighbouring steps differ by a seventh of what distant ones do, an alarm in some 100,000 steps is false."""
    alarms = 0
    for seed in range(10):
        rng = np.random.default_rng((seed, 77))
        alarms += watched(curve(20_000, 0.2 * correlated(rng.standard_normal(20_000), 0.99))) is not None
    print(f"\n{alarms} false alarms in 200,000 steps")
    assert alarms <= 4


def test_one_odd_document_is_no_spike():
    """Without knowing that chunks are read over 24 consecutive steps one odd chunk would pass for a divergence."""
    noise = SIGMA * np.random.default_rng(0).standard_normal(1000)
    noise[600:624] += 3
    assert watched(curve(1000, noise), windows=24) is None
    assert watched(curve(1000, noise), windows=1) is not None


# Name: (what is added to the loss from step 0 of the divergence on, the longest delay until the verdict).
DIVERGENCES = {
    "up by 4 at once, and stays": (lambda t, rng: 4 + 0 * t, SPIKE_STEPS),
    "up by 1 at once, and stays": (lambda t, rng: 1 + 0 * t, SPIKE_STEPS),
    "to a noisy 7": (lambda t, rng: 4 + 2 * rng.standard_normal(len(t)), 40),
    "+0.5 a step": (lambda t, rng: np.minimum(8, 0.5 * t), 25),
    "+0.1 a step": (lambda t, rng: np.minimum(8, 0.1 * t), 30),
    "+1 in 33 steps": (lambda t, rng: np.minimum(8, 0.03 * t), 120),
    "+1 in 100 steps": (lambda t, rng: np.minimum(8, 0.01 * t), 130),
    "exponential, doubling in 10 steps": (lambda t, rng: np.minimum(8, 0.01 * 2 ** (t / 10)), 100),
    "up by 3, back within 50 steps": (lambda t, rng: 3 * np.exp(-t / 25), SPIKE_STEPS),
}


def delays(name: str, seeds: range, at: int) -> list[int]:
    """Steps from the beginning of a divergence to the verdict, which must ask to go back to before it shows."""
    added, found = DIVERGENCES[name][0], []
    for seed in seeds:
        rng = np.random.default_rng(seed)
        losses = curve(at + 400, SIGMA * rng.standard_normal(at + 400))
        losses[at:] += added(np.arange(400), rng)
        verdict = watched(losses[at - 300:], start=at - 300)
        assert verdict, (name, seed)
        assert verdict.first_step == verdict.shown_step - LEAD_STEPS
        assert at - 5 <= verdict.shown_step  # not before it, but for the noise of a few steps
        begun = verdict.first_step - at
        assert begun <= 0 or added(np.array([begun]), rng)[0] < 4 * SIGMA
        found.append(verdict.last_step - at + 1)
    return found


@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergences_are_found(name):
    assert max(delays(name, range(3), at=2000)) <= DIVERGENCES[name][1]


@pytest.mark.slow
@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergences_are_found_whenever_they_come(name):
    found = [delay for at in (700, 2000, 20_000) for delay in delays(name, range(15), at)]
    print(f"\n{name}: verdict after {np.median(found):.0f} steps, at most {max(found)}")
    assert max(found) <= DIVERGENCES[name][1]


# ---- losses of real runs


def recorded() -> dict[str, list[float]]:
    curves = {}
    for file in ("fp8_loss_h200.json", "optimizers8_h200.json"):
        for row in json.loads((RESULTS / file).read_text())["rows"]:
            if row["train_loss"]:
                assert [step for step, _ in row["train_loss"]] == list(range(1, len(row["train_loss"]) + 1))
                curves[f"{file} {row['name']}"] = [loss for _, loss in row["train_loss"]]
    assert len(curves) >= 12
    return curves


@pytest.mark.parametrize("warmup", [0, 20])
def test_silent_on_recorded_runs_in_bf16_and_fp8(warmup):
    for name, losses in recorded().items():
        assert watched(losses, warmup=warmup) is None, name
        assert watched(losses, warmup=warmup, watching=LossWatch(5.0, warmup_steps=warmup)) is None, name


@pytest.mark.parametrize(("at", "rise"), [(150, 3.5), (250, 1.25), (400, 1.25)])
def test_finds_what_is_added_to_recorded_runs(at, rise):
    """The steeper the loss still falls, the larger a rise must be to be one."""
    for name, losses in recorded().items():
        if len(losses) == 460:
            verdict = watched([*losses[:at], *(loss + rise for loss in losses[at:])], warmup=20)
            assert verdict is not None, name
            assert verdict.last_step < at + 30


# ---- what is judged, and when


def test_spikes_are_not_looked_for_in_warm_up_nor_before_64_readings_of_a_length():
    noise = SIGMA * np.random.default_rng(1).standard_normal(1000)
    losses = 3 + noise
    early, late = losses.copy(), losses.copy()
    early[20:60] += 4
    late[300:340] += 4
    assert watched(early, warmup=0) is None
    assert watched(late, warmup=340) is None
    assert watched(late, warmup=300) is not None
    assert watched(late, watching=LossWatch(0.0)) is None  # off


def test_a_new_length_begins_anew():
    rng = np.random.default_rng(2)
    watching = LossWatch(ZSCORE)
    for phase, (seq_len, level) in enumerate([(512, 3.0), (1024, 5.0), (2048, 2.5), (512, 6.0)]):
        losses = level + 0.5 * np.exp(-np.arange(300) / 30) + SIGMA * rng.standard_normal(300)
        assert watched(losses, seq_len=seq_len, start=300 * phase, watching=watching) is None
    assert watched(np.full(SPIKE_STEPS, 8.0), seq_len=512, start=1200, watching=watching) == Verdict(
        1200 - LEAD_STEPS, 1200 + SPIKE_STEPS - 1, 1200, watching.add(Reading(1219, 512, 8.0, 1.0)).reason)


@settings(max_examples=30)
@given(values=st.lists(st.floats(0, 20), min_size=64, max_size=200))
def test_what_is_usual_is_the_median_and_the_spread_around_the_trend(values):
    watching = LossWatch(1e9)
    for step, loss in enumerate(values):
        watching.add(Reading(step, 64, loss, 1.0))
    last = np.array(values[-128:])
    half = len(last) // 2
    medians = np.median(last[:half]), np.median(last[half:])
    x = np.arange(len(last))
    centres = x[:half].mean(), x[:half].mean() + len(last) / 2
    line = medians[0] + (x - centres[0]) * (medians[1] - medians[0]) / (centres[1] - centres[0])
    usual, sigma = watching._usual()
    assert usual == min(medians)
    assert sigma == pytest.approx(max(1.4826 * np.median(np.abs(last - line)), watch.MIN_SIGMA))


# ---- updates that were skipped


def skipping(scales, start=100, watching=None):
    """The first verdict on a run of steps without a finite norm, at these loss scales."""
    watching = watching or LossWatch(ZSCORE)
    for step, scale in enumerate(scales, start):
        if verdict := watching.add(Reading(step, 64, 3.0, math.inf, scale)):
            return verdict
    return None


def test_ten_skipped_updates_in_a_row_are_enough():
    watching = LossWatch(0.0)  # whatever the threshold for spikes
    assert skipping([1.0] * 9, watching=watching) is None
    assert not watching.calm
    assert watching.add(Reading(109, 64, 3.0, 1.0)) is None  # in between, one that was not
    assert watching.calm
    assert skipping([1.0] * 9, start=110, watching=watching) is None
    verdict = watching.add(Reading(119, 64, math.nan, 1.0))  # a loss that is not finite is as bad
    assert (verdict.first_step, verdict.shown_step, verdict.last_step) == (110 - LEAD_STEPS, 110, 119)
    assert "from 110 to 119" in verdict.reason


def test_fp16_may_skip_until_its_loss_scale_is_at_its_minimum():
    """With the real scaler: the first steps of a run may overflow until the scale suits, which is no fault."""
    scaler, watching, step = LossScaler(enabled=True), LossWatch(ZSCORE), 0
    while scaler.scale > MIN_SCALE:
        scaler.update(torch.tensor(math.inf))
        assert watching.add(Reading(step, 64, 11.0, math.inf, scaler.scale.item())) is None
        step += 1
    assert step == 16
    for _ in range(SKIP_STEPS - 1):
        verdict = watching.add(Reading(step, 64, 11.0, math.inf, scaler.scale.item()))
        step += 1
    assert (verdict.first_step, verdict.shown_step, verdict.last_step) == (0, 0, 16 + SKIP_STEPS - 2)


def test_skipped_updates_neither_prolong_nor_end_a_rise():
    watching = LossWatch(ZSCORE)
    assert watched(np.full(200, 3.0), watching=watching) is None
    for number in range(SPIKE_STEPS - 1):
        assert watching.add(Reading(200 + 2 * number, 256, 5.0, 1.0)) is None
        assert watching.add(Reading(201 + 2 * number, 256, math.nan, math.nan)) is None
    verdict = watching.add(Reading(238, 256, 5.0, 1.0))
    assert (verdict.shown_step, verdict.last_step) == (200, 238)


# ---- calm, and state


def test_calm_means_that_a_checkpoint_may_be_saved():
    watching = LossWatch(ZSCORE)
    assert watching.calm
    watched(np.full(200, 3.0), watching=watching)
    assert watching.calm
    watching.add(Reading(200, 256, 3.2, 1.0))  # 6.7 of the least standard deviation
    assert not watching.calm
    watching.add(Reading(201, 256, 3.05, 1.0))
    assert watching.calm
    watching.add(Reading(202, 256, 3.5, 1.0))
    assert not watching.calm
    watching.add(Reading(203, 256, 3.0, 1.0))
    assert watching.calm


@pytest.mark.parametrize("name", ORDINARY)
def test_a_run_is_calm_most_of_the_time_and_never_long_without_it(name):
    noise, windows = ORDINARY[name]
    watching, waited, longest, calm = LossWatch(ZSCORE, chunk_len=windows * 256), 0, 0, 0
    losses = curve(3000, noise(np.random.default_rng(7), 3000))
    for step, loss in enumerate(losses.tolist()):
        watching.add(Reading(step, 256, loss, 1.0))
        calm += watching.calm
        waited = 0 if watching.calm else waited + 1
        longest = max(longest, waited)
    assert calm > 0.8 * 3000
    assert longest < 60


@settings(max_examples=30)
@given(seed=st.integers(0, 99), cuts=st.lists(st.integers(1, 499), max_size=5))
def test_the_verdict_is_the_same_through_any_number_of_checkpoints(seed, cuts):
    rng = np.random.default_rng(seed)
    losses = 3 + 0.1 * rng.standard_t(2, 500)
    losses[400:] += rng.uniform(0, 2)
    losses[rng.random(500) < 0.02] = math.nan
    lengths = [64 if step < 150 else 128 for step in range(500)]
    through, straight = LossWatch(ZSCORE, warmup_steps=5), LossWatch(ZSCORE, warmup_steps=5)
    for step, (loss, seq_len) in enumerate(zip(losses.tolist(), lengths, strict=True)):
        if step in cuts:
            state = json.loads(json.dumps(through.state_dict()))
            through = LossWatch(ZSCORE, warmup_steps=5)
            through.load_state_dict(state)
        reading = Reading(step, seq_len, loss, 1.0)
        assert through.add(reading) == straight.add(reading)
        assert through.calm == straight.calm
        assert through.state_dict() == straight.state_dict()


@pytest.mark.parametrize("change", [
    {"recent": [3.0, "3"]}, {"recent": [math.nan]}, {"recent": (3.0,)}, {"recent": [3.0] * 129}, {"high": 1.0},
    {"z": math.nan}, {"z": "0"}, {"seq_len": None}, {"skips": True}, {"more": 1}])
def test_a_damaged_state_is_refused(change):
    with pytest.raises(OnebError, match="resume from an older one"):
        LossWatch(ZSCORE).load_state_dict({**LossWatch(ZSCORE).state_dict(), **change})
    with pytest.raises(OnebError):
        LossWatch(ZSCORE).load_state_dict([])
