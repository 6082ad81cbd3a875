"""Arithmetic of a model: parameters, FLOPs, KV cache, memory. Pure functions of the configuration."""

from __future__ import annotations

from oneb.config import ModelConfig

BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
# Tokens whose logits the loss head holds at once (oneb.kernels.loss_head).
HEAD_CHUNK_TOKENS = 4096


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
) -> dict[str, int]:
    """Estimated GPU memory by part, in bytes, at the peak of a step. The CUDA context comes on top.

    Optimizer state is fp32: one moment for Lion, two for AdamW.
    """
    stored = sum(parameter_counts(model).values()) + (model.padded_vocab_size - model.vocab_size) * model.d_model
    width, value = BYTES[param_dtype], BYTES[compute_dtype]
    layer = _activation_bytes_per_token(model, value)
    kept = 2 * layer + model.n_layers * model.d_model * value if grad_checkpoint else model.n_layers * layer
    head_tokens = min(HEAD_CHUNK_TOKENS, micro_batch_tokens)
    return {
        "weights": stored * width,
        "gradients": stored * width,
        "optimizer": stored * 4 * (1 if optimizer == "lion" else 2),
        "activations": micro_batch_tokens * kept,
        # A chunk's logits and their gradient, and the head's weight gradient (fp32, then as stored).
        "loss head": head_tokens * model.padded_vocab_size * 2 * value
        + model.padded_vocab_size * model.d_model * (4 + width)
        + micro_batch_tokens * model.d_model * 2 * value,
    }


def _activation_bytes_per_token(model: ModelConfig, value_bytes: int) -> int:
    """What one block keeps a token for its backward pass: inputs of its products, and of attention."""
    padded = -(-model.qk_head_dim // 8) * 8
    qkv = (model.n_heads + 2 * model.n_kv_heads) * padded
    wide = 4 * model.d_model + qkv + model.n_heads * padded + model.attn_dim + 3 * model.d_ff
    return wide * value_bytes + model.n_heads * 4
