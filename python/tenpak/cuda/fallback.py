"""Packed weights in plain PyTorch, for any device: what `G8Linear` computes with where the kernels cannot run."""

from __future__ import annotations

import functools

import torch

from tenpak import _core
from tenpak.cuda import layouts
from tenpak.cuda.layouts import TILE_COLS, TILE_ROWS, Layout

#: Weights that are unpacked at a time: 64 MiB as FP32.
AT_ONCE = 1 << 24


def dequantise(
    layout: Layout,
    codes: torch.Tensor,
    params: torch.Tensor | None,
    row_params: torch.Tensor | None,
    n: int,
    k: int,
    scale: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The weight [n, k] from packed tensors, rounded once from FP32."""
    out = torch.empty(n, k, dtype=dtype, device=codes.device)
    strips = max(1, AT_ONCE // (TILE_ROWS * max(k, 1)))
    if row_params is not None:
        row_params = row_params.unflatten(0, (codes.shape[0], -1)) if not layout.row_run else row_params
    for first in range(0, codes.shape[0], strips):
        here = slice(first, first + strips)
        rows = out[TILE_ROWS * first : TILE_ROWS * (first + strips)]
        part = _strips(
            layout,
            codes[here],
            None if params is None else params[here],
            None if row_params is None else row_params[here],
        )
        if scale != 1.0:
            part *= scale
            part.clamp_(-torch.finfo(dtype).max, torch.finfo(dtype).max)
        rows.copy_(part[: rows.shape[0], :k])
    return out


def _strips(
    layout: Layout, codes: torch.Tensor, params: torch.Tensor | None, row_params: torch.Tensor | None
) -> torch.Tensor:
    """Whole strips as FP32 [16 * strips, 64 * tiles]."""
    strips, tiles = codes.shape[:2]
    rows, columns = strips * TILE_ROWS, tiles * TILE_COLS
    if layout.code_bits == 8:
        assert row_params is not None
        # [strip, tile, column half, g, t, pair, row half, which of two]
        biased = codes.view(torch.uint8).view(strips, tiles, 2, 8, 4, 4, 2, 2)
        weights = biased.permute(0, 6, 3, 1, 2, 4, 5, 7).reshape(rows, columns).float()
        return weights.sub_(128).mul_(row_params.view(torch.float32).reshape(rows, 1))

    assert params is not None
    if layout.high_bits:
        own = TILE_ROWS * TILE_COLS // layout.group
        coded = _codes_in_planes(layout.code_bits, codes, params[..., own:]).reshape(rows, columns)
        params = params[..., :own].reshape(strips, tiles, 8, 32 // layout.group, 4)
    else:
        # [strip, tile, g, t, word, nibble], the last two as `layouts.pack` has them, to rows of codes in order.
        shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=codes.device)
        coded = (codes.view(strips, tiles, 8, 4, 4, 1) >> shifts).bitwise_and_(15)
        if layout.natural:
            coded = coded.view(strips, tiles, 8, 4, 2, 2, 8).permute(0, 5, 2, 1, 4, 3, 6).reshape(rows, columns)
        else:
            coded = coded.view(strips, tiles, 8, 4, 4, 2, 2, 2).permute(0, 7, 2, 1, 6, 3, 4, 5).reshape(rows, columns)
    group = layout.group
    groups = _by_rows(layout, params, rows)[:, : -(-columns // group)]

    if layout.row_run:
        assert row_params is not None
        supers = row_params.view(torch.float16).float().transpose(1, 2).reshape(rows, -1)
        supers = supers.repeat_interleave(layout.row_run // group, 1)[:, : groups.shape[1]]
        byte = groups[..., 0].int()
        l_times_d = ((byte & 63) - (byte & 32) * 2).float().mul_(supers)
        index = coded.view(rows, -1, group) + ((byte >> 6) * 16)[..., None]
        return (_tables(layout, codes.device)[index].mul_(l_times_d[..., None])).view(rows, columns)

    if row_params is not None:
        line = row_params.view(torch.float16).float().reshape(rows, 1, 4)
        bytes_ = groups.float()
        scale = bytes_[..., 0] * line[..., 1] + line[..., 0]
        offset = bytes_[..., 1] * line[..., 3] + line[..., 2]
    else:
        scale, offset = groups.float().unbind(-1)
    weights = torch.nn.functional.pad(coded, (0, groups.shape[1] * group - columns)).view(rows, -1, group).float()
    weights.mul_(scale[..., None]).add_(offset[..., None])
    return weights.view(rows, -1)[:, :columns]


def _codes_in_planes(bits: int, codes: torch.Tensor, planes: torch.Tensor) -> torch.Tensor:
    """Codes of five or six bits, [strip, row half, g, tile, column half, t, pair, which of two] (`layouts.pack`)."""
    strips, tiles = codes.shape[:2]
    pairs = layouts.PLANE_PAIRS[bits]
    # [strip, tile, g, t, pair, which of two, column half]
    low = codes.contiguous().view(torch.uint8).view(strips, tiles, 8, 4, 4, 2, 2).int()
    # [strip, tile, word, g, t, column half, which of two, place of the pair]
    shifts = torch.arange(0, 8, 8 // pairs, dtype=torch.int32, device=codes.device)
    high = planes.contiguous().view(torch.uint8).view(strips, tiles, 4 // pairs, 8, 4, 2, 2, 1).int() >> shifts
    high = high.bitwise_and_((1 << 8 // pairs) - 1).permute(0, 1, 3, 4, 2, 7, 6, 5).reshape(low.shape)
    both = low | high << 8
    coded = torch.stack([both & ((1 << bits) - 1), both >> bits], 1)
    return coded.permute(0, 1, 3, 2, 7, 4, 5, 6)


def _by_rows(layout: Layout, params: torch.Tensor, rows: int) -> torch.Tensor:
    """Parameters [rows, groups, fields]: FP16 (scale, offset), or bytes."""
    fields = params.view(torch.float16 if params.dtype == torch.int32 else torch.uint8)
    if layout.group > 32:
        # [strip, group, g, row half]
        return fields.view(*params.shape, -1).permute(0, 3, 2, 1, 4).reshape(rows, params.shape[1], -1)
    strips, tiles, _, subgroups = params.shape[:4]
    # [strip, tile, g, subgroup, column half, row half]
    split = fields.view(strips, tiles, 8, subgroups, 2, 2, -1)
    return split.permute(0, 5, 2, 1, 4, 3, 6).reshape(rows, tiles * 2 * subgroups, -1)


@functools.cache
def _tables(layout: Layout, device: torch.device) -> torch.Tensor:
    """The tables one after another, each in the order of packed codes."""
    tables = torch.tensor(_core.tables(layout.name), dtype=torch.float32, device=device)
    return tables[:, layout.packed_as].reshape(-1)
