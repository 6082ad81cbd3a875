"""Arithmetic of a model: parameters, FLOPs, KV cache. Pure functions of the configuration; memory is oneb.memory's."""

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


def flops_per_token(model: ModelConfig, seq_len: int, doc_mask: bool = False) -> float:
    """Training FLOPs a token: 6 x matmul parameters + causal attention.

    The convention of PaLM (Chowdhery et al. 2022, arXiv 2204.02311, appendix B) with the attention term
    halved, since a causal query meets half of the keys on average. Recomputation does not count. Nor does attention
    within documents (``doc_mask``), which depends on their lengths: an MFU from it is a little low, never too high.
    """
    if doc_mask:
        return 6.0 * matmul_parameters(model)
    # Forward: 2 FLOPs x seq_len/2 keys x (scores + weighted values); backward twice that.
    attention = 3 * seq_len * model.n_heads * (model.qk_head_dim + model.v_head_dim)
    return 6 * matmul_parameters(model) + model.n_layers * attention


def kv_bytes_per_token(model: ModelConfig, bytes_per_value: int = 2) -> int:
    """KV cache a token over all layers, in bytes (16-bit values by default)."""
    per_layer = model.n_kv_heads * (model.qk_head_dim + model.v_head_dim)
    return model.n_layers * per_layer * bytes_per_value
