"""Attention on a GPU: over a `KVCache`, and of a prompt over its own keys and values.

How the sequence is cut is decided by shapes alone, and lengths are read on the device: a launch can be captured in a
CUDA graph. Nothing is allocated but `out`, except the workspace of a stream's first call (call once before capturing,
or `prepare`).
"""

from __future__ import annotations

import functools
import math
from typing import Any

import cupy
import numpy as np

from tenpak.cuda.cache import Heads, KVCache, RotaryTable, is_bf16
from tenpak.cuda.compile import function
from tenpak.cuda.plans import HEAD_DIMS, AttentionPlan, choose_attention
from tenpak.cuda.products import Workspace, device_of, workspace_of
from tenpak.errors import UsageError

_QUERIES = 64  # of a block of attention_prefill.cu
_LOG2E = math.log2(math.e)


@functools.lru_cache(maxsize=1024)
def _plan(
    device: int, bits: int, head_dim: int, bf16: bool, batch: int, tokens: int, heads: int, kv_heads: int, capacity: int
) -> AttentionPlan:
    return choose_attention(device_of(device), bits, head_dim, bf16, batch, tokens, heads, kv_heads, capacity)


def attend(
    q: Any,
    cache: KVCache,
    layer: int,
    *,
    scale: float | None = None,
    window: int | None = None,
    counts: Any = None,
    out: Any = None,
    workspace: Workspace | None = None,
    stream: Any = None,
) -> Any:
    """Attention of the T newest tokens over all that the cache holds of their sequences, themselves included.

    To be called after `KVCache.append` of these tokens and before `advance`. Each token sees those before it and
    itself. Made for few tokens a step: each eight of T · (heads / kv_heads) read the cache once.

    Args:
        q: Queries [batch, T, heads, head_dim], float16 or bfloat16, normed and turned as the keys were.
        cache: The cache; `heads` must be a multiple of its `kv_heads`.
        layer: Which layer's.
        scale: What scores are multiplied with; None for 1 / √head_dim.
        window: The last tokens that each one sees, itself included; None for all.
        counts: What `append` was given; the output of tokens that are not real means nothing.
        out: A contiguous array like q, to be filled.
        workspace: Memory for partial sums; None for the stream's own.
        stream: A CuPy stream; None for the current one.

    Returns:
        [batch, T, heads, head_dim] of q's dtype.

    Raises:
        UsageError: Shapes, dtypes, a window or a layer that do not fit.
    """
    return _attend(q, cache, layer, None, scale, window, counts, out, workspace, stream)


def append_and_attend(
    q: Any,
    k: Any,
    v: Any,
    cache: KVCache,
    layer: int,
    *,
    rotary: RotaryTable | None = None,
    q_norm: Any = None,
    k_norm: Any = None,
    eps: float = 1e-6,
    scale: float | None = None,
    window: int | None = None,
    out: Any = None,
    workspace: Workspace | None = None,
    stream: Any = None,
) -> Any:
    """`KVCache.append` of one new token of each sequence and `attend`, in one launch.

    The cache and the output become what they become by those two, bit for bit; q and k stay as they are. Within
    `tenpak.cuda.launch.overlapping`, something that does not overlap must have been launched since the cache's lengths
    last changed.

    Args:
        q: Queries [batch, 1, heads, head_dim], as `append` takes them.
        k: Keys [batch, 1, kv_heads, head_dim].
        v: Values, as `k`.
        cache, layer, rotary, q_norm, k_norm, eps: As `append` has them.
        scale, window, out, workspace, stream: As `attend` has them.

    Returns:
        [batch, 1, heads, head_dim] of q's dtype.

    Raises:
        UsageError: Shapes, dtypes, a window or a layer that do not fit, or more than one token.
    """
    _, keys, values = cache.checked(layer, q, k, v, rotary, q_norm, k_norm)
    if keys.tokens != 1:
        raise UsageError(f"k: {keys.tokens} tokens; one is appended here, more by KVCache.append")
    newest = (
        keys.pointer,
        values.pointer,
        0 if rotary is None else rotary.table.data.ptr,
        0 if q_norm is None else q_norm.data.ptr,
        0 if k_norm is None else k_norm.data.ptr,
        np.int64(keys.sequence),
        np.int64(values.sequence),
        np.int32(0 if rotary is None else rotary.pairs),
        np.int32(0 if rotary is None else rotary.positions),
        np.float32(eps),
    )
    return _attend(q, cache, layer, newest, scale, window, None, out, workspace, stream)


def _attend(
    q: Any,
    cache: KVCache,
    layer: int,
    newest: tuple[Any, ...] | None,
    scale: float | None,
    window: int | None,
    counts: Any,
    out: Any,
    workspace: Workspace | None,
    stream: Any,
) -> Any:
    at = Heads.of(q, "q", cache.head_dim)
    if at.batch != cache.batch:
        raise UsageError(f"q: {at.batch} sequences, but the cache has {cache.batch}")
    _check(at.heads, cache.kv_heads, window)
    addresses = cache.addresses(layer)
    bf16 = is_bf16(q)
    with cupy.cuda.Device(cache.device):
        stream = cupy.cuda.get_current_stream() if stream is None else stream
        out = _output(q, out, stream)
        if out.size == 0:
            return out
        plan = _plan_of(cache, at.tokens, at.heads, bf16)
        if workspace is None:
            workspace = workspace_of(cache.device, stream.ptr)
            with stream:
                workspace.reserve(plan.partial_bytes, plan.counters)
        int32 = np.int32
        arguments = (
            at.pointer,
            out.data.ptr,
            *addresses,
            cache.counts_address(counts),
            workspace.partial.data.ptr,
            workspace.counters.data.ptr,
            np.int64(at.sequence),
            np.int64(at.token),
            int32(at.tokens),
            int32(at.heads),
            int32(cache.kv_heads),
            int32(cache.capacity),
            int32(cache.ring_tiles),
            int32(0 if window is None else window),
            np.float32(_scale(scale, cache.head_dim) * _LOG2E),
            *(newest or ()),
        )
        defines = plan.defines if newest is None else plan.appending
        kernel = function("attention.cu", "attend", defines, cache.device)
        kernel(plan.grid, (32 * plan.warps,), arguments, plan.shared, stream)
    return out


