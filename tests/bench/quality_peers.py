"""The formats of other tools that bench_quality.py compares with: quantise and rebuild one weight matrix.

Each is a `Peer`, groups run along the last axis, and the bits of a weight count everything that the format stores
for it: codes, scales, offsets. ggml's formats come from the package libgguf, which holds ggml's own quantisers; HQQ
and NF4 are written here from their papers. NaN and infinity in weights are not looked for.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

try:
    import libgguf
except ImportError as absent:  # not installed, or built for another Python
    libgguf = None
    _LIBGGUF_ABSENT = f"ggml's formats: {absent}; pip install libgguf==0.2.2"

Floats = NDArray[np.float32]

#: Weights that a thread takes at a time: some hundreds of KiB, so that NumPy's temporaries stay in its cache.
_PIECE = 1 << 16


@dataclass(frozen=True)
class Peer:
    """One format of another tool.

    `bits_per_weight(rows, cols)` is what a matrix of that shape takes; `rebuild(weight, importance)` quantises
    FP32 [rows, cols] and returns the weights that the format gives back, FP32 of the same shape. `importance` is
    E[x_j²] of each input, FP32 [cols]; peers that do not use it ignore it, and those that do need it.
    """

    name: str
    bits_per_weight: Callable[[int, int], float]
    rebuild: Callable[[Floats, Floats | None], Floats]
    uses_importance: bool = False


def peers() -> list[Peer]:
    """Every peer that this machine can run; `missing` says which it cannot."""
    found = []
    if libgguf is not None:
        for name in _GGML:
            found.append(Peer(name, partial(_ggml_bits, name), partial(_ggml, name)))
            found.append(Peer(f"{name}, imatrix", partial(_ggml_bits, name), partial(_ggml_imatrix, name), True))
    for group in (16, 32, 64):
        found.append(Peer(f"HQQ g{group}", partial(_grouped_bits, 4 + 32 / group, group), partial(_hqq, group)))
    found.append(Peer("NF4 g64", partial(_grouped_bits, 4 + 16 / 64, 64), partial(_nf4, 64)))
    return found


def missing() -> list[str]:
    """One sentence for each part of the table that is left out here: what, why, and the remedy."""
    return [] if libgguf is not None else [_LIBGGUF_ABSENT]


def packages() -> list[str]:
    """The installed packages whose versions the peers' results depend on."""
    return [] if libgguf is None else ["libgguf"]


# Rows are spread over threads: NumPy and libgguf both release the interpreter's lock.


