"""What a practitioner would ask about a plan that can work."""

from __future__ import annotations

import math

from oneb.config import EVAL_ITER_TOKENS, Config, OptimConfig
from oneb.memory import documents_by_bias
from oneb.planner import Plan, longest_seq_len
from oneb.units import format_count

# Training tokens a parameter at which a given compute buys the lowest loss: Hoffmann et al. 2022 (arXiv 2203.15556),
# table 3.
TOKENS_PER_PARAMETER = 20
# Brown et al. 2020 (arXiv 2005.14165), table 2.1: models from 125M to 2.7B parameters train with steps of 0.5M to 1M
# tokens; later reports of this size go down to 0.25M.
USUAL_BATCH_TOKENS = (250_000, 1_000_000)
# Parameters -> AdamW's peak rate, of the same table.
_GPT3_LR = ((125e6, 6e-4), (350e6, 3e-4), (760e6, 2.5e-4), (1.3e9, 2e-4), (2.7e9, 1.6e-4))
# The usual range around that rate. AdamW: later models of this size take up to three times as much (TinyLlama, arXiv
# 2401.02385: 4e-4 at 1.1B). Lion wants 3 to 10 times less than AdamW would take (Chen et al. 2023, arXiv 2302.06675,
# section 5).
_USUAL_LR = {"adamw": (0.5, 3.0), "lion": (0.45, 1.5)}
# Up to about this many epochs, repeated tokens teach nearly as much as new ones: Muennighoff et al. 2023 (arXiv
# 2305.16264).
USEFUL_EPOCHS = 4
# Models below are demonstrations, whose batch and rate are nobody's concern.
_SMALL_PARAMETERS = 100e6
_WARMUP_SHARE = 0.1
_EVAL_SHARE = 0.05


def advice(plan: Plan, config: Config, data_tokens: int | None = None) -> list[str]:
    """Sentences about what is unusual in a plan, each with what would be usual.

    Args:
        data_tokens: tokens in the data, where that is known.
    """
    notes = [*_amount(plan), *_batch(plan)] if plan.parameters >= _SMALL_PARAMETERS else []
    if plan.parameters >= _SMALL_PARAMETERS:
        notes += _rate(config.optim, plan)
    notes += _data(plan, data_tokens) + _documents(config) + _lengths(config) + _shares(config, plan)
    return notes


def _amount(plan: Plan) -> list[str]:
    ratio = plan.tokens / plan.parameters
    if ratio >= TOKENS_PER_PARAMETER / 2:
        return []
    return [f"{ratio:.2g} tokens a parameter: about {TOKENS_PER_PARAMETER} are the best use of compute (Hoffmann et "
            f"al. 2022), which is --target-tokens {format_count(TOKENS_PER_PARAMETER * plan.parameters)} here, or a "
            f"smaller --size for {format_count(plan.tokens)} tokens"]


def _batch(plan: Plan) -> list[str]:
    sizes = sorted({phase.tokens_per_step for phase in plan.phases})
    low, high = USUAL_BATCH_TOKENS
    text = " to ".join(dict.fromkeys(format_count(size) for size in (sizes[0], sizes[-1])))
    if sizes[-1] < low / 2:
        return [f"{text} tokens a step: usual at this size are 0.25M to 1M (Brown et al. 2020, table 2.1). "
                "--batch-tokens 512K with --target-tokens reads as much data in fewer, less noisy steps"]
    if sizes[0] > 2 * high:
        return [f"{text} tokens a step: usual at this size are 0.25M to 1M (Brown et al. 2020, table 2.1); smaller "
                "steps learn more from the same data"]
    return []


def _rate(optim: OptimConfig, plan: Plan) -> list[str]:
    low, high = usual_lr(plan.parameters, plan.optimizer)
    # As said to one digit; what is said to be usual is not warned of.
    if float(f"{low:.0e}") <= optim.lr <= float(f"{high:.0e}"):
        return []
    source = "Brown et al. 2020, table 2.1" if optim.is_adamw else "Chen et al. 2023: a third to a tenth of AdamW's"
    return [f"--lr {optim.lr:g} is {'low' if optim.lr < low else 'high'} for {plan.optimizer} at "
            f"{format_count(plan.parameters)} parameters: usual are {low:.0e} to {high:.0e} ({source})"]


def usual_lr(parameters: float, optimizer: str) -> tuple[float, float]:
    """The usual range of peak rates for ``optimizer`` ("lion", "adamw" or their 8-bit kin)."""
    points = [(math.log(size), math.log(rate)) for size, rate in _GPT3_LR]
    at = min(max(math.log(parameters), points[0][0]), points[-1][0])
    (x0, y0), (x1, y1) = next(pair for pair in zip(points, points[1:], strict=False) if at <= pair[1][0])
    middle = math.exp(y0 + (at - x0) / (x1 - x0) * (y1 - y0))
    low, high = _USUAL_LR[optimizer.removesuffix("8bit")]
    return low * middle, high * middle


def _data(plan: Plan, data_tokens: int | None) -> list[str]:
    if not data_tokens or plan.tokens <= data_tokens:
        return []
    epochs = plan.tokens / data_tokens
    beyond = "" if epochs <= USEFUL_EPOCHS else (
        f", and beyond about {USEFUL_EPOCHS} times repeated tokens teach little (Muennighoff et al. 2023)")
    return [f"the data has {format_count(data_tokens)} tokens, and the run reads {format_count(plan.tokens)}: each "
            f"about {epochs:.1f} times{beyond}"]


def _documents(config: Config) -> list[str]:
    if not config.data.doc_mask:
        return []
    if documents_by_bias(config):
        return ["--doc-mask: speeds are without it, and here it is slow: attention gets a bias of all scores. Our "
                "kernel, which passes over what is hidden, takes bf16 and heads up to 128 wide"]
    return ["--doc-mask: speeds are of attention over whole sequences; within documents long ones are faster"]


def _lengths(config: Config) -> list[str]:
    longest = longest_seq_len(config.train)
    notes = []
    if longest < config.model.max_seq_len:
        notes.append(f"--block is {config.model.max_seq_len}, and the run never trains past {longest} tokens: "
                     "longer contexts will not be learned")
    notes += [f"the phase of {seq_len} tokens from step {start:,} is never reached: the run ends at step "
              f"{config.train.steps:,}" for start, seq_len in config.train.phases if start >= config.train.steps]
    return notes


def _shares(config: Config, plan: Plan) -> list[str]:
    """Parts of the run that its purpose should not pay for."""
    notes = []
    warmup, steps = config.optim.warmup_steps, plan.steps
    if warmup > _WARMUP_SHARE * steps and steps >= 1000:
        notes.append(f"--warmup-steps {warmup:,} is {warmup / steps:.0%} of the run; 1% to 5% is usual")
    every = config.train.eval_every
    if every and every <= steps:
        step = plan.tokens / steps
        # An evaluation's forward pass is a third of a training step's work.
        share = config.train.eval_iters * EVAL_ITER_TOKENS / 3 / (every * step)
        if share > _EVAL_SHARE:
            notes.append(f"evaluations every {every:,} steps add about {share:.0%} to the time; raise --eval-every, or "
                         "lower --eval-iters")
    return notes