def prepare(cache: KVCache, heads: int, *, tokens: int = 1, bf16: bool = False, stream: Any = None) -> None:
    """Compiles what a cache's kernels will need and makes the stream's workspace, before a capture.

    Those are `append`, `attend`, of one token `append_and_attend`, and `advance`.
    """
    plan = _plan_of(cache, tokens, heads, bf16)
    with cupy.cuda.Device(cache.device):
        stream = cupy.cuda.get_current_stream() if stream is None else stream
        with stream:
            workspace_of(cache.device, stream.ptr).reserve(plan.partial_bytes, plan.counters)
        function("attention.cu", "attend", plan.defines, cache.device)
        if tokens == 1:
            function("attention.cu", "attend", plan.appending, cache.device)
        function("append.cu", "append", cache.defines(bf16), cache.device)
        function("append.cu", "advance", cache.defines(False), cache.device)


def prefill(
    q: Any,
    k: Any,
    v: Any,
    *,
    scale: float | None = None,
    window: int | None = None,
    out: Any = None,
    stream: Any = None,
) -> Any:
    """Causal attention of whole sequences over their own keys and values, which are read as they are.

    For prompts of empty sequences, after `KVCache.append` has normed and turned q and k. Padding at the end of a
    sequence does not change what comes before it.

    Args:
        q: [batch, T, heads, head_dim], float16 or bfloat16.
        k: [batch, T, kv_heads, head_dim], of q's dtype; `heads` is a multiple of `kv_heads`.
        v: As `k`.
        scale: What scores are multiplied with; None for 1 / √head_dim.
        window: The last tokens that each one sees, itself included; None for all.
        out: A contiguous array like q, to be filled.
        stream: A CuPy stream; None for the current one.

    Returns:
        [batch, T, heads, head_dim] of q's dtype.

    Raises:
        UsageError: Shapes, dtypes or a window that do not fit.
    """
    head_dim = q.shape[-1] if q.ndim == 4 else 0
    if head_dim not in HEAD_DIMS:
        raise UsageError(f"q: shape {list(q.shape)} does not fit; head_dim must be {', '.join(map(str, HEAD_DIMS))}")
    at, keys, values = (Heads.of(x, name, head_dim) for name, x in (("q", q), ("k", k), ("v", v)))
    for name, x, where in (("k", k, keys), ("v", v, values)):
        if (where.batch, where.tokens, where.heads) != (at.batch, at.tokens, keys.heads) or x.dtype != q.dtype:
            raise UsageError(f"{name}: {x.dtype} {list(x.shape)} does not fit q of {q.dtype} {list(q.shape)}")
    _check(at.heads, keys.heads, window)
    device = int(q.device.id)
    with cupy.cuda.Device(device):
        stream = cupy.cuda.get_current_stream() if stream is None else stream
        out = _output(q, out, stream)
        if out.size == 0:
            return out
        int32, int64 = np.int32, np.int64
        arguments = (
            at.pointer,
            keys.pointer,
            values.pointer,
            out.data.ptr,
            *(int64(step) for x in (at, keys, values) for step in (x.sequence, x.token)),
            int32(at.tokens),
            int32(at.heads),
            int32(keys.heads),
            int32(0 if window is None else window),
            np.float32(_scale(scale, head_dim) * _LOG2E),
        )
        defines = {"DIM": head_dim, "BF16": int(is_bf16(q))}
        kernel = function("attention_prefill.cu", "attention_prefill", defines, device)
        # Queries, and two buffers each of keys and values, in rows longer by 16 bytes.
        shared = (_QUERIES + 4 * (64 if head_dim <= 128 else 32)) * (head_dim + 8) * 2
        kernel((-(-at.tokens // _QUERIES), at.heads, at.batch), (128,), arguments, shared, stream)
    return out


def _plan_of(cache: KVCache, tokens: int, heads: int, bf16: bool) -> AttentionPlan:
    return _plan(
        cache.device, cache.bits, cache.head_dim, bf16, cache.batch, tokens, heads, cache.kv_heads, cache.capacity
    )


def _scale(scale: float | None, head_dim: int) -> float:
    return 1 / math.sqrt(head_dim) if scale is None else scale


def _check(heads: int, kv_heads: int, window: int | None) -> None:
    if heads < 1 or heads % kv_heads:
        raise UsageError(f"q has {heads} heads; it must be a multiple of the {kv_heads} of keys and values")
    if window is not None and window < 1:
        raise UsageError(f"window {window} is too small; give at least 1, or None for all tokens")


def _output(q: Any, out: Any, stream: Any) -> Any:
    if out is None:
        with stream:
            return cupy.empty(q.shape, q.dtype)
    if out.shape != q.shape or out.dtype != q.dtype or not out.flags.c_contiguous:
        here = f"{out.dtype.name} {list(out.shape)}"
        raise UsageError(f"out: {here} does not fit; it must be contiguous {q.dtype.name} {list(q.shape)}")
    return out
