"""The KV cache in GPU memory: keys and values of many sequences as codes, the newest of each as FP16.

    cache = KVCache(layers, kv_heads, head_dim, max_tokens=8192, dtype="int8")
    for layer in range(layers):
        ...                                                    # q, k, v of the new tokens
        cache.append(layer, k, v, q=q, rotary=rotary)          # turns q and k in place, stores k and v
        y = attend(q, cache, layer)
    cache.advance(1)

What is stored is described, and measured on a CPU, by `tenpak.decoder.kv`; where it lies, by cuda/cache.cuh. Lengths
live on the device and every kernel reads them there, so one captured CUDA graph serves every step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cupy
import numpy as np
from numpy.typing import NDArray

from tenpak.cuda.compile import function
from tenpak.cuda.plans import HEAD_DIMS, cache_defines, tile_bytes
from tenpak.decoder.kv import BITS, RECENT, TILE, KVType, checked_kv
from tenpak.errors import UsageError

_THREADS = 128


class RotaryTable:
    """Cosines and sines of every position, for `KVCache.append`.

    Args:
        frequencies: Radians per position of each pair, [pairs] (`tenpak.decoder.layers.frequencies`); element i of a
            head turns with element i + pairs, and elements from 2 · pairs on are left as they are.
        positions: For how many positions; later ones take the last.
    """

    def __init__(self, frequencies: NDArray[np.float32], positions: int) -> None:
        angles = np.arange(positions, dtype=np.float32)[:, None] * np.asarray(frequencies, np.float32)
        #: FP32 [2, positions, pairs] on the device: cosines and sines.
        self.table = cupy.asarray(np.stack([np.cos(angles), np.sin(angles)]))

    @property
    def positions(self) -> int:
        return int(self.table.shape[1])

    @property
    def pairs(self) -> int:
        return int(self.table.shape[2])


@dataclass(frozen=True)
class Heads:
    """Where an array [batch, T, heads, head_dim] lies: strides, in elements, of sequences and of tokens."""

    pointer: int
    batch: int
    tokens: int
    heads: int
    sequence: int
    token: int

    @classmethod
    def of(cls, x: Any, name: str, head_dim: int) -> Heads:
        """Reads an array, or refuses one that the kernels would misread."""
        kind = np.dtype(x.dtype).name
        if kind not in ("float16", "bfloat16"):
            raise UsageError(f"{name}: {kind} is no type of these kernels; cast it to float16 or bfloat16")
        if x.ndim != 4 or x.shape[3] != head_dim:
            raise UsageError(f"{name}: shape {list(x.shape)} does not fit; it must be [batch, T, heads, {head_dim}]")
        dense = x.strides[3] == 2 and (x.shape[2] == 1 or x.strides[2] == 2 * head_dim)
        if not dense or x.strides[0] % 16 or x.strides[1] % 16 or x.data.ptr % 16:
            raise UsageError(
                f"{name}: a token's heads must lie one after another, each token at a multiple of 16 bytes"
            )
        batch, tokens, heads, _ = x.shape
        return cls(x.data.ptr, batch, tokens, heads, x.strides[0] // 2, x.strides[1] // 2)


def is_bf16(x: Any) -> bool:
    """Whether an array holds BF16, which NumPy knows through `ml_dtypes` alone."""
    return bool(np.dtype(x.dtype).name == "bfloat16")


class KVCache:
    """Keys and values of `batch` sequences of up to `max_tokens` tokens each, of all layers.

    Args:
        layers: The model's layers.
        kv_heads: Heads of keys and values.
        head_dim: Channels of a head: one of `HEAD_DIMS`.
        max_tokens: Tokens of a sequence, rounded up to a multiple of 16. Memory for all is taken at once.
        dtype: "int8", "int4" or "fp16".
        batch: Sequences.
        device: The GPU; None for CuPy's current one.

    Raises:
        UsageError: A number or kind that there is not.
    """

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        head_dim: int,
        max_tokens: int,
        dtype: str = "int8",
        batch: int = 1,
        *,
        device: int | None = None,
    ) -> None:
        counts = {"layers": layers, "kv_heads": kv_heads, "max_tokens": max_tokens, "batch": batch}
        for name, value in counts.items():
            if value < 1:
                raise UsageError(f"{name} {value} is too small; give at least 1")
        if head_dim not in HEAD_DIMS:
            raise UsageError(f"head_dim {head_dim} has no kernels; there are {', '.join(map(str, HEAD_DIMS))}")
        self.dtype: KVType = checked_kv(dtype)
        self.layers, self.kv_heads, self.head_dim, self.batch = layers, kv_heads, head_dim, batch
        self.device = int(cupy.cuda.runtime.getDevice()) if device is None else device
        self.bits = BITS[self.dtype]
        #: Tiles of a sequence and head: of codes, and of FP16.
        self.capacity = -(-max_tokens // TILE)
        self.ring_tiles = self.capacity if self.bits == 16 else min(RECENT // TILE + 1, self.capacity)
        per_layer = batch * kv_heads
        with cupy.cuda.Device(self.device):
            stored = 0 if self.bits == 16 else per_layer * self.capacity * tile_bytes(self.bits, head_dim)
            # What was never written is masked, but must not be NaN: masked probabilities are zeros times it.
            self._store = cupy.zeros((layers, stored), cupy.uint8)
            self._ring = cupy.zeros((layers, per_layer * self.ring_tiles * tile_bytes(16, head_dim)), cupy.uint8)
            #: Tokens of each sequence, int32 [batch] on the device; `advance` adds to it.
            self.lengths = cupy.zeros(batch, cupy.int32)

    @property
    def max_tokens(self) -> int:
        """The most tokens of a sequence."""
        return self.capacity * TILE

    @property
    def nbytes(self) -> int:
        """Bytes of device memory: codes, FP16 tokens and lengths."""
        return int(self._store.nbytes + self._ring.nbytes + self.lengths.nbytes)

    @property
    def bytes_per_token(self) -> float:
        """Bytes of one more token once it is no longer among the newest, over all layers."""
        return self.layers * self.kv_heads * tile_bytes(self.bits, self.head_dim) / TILE

    def append(
        self,
        layer: int,
        k: Any,
        v: Any,
        *,
        q: Any = None,
        rotary: RotaryTable | None = None,
        q_norm: Any = None,
        k_norm: Any = None,
        eps: float = 1e-6,
        counts: Any = None,
        stream: Any = None,
    ) -> None:
        """Stores the keys and values of T new tokens of each sequence, after those that `lengths` counts.

        Keys and queries are normed and turned in place. Lengths stay as they are until `advance`, since other layers
        append at the same places. What passes `max_tokens` is dropped.

        Args:
            layer: Which layer's.
            k: Keys [batch, T, kv_heads, head_dim], float16 or bfloat16; may be a view into a wider product.
            v: Values, as `k`.
            q: Queries [batch, T, heads, head_dim], to be normed and turned with the keys; None leaves them alone.
            rotary: Turns queries and keys by their positions; None where positions are learnt.
            q_norm: Weights [head_dim] of an RMS norm over each query, of q's dtype; None for no norm.
            k_norm: The same for keys.
            eps: What the norms add under the root.
            counts: How many of the T tokens of each sequence are real, the first ones, int32 [batch] on the device;
                None for all.
            stream: A CuPy stream; None for the current one.

        Raises:
            UsageError: Shapes, dtypes or a layer that do not fit.
        """
        queries, keys, values = self.checked(layer, q, k, v, rotary, q_norm, k_norm)
        if keys.tokens == 0:
            return
        q_heads = 0 if queries is None else queries.heads
        q_at = keys if queries is None else queries
        int32, int64 = np.int32, np.int64
        arguments = (
            0 if queries is None else queries.pointer,
            keys.pointer,
            values.pointer,
            *self.addresses(layer),
            self.counts_address(counts),
            0 if rotary is None else rotary.table.data.ptr,
            0 if q_norm is None else q_norm.data.ptr,
            0 if k_norm is None else k_norm.data.ptr,
            *(int64(step) for at in (q_at, keys, values) for step in (at.sequence, at.token)),
            int32(keys.tokens),
            int32(q_heads),
            int32(self.kv_heads),
            int32(self.capacity),
            int32(self.ring_tiles),
            int32(0 if rotary is None else rotary.pairs),
            int32(0 if rotary is None else rotary.positions),
            np.float32(eps),
        )
        tiles = 1 if keys.tokens == 1 else 1 + -(-keys.tokens // TILE)
        self._launch("append", (tiles, self.kv_heads + q_heads, self.batch), (_THREADS,), arguments, stream, is_bf16(k))

    def checked(
        self, layer: int, q: Any, k: Any, v: Any, rotary: RotaryTable | None, q_norm: Any, k_norm: Any
    ) -> tuple[Heads | None, Heads, Heads]:
        """Where the queries, keys and values of `append` lie, or UsageError."""
        keys, values = Heads.of(k, "k", self.head_dim), Heads.of(v, "v", self.head_dim)
        queries = None if q is None else Heads.of(q, "q", self.head_dim)
        self._check_layer(layer)
        for name, heads in (("k", keys), ("v", values)):
            if (heads.batch, heads.tokens, heads.heads) != (self.batch, keys.tokens, self.kv_heads):
                raise UsageError(
                    f"{name}: [{heads.batch}, {heads.tokens}, {heads.heads}] does not fit; "
                    f"the cache takes [{self.batch}, {keys.tokens}, {self.kv_heads}, {self.head_dim}]"
                )
        if queries is not None and (queries.batch, queries.tokens) != (self.batch, keys.tokens):
            raise UsageError(f"q: {queries.batch} x {queries.tokens} tokens, but k has {self.batch} x {keys.tokens}")
        for name, x in (("v", v), ("q", q), ("q_norm", q_norm), ("k_norm", k_norm)):
            if x is not None and x.dtype != k.dtype:
                raise UsageError(f"{name}: {x.dtype} beside k of {k.dtype}; they must be alike")
        for name, x in (("q_norm", q_norm), ("k_norm", k_norm)):
            if x is not None and (x.shape != (self.head_dim,) or not x.flags.c_contiguous):
                raise UsageError(f"{name}: shape {list(x.shape)} does not fit; it must be contiguous [{self.head_dim}]")
        if rotary is not None and 2 * rotary.pairs > self.head_dim:
            raise UsageError(f"rotary turns {2 * rotary.pairs} elements of heads of {self.head_dim}")
        return queries, keys, values

    def advance(self, tokens: int | Any = 1, *, most: int | None = None, stream: Any = None) -> None:
        """Counts new tokens in: once for a step, after all layers; on the device, so that graphs may hold it.

        Args:
            tokens: How many of each sequence; or int32 [batch] on the device, the `counts` that were appended.
            most: With such an array, the T of its `append`.
            stream: A CuPy stream; None for the current one.
        """
        counts = None if isinstance(tokens, int) else tokens
        number = tokens if isinstance(tokens, int) else self.max_tokens if most is None else most
        int32 = np.int32
        arguments = (
            self.lengths.data.ptr,
            self.counts_address(counts),
            int32(number),
            int32(self.batch),
            int32(self.max_tokens),
        )
        self._launch("advance", (-(-self.batch // _THREADS), 1, 1), (_THREADS,), arguments, stream, False)

    def reset(self) -> None:
        """Forgets all tokens."""
        self.lengths.fill(0)

    def truncate(self, lengths: int | Sequence[int]) -> None:
        """Forgets each sequence's tokens from a position on, one for all or one for each; not within a graph.

        Tokens that are among the newest again come back from their codes to FP16, as far as those tell.
        """
        before = cupy.asnumpy(self.lengths)
        wanted = np.broadcast_to(np.asarray(lengths, np.int32), (self.batch,))
        if (wanted < 0).any():
            raise UsageError(f"length {int(wanted.min())} is below 0")
        after = np.minimum(before, wanted).astype(np.int32)
        with cupy.cuda.Device(self.device):
            old, new = cupy.asarray(before), cupy.asarray(after)
            if self.bits != 16:
                for layer in range(self.layers):
                    store, ring, _ = self.addresses(layer)
                    sizes = (np.int32(self.kv_heads), np.int32(self.capacity), np.int32(self.ring_tiles))
                    arguments = (store, ring, old.data.ptr, new.data.ptr, *sizes)
                    self._launch("restore", (self.kv_heads, self.batch, 1), (_THREADS,), arguments, None, False)
            self.lengths[...] = new

    def addresses(self, layer: int) -> tuple[int, int, int]:
        """Device addresses of a layer's codes and FP16 ring, and of the lengths."""
        self._check_layer(layer)
        store = 0 if self.bits == 16 else self._store.data.ptr + layer * self._store.strides[0]
        return store, self._ring.data.ptr + layer * self._ring.strides[0], self.lengths.data.ptr

    def defines(self, bf16: bool) -> dict[str, object]:
        """Macros of the kernels that read or write this cache."""
        return cache_defines(self.bits, self.head_dim, bf16)

    def _check_layer(self, layer: int) -> None:
        if not 0 <= layer < self.layers:
            raise UsageError(f"there is no layer {layer}; the cache has {self.layers}")

    def counts_address(self, counts: Any) -> int:
        """The device address of int32 [batch], or 0 for None."""
        if counts is None:
            return 0
        if counts.shape != (self.batch,) or counts.dtype != np.int32 or not counts.flags.c_contiguous:
            here = f"{counts.dtype.name} {list(counts.shape)}"
            raise UsageError(f"counts: {here} does not fit; it must be contiguous int32 [{self.batch}]")
        return int(counts.data.ptr)

    def _launch(
        self, kernel: str, grid: tuple[int, int, int], block: tuple[int], arguments: Any, stream: Any, bf16: bool
    ) -> None:
        with cupy.cuda.Device(self.device):
            stream = cupy.cuda.get_current_stream() if stream is None else stream
            function("append.cu", kernel, self.defines(bf16), self.device)(grid, block, arguments, 0, stream)

    def __repr__(self) -> str:
        shape = (
            f"{self.layers} layers, {self.kv_heads} heads of {self.head_dim}, {self.batch} x {self.max_tokens} tokens"
        )
        return f"KVCache({self.dtype}, {shape}, {self.nbytes / 1e6:.1f} MB)"
