"""Arithmetic of a model: parameters, FLOPs, KV cache, memory. Pure functions of the configuration."""

from __future__ import annotations

from oneb.config import ModelConfig

BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
# Tokens whose logits the loss head holds at once (oneb.kernels.loss_head).
HEAD_CHUNK_TOKENS = 8192


def qkv_widths(model: ModelConfig) -> tuple[int, int, int]:
    """Output widths of the query, key and value projections; 0 for queries tied to the keys."""
    q = 0 if model.tie_qk else model.n_heads * model.qk_head_dim
    return q, model.n_kv_heads * model.qk_head_dim, model.n_kv_heads * model.v_head_dim


def parameter_counts(model: ModelConfig) -> dict[str, int]:
    """Parameters by part. The embedding counts once (it is also the output head), padding rows never."""
    d, layers = model.d_model, model.n_layers
    null = model.n_kv_heads * (model.qk_head_dim + model.v_head_dim) if model.null_attn else 0
    temperature = model.n_heads if model.learned_temp else 0
    return {
        "embedding": model.vocab_size * d,
        "attention": layers * (d * sum(qkv_widths(model)) + model.attn_dim * d + temperature + null),
        "feed-forward": layers * 3 * d * model.d_ff,
        "norms": (2 * layers + 1) * d,
    }


def matmul_parameters(model: ModelConfig) -> int:
    """Weights that take part in a matrix product for each token, the output head included."""
    d = model.d_model
    per_layer = d * sum(qkv_widths(model)) + model.attn_dim * d + 3 * d * model.d_ff
    return model.n_layers * per_layer + model.vocab_size * d


def flops_per_token(model: ModelConfig, seq_len: int) -> float:
    """Training FLOPs a token: 6 x matmul parameters + causal attention.

    The convention of PaLM (Chowdhery et al. 2022, arXiv 2204.02311, appendix B) with the attention term
    halved, since a causal query meets half of the keys on average. Recomputation does not count.
    """
    # Forward: 2 FLOPs x seq_len/2 keys x (scores + weighted values); backward twice that.
    attention = 3 * seq_len * model.n_heads * (model.qk_head_dim + model.v_head_dim)
    return 6 * matmul_parameters(model) + model.n_layers * attention


def kv_bytes_per_token(model: ModelConfig, bytes_per_value: int = 2) -> int:
    """KV cache a token over all layers, in bytes (16-bit values by default)."""
    per_layer = model.n_kv_heads * (model.qk_head_dim + model.v_head_dim)
    return model.n_layers * per_layer * bytes_per_value


def memory_parts(
    model: ModelConfig,
    *,
    optimizer: str,
    param_dtype: str,
    compute_dtype: str,
    micro_batch_tokens: int,
    grad_checkpoint: bool,
    fused: bool = True,
    fp8: bool = False,
) -> dict[str, int]:
    """Estimated GPU memory by part, in bytes, at the peak of a step. The CUDA context comes on top.

    Optimizer state is fp32: one moment for Lion, two for AdamW. With fp8 products, each matrix of a block also
    exists twice in 8 bits (as it is, and transposed); with 16-bit products of fp32 weights, once in 16 bits from the
    forward pass to the backward.
    """
    stored = sum(parameter_counts(model).values()) + (model.padded_vocab_size - model.vocab_size) * model.d_model
    width, value = BYTES[param_dtype], BYTES[compute_dtype]
    layer = activation_bytes_per_token(model, value, 1 if fp8 else value, fused=fused)
    matrices = matmul_parameters(model) - model.vocab_size * model.d_model  # of the blocks
    casts = 2 * matrices if fp8 else 0
    # Autograd's recomputation casts weights once more instead.
    narrowed = matrices * value if value < width and not fp8 and (fused or not grad_checkpoint) else 0
    kept = 2 * layer + model.n_layers * model.d_model * value if grad_checkpoint else model.n_layers * layer
    head_tokens = min(HEAD_CHUNK_TOKENS, micro_batch_tokens)
    return {
        "weights": stored * width + casts,
        "gradients": stored * width,
        "optimizer": stored * 4 * (1 if optimizer == "lion" else 2),
        "activations": micro_batch_tokens * kept + narrowed,
        # A chunk's logits (their gradient takes their place), and the head's weight gradient (fp32, then as stored).
        "loss head": head_tokens * model.padded_vocab_size * value
        + model.padded_vocab_size * model.d_model * (4 + width)
        + micro_batch_tokens * model.d_model * 2 * value,
    }


def activation_bytes_per_token(model: ModelConfig, value: int, operand: int, *, fused: bool) -> int:
    """What one block keeps a token for its backward pass.

    Args:
        value: bytes of an activation.
        operand: bytes of an entry that only a matrix product reads again; fused blocks may keep those in fp8.
        fused: whether the block runs by :mod:`oneb.model.fused`; else its backward is autograd's.
    """
    heads_out = model.n_heads * model.v_head_dim
    if not fused:
        padded = -(-model.qk_head_dim // 8) * 8
        qkv = (model.n_heads + 2 * model.n_kv_heads) * padded
        wide = 4 * model.d_model + qkv + model.n_heads * padded + heads_out + 3 * model.d_ff
        return wide * value + model.n_heads * 4
    tied_q = model.n_heads * model.qk_head_dim if model.tie_qk else 0
    # The residual stream twice, queries, keys and values, attention's output, gate and up.
    values = 2 * model.d_model + sum(qkv_widths(model)) + tied_q + heads_out + 2 * model.d_ff
    # Both norms' outputs and SwiGLU's; in fp8 also a copy of attention's output.
    operands = 2 * model.d_model + model.d_ff + (heads_out if operand < value else 0)
    # fp32: attention's log-sum-exp, and the two norms' scales.
    return values * value + operands * operand + 4 * (model.n_heads + 2)
