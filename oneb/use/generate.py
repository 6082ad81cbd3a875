"""Text out of what was trained."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from oneb.checkpoints.checkpoint import load_checkpoint, load_weights
from oneb.config import TrainConfig, compute_dtype, model_from_dict
from oneb.data.tokenizer import Tokenizer, known_tokenizer, load_tokenizer
from oneb.errors import OnebError
from oneb.model.kv_cache import KVCache
from oneb.model.transformer import DTYPES, Transformer, build_model
from oneb.train.device import open_device


@dataclass(frozen=True)
class Trained:
    """A model from a checkpoint, ready to generate."""

    model: Transformer
    tokenizer: Tokenizer
    step: int
    tokens: int


def load_trained(path: Path, device_name: str = "auto", tokenizer_name: str | None = None) -> Trained:
    """The model of a checkpoint and the tokenizer of its data, or the one that is named.

    Raises:
        OnebError: no such checkpoint or device, or data whose tokenizer nobody named.
    """
    contents = load_checkpoint(path)
    device = open_device(device_name)
    if tokenizer_name:
        tokenizer = load_tokenizer(tokenizer_name)
    elif contents["encoding"] is None:
        raise OnebError(f"{path} was trained on tokens whose tokenizer is not known (the data's .meta has no "
                        "'encoding'), so they cannot be turned into text; name it with --tokenizer")
    else:
        tokenizer = known_tokenizer(contents["encoding"])
    config = model_from_dict(contents["config"]["model"])
    # As in training on a GPU; elsewhere 16-bit arithmetic is slower than fp32.
    dtype = DTYPES[compute_dtype(TrainConfig(**contents["config"]["train"])) if device.is_cuda else "fp32"]
    model = build_model(config, device=device.torch, param_dtype=dtype, compute_dtype=dtype)
    load_weights(model, contents, config, path)
    return Trained(model, tokenizer, contents["step"], contents["tokens"])


def stream_text(tokenizer: Tokenizer, tokens: Iterator[int]) -> Iterator[str]:
    """Text as its tokens arrive; a character whose bytes span tokens waits until it is whole."""
    ids, shown = [], 0
    for token in tokens:
        ids.append(token)
        text = tokenizer.decode(ids)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            yield text[shown:]
            shown = len(text)
    yield tokenizer.decode(ids)[shown:]


@torch.no_grad()
def generate(
    model: Transformer,
    prompt: Tensor,
    *,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    seed: int,
    vocab_size: int | None = None,
    eot: int | None = None,
) -> Iterator[int]:
    """New token ids after ``prompt`` (T,), one by one, through a KV cache.

    Ends after ``max_new_tokens``, at ``eot``, or when the model's longest context is full. ``temperature`` 0 takes
    the likeliest token; ``top_k`` 0 samples from the whole vocabulary. Ids from ``vocab_size`` on are never chosen: a
    model may have more than its tokenizer.
    """
    limit = min(model.config.max_seq_len, len(prompt) + max_new_tokens)
    cache = KVCache(model.config, 1, limit, model.compute_dtype, model.device)
    generator = torch.Generator(model.device).manual_seed(seed)
    tokens = prompt.to(model.device)
    for _ in range(limit - len(prompt)):
        logits = model.logits(model(tokens[None], cache)[0, -1])[:vocab_size]
        token = _choose(logits, temperature, top_k, generator)
        if token == eot:
            return
        yield token
        tokens = torch.tensor([token], device=model.device)


def _choose(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    logits = logits / temperature
    if 0 < top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], float("-inf"))
    return int(torch.multinomial(logits.softmax(-1), 1, generator=generator))
