"""Backwards through what blocks are made of: norms, activations and attention, on any array module, in FP32.

Gradients of a linear layer's weights are nobody's business here: they are products of what its callers observe, its
inputs and the gradients at its outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from tenpak.decoder.config import Activation
from tenpak.decoder.layers import LayerNorm, RMSNorm, erf, hide, queries_at_once


def norm_backward(norm: RMSNorm | LayerNorm, x: Any, d: Any, *, xp: Any) -> Any:
    """The gradient at a norm's input x, from that at its output."""
    x, r = _normalised(norm, x, xp=xp)
    d = d * norm.weight
    along = xp.einsum("...i,...i->...", x, d)[..., None] / np.float32(x.shape[-1])
    if isinstance(norm, LayerNorm):
        d -= d.mean(axis=-1, keepdims=True)
    d -= x * along
    d *= r
    return d


def gain_backward(norm: RMSNorm | LayerNorm, x: Any, d: Any, *, xp: Any) -> Any:
    """The gradient at a norm's gain [width], from its input x and that at its output, […, width] both."""
    x, _ = _normalised(norm, x, xp=xp)
    return xp.einsum("ti,ti->i", x.reshape(-1, x.shape[-1]), d.reshape(-1, x.shape[-1]))


def _normalised(norm: RMSNorm | LayerNorm, x: Any, *, xp: Any) -> tuple[Any, Any]:
    """What a norm's gain multiplies, of x's shape, and by what it became that, [..., 1]."""
    if isinstance(norm, LayerNorm):
        x = x - x.mean(axis=-1, keepdims=True)
    r = 1 / xp.sqrt(xp.einsum("...i,...i->...", x, x)[..., None] / np.float32(x.shape[-1]) + np.float32(norm.eps))
    return x * r, r


def derivative(name: Activation, *, xp: Any) -> Callable[[Any], Any]:
    """The derivative of the activation of that name."""

    def relu(x: Any) -> Any:
        return (x > 0).astype(x.dtype)

    def silu(x: Any) -> Any:
        s = 1 / (1 + xp.exp(-xp.maximum(x, np.float32(-80))))
        return s * (1 + x * (1 - s))

    def gelu_tanh(x: Any) -> Any:
        c, cubic = np.float32(math.sqrt(2 / math.pi)), np.float32(0.044715)
        square = x * x
        t = xp.tanh(c * x * (1 + cubic * square))
        return np.float32(0.5) * (1 + t) * (1 + x * (1 - t) * c * (1 + 3 * cubic * square))

    def gelu(x: Any) -> Any:
        density = xp.exp(x * x * np.float32(-0.5)) * np.float32(1 / math.sqrt(2 * math.pi))
        return np.float32(0.5) * (1 + erf(x * np.float32(math.sqrt(0.5)), xp=xp)) + x * density

    return {"gelu": gelu, "gelu_tanh": gelu_tanh, "relu": relu, "silu": silu}[name]


def attention_backward(
    q: Any, k: Any, v: Any, d: Any, scale: float, window: int | None = None, *, xp: Any
) -> tuple[Any, Any, Any]:
    """Gradients at queries, keys and values of `layers.attention` over no more than themselves.

    Args:
        q: [batch, heads, T, head_dim]; keys and values [batch, kv_heads, T, head_dim].
        k, v: See `q`.
        d: The gradient at the output, [batch, T, heads · head_dim].
        scale, window: As for `attention`.
        xp: The array module.
    """
    batch, heads, steps, head_dim = q.shape
    kv_heads = k.shape[1]
    shape = (batch, kv_heads, heads // kv_heads, steps, head_dim)
    q = q.reshape(shape) * np.float32(scale)
    d = d.reshape(batch, steps, kv_heads, heads // kv_heads, head_dim).transpose(0, 2, 3, 1, 4)
    k, v = k[:, :, None], v[:, :, None]
    dq, dk, dv = xp.empty_like(q), xp.zeros_like(k), xp.zeros_like(v)
    at_once = queries_at_once(batch * heads * min(steps, window or steps), steps, xp)
    for start in range(0, steps, at_once):
        end = min(start + at_once, steps)
        low = 0 if window is None else max(0, start - window + 1)
        here, seen = (..., slice(start, end), slice(None)), (..., slice(low, end), slice(None))
        p = q[here] @ k[seen].swapaxes(-1, -2)
        hide(p, start, low, window, xp)
        p -= p.max(axis=-1, keepdims=True)
        xp.exp(p, out=p)
        p /= p.sum(axis=-1, keepdims=True)
        dv[seen] += (p.swapaxes(-1, -2) @ d[here]).sum(axis=2, keepdims=True)
        ds = d[here] @ v[seen].swapaxes(-1, -2)
        ds -= xp.einsum("...i,...i->...", ds, p)[..., None]
        ds *= p
        dq[here] = ds @ k[seen]
        dk[seen] += (ds.swapaxes(-1, -2) @ q[here]).sum(axis=2, keepdims=True)
    dq *= np.float32(scale)
    return dq.reshape(batch, heads, steps, head_dim), dk[:, :, 0], dv[:, :, 0]
