"""What ``--instrument`` looks at: sizes of weights and gradients by part and layer, and how attention spreads.

Legend: B sequences, T tokens, H query heads, L layers.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oneb.kernels.documents import Documents, visible
from oneb.model.transformer import Block, Transformer

LEVELS = ("basic", "medium", "full")
MAX_PROBE_TOKENS = 512
# Heads whose attention (T x T, fp32) is held at once.
_HEADS_AT_ONCE = 8

# Part -> parameters. Parts as in oneb.accounting.parameter_counts; temperature and null token apart from attention.
Parts = dict[str, list[nn.Parameter]]


@torch.no_grad()
def analyse(model: Transformer, tokens: Tensor | None, level: str, *, grad_scale: float = 1.0) -> dict[str, Any]:
    """The contents of an ``analysis`` row, after a backward pass and before the optimizer's step.

    Changes nothing: weights, gradients and random state stay as they are. The device is read once, at the end.

    Args:
        model: with the gradients of a step.
        tokens: probe windows (B, T + 1), of which the first 512 tokens are looked at; used by level ``full`` only,
            which leaves attention out without them.
        level: ``basic``, ``medium`` or ``full``.
        grad_scale: what gradients are multiplied by to be those of the mean loss (1 / the loss scale).

    Returns:
        ``weight_rms``, ``grad_rms``: root mean square by part (embedding, attention, feed-forward, norms, temperature,
        null); None for a part without gradients. ``medium`` adds ``weight_rms_by_layer`` and ``grad_rms_by_layer``:
        lists of L values by part. ``full`` adds lists of L lists of H values: ``attention_entropy`` in nats (mean
        over sequences and queries), ``attention_entropy_fraction`` (each query's entropy over its maximum, the ln of
        the keys that it sees; queries that see one key are left out), with a learned temperature ``temperature``
        (what multiplies the scores), and with a null token ``null_mass`` by layer (L values: the mean weight on it).
    """
    assert level in LEVELS, f"{level!r} is none of {LEVELS}"
    layers = [_block_parts(block) for block in model.blocks]
    grad_scale = abs(grad_scale)
    whole = {part: [x for layer in layers for x in layer[part]] for part in layers[0]}
    whole["norms"] = [*whole["norms"], model.norm.weight]
    rows: dict[str, Any] = {
        "weight_rms": {"embedding": _rms([_used_rows(model, model.embedding)])} | _weight_rms(whole),
        "grad_rms": {"embedding": _rms([_used_rows(model, model.embedding.grad)]) * grad_scale}
        | _grad_rms(whole, grad_scale),
    }
    if level != "basic":
        rows["weight_rms_by_layer"] = _by_layer(_weight_rms(layer) for layer in layers)
        rows["grad_rms_by_layer"] = _by_layer(_grad_rms(layer, grad_scale) for layer in layers)
    if level == "full":
        if model.config.learned_temp:
            rows["temperature"] = torch.stack([block.attention.log_temperature.float().exp() for block in model.blocks])
        if tokens is not None:
            rows |= attention_statistics(model, tokens[:, :-1][:, :MAX_PROBE_TOKENS])
    return _to_host(rows)


# ---- sizes of weights and gradients


def _block_parts(block: Block) -> Parts:
    attention, feed_forward = block.attention, block.feed_forward
    parts = {
        "attention": [attention.qkv.weight, attention.out.weight],
        "feed-forward": [feed_forward.gate_up.weight, feed_forward.down.weight],
        "norms": [block.attention_norm.weight, block.feed_forward_norm.weight],
    }
    if attention.config.learned_temp:
        parts["temperature"] = [attention.log_temperature]
    if attention.config.null_attn:
        parts["null"] = [attention.null_k, attention.null_v]
    return parts


def _used_rows(model: Transformer, embedding: Tensor | None) -> Tensor | None:
    """Without the rows that only pad the vocabulary: they are zero, and would dilute the mean."""
    return None if embedding is None else embedding[: model.config.vocab_size]


def _weight_rms(parts: Parts) -> dict[str, Tensor]:
    return {part: _rms(parameters) for part, parameters in parts.items()}


def _grad_rms(parts: Parts, grad_scale: float) -> dict[str, Tensor]:
    return {part: _rms([p.grad for p in parameters]) * grad_scale for part, parameters in parts.items()}


def _rms(tensors: list[Tensor | None]) -> Tensor:
    """Root mean square over all entries of all tensors, fp32 (); NaN where there is none."""
    known = [x for x in tensors if x is not None]
    if not known:
        return torch.tensor(float("nan"))
    # The reduction widens 16-bit entries as it goes: no fp32 copy of a large weight.
    norms = torch.stack([torch.linalg.vector_norm(x, dtype=torch.float32) for x in known])
    return torch.linalg.vector_norm(norms) / sum(x.numel() for x in known) ** 0.5


def _by_layer(layers: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    rows = list(layers)
    return {part: torch.stack([row[part] for row in rows]) for part in rows[0]}  # (L,)


# ---- attention


@torch.no_grad()
def attention_statistics(model: Transformer, tokens: Tensor) -> dict[str, Tensor]:
    """Entropy of attention, and the weight on the null token, of the model's own queries and keys.

    Args:
        tokens: ids (B, T).

    Returns:
        ``attention_entropy`` (L, H) in nats, ``attention_entropy_fraction`` (L, H), and with a null token
        ``null_mass`` (L,), as :func:`analyse` describes them.
    """
    positions = model.positions(tokens)
    x = F.embedding(tokens, model.embedding).to(model.compute_dtype)
    layers = []
    for block in model.blocks:
        q, k, _ = block.attention.project(block.attention_norm(x), positions)
        layers.append(_layer_statistics(q, k, block.attention.null()[0], positions.documents))
        # Not block(x): a compiled block would compile once more for this length.
        x = block.forward(x, positions)
    names = ("attention_entropy", "attention_entropy_fraction", "null_mass")
    return {name: torch.stack([layer[name] for layer in layers]) for name in names if name in layers[0]}


def _layer_statistics(
    q: Tensor, k: Tensor, null_k: Tensor | None, documents: Documents | None
) -> dict[str, Tensor]:
    """One layer's (H,) entropies and () null mass: scaled queries (B, H, T, D), keys (B, K, T, D), null key (K, D)."""
    n_heads, n_tokens = q.shape[1:3]
    repeats = n_heads // k.shape[1]
    k = k.repeat_interleave(repeats, dim=1)
    if null_k is not None:
        null_k = null_k.repeat_interleave(repeats, dim=0)
    if documents is None:
        seen = torch.ones(1, n_tokens, n_tokens, dtype=torch.bool, device=q.device).tril()
    else:
        seen = visible(documents)
    seen = seen.expand(len(q), -1, -1)
    # Entropy of even attention, by sequence and query (B, T).
    most = (seen.sum(-1) + (null_k is not None)).log()
    several = most > 0
    entropy, fraction, null_mass = (torch.zeros(n_heads, device=q.device) for _ in range(3))
    for first in range(0, n_heads, _HEADS_AT_ONCE):
        heads = slice(first, first + _HEADS_AT_ONCE)
        null = None if null_k is None else null_k[heads]
        for one in range(len(q)):  # one sequence at a time
            weights = _weights(q[one, heads], k[one, heads], null, seen[one])
            by_query = torch.special.entr(weights).sum(-1)  # (heads, T)
            entropy[heads] += by_query.mean(-1) / len(q)
            fraction[heads] += (by_query / most[one])[:, several[one]].sum(-1) / several.sum().clamp(min=1)
            null_mass[heads] += weights[..., 0].mean(-1) / len(q)
    statistics = {"attention_entropy": entropy, "attention_entropy_fraction": fraction}
    return statistics if null_k is None else statistics | {"null_mass": null_mass.mean()}


