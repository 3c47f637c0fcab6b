"""The quantised cache of tenpak.cuda, on any array module: what its kernels store and what attention reads from it.

Every token and head has one scale and one offset for its key and one for its value, FP16 both, and codes of eight or
four bits around the middle of its range. Keys of four bits are turned by a Hadamard matrix first, which spreads what
lies in few channels over all (Ashkboos et al. 2024, QuaRot, arXiv:2404.00456); queries are turned alike, so that their
products stay. Codes come in tiles of `TILE` tokens; at least the newest `RECENT` tokens of a sequence stay FP16.
"""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from tenpak.decoder.cache import Cache
from tenpak.decoder.layers import attention
from tenpak.errors import UsageError

KVType = Literal["fp16", "int8", "int4"]
KV_TYPES: tuple[KVType, ...] = get_args(KVType)
BITS: dict[KVType, int] = {"fp16": 16, "int8": 8, "int4": 4}

#: Tokens that are quantised together.
TILE = 16
#: The newest tokens of a sequence that are never quantised, a multiple of `TILE`.
RECENT = 64


def checked_kv(kv: str) -> KVType:
    """The kind of cache of that name, or UsageError."""
    for known in KV_TYPES:
        if kv == known:
            return known
    raise UsageError(f"unknown kind of cache {kv!r}; choose {', '.join(KV_TYPES)}")


def quantised(tokens: int) -> int:
    """How many of a sequence's first tokens are stored as codes, where it has `tokens`."""
    return max(tokens - RECENT, 0) // TILE * TILE


def hadamard(dim: int) -> NDArray[np.float32]:
    """What keys and queries of four bits are multiplied with, [dim, dim] orthonormal and symmetric.

    Blocks along the diagonal of the largest power of two that divides `dim`.
    """
    block = dim & -dim
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < block:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    whole = np.kron(np.eye(dim // block, dtype=np.float32), matrix)
    return (whole / np.float32(math.sqrt(block))).astype(np.float32)


def rounded(x: Any, bits: int, *, xp: Any) -> Any:
    """[…, head_dim] FP32 as codes rebuild it; each vector has its own scale and offset."""
    low, high = x.min(axis=-1, keepdims=True), x.max(axis=-1, keepdims=True)
    scale = ((high - low) / np.float32(2**bits - 1)).astype(np.float16).astype(np.float32)
    # Codes are centred, so the middle of the range is half a step above code 0.
    offset = ((high + low) / 2 + scale / 2).astype(np.float16).astype(np.float32)
    least = np.float32(-(2 ** (bits - 1)))
    codes = xp.clip(xp.rint((x - offset) / xp.where(scale > 0, scale, np.float32(1))), least, -least - 1)
    return codes * scale + offset


class QuantizedCache(Cache):
    """A `Cache` whose attention reads what a cache of `tenpak.cuda` would hold at each position.

    Every position, also of a prompt, is computed as if its tokens had come one by one: all but the newest are read
    from their codes. Values are rounded to FP16 at least.
    """

    def __init__(self, layers: int, kv: KVType, *, xp: Any) -> None:
        super().__init__(layers, xp=xp)
        self.kv = kv
        self._stored = Cache(layers, xp=xp)

    def attend(self, layer: int, start: int, q: Any, k: Any, v: Any, scale: float, window: int | None) -> Any:
        xp, bits = self._xp, BITS[self.kv]
        self._check_start(layer, start)
        k, v = k.astype(np.float16).astype(np.float32), v.astype(np.float16).astype(np.float32)
        keys, values = self.append(layer, k, v)
        if bits == 16:
            return attention(q, keys, values, scale, window, xp=xp)
        k, v = rounded(turned(k, bits, xp), bits, xp=xp), rounded(v, bits, xp=xp)
        stored_keys, stored_values = self._stored.append(layer, turned(k, bits, xp), v)
        parts = []
        first, total = start, start + q.shape[2]
        while first < total:
            # Positions up to `end` see the same tokens as codes.
            codes = quantised(first + 1)
            end = min(total, max(codes + TILE + RECENT - 1, first + 1))
            seen = [
                xp.concatenate([stored[:, :, :codes], exact[:, :, codes:end]], axis=2)
                for stored, exact in ((stored_keys, keys), (stored_values, values))
            ]
            part = q[:, :, first - start : end - start]
            parts.append(attention(part, seen[0], seen[1], scale, window, xp=xp))
            first = end
        return xp.concatenate(parts, axis=1)

    def truncate(self, length: int) -> None:
        super().truncate(length)
        self._stored.truncate(length)


def turned(x: Any, bits: int, xp: Any) -> Any:
    """Keys [..., head_dim] by the Hadamard matrix, where this kind of cache turns them."""
    return x @ xp.asarray(hadamard(x.shape[-1])) if bits == 4 else x
