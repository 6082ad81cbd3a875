"""The decoder-only transformer: pre-norm blocks, tied embedding, and a loss that never holds all logits."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from oneb.config import ModelConfig
from oneb.kernels.documents import documents_of
from oneb.kernels.loss_head import head_loss
from oneb.kernels.products import Product, Product16
from oneb.model.attention import Attention
from oneb.model.float8_state import Float8State
from oneb.model.fused import BlockProducts, block_matrices, fused_block, fused_norm
from oneb.model.kv_cache import KVCache, LayerCache
from oneb.model.layers import FeedForward, Linear, Positions, RMSNorm, rotary_table

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

_INIT_STD = 0.02  # GPT-2 (Radford et al. 2019); residual outputs shrink by 1/sqrt(2 layers) as there


class Block(nn.Module):
    """Attention and feed-forward, each behind a norm and added to the residual stream (B, T, d_model)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model)
        self.attention = Attention(config)
        self.feed_forward_norm = RMSNorm(config.d_model)
        self.feed_forward = FeedForward(config.d_model, config.d_ff)
        # Set by Transformer.fuse: the four products of the fused path, made anew for each pass. The block is its
        # argument, since a reference to it from here would keep a discarded model's memory until the next collection.
        self.products: Callable[[Block], tuple[Product, ...]] | None = None

    def forward(self, x: Tensor, positions: Positions, cache: LayerCache | None = None) -> Tensor:
        """One block; ``cache`` is for generation."""
        if self.products and cache is None:
            return fused_block(self, x, positions, BlockProducts(*self.products(self)))
        x = x + self.attention(self.attention_norm(x), positions, cache)
        return x + self.feed_forward(self.feed_forward_norm(x))


class Transformer(nn.Module):
    """The model. Build it with :func:`build_model`, which allocates and initialises the weights on the device."""

    def __init__(self, config: ModelConfig, compute_dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = compute_dtype
        self.recomputed_layers = 0  # so many of the first blocks keep their input only, and run again backward
        self.fused = False
        # The id that opens documents, where attention is to stay within them; None lets it reach over whole sequences.
        self.document_opening: int | None = None
        # Its rows are also the output head. The last ones only pad the vocabulary to a multiple of 128.
        self.embedding = nn.Parameter(torch.empty(config.padded_vocab_size, config.d_model))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.d_model)
        self.rotary = Positions(None, None)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embedding.device

    def forward(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """Token ids (B, T) -> normalised hidden states (B, T, d_model), in the compute dtype."""
        positions = self.positions(tokens, cache)
        x = F.embedding(tokens, self.embedding).to(self.compute_dtype)
        for index, block in enumerate(self.blocks):
            if index < self.recomputed_layers and torch.is_grad_enabled():
                x = checkpoint(block, x, positions, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, positions, cache.layers[index] if cache else None)
        return fused_norm(self.norm, x) if self.fused and cache is None else self.norm(x)

    def positions(self, tokens: Tensor, cache: KVCache | None = None) -> Positions:
        """Where ids (B, T) stand: behind what ``cache`` holds, or else in their documents, if it matters."""
        start = cache.length if cache else 0
        positions = self.rotary.slice(start, start + tokens.shape[1])
        if self.document_opening is None or cache is not None:
            return positions
        documents = documents_of(tokens, self.document_opening)
        if self.blocks[0].attention.backend != "narrow":
            documents = documents.with_bias(self.compute_dtype, self.config.null_attn)
        return positions._replace(documents=documents)

    def loss(self, tokens: Tensor) -> Tensor:
        """Mean next-token cross-entropy, fp32 scalar, of windows (B, T + 1): inputs and, shifted by one, targets."""
        hidden = self(tokens[:, :-1])
        return head_loss(hidden.flatten(0, 1), self.embedding, tokens[:, 1:].flatten(), self.config.vocab_size)

    def logits(self, hidden: Tensor) -> Tensor:
        """fp32 logits (..., vocab_size) of hidden states (..., d_model); padding rows are cut off."""
        return F.linear(hidden, self.embedding.to(hidden.dtype))[..., : self.config.vocab_size].float()

    def fuse(self, float8: Float8State | None = None) -> None:
        """Run the blocks by :mod:`oneb.model.fused` from now on, their products in fp8 if its state is given."""
        self.fused = True
        for index, block in enumerate(self.blocks):
            if float8:
                block.products = functools.partial(_products8, float8, index)
            else:
                block.products = functools.partial(_products16, self.compute_dtype)

    def compile(self, mode: str = "default") -> None:
        """Compile the blocks in place instead of fusing them by hand; a graph a sequence length serves all blocks."""
        mode = None if mode == "default" else mode
        for block in self.blocks:
            block.compile(mode=mode, dynamic=False)
        self.norm.compile(dynamic=False)


def _products16(dtype: torch.dtype, block: Block) -> tuple[Product, ...]:
    return tuple(Product16(weight, dtype) for weight in block_matrices(block))


def _products8(float8: Float8State, index: int, _: Block) -> tuple[Product, ...]:
    return float8.products(index)


def build_model(
    config: ModelConfig,
    *,
    device: torch.device | str = "cpu",
    param_dtype: torch.dtype = torch.float32,
    compute_dtype: torch.dtype = torch.float32,
    seed: int = 0,
    backend: str = "math",
) -> Transformer:
    """A freshly initialised model on ``device``.

    Matrices are stored in ``param_dtype``; vectors (norm gains, temperatures, the null key and value) in fp32: they
    are few, and 16 bits would round their small updates away. ``backend`` is the attention kernel's name.
    """
    device = torch.device(device)
    with torch.device("meta"):
        model = Transformer(config, compute_dtype)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            wide = parameter.ndim == 1 or getattr(parameter, "no_weight_decay", False)
            stored = nn.Parameter(torch.empty_like(parameter, device=device, dtype=None if wide else param_dtype))
            stored.__dict__.update(parameter.__dict__)
            setattr(module, name, stored)
        if isinstance(module, Attention):
            module.backend = backend
    if config.rope:
        model.rotary = rotary_table(config.geo_head_dim, config.max_seq_len, device)
    initialise(model, seed)
    return model


@torch.no_grad()
def initialise(model: Transformer, seed: int) -> None:
    """Normal weights (std 0.02, residual outputs smaller with depth), unit norms, neutral temperatures and nulls."""
    generator = torch.Generator(model.device).manual_seed(seed)

    def normal(weight: Tensor, std: float) -> None:
        # Drawn in fp32, so that 16-bit weights are the rounded fp32 ones.
        weight.copy_(torch.randn(weight.shape, generator=generator, device=weight.device) * std)

    normal(model.embedding, _INIT_STD)
    model.embedding[model.config.vocab_size :].zero_()
    residual_std = _INIT_STD / (2 * model.config.n_layers) ** 0.5
    residual_outputs = {id(m) for block in model.blocks for m in (block.attention.out, block.feed_forward.down)}
    for module in model.modules():
        if isinstance(module, Linear):
            normal(module.weight, residual_std if id(module) in residual_outputs else _INIT_STD)
        elif isinstance(module, RMSNorm):
            module.weight.fill_(1.0)
        elif isinstance(module, Attention):
            for name in ("log_temperature", "null_k", "null_v"):
                if hasattr(module, name):
                    getattr(module, name).zero_()
