"""Small models of every variant and option, shared by the tests of the model."""

from oneb.presets import resolve

SHAPE = {"d_model": 64, "n_layers": 2, "n_heads": 4, "d_ff": 96, "max_seq_len": 64, "vocab_size": 300}
VARIANTS = ("baseline", "gqa", "gqa_kv2", "bottleneck", "decoupled")
OPTIONS = {
    "plain": {},
    "null": {"null_attn": True},
    "tied": {"tie_qk": True},
    "null_tied": {"null_attn": True, "tie_qk": True},
    "no_rope": {"rope": False, "null_attn": True},
    "no_temperature": {"learned_temp": False},
}
CASES = [
    (variant, name) for variant in VARIANTS for name, given in OPTIONS.items()
    if not (given.get("tie_qk") and variant.startswith("gqa"))
]


def model_config(variant="baseline", **given):
    given = {"decoupled": {"sem_dim": 16, "geo_dim": 32}, "bottleneck": {"attn_dim": 24}}.get(variant, {}) | given
    return resolve({**SHAPE, "variant": variant, "phases": "64@0", **given}).model


def relative_error(got, expected):
    """Frobenius norm of the difference over that of ``expected``."""
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()
