"""A block's forward and backward written out: matrix products and fused kernels, nothing in between.

Left to autograd, a block passes over its activations about three times more often than it must; a compiler closes
part of that gap, and costs half a minute for each sequence length. Here every pass over memory can be read:

    x ── norm ── qkv product ── rotary ── attention
      ── out product ── + x, norm ── gate/up product ── SwiGLU ── down product ── + x

Attention is autograd's own. What stands before it and behind it are one :class:`torch.autograd.Function` each, the
same for 16-bit and for fp8 products: a product says in which form it wants its input and its output's gradient
(``x_cast``, ``dy_cast``), and the kernel that makes them writes them so.

Legend: N = B * T tokens, d = d_model, W = widths of queries, keys and values together, F = d_ff.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from oneb.accounting import qkv_widths
from oneb.kernels.products import Product
from oneb.kernels.rms_norm import rms_norm, rms_norm_backward
from oneb.kernels.rotary import rotary, rotary_backward
from oneb.kernels.swiglu import swiglu, swiglu_backward
from oneb.model.layers import Positions, RMSNorm

if TYPE_CHECKING:
    from oneb.model.transformer import Block


class BlockProducts(NamedTuple):
    """The four linear maps of a block, as :mod:`oneb.kernels.products`."""

    qkv: Product
    out: Product
    gate_up: Product
    down: Product


def block_matrices(block: Block) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The weights of :class:`BlockProducts`, in its order."""
    ff = block.feed_forward
    return block.attention.qkv.weight, block.attention.out.weight, ff.gate_up.weight, ff.down.weight


def fused_block(block: Block, x: Tensor, positions: Positions, products: BlockProducts) -> Tensor:
    """``block(x, positions)``, (B, T, d) -> (B, T, d), with the backward of this file."""
    attention = block.attention
    qkv, out, gate_up, down = block_matrices(block)
    temperature = getattr(attention, "log_temperature", None)
    x, q, k, v = _BeforeAttention.apply(x, block.attention_norm.weight, qkv, temperature, block, positions,
                                        products.qkv)
    y = attention.attend(q, k, v, positions.documents)  # (B, T, H * V)
    return _AfterAttention.apply(x, y, block.feed_forward_norm.weight, out, gate_up, down, block, products)


def fused_norm(norm: RMSNorm, x: Tensor) -> Tensor:
    """``norm(x)``, (B, T, d) -> (B, T, d): for the model's last one, which no block contains."""
    return _Norm.apply(x, norm.weight, norm.eps)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        _, y, rstd = rms_norm(x.flatten(0, 1), weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        return y.view_as(x)

    @staticmethod
    def backward(ctx, dy):
        x, weight, rstd = ctx.saved_tensors
        dx, dweight = rms_norm_backward(dy.flatten(0, 1), x.flatten(0, 1), weight, rstd)
        return dx.view_as(x), dweight, None


class _BeforeAttention(torch.autograd.Function):
    """x -> (x, q, k, v). ``x`` passes through so that both of its gradients meet in the norm's backward kernel."""

    @staticmethod
    def forward(ctx, x, norm_weight, qkv_weight, log_temperature, block, positions, product):
        c, norm = block.attention.config, block.attention_norm
        _, h, rstd = rms_norm(x.flatten(0, 1), norm_weight, norm.eps, cast=product.x_cast)  # (N, d)
        qkv = product.forward(h).view(*x.shape[:2], sum(qkv_widths(c)))
        scale = block.attention.query_scale(x.device)
        starts = positions.documents.starts if positions.documents else None
        q, k, v = rotary(qkv, positions.cos, positions.sin, scale, n_heads=c.n_heads, n_kv_heads=c.n_kv_heads,
                         head_dim=c.qk_head_dim, v_head_dim=c.v_head_dim, tie_qk=c.tie_qk, starts=starts)
        ctx.save_for_backward(x, norm_weight, rstd, h, q, scale)
        ctx.positions, ctx.starts, ctx.product = positions, starts, product
        ctx.tie_qk, ctx.learned_temp = c.tie_qk, c.learned_temp
        return x.view_as(x), q, k, v

    @staticmethod
    def backward(ctx, dx, dq, dk, dv):
        x, norm_weight, rstd, h, q, scale = ctx.saved_tensors
        product = ctx.product
        dqkv, dlog_temperature = rotary_backward(dq, dk, dv, q, ctx.positions.cos, ctx.positions.sin, scale,
                                                 tie_qk=ctx.tie_qk, cast=product.dy_cast, starts=ctx.starts)
        dh, dqkv_weight = product.backward(dqkv.flatten(0, 1), h)
        dx, dnorm_weight = rms_norm_backward(dh, x.flatten(0, 1), norm_weight, rstd, dtotal=dx.flatten(0, 1))
        return (dx.view_as(x), dnorm_weight, dqkv_weight, dlog_temperature if ctx.learned_temp else None,
                None, None, None)


class _AfterAttention(torch.autograd.Function):
    """(x, attention's output) -> the block's output: projection, residual, norm, feed-forward, residual."""

    @staticmethod
    def forward(ctx, x, y, norm_weight, out_weight, gate_up_weight, down_weight, block, products):
        out, gate_up, down = products[1:]
        y = out.prepare_x(y.flatten(0, 1))  # (N, H * V)
        total, h, rstd = rms_norm(x.flatten(0, 1), norm_weight, block.feed_forward_norm.eps, delta=out.forward(y),
                                  cast=gate_up.x_cast)
        gates = gate_up.forward(h)  # (N, 2F)
        act = swiglu(gates, cast=down.x_cast)  # (N, F)
        ctx.save_for_backward(y, total, norm_weight, rstd, h, gates, act)
        ctx.products = products
        return down.forward(act).add_(total).view_as(x)

    @staticmethod
    def backward(ctx, dresult):
        y, total, norm_weight, rstd, h, gates, act = ctx.saved_tensors
        out, gate_up, down = ctx.products[1:]
        shape, dresult = dresult.shape, dresult.flatten(0, 1)
        dact, ddown_weight = down.backward(down.prepare_dy(dresult), act)
        dgates = swiglu_backward(dact, gates, cast=gate_up.dy_cast)
        dh, dgate_up_weight = gate_up.backward(dgates, h)
        dtotal, dnorm_weight = rms_norm_backward(dh, total, norm_weight, rstd, dtotal=dresult)
        dy, dout_weight = out.backward(out.prepare_dy(dtotal), y)
        return (dtotal.view(shape), dy.view(*shape[:2], -1), dnorm_weight, dout_weight, dgate_up_weight, ddown_weight,
                None, None)