def _pieces(rows: int, cols: int) -> Iterator[slice]:
    step = max(1, _PIECE // cols)
    return (slice(start, start + step) for start in range(0, rows, step))


def _each_piece(work: Callable[[slice], float | None], rows: int, cols: int) -> list[float | None]:
    """What `work` returns for every piece of a matrix, in order."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(work, _pieces(rows, cols)))


# ggml

#: The formats that are compared, and for each that needs rows of 256 what llama-quantize takes for other widths.
_GGML = {
    "Q4_0": None,
    "Q4_1": None,
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
    "IQ4_NL": None,
    "IQ4_XS": "IQ4_NL",
}


def _ggml_format(name: str, cols: int) -> int:
    """ggml's number of the format that rows of `cols` weights get: `name`, its substitute, or F16."""
    for candidate in (name, _GGML[name]):
        if candidate is not None and libgguf.row_size(libgguf.GGMLQuantizationType[candidate], cols):
            return int(libgguf.GGMLQuantizationType[candidate])
    return int(libgguf.GGMLQuantizationType.F16)


def _ggml_bits(name: str, rows: int, cols: int) -> float:
    return 8 * int(libgguf.row_size(_ggml_format(name, cols), cols)) / cols


def _ggml(name: str, weight: Floats, importance: Floats | None = None) -> Floats:
    return _ggml_rebuild(_ggml_format(name, weight.shape[1]), weight, None)


def _ggml_imatrix(name: str, weight: Floats, importance: Floats | None) -> Floats:
    if importance is None or importance.shape != weight.shape[1:]:
        got = "none" if importance is None else f"shape {importance.shape}"
        raise ValueError(f"{name}, imatrix: importance must be FP32 [{weight.shape[1]}], got {got}")
    return _ggml_rebuild(_ggml_format(name, weight.shape[1]), weight, np.ascontiguousarray(importance, np.float32))


def _ggml_rebuild(number: int, weight: Floats, importance: Floats | None) -> Floats:
    weight = np.ascontiguousarray(weight, np.float32)
    if number == libgguf.GGMLQuantizationType.F16:
        return weight.astype(np.float16).astype(np.float32)
    rows, cols = weight.shape
    out = np.empty_like(weight)

    def work(piece: slice) -> None:
        part = weight[piece]
        encoded = libgguf.quantize_rows(part, number, importance)
        libgguf.dequantize_rows_into_raw(number, encoded, out[piece], len(part), cols)

    _each_piece(work, rows, cols)
    return out


# HQQ

#: The solver's settings: the norm's exponent, the penalty, its growth per iteration, and iterations at most.
_NORM, _BETA, _KAPPA, _ITERATIONS = 0.7, 10.0, 1.01, 20
#: 1 / scale is at most this, so that the scale stays a normal FP16 number.
_STEEPEST = 2e4


def _hqq(group: int, weight: Floats, importance: Floats | None = None) -> Floats:
    """Half-quadratic quantisation to 4 bits, ŵ = (code - zero) · scale, scale and zero in FP16.

    Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023. The scale is that of the
    group's smallest and largest weight and stays; the zero point minimises an l_p norm of the error, p = 0.7, by
    half-quadratic splitting: codes = round(w / scale + zero), e = shrink(w - ŵ), zero = mean(codes - (w - e) / scale).
    It ends when the mean |w - ŵ| of the whole matrix no longer falls, with the zero points of that last step.
    """
    groups = _groups(group, weight)
    low, high = groups.min(axis=1, keepdims=True), groups.max(axis=1, keepdims=True)
    # All weights alike: any scale will do, and the zero point alone says which they are.
    inverse = np.where(high > low, np.minimum(15 / np.where(high > low, high - low, 1), _STEEPEST), 1)
    inverse = inverse.astype(np.float32)
    zero = -low * inverse
    best = np.inf
    for iteration in range(_ITERATIONS):
        step = partial(_hqq_step, groups, inverse, zero, beta=_BETA * _KAPPA**iteration)
        error = sum(filter(None, _each_piece(step, *groups.shape)))
        if error >= best:
            break
        best = error
    # Codes follow from the numbers before they are rounded to FP16, as in the authors' library.
    out = np.empty_like(groups)
    stored_scale, stored_zero = (number.astype(np.float16).astype(np.float32) for number in (1 / inverse, zero))

    def work(piece: slice) -> None:
        codes = _hqq_codes(groups[piece] * inverse[piece], zero[piece])
        np.multiply(codes - stored_zero[piece], stored_scale[piece], out=out[piece])

    _each_piece(work, *groups.shape)
    return out.reshape(weight.shape)


def _hqq_codes(scaled: Floats, zero: Floats) -> Floats:
    codes: Floats = np.rint(scaled + zero)
    np.clip(codes, 0, 15, out=codes)
    return codes


def _hqq_step(groups: Floats, inverse: Floats, zero: Floats, piece: slice, *, beta: float) -> float:
    """Moves the zero points of some groups; returns their Σ|w - ŵ| before that."""
    scale = 1 / inverse[piece]
    scaled = groups[piece] * inverse[piece]
    wanted = _hqq_codes(scaled, zero[piece])
    wanted -= scaled  # the zero point at which a weight would be met exactly
    error = (zero[piece] - wanted) * scale
    size = np.abs(error)
    # shrink(x) = sign(x) · max(0, |x| - |x|^(p-1) / β) is zero up to here, and weights seldom err by more.
    far = size > beta ** (-1 / (2 - _NORM))
    if far.any():
        shrunk = np.sign(error[far]) * (size[far] - size[far] ** (_NORM - 1) / beta)
        wanted[far] += shrunk * np.broadcast_to(inverse[piece], far.shape)[far]
    zero[piece] = wanted.mean(axis=1, keepdims=True)
    return float(size.sum(dtype=np.float64))


# NF4

#: Quantiles of a standard normal scaled to [-1, 1] with an exact zero: Dettmers et al., "QLoRA", 2023, appendix E.
_NF4 = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    np.float32,
)  # fmt: skip


def _nf4(group: int, weight: Floats, importance: Floats | None = None) -> Floats:
    """The nearest of NF4's 16 values times the group's largest |w|, which is stored in FP16."""
    groups = _groups(group, weight)
    out = np.empty_like(groups)
    between = (_NF4[1:] + _NF4[:-1]) / 2

    def work(piece: slice) -> None:
        largest = np.abs(groups[piece]).max(axis=1, keepdims=True).astype(np.float16).astype(np.float32)
        codes = np.searchsorted(between, groups[piece] / np.where(largest > 0, largest, 1))
        np.multiply(_NF4[codes], largest, out=out[piece])

    _each_piece(work, *groups.shape)
    return out.reshape(weight.shape)


def _groups(group: int, weight: Floats) -> Floats:
    """[rows · cols / group, group]."""
    _check_width(group, weight.shape[1])
    return np.ascontiguousarray(weight, np.float32).reshape(-1, group)


def _grouped_bits(bits: float, group: int, rows: int, cols: int) -> float:
    _check_width(group, cols)
    return bits


def _check_width(group: int, cols: int) -> None:
    if cols % group:
        raise ValueError(f"rows of {cols} weights do not divide into groups of {group}; leave this peer out")
