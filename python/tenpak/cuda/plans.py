"""Which kernel multiplies or attends, in which configuration, for which shape; needs no GPU.

The choices are measured ones (tests/bench/bench_gemm.py, bench_attention.py) and ship with the package: nothing is
tuned at run time.

- up to 16 tokens: `skinny`, bound by memory (one token of most layouts, and two of tables, in integers), or on Hopper
  from `ROWS_FROM` tokens on `rows`, whose blocks have more rows for what they read of x;
- more on Hopper: `wide`, whose tokens the copy engine brings, on the tensor cores' warpgroup instructions;
- more elsewhere, and where the copy engine cannot bring them: `tiled`;
- of experts few by `skinny`, whose blocks those with tokens share, and more by `wide` or `tiled`;
- `dense_from` tokens and more, where neither is faster: the weight is unpacked, a part at a time, for cuBLAS.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np

from tenpak.cuda import wide
from tenpak.cuda.layouts import LAYOUTS, TABLES, TILE_COLS, TILE_ROWS
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
    "int5_g32_u8": 1408,
    "int6_g32_u8": 1664,
    "int4_lut16": 1184,
    "int4_lut32": 1184,
    "int8_sym": 2048,
}

#: Layouts of which one token is multiplied in integers (cuda/integers.cuh). The others have so many bytes that memory
#: takes the time either way.
INTEGER = TABLES | {"int4_g16_fp16", "int4_g32_fp16", "int4_g64_fp16", "int4_g128_fp16", "int4_g16_u8"}
#: Tokens from which `rows` is faster than `skinny`, where the copy engine can read x.
ROWS_FROM = 2
#: The same for weights from `LARGE` on, and for those of them that have the most bytes.
ROWS_FROM_LARGE, ROWS_FROM_LARGEST = 5, 9
LARGEST = frozenset({"int4_g8_fp16", "int4_g16_fp16", "int4_g32_fp16", "int8_sym"})
#: Tokens from which `wide`, or elsewhere `tiled`, is faster than what is for fewer.
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
    capability: int  # 90 for 9.0

    @property
    def hopper(self) -> bool:
        """Whether it has the warpgroups' products of `wide`, which newer ones do not."""
        return self.capability == 90

    @property
    def clusters(self) -> bool:
        """Whether blocks of a cluster reach each other's shared memory."""
        return self.capability >= 90


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


def sample_defines(here: Device) -> dict[str, int]:
    """Macros of sample.cu: where there are clusters, the blocks of one choose a token together."""
    return {"THREADS": 1024, "CLUSTER": 8 if here.clusters else 1}


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
    #: Tokens of each map's boxes, where the kernel takes maps of x (tensormap.py) and not its address; and a box's
    #: tiles of 64 columns, where it has several.
    boxes: tuple[int, ...] = ()
    box_tiles: int = 0


