"""Which kernel multiplies or attends, in which configuration, for which shape; needs no GPU.

The choices are measured ones (tests/bench/bench_gemm.py, bench_attention.py) and ship with the package: nothing is
tuned at run time.

- up to 8 tokens, and 16 where x fits in shared memory: `skinny`, bound by memory (one or two tokens of `int4_lut16`:
  in integers);
- more on Hopper: from `WIDE_FROM` tokens on `wide`, whose tokens the copy engine brings, and `prefill` for fewer and
  where it cannot bring them; both on the tensor cores' warpgroup instructions;
- `dense_from` tokens and more: the weight is unpacked, a part at a time, for cuBLAS.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from tenpak.cuda import wide
from tenpak.cuda.layouts import TILE_COLS, TILE_ROWS
from tenpak.decoder.kv import RECENT, TILE

#: Bytes that two tiles take in shared memory: codes and parameters (STAGE_BYTES of cuda/layouts.cuh).
STAGE_BYTES = {
    "int4_g8_fp16": 2048,
    "int4_g16_fp16": 1536,
    "int4_g32_fp16": 1280,
    "int4_g64_fp16": 1152,
    "int4_g128_fp16": 1088,
    "int4_g8_u8": 1536,
    "int4_g16_u8": 1280,
    "int4_lut16": 1184,
    "int8_sym": 2048,
}

#: Layouts with products in integers, and for how many tokens (cuda/integers.cuh).
INTEGER = {"int4_lut16": 2}
#: Tokens from which `wide` is faster than what is for fewer.
WIDE_FROM = 17
#: Weights from which more tiles in flight pay for the shared memory they take.
LARGE = 100_000_000
#: Shared memory that a block keeps for itself: barriers, tables, and what the driver reserves.
RESERVED = 2048


@dataclass(frozen=True)
class Device:
    """What a choice depends on."""

    multiprocessors: int
    shared: int  # bytes a block may have
    shared_all: int  # bytes of a multiprocessor
    hopper: bool


#: What a product writes: the activations' type, FP32, or FP32 that it is added to; numbered by cuda/skinny.cu.
Output = Literal["activations", "float32", "added"]
OUTPUTS: tuple[Output, ...] = get_args(Output)
#: As cuda/activation.cuh numbers them.
ACTIVATIONS = ("none", "silu", "gelu_tanh", "gelu", "relu")
#: What is done to x before a product; numbered by cuda/normed.cuh.
NormKind = Literal["none", "rms", "layer"]
NORMS: tuple[NormKind, ...] = get_args(NormKind)


@dataclass(frozen=True)
class Fused:
    """What else a decoder's step does in the launch of a product of up to `FEW` tokens (cuda/skinny.cu)."""

    #: The norm before it: x is then FP32, and its columns are a multiple of four.
    norm: NormKind = "none"
    #: What y is.
    output: Output = "activations"
    #: A function of the outputs, by its name in `ACTIVATIONS`.
    activation: str = "none"
    #: Whether each sixteen outputs are eight gates, which are activated, and the eight that they multiply; y then has
    #: half as many.
    gated: bool = False
    #: Whether the launch may begin before the one before it has ended (`tenpak.cuda.launch.overlapping`).
    overlaps: bool = False

    @property
    def defines(self) -> dict[str, object]:
        """Macros of cuda/skinny.cu, of those only that are not its defaults."""
        values = {
            "NORM": NORMS.index(self.norm),
            "OUTPUT": OUTPUTS.index(self.output),
            "ACTIVATION": ACTIVATIONS.index(self.activation),
            "GATED": int(self.gated),
            "OVERLAP": int(self.overlaps),
        }
        return {name: value for name, value in values.items() if value}


#: Threads of norm.cu.
NORM_THREADS = 512


def norm_defines(width: int, centred: bool) -> dict[str, object]:
    """Macros of norm.cu; `centred`: a layer norm."""
    return {"THREADS": NORM_THREADS, "EACH": divide_up(width, NORM_THREADS), "BF16": 0, "CENTRED": int(centred)}


PLAIN = Fused()
#: Tokens that a product with another `Fused` may have.
FEW = 8


@dataclass(frozen=True)
class Plan:
    """A launch without its pointers and strides, which its `scalars` follow."""

    #: The source in cuda/, its kernel, and its macros.
    source: str
    kernel: str
    defines: Mapping[str, object]
    grid: tuple[int, int, int]
    block: tuple[int]
    shared: int
    scalars: tuple[Any, ...]
    partial_bytes: int
    counters: int
    #: Tokens of a box, where the kernel takes a map of x (tensormap.py) and not its address.
    box: int = 0


