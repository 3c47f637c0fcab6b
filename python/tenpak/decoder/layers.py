"""What blocks are made of beside linear layers: norms, rotation, activations and attention, on any array module.

`xp` is NumPy or CuPy; only functions that both have are used. Everything is FP32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tenpak.decoder.config import Activation, Rope

#: Scores that exist at once: on a CPU what its cache holds, elsewhere enough to keep a device busy.
_SCORES_CPU = 1 << 20
_SCORES = 1 << 26


class RMSNorm:
    """x / √(mean(x²) + ε) · weight, along the last dimension."""

    def __init__(self, weight: Any, eps: float, *, xp: Any, name: str = "") -> None:
        """`name` is the weight's in the model, where it is a model's."""
        self.weight, self.eps, self._xp, self.name = weight, eps, xp, name

    def __call__(self, x: Any) -> Any:
        xp = self._xp
        mean = xp.einsum("...i,...i->...", x, x)[..., None] / np.float32(x.shape[-1])
        y = x / xp.sqrt(mean + np.float32(self.eps))
        y *= self.weight
        return y


class LayerNorm:
    """(x - mean) / √(variance + ε) · weight + bias, along the last dimension."""

    def __init__(self, weight: Any, bias: Any, eps: float, *, xp: Any, name: str = "") -> None:
        """`name` is the weight's in the model, where it is a model's."""
        self.weight, self.bias, self.eps, self._xp, self.name = weight, bias, eps, xp, name

    def __call__(self, x: Any) -> Any:
        xp = self._xp
        y = x - x.mean(axis=-1, keepdims=True)
        variance = xp.einsum("...i,...i->...", y, y)[..., None] / np.float32(x.shape[-1])
        y /= xp.sqrt(variance + np.float32(self.eps))
        y *= self.weight
        y += self.bias
        return y


class Rotary:
    """Rotates pairs of elements by an angle that grows with the position (Su et al. 2021, arXiv:2104.09864).

    Element i of a head's first half is paired with element i of its second half. Frequencies and angles are FP32,
    as in transformers: models were trained with what that rounds to.
    """

    def __init__(self, rope: Rope, head_dim: int, *, xp: Any) -> None:
        self._xp = xp
        self._frequencies = frequencies(rope, head_dim)
        self._cos: Any = None
        self._sin: Any = None

    def __call__(self, x: Any, start: int, *, back: bool = False) -> Any:
        """Rotates [batch, heads, T, head_dim] at positions `start …`, or back, into a new array."""
        xp, steps, half = self._xp, x.shape[2], x.shape[3] // 2
        if self._cos is None or len(self._cos) < start + steps:
            positions = np.arange(max(start + steps, 2 * start), dtype=np.float32)
            angles = positions[:, None] * self._frequencies
            self._cos, self._sin = xp.asarray(np.cos(angles)), xp.asarray(np.sin(angles))
        cos, sin = self._cos[start : start + steps], self._sin[start : start + steps]
        if back:
            sin = -sin
        first, second = x[..., :half], x[..., half:]
        y = xp.empty(x.shape, x.dtype)
        xp.multiply(first, cos, out=y[..., :half])
        y[..., :half] -= second * sin
        xp.multiply(second, cos, out=y[..., half:])
        y[..., half:] += first * sin
        return y


def frequencies(rope: Rope, head_dim: int) -> NDArray[np.float32]:
    """Radians per position of each pair, [head_dim / 2].

    `linear` divides all by the factor. `llama3` (Llama 3.1's code) divides those of long wavelengths, leaves those
    of short ones, and blends between.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    plain: NDArray[np.float32] = np.reciprocal(np.power(np.float32(rope.theta), exponents))
    if rope.kind == "linear":
        return np.divide(plain, np.float32(rope.factor))
    if rope.kind == "llama3":
        turns = np.multiply(plain, rope.original / (2 * math.pi), dtype=np.float64)
        keep = np.clip((turns - rope.low) / (rope.high - rope.low), 0, 1)
        return np.multiply(plain, keep + (1 - keep) / rope.factor).astype(np.float32)
    return plain


def activation(name: Activation, *, xp: Any) -> Callable[[Any], Any]:
    """The function of that name; it may write over its argument."""
    return {"gelu": _gelu, "gelu_tanh": _gelu_tanh, "relu": _relu, "silu": _silu}[name](xp)


def _relu(xp: Any) -> Callable[[Any], Any]:
    return lambda x: xp.maximum(x, np.float32(0), out=x)


def _silu(xp: Any) -> Callable[[Any], Any]:
    def silu(x: Any) -> Any:
        # Below -80, x / (1 + e⁸⁰) is 0 as far as FP32 goes, and no exponential overflows.
        y = xp.maximum(x, np.float32(-80))
        xp.negative(y, out=y)
        xp.exp(y, out=y)
        y += np.float32(1)
        return xp.divide(x, y, out=y)

    return silu


def _gelu_tanh(xp: Any) -> Callable[[Any], Any]:
    def gelu(x: Any) -> Any:
        y = x * x
        y *= np.float32(0.044715 * math.sqrt(2 / math.pi))
        y += np.float32(math.sqrt(2 / math.pi))
        y *= x
        xp.tanh(y, out=y)
        y += np.float32(1)
        y *= x
        y *= np.float32(0.5)
        return y

    return gelu


def _gelu(xp: Any) -> Callable[[Any], Any]:
    def gelu(x: Any) -> Any:
        y = erf(x * np.float32(math.sqrt(0.5)), xp=xp)
        y += np.float32(1)
        y *= x
        y *= np.float32(0.5)
        return y

    return gelu


#: Numerator and denominator of erf(x) / x in x², highest power first: Eigen's rational approximation for FP32.
_ERF_ABOVE = (
    -2.72614225801306e-10,
    2.77068142495902e-08,
    -2.10102402082508e-06,
    -5.69250639462346e-05,
    -7.34990630326855e-04,
    -2.95459980854025e-03,
    -1.60960333262415e-02,
)
_ERF_BELOW = (
    -1.45660718464996e-05,
    -2.13374055278905e-04,
    -1.68282697438203e-03,
    -7.37332916720468e-03,
    -1.42647390514189e-02,
)


def erf(x: Any, *, xp: Any) -> Any:
    """The error function of FP32 arrays, which NumPy lacks, to 4e-7."""
    x = xp.clip(x, np.float32(-4), np.float32(4))
    square = x * x

    def polynomial(coefficients: tuple[float, ...]) -> Any:
        y = square * np.float32(coefficients[0])
        y += np.float32(coefficients[1])
        for coefficient in coefficients[2:]:
            y *= square
            y += np.float32(coefficient)
        return y

    y = polynomial(_ERF_ABOVE)
    y *= x
    y /= polynomial(_ERF_BELOW)
    return y


def attention(q: Any, k: Any, v: Any, scale: float, window: int | None = None, *, xp: Any) -> Any:
    """Causal attention with grouped queries, some queries at a time.

    Args:
        q: [batch, heads, T, head_dim], the last T of S positions; `scale` is applied to it here.
        k: [batch, kv_heads, S, head_dim].
        v: As `k`.
        scale: What scores are multiplied with.
        window: The last positions that each one sees, its own included; None for all.
        xp: The array module.

    Returns:
        [batch, T, heads · head_dim].
    """
    batch, heads, steps, head_dim = q.shape
    kv_heads, total = k.shape[1], k.shape[2]
    past, group = total - steps, heads // kv_heads
    out = xp.empty((batch, steps, kv_heads, group, head_dim), q.dtype)
    if steps == 1:
        # Values serve all heads of a group at once; scores, few rows of many columns, are faster head by head.
        low = 0 if window is None else max(0, total - window)
        q = q.reshape(batch, kv_heads, group, 1, head_dim) * np.float32(scale)
        scores = (q @ k[:, :, None, low:].swapaxes(-1, -2))[:, :, :, 0]
        out[:, 0] = _mixed(scores, v[:, :, low:], xp)
        return out.reshape(batch, steps, heads * head_dim)
    q = q.reshape(batch, kv_heads, group, steps, head_dim) * np.float32(scale)
    k, v = k[:, :, None].swapaxes(-1, -2), v[:, :, None]
    turned = out.transpose(0, 2, 3, 1, 4)
    at_once = queries_at_once(batch * heads * min(total, window or total), steps, xp)
    for start in range(0, steps, at_once):
        end = min(start + at_once, steps)
        # What no query of these sees is left out, so that half of all scores are never computed.
        low = 0 if window is None else max(0, past + start - window + 1)
        high = past + end
        scores = q[..., start:end, :] @ k[..., low:high]
        hide(scores, past + start, low, window, xp)
        turned[..., start:end, :] = _mixed(scores, v[..., low:high, :], xp)
    return out.reshape(batch, steps, heads * head_dim)


def _mixed(scores: Any, v: Any, xp: Any) -> Any:
    """Values [..., keys, head_dim], by the softmax of scores [..., queries, keys], which are written over."""
    scores -= scores.max(axis=-1, keepdims=True)
    xp.exp(scores, out=scores)
    mixed = scores @ v
    mixed /= scores.sum(axis=-1, keepdims=True)
    return mixed


def queries_at_once(each: int, steps: int, xp: Any) -> int:
    """How many of `steps` queries are computed at once, each of which has so many scores."""
    return max(1, min(steps, (_SCORES_CPU if xp is np else _SCORES) // each))


def hide(scores: Any, first: int, low: int, window: int | None, xp: Any) -> None:
    """Sets scores […, queries, keys] that causality or the window forbid to -∞; they start at `first` and `low`."""
    queries, keys = scores.shape[-2:]
    if queries == 1:
        return
    # Without a window only the last square has a border in it.
    seen_by_all = 0 if window is not None else keys - queries
    rows = np.arange(first, first + queries)[:, None]
    columns = np.arange(low + seen_by_all, low + keys)[None, :]
    hidden = columns > rows
    if window is not None:
        hidden |= columns <= rows - window
    scores[..., seen_by_all:] += xp.asarray(np.where(hidden, np.float32(-np.inf), np.float32(0)))