def _weights(q: Tensor, k: Tensor, null_k: Tensor | None, seen: Tensor) -> Tensor:
    """Softmax in fp32 of q, k (heads, T, D) over what is ``seen`` (T, T): (heads, T, T); with a null key (heads, D),
    (heads, T, 1 + T)."""
    scores = q.float() @ k.float().transpose(-1, -2)
    scores = scores.masked_fill(~seen, float("-inf"))
    if null_k is not None:
        scores = torch.cat([q.float() @ null_k.float().unsqueeze(-1), scores], dim=-1)
    return scores.softmax(-1)


def _to_host(rows: dict[str, Any]) -> dict[str, Any]:
    """The same nested dict with numbers and lists for tensors, which travel together: the device is waited for once."""
    leaves: list[Tensor] = []

    def collect(value: Any) -> None:
        if isinstance(value, dict):
            for entry in value.values():
                collect(entry)
        else:
            leaves.append(value)

    collect(rows)
    device = leaves[0].device
    numbers = torch.cat([leaf.to(device, torch.float32).flatten() for leaf in leaves]).cpu()
    on_host = iter(part.view(leaf.shape).tolist() for part, leaf in
                   zip(numbers.split([leaf.numel() for leaf in leaves]), leaves, strict=True))

    def rebuild(value: Any) -> Any:
        return {key: rebuild(entry) for key, entry in value.items()} if isinstance(value, dict) else next(on_host)

    return rebuild(rows)
