"""What is chosen so that a run fits, against a search through everything that could have been chosen."""

import dataclasses
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oneb.config import Config, device_defaults
from oneb.errors import OnebError
from oneb.fit import USEFUL_TOKENS, fit
from oneb.gpus import get_gpu
from oneb.memory import step_memory
from oneb.presets import resolve
from oneb.roofline import table_speed
from oneb.units import GIB, format_gib


def settled(**options) -> Config:
    config = resolve(options)
    return dataclasses.replace(config, train=device_defaults(config.train, "cuda"))


def peak(config, seq_len, batch_size, layers, optimizer):
    return sum(step_memory(config, seq_len, batch_size, layers, optimizer=optimizer).values())


def every_choice(config, seq_len, budget, optimizer):
    """(micro-batch, recomputed layers) of all that fits."""
    sequences = config.train.sequences(seq_len)
    return [(n, layers) for n in range(1, sequences + 1) if sequences % n == 0
            for layers in range(config.model.n_layers + 1) if n == 1 or n * seq_len <= USEFUL_TOKENS
            if peak(config, seq_len, n, layers, optimizer) <= budget]


def made_up_speed(seq_len, batch_size, grad_accum, layers):
    """Larger micro-batches are faster, recomputation is slower: with its own numbers."""
    return 1e5 / (1 + 2000 / (batch_size * seq_len)) / (1 + layers / 50)


budgets = st.floats(5.0, 40.0).map(lambda gib: int(gib * GIB))
SMALL = {"size": "large", "n_layers": 8, "max_seq_len": 4096}


@settings(max_examples=25, deadline=None)
@given(budget=budgets, variant=st.sampled_from(["baseline", "decoupled"]), seq_len=st.sampled_from([512, 3000, 4096]),
       grad_accum=st.sampled_from([1, 6, 16]), optimizer=st.sampled_from(["auto", "adamw", "lion8bit"]))
