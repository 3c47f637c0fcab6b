"""How packed weights lie in memory, in NumPy: the reference for cuda/pack.cu, and what packs where there is no GPU.

A weight W [n, k] is cut into tiles of 16 rows x 64 columns, a strip of 16 rows being one run of memory along k; lanes
and words in a tile are as cuda/layouts.cuh draws them. Padding is codes that stand for zero, under parameters of zero.
Scales and offsets of one weight are packed times a power of two, so that kernels know how large they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tenpak import _core, dtypes
from tenpak.errors import UsageError

TILE_ROWS = 16
TILE_COLS = 64

#: Layouts that look codes up in tables (Lut16 of cuda/layouts.cuh).
TABLES = frozenset({"int4_lut16", "int4_lut32"})
#: Codes as they are packed, and packed ones as they were: bits 2 and 3 exchanged (cuda/layouts.cuh says why).
EXCHANGED = (0, 1, 2, 3, 8, 9, 10, 11, 4, 5, 6, 7, 12, 13, 14, 15)


#: Scales are packed so that the largest magnitude is below this, and not below half of it if offsets let it be so.
SCALE_BOUND = 4.0
#: The largest power of two for that: halves that are not subnormal need no larger one.
MOST_POWER = 15

#: Pairs of which a word has what is above the low byte of codes of so many bits (cuda/layouts.cuh).
PLANE_PAIRS = {5: 4, 6: 2}

#: Shapes of codes, params and row_params.
Sizes = tuple[tuple[int, ...], tuple[int, ...] | None, tuple[int, ...] | None]


class Packed(NamedTuple):
    """A weight as kernels read it, on the CPU or a GPU, and two to what power its scales and offsets are times."""

    codes: Any
    params: Any | None
    row_params: Any | None
    power: int


@dataclass(frozen=True)
class Layout:
    """What the packed form of one layout of the codec table is made of."""

    name: str
    #: Weights that share packed parameters; 0 where only a whole row does.
    group: int
    code_bits: int = 4
    #: The part with the bits of codes above the fourth, where they have five or six.
    high_part: int | None = None
    #: Whether a word of four-bit codes is eight columns in order. Else word P has pair P of each of a lane's four.
    natural: bool = False
    #: What each four-bit code is packed as; its own inverse.
    packed_as: tuple[int, ...] = tuple(range(16))
    #: Parts whose elements, side by side and the first lowest, make a group's parameter.
    group_parts: tuple[int, ...] = ()
    #: One parameter: (scale, offset) as halves or bytes, or one byte.
    param: np.dtype[Any] | None = None
    #: The part with parameters of rows.
    row_part: int | None = None
    #: Their type, as raw bits.
    row_param: np.dtype[Any] | None = None
    #: How many a row has.
    row_params: int = 1
    #: Columns that one of them is for; 0 for the whole row.
    row_run: int = 0
    #: How often each parameter of an artifact is packed, whose groups and runs are as many times as long.
    repeat: int = 1

    def sizes(self, n: int, k: int, batch: int) -> Sizes:
        """Shapes of packed codes (uint32), params and row_params for a weight [n, k] (or [batch, n, k])."""
        lead = (batch,) if batch else ()
        strips, tiles = _up(n, TILE_ROWS), _up(k, TILE_COLS)
        codes = (*lead, strips, tiles, TILE_ROWS * TILE_COLS * (8 if self.code_bits == 8 else 4) // 32)
        params: tuple[int, ...] | None = None
        if self.high_bits:
            params = (*lead, strips, tiles, TILE_ROWS * TILE_COLS // self.group + 64 * self.high_bits)
        elif self.param is not None and self.group <= 32:
            params = (*lead, strips, tiles, 8, 32 // self.group, 4)
        elif self.param is not None:
            params = (*lead, strips, _up(tiles * TILE_COLS, self.group), 8, 2)
        rows: tuple[int, ...] | None = None
        if self.row_param is not None:
            rows = (*lead, strips, _up(k, self.row_run), TILE_ROWS) if self.row_run else (*lead, strips * TILE_ROWS)
            rows = (*rows, self.row_params) if self.row_params > 1 else rows
        return codes, params, rows

    @property
    def high_bits(self) -> int:
        """Bits of a code above the fourth, where they have five or six: they lie with the parameters of a tile."""
        return self.code_bits - 4 if self.high_part is not None else 0

    @property
    def halves(self) -> tuple[str, int] | None:
        """The packed array that has scales and offsets as halves, and how many make one of both; 1: a scale alone."""
        if self.row_param is not None and self.row_param.itemsize == 2:
            return "row_params", self.row_params
        return ("params", 2) if self.param is not None and self.param.itemsize == 4 else None

    @property
    def zero_word(self) -> np.uint32:
        """A word of codes that stand for zero."""
        return np.uint32(0x80808080 if self.code_bits == 8 else 0)


def _tables(group: int) -> Layout:
    return Layout(
        f"int4_lut{group}",
        16,
        natural=True,
        packed_as=EXCHANGED,
        group_parts=(1,),
        param=np.dtype("u1"),
        row_part=2,
        row_param=np.dtype("<u2"),
        row_run=256,
        repeat=group // 16,
    )


def _pairs(group: int) -> Layout:
    return Layout(f"int4_g{group}_fp16", group, group_parts=(1, 2), param=np.dtype("<u4"))


def _bytes(group: int, code_bits: int = 4) -> Layout:
    return Layout(
        f"int{code_bits}_g{group}_u8",
        group,
        code_bits,
        high_part=4 if code_bits > 4 else None,
        group_parts=(1, 2),
        param=np.dtype("<u2"),
        row_part=3,
        row_param=np.dtype("<u2"),
        row_params=4,
    )


#: Every layout, by its name in the codec table and in cuda/.
LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        *map(_pairs, (8, 16, 32, 64, 128)),
        *map(_bytes, (8, 16, 32, 32), (4, 4, 5, 6)),
        *map(_tables, (16, 32)),
        Layout("int8_sym", 0, code_bits=8, natural=True, row_part=1, row_param=np.dtype("<u4")),
    )
}


def find(name: str) -> Layout:
    """The layout of that name; `UsageError` where it has no kernels."""
    if name not in LAYOUTS:
        raise UsageError(f"the layout {name} has no CUDA kernels; those with some: {', '.join(LAYOUTS)}")
    return LAYOUTS[name]


def matrices(shape: Sequence[int], axis: int) -> tuple[int, int, int]:
    """Output width n, input width k and batch (0: one matrix) of a tensor with its input dimension at `axis`.

    [n, k] has axis 1 or -1; GPT-2's [k, n] has axis 0; experts are [batch, n, k] or [batch, k, n].

    Raises:
        UsageError: It is no matrix and no batch of them.
    """
    rank = len(shape)
    position = axis + rank if axis < 0 else axis
    if rank not in (2, 3) or not rank - 2 <= position < rank:
        raise UsageError(
            f"shape {list(shape)} with its input dimension at axis {axis} is no linear layer; "
            "give [out, in], [in, out] with axis 0, or a batch of either"
        )
    k = shape[position]
    n = shape[rank - 2] if position == rank - 1 else shape[rank - 1]
    return n, k, shape[0] if rank == 3 else 0


def ordered(codec: str, parts: Mapping[str, Any], shape: Sequence[int], axis: int) -> list[Any]:
    """A codec's parts in its layout's order; `UsageError` where they do not fit the shape."""
    found = []
    for name, kind, rows, per_row in _core.part_shapes(codec, list(shape), axis):
        if name not in parts:
            raise UsageError(f"the parts of {codec} lack {name!r}; there are {', '.join(parts) or 'none'}")
        part, wanted = parts[name], dtypes.stored(kind)
        if part.shape != (rows, per_row) or part.dtype != wanted:
            raise UsageError(
                f"{name}: {part.dtype} {list(part.shape)} does not fit {codec} of shape {list(shape)}; "
                f"it must be {wanted} {[rows, per_row]}"
            )
        found.append(part)
    return found


def power_of(scale: float, offset: float) -> int:
    """Two to what power scales and offsets are packed times, by the largest magnitude of each (of a whole batch).

    Scales then do not depend on how large the weights are, which lets kernels turn codes into floats as subnormals.
    Nothing is lost but bits of those that are 2^-15 of a scale that was larger than `SCALE_BOUND`.
    """
    if not (math.isfinite(scale) and math.isfinite(offset)):
        return 0
    # What is between two halves is rounded to the larger one.
    exponents = [math.frexp(x * (1 + 2**-11))[1] for x in (scale / SCALE_BOUND, offset / 2**16) if x]
    return min(MOST_POWER, *(-e for e in exponents)) if exponents else 0


def largest(halves: Any) -> tuple[float, float]:
    """The largest magnitudes of scales and of offsets, of FP32 [..., (s, o)], [..., (s0, ds, o0, do)] or [..., (d,)].

    Of NumPy or PyTorch; the reference for `largest` of cuda/pack.cu.
    """
    found, each = [0.0, 0.0], (halves.shape[-1] + 1) // 2
    for i in range(min(2, halves.shape[-1])) if math.prod(halves.shape) else ():
        first = halves[..., each * i]
        found[i] = float(abs(first).max())
        if each == 2:
            found[i] = max(found[i], float(abs(first + 255.0 * halves[..., each * i + 1]).max()))
    return found[0], found[1]


def pack(layout: Layout, parts: Sequence[NDArray[Any]], n: int, k: int, batch: int = 0) -> Packed:
    """A packed weight from an artifact's parts, [rows, elements per row] in the layout's order."""
    sizes = layout.sizes(n, k, batch)
    matrix_count, strips, tiles = max(batch, 1), _up(n, TILE_ROWS), _up(k, TILE_COLS)

    def padded(rows: NDArray[Any], width: int, fill: int = 0) -> NDArray[Any]:
        """[rows, …] to [batch, 16 * strips, width]."""
        out = np.full((matrix_count, strips * TILE_ROWS, width), fill, rows.dtype)
        rows = rows.reshape(matrix_count, n, rows.shape[-1])
        out[:, :n, : min(width, rows.shape[-1])] = rows[..., :width]
        return out

    codes = parts[0]
    words: NDArray[np.uint32]
    planes: NDArray[Any] | None = None
    if layout.code_bits != 8:
        codes = np.stack([codes & 15, codes >> 4], -1).reshape(matrix_count * n, -1)[:, :k]
        codes = np.array(layout.packed_as, np.uint8)[codes]
        if layout.high_part is not None:
            codes = codes | _high_bits(layout, parts[layout.high_part], k) << 4
        tile = padded(codes, tiles * TILE_COLS).reshape(matrix_count, strips, 2, 8, tiles, 2, 4, 8)
        # [batch, strip, row half, g, tile, column half, t, column] to tile by tile, lane (g, t), word, nibble: word
        # (column half, row half) with its columns, or each pair with (which of two, column half, row half).
        pairs = tile.reshape(*tile.shape[:-1], 4, 2)
        if layout.high_bits:
            words, planes = _codes_in_planes(layout.code_bits, pairs)
        else:
            nibbles = tile.transpose(0, 1, 4, 3, 6, 5, 2, 7)
            if not layout.natural:
                nibbles = pairs.transpose(0, 1, 4, 3, 6, 7, 8, 5, 2).reshape(*tile.shape[:2], tiles, 8, 4, 4, 8)
            words = np.zeros(nibbles.shape[:-1], np.uint32)
            for nibble in range(8):
                words |= nibbles[..., nibble].astype(np.uint32) << np.uint32(4 * nibble)
    else:
        tile = padded(codes.view(np.uint8) ^ 128, tiles * TILE_COLS, fill=128)
        tile = tile.reshape(matrix_count, strips, 2, 8, tiles, 2, 4, 4, 2)
        lanes = np.ascontiguousarray(tile.transpose(0, 1, 4, 5, 3, 6, 7, 2, 8))
        words = lanes.view(np.uint8).reshape(-1, 16).view(np.dtype("<u4"))
    packed_codes = words.reshape(sizes[0])

    params = None
    if layout.param is not None and sizes[1] is not None:
        fields = [parts[i].view(f"<u{parts[i].itemsize}") for i in layout.group_parts]
        joined = np.zeros(fields[0].shape, layout.param)
        for i, field in enumerate(fields):
            joined |= field.astype(layout.param) << layout.param.type(8 * field.itemsize * i)
        joined = np.repeat(joined, layout.repeat, axis=1)[:, : _up(k, layout.group)]
        if layout.group <= 32:
            subgroups = 32 // layout.group
            groups = padded(joined, tiles * 2 * subgroups).reshape(matrix_count, strips, 2, 8, tiles, 2, subgroups)
            params = groups.transpose(0, 1, 4, 3, 6, 5, 2)
        else:
            params = padded(joined, sizes[1][-3]).reshape(matrix_count, strips, 2, 8, -1).transpose(0, 1, 4, 3, 2)
        params = np.ascontiguousarray(params)
        if planes is not None:
            planes = np.ascontiguousarray(planes).view("<u2")
            params = np.concatenate([params.reshape(*planes.shape[:3], -1), planes], -1)
        params = params.reshape(sizes[1])

    row_params = None
    if layout.row_part is not None and layout.row_param is not None and sizes[2] is not None:
        rows = parts[layout.row_part].view(layout.row_param)
        width = rows.shape[-1]
        if layout.row_run:
            rows, width = np.repeat(rows, layout.repeat, axis=1), _up(k, layout.row_run)
        rows = padded(rows, width)
        if layout.row_run:
            rows = rows.reshape(matrix_count, strips, TILE_ROWS, -1).transpose(0, 1, 3, 2)
        row_params = np.ascontiguousarray(rows).reshape(sizes[2])

    packed = Packed(packed_codes, params, row_params, 0)
    if layout.halves is None:
        return packed
    name, each = layout.halves
    bits = getattr(packed, name)
    halves = bits.view(np.float16).astype(np.float32).reshape(-1, each)
    with np.errstate(invalid="ignore"):  # a damaged file's
        power = power_of(*largest(halves))
    if power:
        scaled = (halves * np.float32(2.0**power)).astype(np.float16).view(bits.dtype).reshape(bits.shape)
        packed = packed._replace(**{name: scaled, "power": power})
    return packed


def _high_bits(layout: Layout, part: NDArray[np.uint8], k: int) -> NDArray[np.uint8]:
    """The bits of each code above the fourth, [rows, k]."""
    bits = layout.high_bits
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return (part[..., None] >> shifts & np.uint8((1 << bits) - 1)).reshape(len(part), -1)[:, :k]


def _codes_in_planes(bits: int, tile: NDArray[np.uint8]) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """Codes of five or six bits as packed words, and as words of what is above these (cuda/layouts.cuh).

    Args:
        bits: Of a code.
        tile: Codes [batch, strip, row half, g, tile, column half, t, pair, which of two].

    Returns:
        Both [batch, strip, tile, words].
    """
    # Both row halves' in one number, to [batch, strip, tile, g, t, pair, column half, which of two].
    both = (tile[:, :, 0] | tile[:, :, 1].astype(np.uint32) << np.uint32(bits)).transpose(0, 1, 3, 2, 5, 6, 4, 7)
    half, second, pair = np.arange(2)[:, None], np.arange(2), np.arange(4)[:, None, None]
    words = ((both & 255) << (8 * (half + 2 * second)).astype(np.uint32)).sum((-2, -1), dtype=np.uint32)
    pairs = PLANE_PAIRS[bits]
    at = 8 * (2 * half + second) + pair % pairs * (8 // pairs)
    high = (both >> 8 << at.astype(np.uint32)).sum((-2, -1), dtype=np.uint32)
    planes = high.reshape(*high.shape[:-1], -1, pairs).sum(-1, dtype=np.uint32)
    return words.reshape(*words.shape[:3], -1), np.moveaxis(planes, -1, 3).reshape(*planes.shape[:3], -1)


def _up(a: int, b: int) -> int:
    return -(-a // b)