def divide_up(a: int, b: int) -> int:
    return -(-a // b)


#: Tokens of an expert on average beyond which `wide`, or elsewhere `tiled`, is faster than `skinny`.
WIDE_EXPERTS, TILED_EXPERTS = 2, 4
#: More tokens than a product may have.
NEVER = 1 << 31


def dense_from(layout: str, hopper: bool, in_boxes: bool) -> int:
    """Tokens from which unpacking the weight for cuBLAS is faster; `in_boxes`: the copy engine can read x."""
    if not hopper:
        return 512
    if not in_boxes:
        return 256
    return 8192 if layout in TABLES else NEVER


@dataclass(frozen=True)
class Form:
    """Macros of cuda/skinny.cu: warps of a block that multiply, steps in flight, and a multiprocessor's blocks.

    `strips` at a time. `engine`: the copy engine brings weights, asked for by `copiers`. `sharers`: warps that take a
    step together, of whom there are several groups in turn (0: all). `even`: no more blocks than as many turns need.
    `head`: strips that are left over are cut along K (`head_steps`), with `engine` only.
    """

    warps: int
    depth: int
    blocks: int
    strips: int = 1
    engine: bool = False
    copiers: int = 1
    sharers: int = 0
    even: bool = False
    head: bool = False


def head_steps(turns: int, blocks: int, steps: int) -> int:
    """Steps that each of `blocks` has of the turns that are left over when all have as many, or 0 where none are cut.

    A turn is `steps`. None are cut where each would have a turn's (Walk of cuda/ring.cuh).
    """
    share = divide_up(turns % blocks * steps, blocks)
    return share if share < steps else 0


#: Layouts of which one token of a large weight is multiplied with two strips at a time.
TWO_STRIPS = TABLES | {"int4_g32_fp16", "int4_g128_fp16"}


def _forms(device: Device, layout: str, n: int, k: int, m: int, integer: int, overlaps: bool) -> list[Form]:
    """What `skinny_plans` tries, the best first, as measured."""
    large, tables = n * k >= LARGE, layout in TABLES
    depth = 3 if large and STAGE_BYTES[layout] <= 1280 and not integer else 2
    forms = [Form(8, depth, 2), Form(16, 2, 1), Form(8, depth, 1)]
    if integer * k > 8192:
        forms.insert(0, Form(16, 2, 1))
    elif m > 2 and not large and not tables:
        forms[:0] = [Form(12, 3, 1), Form(12, 2, 1)]
    if not device.hopper:
        return forms

    def engine(
        warps: int, depth: int, blocks: int, strips: int = 1, copiers: int = 1, sharers: int = 0, head: bool = False
    ) -> Form:
        return Form(warps, depth, blocks, strips, True, copiers, sharers, blocks == 1 and not sharers, head)

    # Strips of a multiprocessor.
    strips = divide_up(n, TILE_ROWS) / device.multiprocessors
    if integer:
        if integer == 2:
            first = engine(16, 2, 1, 2, 2)
        elif large and layout in TWO_STRIPS:
            first = engine(16, 4, 1, 2, 2, 8)
        elif large or overlaps or k > 8192 or (layout == "int4_g16_u8" and strips <= 2):
            first = engine(16, 8, 1, 1, 2, 8)
        else:
            # Small blocks have multiplied the sooner, and two of them wait at different times. The less there is to
            # multiply, the more it matters how soon the first warps begin.
            small = tables and n * k < LARGE // 2
            first = engine(8, 8, 2, sharers=4, head=True) if small else engine(8, 4, 2, head=tables)
        forms[:0] = [first, engine(16, 4, 1), engine(16, 3, 1), engine(12, 3, 1)]
    elif large and m > 1:
        first = (
            engine(16, 2, 1, 2, 2) if tables and m <= 4 else engine(8, 3 if STAGE_BYTES[layout] > 1184 else 4, 1, 2, 2)
        )
        forms[:0] = [first, engine(8, 3, 1, 2, 2), engine(16, 3, 1), engine(12, 3, 1), engine(12, 2, 1)]
    elif m > 4:
        forms[:0] = [engine(8, 3, 1, 2, 2), engine(12, 3, 1), engine(12, 2, 1)]
    elif m > 1:
        forms.insert(0, engine(8, 3, 2) if overlaps else engine(8, 3, 1, 2, 2))
    elif layout == "int4_g8_u8" or (LAYOUTS[layout].high_bits and not large):
        cut = layout == "int4_g8_u8" and not (overlaps or large or k > 8192)
        forms.insert(0, engine(8, 4, 2, sharers=4, head=True) if cut else engine(8, 2, 2))
    return forms


#: Strips whose sums a block of `skinny` adds at a time, each by a warp.
BUFFERS = 2
#: Tiles that a slice of K is a multiple of: those of a super-scale of `TABLES`.
SLICE_TILES = 4


def x_row_bytes(layout: str, integer: int, tiles: int) -> int:
    """Shared memory of a token's `tiles` of 64 columns (row_bytes of cuda/halves.cuh and cuda/integers.cuh).

    `integer`: the tokens that are multiplied in integers, or 0.
    """
    if not integer:
        return 2 * TILE_COLS * tiles + 64
    if layout in TABLES:
        versions, units = 1, 0
    else:
        group = LAYOUTS[layout].group
        # Where groups are smaller than a tile, tiles are there twice.
        versions, units = 2 if group < TILE_COLS else 1, 2 * TILE_COLS // group
    return divide_up(divide_up(tiles, 2) * (4 * TILE_COLS * versions + 4 + 4 * units), 128) * 128 + 32


def skinny_plans(
    device: Device,
    layout: str,
    n: int,
    k: int,
    m: int,
    batch: int = 1,
    bf16: bool = False,
    grouped: bool = False,
    fused: Fused = PLAIN,
    heads: bool = True,
) -> list[Plan]:
    """Configurations of `skinny` for a product, the one to take first.

    `m` is the number of tokens a matrix, or, grouped, of all experts together. `heads`: as for `choose`.
    """
    strips, tiles, stage = divide_up(n, TILE_ROWS), divide_up(k, TILE_COLS), STAGE_BYTES[layout]
    average = divide_up(m, batch) if grouped else m
    # An expert has by chance more: nearly none more than three times the deviation, which would read its weights again.
    most = m / batch + 3 * math.sqrt(m / batch) if grouped else m
    # Experts that may have tokens share the blocks.
    matrices = min(batch, m) if grouped else batch
    columns = 1 if most <= 8 else 2
    # Tokens that are multiplied in integers; not experts', of which one may have many.
    most_integer = 0 if layout not in INTEGER or grouped else 2 if layout in TABLES and n * k >= LARGE else 1
    integer = m if m <= most_integer else 0
    chunk = integer or 8 * columns
    at_once = min(chunk, m)

    # Of a warp's sums of up to eight tokens (Sum of cuda/integers.cuh and cuda/halves.cuh).
    sum_bytes = 32 * (8 if integer else 16)

    # K goes over several blocks where there are too few rows for all multiprocessors, or x is too large for one.
    slices = 1
    if strips * matrices <= device.multiprocessors:
        slices = max(1, min(2 * device.multiprocessors // (strips * matrices), tiles // 16))

    def plan(form: Form, slices: int) -> Plan | None:
        slice_tiles = divide_up(divide_up(tiles, slices), SLICE_TILES) * SLICE_TILES
        sharers = form.sharers or form.warps
        shared = form.strips * (BUFFERS * form.warps * columns * sum_bytes + sharers * form.depth * stage)
        shared += at_once * x_row_bytes(layout, integer, slice_tiles)
        if shared > device.shared or form.blocks * (shared + RESERVED) > device.shared_all:
            return None
        slices, turns = divide_up(tiles, slice_tiles), divide_up(strips, form.strips)
        per_matrix = max(1, device.multiprocessors * form.blocks // (slices * matrices))
        width = min(turns, per_matrix)
        steps = divide_up(tiles, 2 * sharers)
        head = head_steps(turns, width, steps) if heads and form.head and slices == 1 and not grouped else 0
        if form.even:
            width = divide_up(turns, divide_up(turns, width))
        defines = {
            "LAYOUT": layout,
            "BF16": int(bf16),
            "WARPS": form.warps,
            "DEPTH": form.depth,
            "COLUMNS": columns,
            "BLOCKS": form.blocks,
            "INTEGER": integer,
            "STRIPS": form.strips,
            "ENGINE": int(form.engine),
            "COPIERS": form.copiers,
            "SHARERS": sharers,
            **({"HEAD": 1} if head else {}),
            **({"GROUPED": 1} if grouped else {}),
            **fused.defines,
        }
        if fused.norm != "none":
            # Each thread's part of a row, in fours (cuda/normed.cuh).
            defines["EACH"] = divide_up(tiles * TILE_COLS, 4 * 32 * form.warps)
        # Strips whose sums are in parts, and how many at most (Parts of cuda/ring.cuh).
        parts, cut = slices, strips
        wholes = turns // width
        if head:
            parts, cut = divide_up(steps - 1, head) + 1, strips - wholes * width * form.strips
        # Slots of partial sums: one for each chunk of tokens of each matrix.
        slots = (m // chunk + batch if grouped else batch * divide_up(m, chunk) + batch) if parts > 1 else 0
        # Those that multiply, that add, and one that asks for copies.
        warps = form.warps + BUFFERS + form.engine * form.copiers
        int32 = np.int32
        return Plan(
            "skinny.cu",
            "skinny",
            defines,
            (width, slices, matrices),
            (32 * warps,),
            shared,
            (
                *(int32(batch if grouped else m), int32(n), int32(k)),
                *(int32(tiles), int32(divide_up(k, 256)), int32(slice_tiles)),
                *((int32(wholes), int32(head), np.uint32(divide_up(1 << 32, steps))) if head else ()),
            ),
            slots * parts * cut * form.strips * columns * sum_bytes,
            slots * strips,
        )

    forms = _forms(device, layout, n, k, average, integer, fused.overlaps)
    while True:
        found = [made for form in forms if (made := plan(form, slices)) is not None]
        if found:
            return found
        slices += 1


#: Blocks of `rows` by the strips of 16 rows that they have at a time: warps, and those of them that share a strip.
#: Each warp has two strips.
ROWS_FORMS = {2: (8, 8), 4: (8, 4), 6: (12, 4), 8: (8, 2), 10: (10, 2), 12: (12, 2), 14: (14, 2)}


def rows_plan(device: Device, layout: str, n: int, k: int, m: int, batch: int = 1, bf16: bool = False) -> Plan | None:
    """The configuration of `rows` for a product, or None where there are too few rows for it.

    The copy engine can read x, and k is a multiple of 64.
    """
    strips, tiles, stage = divide_up(n, TILE_ROWS), divide_up(k, TILE_COLS), STAGE_BYTES[layout]
    columns = 1 if m <= 8 else 2
    if k % TILE_COLS or strips * batch <= device.multiprocessors:
        return None
    per_matrix = max(1, device.multiprocessors // batch)
    # As many turns as the most rows ask for, and as few rows as as many turns need.
    turns = divide_up(strips, per_matrix * max(ROWS_FORMS))
    rows = min(r for r in ROWS_FORMS if r * per_matrix * turns >= strips)
    warps, sharers = ROWS_FORMS[rows]
    copiers = columns
    of_x = 8 * columns * sharers * 2 * TILE_COLS * 2
    of_stage = divide_up(rows * sharers * stage + of_x, 1024) * 1024
    # Stages begin at a multiple of 1024.
    others = 1024 + warps * 2 * columns * 512
    depth = min(3 if rows == 2 else 4, (device.shared - others) // of_stage)
    if depth < 2:
        return None
    defines = {
        "LAYOUT": layout,
        "BF16": int(bf16),
        "WARPS": warps,
        "SHARERS": sharers,
        "STRIPS": 2,
        "DEPTH": depth,
        "COLUMNS": columns,
        "COPIERS": copiers,
    }
    int32 = np.int32
    return Plan(
        "rows.cu",
        "rows",
        defines,
        (min(divide_up(strips, rows) * divide_up(m, 8 * columns), per_matrix), 1, batch),
        (32 * (warps + copiers),),
        depth * of_stage + others,
        (int32(m), int32(n), int32(k), int32(tiles), int32(divide_up(k, 256)), int32(tiles)),
        0,
        0,
        (8 * columns,),
        2 * sharers,
    )


def experts_room(batch: int) -> int:
    """Bytes of shared memory in which blocks count experts' tiles (Experts of cuda/experts.cuh)."""
    return 4 * (2 * batch + 1)


def experts_tiles(n: int, rows: int, m: int, tokens: int, batch: int) -> int:
    """The most tiles of `rows` by `tokens` that `m` tokens of `batch` experts make: each one's last may be smaller."""
    return divide_up(n, rows) * (m // tokens + batch)


def tiled_plan(
    device: Device, layout: str, n: int, k: int, m: int, batch: int = 1, bf16: bool = False, grouped: bool = False
) -> Plan:
    """The configuration of `tiled` for a product of `m` tokens, or with `grouped` of as many for all experts."""
    tokens = wide.tokens_of_experts(m, batch) if grouped else wide.tokens_of_tile(m, 64 if m <= 64 else 128)
    # As registers allow: fewer tokens for more rows.
    warps, strips = (4, 4) if tokens <= 64 else (8, 2)
    rows = 16 * warps * strips
    room = experts_room(batch) if grouped else 0

    def stages_of(step: int) -> tuple[int, int]:
        """As many as fit, and their bytes; of no use are more than four."""
        stage = step * tokens * TILE_COLS * 2 + warps * strips * wide.strip_bytes(layout, STAGE_BYTES[layout], step)
        stages = min(4, (device.shared - room) // stage)
        return stages, stages * stage

    step = 2 if stages_of(2)[0] >= 3 else 1
    stages, shared = stages_of(step)
    tiles = divide_up(k, TILE_COLS)
    output_tiles = batch * divide_up(n, rows) * divide_up(m, tokens)
    if grouped:
        output_tiles = experts_tiles(n, rows, m, tokens, batch)
    grid = min(device.multiprocessors, output_tiles * divide_up(tiles, step))
    int32 = np.int32
    return Plan(
        "tiled.cu",
        "tiled",
        {
            "LAYOUT": layout,
            "BF16": int(bf16),
            "WARPS": warps,
            "STRIPS": strips,
            "TOKENS": tokens,
            "STEP": step,
            "STAGES": stages,
            "GROUPED": int(grouped),
        },
        (grid, 1, 1),
        (32 * warps,),
        shared + room,
        (int32(batch), int32(m), int32(n), int32(k), int32(tiles), int32(divide_up(k, 256))),
        grid * rows * tokens * 4,
        output_tiles,
    )


def _wide_plan(choice: wide.Choice, layout: str, n: int, k: int, m: int, batch: int, bf16: bool) -> Plan:
    int32 = np.int32
    return Plan(
        "wide.cu",
        "wide",
        {"LAYOUT": layout, "BF16": int(bf16), **choice.defines},
        (choice.grid, 1, 1),
        (choice.threads,),
        choice.shared,
        (
            *(int32(batch), int32(m), int32(n), int32(divide_up(k, TILE_COLS)), int32(divide_up(k, 256))),
            *(int32(choice.head), int32(choice.band)),
        ),
        choice.partial_bytes,
        choice.counters,
        wide.boxes(m, choice.tokens, choice.narrow),
    )


def wide_plans(device: Device, layout: str, n: int, k: int, m: int, batch: int, bf16: bool) -> list[Plan]:
    """Configurations of `wide` for a product, the best estimate first."""
    found = wide.choices(layout, STAGE_BYTES[layout], device.multiprocessors, device.shared, n, k, m, batch)
    return [_wide_plan(choice, layout, n, k, m, batch, bf16) for choice in found]


def experts_plan(device: Device, layout: str, n: int, k: int, m: int, batch: int, bf16: bool) -> Plan:
    """The configuration of `wide` for `m` tokens of `batch` experts in all."""
    room = experts_room(batch)
    about = (layout, STAGE_BYTES[layout], device.multiprocessors, device.shared - room, n, k, m, batch)
    choice = wide.choice_of_experts(*about)
    plan = _wide_plan(choice, layout, n, k, m, batch, bf16)
    tiles = experts_tiles(n, choice.rows, m, choice.tokens, batch)
    grid = min(device.multiprocessors, tiles * divide_up(divide_up(k, TILE_COLS), choice.step))
    return replace(
        plan,
        defines={**plan.defines, "GROUPED": 1},
        grid=(grid, 1, 1),
        shared=plan.shared + room,
        partial_bytes=grid * choice.rows * choice.tokens * 4,
        counters=tiles * choice.groups,
        boxes=(choice.tokens,),
    )


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
    heads: bool = True,
) -> Plan:
    """The kernel and configuration for a product of `m` tokens with a weight [batch, n, k].

    `in_boxes`: the copy engine can read x. `heads`: whether strips that are left over may be cut (`head_steps`), which
    takes counters: to make those zero for each launch takes longer than is gained.
    """
    first = ROWS_FROM if n * k < LARGE else ROWS_FROM_LARGEST if layout in LARGEST else ROWS_FROM_LARGE
    if device.hopper and not grouped and in_boxes and fused == PLAIN and first <= m < WIDE_FROM:
        found = rows_plan(device, layout, n, k, m, batch, bf16)
        if found is not None:
            return found
    # x of 16 tokens: 32 bytes a column.
    few = m <= FEW or (m < WIDE_FROM and 32 * k <= 160 << 10 and n * k < LARGE)
    if device.hopper and in_boxes:
        if grouped and m > WIDE_EXPERTS * batch:
            return experts_plan(device, layout, n, k, m, batch, bf16)
        if not grouped and not few:
            return wide_plans(device, layout, n, k, m, batch, bf16)[0]
    if m > TILED_EXPERTS * batch if grouped else m >= WIDE_FROM:
        return tiled_plan(device, layout, n, k, m, batch, bf16, grouped)
    return skinny_plans(device, layout, n, k, m, batch, bf16, grouped, fused, heads)[0]


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
