"""What stands between a decoder's products on a GPU: embedding, norms, activations, and the choice of a token.

Functions launch on CuPy's current stream and allocate nothing; arrays are contiguous and checked by nobody here.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tenpak.cuda.compile import function
from tenpak.cuda.plans import ACTIVATIONS, NORM_THREADS, OUTPUTS, Output, norm_defines, sample_defines
from tenpak.cuda.products import device_of
from tenpak.sampling import Sampling

#: Shared memory of a block of cuda/sample.cu: two histograms.
_BINS_BYTES = 2 * 8 << 9


def norm(norm: Any, h: Any, added: Any, out: Any) -> None:
    """h += added, then out = norm(h).

    Args:
        norm: A `LayerNorm` or `RMSNorm` with FP32 arrays on the device.
        h: The residual stream, FP32 [tokens, width].
        added: FP16 of the same shape, or None.
        out: FP16 of the same shape.
    """
    tokens, width = h.shape
    weight, bias, eps = norm_arguments(norm)
    defines = norm_defines(width, bias != 0)
    arguments = (
        h.data.ptr,
        _address(added),
        weight,
        bias,
        out.data.ptr,
        np.int32(width),
        np.float32(eps),
    )
    function("norm.cu", "normalise", defines, h.device.id)((tokens, 1, 1), (NORM_THREADS,), arguments)


def norm_arguments(norm: Any) -> tuple[int, int, float]:
    """Addresses of a norm's weight and bias (0 for none), and its epsilon."""
    return int(norm.weight.data.ptr), _address(getattr(norm, "bias", None)), norm.eps


def gate(y: Any, out: Any, activation: str, *, in_turns: bool = False, others: Any = None) -> None:
    """out = activation(y), or that times what it gates.

    Args:
        y: FP16 [tokens, inner], or `in_turns` [tokens, 2 · inner].
        out: FP16 [tokens, inner].
        activation: One of `ACTIVATIONS`.
        in_turns: Whether y holds both, as `tenpak.cuda.plans.Fused.gated` says.
        others: What the activated y multiplies, like it; or None.
    """
    gated = 1 if in_turns else 0 if others is None else 2
    defines = {"ACTIVATION": ACTIVATIONS.index(activation), "BF16": 0, "GATED": gated}
    arguments = (y.data.ptr, _address(others), out.data.ptr, np.uint64(out.size))
    function("gate.cu", "gate", defines, y.device.id)((-(-out.size // 256), 1, 1), (256,), arguments)


def embed(tokens: Any, embedding: Any, positions: Any, lengths: Any, h: Any) -> None:
    """h = the embeddings of tokens, with learnt positions on top.

    Args:
        tokens: int32 [count].
        embedding: A `QuantizedWeight` or an array, FP16 or FP32, [vocab, width].
        positions: FP32 [positions, width], or None.
        lengths: int32 [1]: tokens before these.
        h: FP32 [count, width].
    """
    vocab, width = embedding.shape
    packed = hasattr(embedding, "layout")
    if packed:
        defines: dict[str, object] = {"LAYOUT": embedding.layout}
        parts = (embedding.codes, embedding.params, embedding.row_params)
    else:
        defines, parts = {"IN": 8 * embedding.itemsize}, (embedding, None, None)
    arguments = (
        tokens.data.ptr,
        *map(_address, parts),
        _address(positions),
        lengths.data.ptr,
        h.data.ptr,
        np.int32(vocab),
        np.int32(width),
        np.int32(0 if positions is None else len(positions)),
        np.float32(embedding.scale if packed else 1.0),
    )
    grid = (-(-width // (8 * 128)), len(tokens), 1)
    function("embed.cu", "embed", defines, h.device.id)(grid, (128,), arguments)


def product(weight: Any, x: Any, y: Any, bias: Any, output: Output) -> None:
    """y = weight x + bias for one token, from a weight that is not quantised.

    Args:
        weight: FP16 or FP32 [n, k].
        x: FP16 [k].
        y: [n]: FP16, or FP32, or FP32 that is added to.
        bias: FP16 [n], or None.
        output: Which of these y is.
    """
    n, k = weight.shape
    defines = {"IN": 8 * weight.itemsize, "BF16": 0, "OUTPUT": OUTPUTS.index(output)}
    arguments = (weight.data.ptr, x.data.ptr, y.data.ptr, _address(bias), np.int32(n), np.int32(k))
    function("product.cu", "product", defines, weight.device.id)((-(-n // 8), 1, 1), (256,), arguments)


def sampling_bytes(sampling: Sampling) -> Any:
    """What `sample` reads of a `Sampling`, as bytes for the device."""
    inverse = min(1 / sampling.temperature, float(np.finfo(np.float32).max)) if sampling.temperature else 0.0
    fields = [("inverse", "<f4"), ("top_k", "<i4"), ("top_p", "<f8"), ("seed", "<u8")]
    values = (inverse, min(sampling.top_k, 2**31 - 1), sampling.top_p, sampling.seed)
    return np.frombuffer(np.array([values], fields).tobytes(), np.uint8)


def sample(scores: Any, how: Any, lengths: Any, token: Any) -> None:
    """Chooses the token that follows as many as `lengths` says: `tenpak.sampling.choose`, on the device.

    Args:
        scores: FP32 [vocab].
        how: What `sampling_bytes` made, on the device.
        lengths: int32 [1].
        token: int32 [1], to be filled; -1 where a score is NaN or infinite.
    """
    here = device_of(scores.device.id)
    defines = sample_defines(here)
    threads, blocks = defines["THREADS"], defines["CLUSTER"]
    # Scores that fit are read from global memory once.
    shared = _BINS_BYTES + 4 * -(-int(scores.size) // blocks)
    room = shared <= here.shared
    pointers = (scores.data.ptr, np.int32(scores.size), how.data.ptr, lengths.data.ptr, token.data.ptr)
    kernel = function("sample.cu", "sample", defines, scores.device.id)
    kernel((blocks, 1, 1), (threads,), (*pointers, np.int32(room)), shared if room else _BINS_BYTES)


def _address(array: Any) -> int:
    return 0 if array is None else int(array.data.ptr)