def divide_up(a: int, b: int) -> int:
    return -(-a // b)


def dense_from(hopper: bool, in_boxes: bool) -> int:
    """Tokens from which unpacking the weight for cuBLAS is faster; `in_boxes`: the copy engine can read x."""
    return (8192 if in_boxes else 512) if hopper else 64


def _skinny(
    device: Device, layout: str, n: int, k: int, m: int, batch: int, bf16: bool, grouped: bool, fused: Fused
) -> Plan:
    """`m` is the number of tokens a matrix, or, grouped, of all experts together."""
    strips, tiles, stage = divide_up(n, TILE_ROWS), divide_up(k, TILE_COLS), STAGE_BYTES[layout]
    average = divide_up(m, batch) if grouped else m
    columns = next((c for c in (1, 2, 4) if average <= 8 * c), 8)
    # Tokens that are multiplied in integers; not experts', of which one may have many.
    integer = m if m <= INTEGER.get(layout, 0) and not grouped else 0
    chunk = integer or 8 * columns
    at_once = min(chunk, m)
    depth = 3 if n * k >= LARGE and stage <= 1280 and not integer else 2

    # Strips whose sums a block adds at a time, each by a warp (BUFFERS of cuda/skinny.cu).
    buffers = 2 if columns <= 2 else 1

    def shared(warps: int, depth: int, slice_tiles: int) -> int:
        # A row of x, padded (row_bytes of cuda/halves.cuh and, with its scales, of cuda/integers.cuh).
        row = slice_tiles * TILE_COLS * 2 + (2 * slice_tiles + 160 if integer else 64)
        x = at_once * row
        return buffers * warps * columns * 512 + warps * depth * stage + x

    # K goes over several blocks where there are too few rows for all multiprocessors, or x is too large for one.
    slices = 1
    if strips * batch <= device.multiprocessors:
        slices = max(1, min(2 * device.multiprocessors // (strips * batch), tiles // 16))
    # (warps of a block, steps in flight, a multiprocessor's blocks), the best first, as measured.
    choices = [(8, depth, 2), (16, 2, 1), (8, depth, 1)]
    if integer * tiles > 128:
        choices.insert(0, (16, 2, 1))
    elif m > 2 and slices == 1 and n * k < LARGE and layout not in INTEGER:
        choices[:0] = [(12, 3, 1), (12, 2, 1)]
    while True:
        slice_tiles = divide_up(divide_up(tiles, slices), 2) * 2
        bytes_ = [shared(warps, depth, slice_tiles) for warps, depth, _ in choices]
        fits = [
            i
            for i, (_, _, blocks) in enumerate(choices)
            if bytes_[i] <= device.shared and blocks * (bytes_[i] + RESERVED) <= device.shared_all
        ]
        if fits:
            break
        slices += 1
    warps, depth, blocks = choices[fits[0]]
    slices = divide_up(tiles, slice_tiles)
    per_matrix = max(1, device.multiprocessors * blocks // (slices * batch))
    defines = {
        "LAYOUT": layout,
        "BF16": int(bf16),
        "WARPS": warps,
        "DEPTH": depth,
        "COLUMNS": columns,
        "BLOCKS": blocks,
        "INTEGER": integer,
        **fused.defines,
    }
    if fused.norm != "none":
        # Each thread's part of a row, in fours (cuda/normed.cuh).
        defines["EACH"] = divide_up(tiles * TILE_COLS, 4 * 32 * warps)
    # Slots of partial sums: one for each chunk of tokens of each matrix.
    slots = (m // chunk + batch if grouped else batch * divide_up(m, chunk) + batch) if slices > 1 else 0
    int32 = np.int32
    return Plan(
        "skinny.cu",
        "skinny",
        defines,
        (min(strips, per_matrix), slices, batch),
        (32 * (warps + buffers),),
        bytes_[fits[0]],
        (int32(m), int32(n), int32(k), int32(tiles), int32(divide_up(k, 256)), int32(slice_tiles)),
        slots * slices * strips * columns * 512,
        slots * strips,
    )


def _prefill(device: Device, layout: str, n: int, k: int, m: int, batch: int, bf16: bool) -> Plan:
    tiles, stage = divide_up(k, TILE_COLS), STAGE_BYTES[layout]
    tokens = next(t for t in (16, 32, 64, 128) if m <= t or t == 128)
    groups, blocks = (2, 2) if tokens == 128 else (4, 2 if tokens <= 32 and n * k >= LARGE else 1)
    if tokens < 128 and 4 * batch * divide_up(n, 256) <= device.multiprocessors:
        groups = 2  # tiles of fewer rows, so that fewer blocks share one
    depth, stages = (3, 3) if blocks == 2 or stage > 1536 else (4, 3)

    def shared() -> int:
        return 1024 + 2 * stages * tokens * TILE_COLS * 2 + 4 * groups * depth * blocks * stage

    while shared() > device.shared:
        if stages > 2:
            stages -= 1
        else:
            depth -= 1
    rows = 64 * groups * blocks
    output_tiles = batch * divide_up(n, rows) * divide_up(m, tokens)
    grid = min(device.multiprocessors, output_tiles * divide_up(tiles, 2))
    defines = {
        "LAYOUT": layout,
        "BF16": int(bf16),
        "GROUPS": groups,
        "BLOCKS": blocks,
        "TOKENS": tokens,
        "DEPTH": depth,
        "STAGES": stages,
    }
    int32 = np.int32
    return Plan(
        "prefill.cu",
        "prefill",
        defines,
        (grid, 1, 1),
        (128 * groups + 128,),
        shared(),
        (int32(batch), int32(m), int32(n), int32(k), int32(tiles), int32(divide_up(k, 256))),
        grid * rows * tokens * 4,
        output_tiles * groups,
    )


def wide_plans(device: Device, layout: str, n: int, k: int, m: int, batch: int, bf16: bool) -> list[Plan]:
    """Configurations of `wide` for a product, the best estimate first."""
    int32 = np.int32
    scalars = (int32(batch), int32(m), int32(n), int32(divide_up(k, TILE_COLS)), int32(divide_up(k, 256)))
    found = wide.choices(layout, STAGE_BYTES[layout], device.multiprocessors, device.shared, n, k, m, batch)
    return [
        Plan(
            "wide.cu",
            "wide",
            {"LAYOUT": layout, "BF16": int(bf16), **choice.defines},
            (choice.grid, 1, 1),
            (choice.threads,),
            choice.shared,
            scalars,
            choice.partial_bytes,
            choice.counters,
            choice.tokens,
        )
        for choice in found
    ]


def choose(
    device: Device,
    layout: str,
    n: int,
    k: int,
    m: int,
    batch: int = 1,
    bf16: bool = False,
    grouped: bool = False,
    fused: Fused = PLAIN,
    in_boxes: bool = False,
) -> Plan:
    """The kernel and configuration for a product of `m` tokens with a weight [batch, n, k].

    `in_boxes`: the copy engine can read x.
    """
    if device.hopper and not grouped and in_boxes and m >= WIDE_FROM:
        return wide_plans(device, layout, n, k, m, batch, bf16)[0]
    if device.hopper and not grouped:
        # x of 16 tokens: 32 bytes a column.
        fits = m <= FEW or (m <= 16 and 32 * k <= 160 << 10 and n * k < LARGE)
        if not fits:
            return _prefill(device, layout, n, k, m, batch, bf16)
    return _skinny(device, layout, n, k, m, batch, bf16, grouped, fused)


#: Head sizes that the kernels are tested with.
HEAD_DIMS = (32, 64, 80, 96, 128, 256)
#: Columns of a tensor core's product in attention: heads of a group, times new tokens.
COLUMNS = 8


@dataclass(frozen=True)
class AttentionPlan:
    """A launch of attention.cu, without its pointers."""

    defines: Mapping[str, object]
    grid: tuple[int, int, int]
    warps: int
    shared: int
    partial_bytes: int
    counters: int

    @property
    def appending(self) -> Mapping[str, object]:
        """Macros where the launch also appends its one token."""
        return {**self.defines, "APPENDS": 1}


def tile_bytes(bits: int, head_dim: int) -> int:
    """Bytes of a tile of `TILE` tokens: keys, values, and for codes a scale and an offset of each."""
    return 2 * TILE * head_dim * bits // 8 + (0 if bits == 16 else 2 * TILE * 4)


def query_bytes(head_dim: int) -> int:
    """The most shared memory that a block of attention.cu takes for queries and what turns them, and CUDA itself."""
    return (12 << 10) + 16 * head_dim


def cache_defines(bits: int, head_dim: int, bf16: bool) -> dict[str, object]:
    """Macros of the kernels that read or write a cache."""
    return {"BITS": bits, "DIM": head_dim, "RECENT": RECENT, "BF16": int(bf16)}


def choose_attention(
    device: Device,
    bits: int,
    head_dim: int,
    bf16: bool,
    batch: int,
    tokens: int,
    heads: int,
    kv_heads: int,
    capacity: int,
) -> AttentionPlan:
    """The configuration for `tokens` new tokens a sequence over a cache of `capacity` tiles."""
    # Measured on an H200: one block a multiprocessor, for fewer splits to merge; codes at a time that are as many bytes
    # as half an FP16 tile, and some 12 KiB of them on their way to each warp: with more, what comes late comes later.
    warps, tiles, tile = 8, max(1, 8 // bits), tile_bytes(bits, head_dim)
    wanted, least = max(3, 1 + 12700 // (tiles * tile)), 2 if bits == 16 else 3
    most = device.shared_all - query_bytes(head_dim)
    while most // (warps * tiles * tile) < least:
        warps //= 2
    stages = min(wanted, most // (warps * tiles * tile))
    merge = warps * (COLUMNS * (head_dim + 4) + 2 * COLUMNS) * 4
    rows = kv_heads * divide_up(tokens * heads // kv_heads, COLUMNS)
    splits = max(1, min(device.multiprocessors // (rows * batch), divide_up(capacity, warps * tiles)))
    part = (COLUMNS * head_dim + 2 * COLUMNS) * 4
    return AttentionPlan(
        {**cache_defines(bits, head_dim, bf16), "WARPS": warps, "TILES": tiles, "STAGES": stages, "BLOCKS": 1},
        (splits, rows, batch),
        warps,
        max(warps * stages * tiles * tile, merge),
        splits * rows * batch * part if splits > 1 else 0,
        rows * batch,
    )