def test_the_fastest_of_all_that_fits_is_chosen(budget, variant, seq_len, grad_accum, optimizer):
    budget //= 4
    config = settled(**SMALL, variant=variant, train_seq_len=seq_len, grad_accum=grad_accum, optimizer=optimizer)
    chosen = fit(config, budget, made_up_speed)
    wide = "lion" if optimizer == "auto" else optimizer
    choices = every_choice(config, seq_len, budget, wide)
    if optimizer == "auto":
        assert chosen.optimizer == ("lion" if choices else "lion8bit")
    choices = choices or every_choice(config, seq_len, budget, chosen.optimizer)
    (phase,) = chosen.phases
    assert phase.batch_size * phase.grad_accum == grad_accum
    assert phase.peak_bytes == peak(config, seq_len, phase.batch_size, phase.recomputed_layers, chosen.optimizer)
    assert chosen.fits == bool(choices) == (phase.peak_bytes <= budget)
    if choices:
        best = max(made_up_speed(seq_len, n, grad_accum // n, layers) for n, layers in choices)
        assert made_up_speed(seq_len, phase.batch_size, phase.grad_accum, phase.recomputed_layers) == best


@settings(max_examples=20, deadline=None)
@given(budget=budgets, grad_accum=st.sampled_from([1, 6, 16]))
def test_without_a_speed_the_least_is_recomputed(budget, grad_accum):
    budget //= 4
    config = settled(**SMALL, train_seq_len=2048, grad_accum=grad_accum, optimizer="lion")
    chosen = fit(config, budget)
    choices = every_choice(config, 2048, budget, "lion")
    if choices:
        least = min(layers for _, layers in choices)
        largest = max(n for n, layers in choices if layers == least)
        assert (chosen.at(2048).batch_size, chosen.at(2048).recomputed_layers) == (largest, least)


def test_each_length_has_its_own_choice_and_keeps_the_global_batch():
    config = settled(phases="512@0,2048@100,512@200,1024@300", steps=250, grad_accum=12)
    chosen = fit(config, 24 * GIB, made_up_speed)
    assert [phase.seq_len for phase in chosen.phases] == [512, 2048]
    assert all(phase.batch_size * phase.grad_accum == 12 for phase in chosen.phases)
    assert chosen.at(512).batch_size > chosen.at(2048).batch_size
    by_tokens = fit(settled(phases="512@0,2048@100", steps=250, batch_tokens=65536), 24 * GIB, made_up_speed)
    assert [p.seq_len * p.batch_size * p.grad_accum for p in by_tokens.phases] == [65536, 65536]


def test_numbers_that_were_given_are_obeyed_even_where_they_do_not_fit():
    config = settled(variant="baseline", train_seq_len=2048, batch_size=8, grad_accum=2, grad_checkpoint="3")
    for gib, fits in ((80, True), (16, False)):
        chosen = fit(config, gib * GIB, made_up_speed)
        (phase,) = chosen.phases
        assert (phase.batch_size, phase.grad_accum, phase.recomputed_layers) == (8, 2, 3)
        assert chosen.fits == fits
        assert bool(chosen.notes) != fits or chosen.optimizer != "lion"


@pytest.mark.parametrize("seq_len", [100, 1024])
def test_fp8_micro_batches_have_tokens_in_multiples_of_16(seq_len):
    config = settled(variant="baseline", train_seq_len=seq_len, grad_accum=24, precision="fp8")
    for gib in (12, 40):
        (phase,) = fit(config, gib * GIB, lambda _, batch_size, *__: 1 / batch_size).phases
        assert phase.batch_size * seq_len % 16 == 0
        assert phase.batch_size == (4 if seq_len == 100 else 1)


@pytest.mark.parametrize(("seq_len", "batch_size"), [(64, 16), (200, 4), (2048, 1)])
def test_where_memory_is_not_counted_little_is_taken_and_nothing_recomputed(seq_len, batch_size):
    """Off CUDA nothing stops a micro-batch but the machine's memory."""
    chosen = fit(settled(train_seq_len=seq_len, grad_accum=64), None, made_up_speed)
    assert chosen.fits
    assert not chosen.is_hopeless
    assert (chosen.phases[0].batch_size, chosen.phases[0].recomputed_layers) == (batch_size, 0)


@pytest.mark.parametrize(("options", "gib", "hopeless"), [
    ({}, 80, False), ({}, 6, True), ({"optimizer": "adamw"}, 10, True), ({"batch_size": 4}, 12, False),
    ({"grad_checkpoint": "none"}, 12, False), ({"batch_size": 4}, 3, True), ({"grad_checkpoint": "all"}, 6, False),
])
def test_only_numbers_that_were_given_are_tried_where_they_do_not_fit(options, gib, hopeless):
    chosen = fit(settled(variant="baseline", train_seq_len=2048, **options), gib * GIB, made_up_speed)
    assert chosen.is_hopeless == hopeless
    assert not (chosen.is_hopeless and chosen.fits)


def test_notes_say_what_was_chosen_and_why():
    config = settled(variant="baseline", train_seq_len=2048, grad_accum=16)
    (note,) = fit(config, 80 * GIB, made_up_speed).notes
    assert "micro-batch 16 x 1 instead of 1 x 16: the same 16 sequences a step, about 1.9 times as fast" in note
    notes = fit(config, int(7.7 * GIB), made_up_speed).notes
    assert "lion8bit" in notes[0]
    assert "7.7 GiB" in notes[0]
    assert "of 22 layers are recomputed" in notes[1] or "all 22 layers are recomputed" in notes[1]
    # One sequence at a time, as asked, has nothing to tell.
    assert fit(settled(variant="baseline", train_seq_len=2048, batch_size=1), 80 * GIB, made_up_speed).notes == ()


def given_by(advice: str, options: dict) -> dict:
    """The options with the flags of a piece of advice."""
    flags = dict(re.findall(r"--([\w-]+) ([\w@,]+)", advice))
    names = {"size": "size", "optimizer": "optimizer", "seq-schedule": "phases", "param-dtype": "param_dtype"}
    changed = {names[flag]: value for flag, value in flags.items() if flag in names}
    if "to auto" in advice:
        changed |= {"batch_size": None, "grad_checkpoint": "auto",
                    "grad_accum": options.get("grad_accum", 16) * options.get("batch_size", 1)}
    rest = {k: v for k, v in options.items() if not ("phases" in changed and k == "train_seq_len")}
    return {k: v for k, v in (rest | changed).items() if v is not None}


@pytest.mark.parametrize(("options", "gib", "kinds"), [
    ({"train_seq_len": 2048}, 6.3, ["--size large"]),
    ({"train_seq_len": 8192, "max_seq_len": 8192}, 8.0, ["--seq-schedule", "--size"]),
    ({"train_seq_len": 2048, "optimizer": "adamw"}, 12.0, ["--optimizer adamw8bit"]),
    ({"phases": "1024@0,2048@5,8192@9", "max_seq_len": 8192, "optimizer": "adamw"}, 9.0,
     ["--seq-schedule 1024@0,2048@5 --optimizer adamw8bit", "--size"]),
    ({"train_seq_len": 2048, "grad_checkpoint": "none", "optimizer": "lion8bit"}, 6.5,
     ["leave --grad-checkpoint to auto, and choose --size"]),
    ({"train_seq_len": 2048, "batch_size": 16, "grad_accum": 1, "grad_checkpoint": "none"}, 24.0,
     ["leave --batch-size and --grad-checkpoint to auto"]),
    ({"train_seq_len": 2048, "param_dtype": "fp32"}, 14.0, ["--param-dtype bf16"]),
])
def test_advice_where_nothing_fits_is_true(options, gib, kinds):
    options = {"variant": "baseline", **options}
    chosen = fit(settled(**options), int(gib * GIB))
    assert not chosen.fits
    text = chosen.notes[-1]
    missing = format_gib(chosen.peak_bytes - int(gib * GIB))
    assert f" need {format_gib(chosen.peak_bytes)}, {missing} more than the {gib} GiB there are; " in text
    *pieces, last = text.split("; ", 1)[1].split(" or ")
    assert last == "use a GPU with more memory"
    for kind in kinds:
        assert any(kind in piece for piece in pieces), pieces
    for piece in pieces:
        assert fit(settled(**given_by(piece, options)), int(gib * GIB)).fits, piece


def test_a_limit_that_the_user_set_is_what_to_raise():
    config = settled(variant="baseline", train_seq_len=2048, vram_limit_gib=5.5)
    assert fit(config, int(5.5 * GIB)).notes[-1].endswith("or give more than --vram-limit-gib 5.5")
    assert fit(config, 5 * GIB).notes[-1].endswith("or use a GPU with more memory")


def test_after_running_out_of_memory_there_is_less_until_there_is_nothing_less():
    config = settled(variant="baseline", phases="512@0,2048@100", steps=200, grad_accum=12)
    now = fit(config, 40 * GIB, made_up_speed)
    before = now.at(512)
    seen = [now.at(2048)]
    while (seen[-1].batch_size, seen[-1].recomputed_layers) != (1, 22):
        now = now.smaller(2048)
        seen.append(now.at(2048))
    with pytest.raises(OnebError, match="2048 tokens a sequence with micro-batch 1 x 12, 22 layers recomputed"):
        now.smaller(2048)
    assert now.at(512) == before
    assert all(phase.batch_size * phase.grad_accum == 12 for phase in seen)
    peaks = [phase.peak_bytes for phase in seen]
    assert peaks == sorted(set(peaks), reverse=True)
    assert len(seen) < 10


@pytest.mark.parametrize(("gib", "options", "told"), [
    (12, {}, True), (16, {}, False), (80, {}, False), (8, {}, False), (12, {"optimizer": "lion"}, False),
])
def test_the_user_is_told_where_state_in_8_bits_would_be_much_faster(gib, options, told):
    config = settled(variant="baseline", train_seq_len=2048, **options)
    speed = table_speed(config, get_gpu("h200"))
    chosen = fit(config, gib * GIB, speed)
    tips = [note for note in chosen.notes if "--optimizer lion8bit would" in note]
    assert len(tips) == told
    if told:
        taken = fit(settled(variant="baseline", train_seq_len=2048, optimizer="lion8bit"), gib * GIB, speed)
        (new,), (old,) = taken.phases, chosen.phases
        gain = speed(2048, new.batch_size, new.grad_accum, new.recomputed_layers) / speed(
            2048, old.batch_size, old.grad_accum, old.recomputed_layers)
        assert f"about {gain:.1f} times as fast" in tips[0]
