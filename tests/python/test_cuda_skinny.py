"""`skinny.cu`, `rows.cu` and `tiled.cu` beside FP64, on the CPU: layouts, ways to copy and multiply, norms, slices,
experts."""

from __future__ import annotations

import sys
from unittest.mock import patch

import numpy as np
import pytest
from skinny_on_cpu import run
from tenpak.cuda import layouts, plans
from test_cuda_wide import bits, random_weight, values
from warps_on_cpu import COMPILER

pytestmark = pytest.mark.skipif(
    COMPILER is None or sys.maxsize < 2**32, reason="a C++ compiler, fibers and the linker's options of Linux"
)

LAYOUTS = list(layouts.LAYOUTS)
#: Shared memory of a block and of a multiprocessor.
SHARED = (225 << 10, 228 << 10)
#: Few multiprocessors, so that a block has several strips.
SMALL = plans.Device(2, *SHARED, 90)


def check(
    layout: str,
    form: plans.Form | str,
    shape: tuple[int, int, int],
    *,
    bf16: bool = False,
    batch: int = 0,
    offsets: list[int] | None = None,
    fused: plans.Fused = plans.PLAIN,
    device: plans.Device = SMALL,
) -> None:
    """Twice the same, within rounding of the exact product, by a form of `skinny.cu`, or by another kernel."""
    m, n, k = shape
    random, lead, count = np.random.default_rng(m + n + k), (batch,) if batch else (), max(batch, 1)
    parts, reference, scale = random_weight(layout, (*lead, n, k))
    reference = reference.reshape(count, n, k) * scale
    *packed, power = layouts.pack(layouts.find(layout), parts, n, k, batch)
    scale /= 2.0**power
    if form == "rows":
        plan = plans.rows_plan(device, layout, n, k, m, count, bf16)
        assert plan is not None
    elif form == "tiled":
        plan = plans.tiled_plan(device, layout, n, k, m, count, bf16, offsets is not None)
    else:
        with patch.object(plans, "_forms", lambda *_: [form]):
            (plan,) = plans.skinny_plans(device, layout, n, k, m, count, bf16, offsets is not None, fused)
    rows = (m,) if offsets else (count, m)
    x = random.standard_normal((*rows, k)).astype(np.float32)
    tolerance = 8e-3 if bf16 else 1.5e-3
    norm = None
    if fused.norm == "none":
        given = bits(x, bf16)
        x = values(given, bf16).astype(np.float64)
    else:
        given = x = x * 3 + 0.5
        weight, shift = (random.standard_normal(k).astype(np.float32) for _ in range(2))
        norm = (weight, shift if fused.norm == "layer" else None, 1e-5)
        x = x.astype(np.float64)
        x = x - x.mean(-1, keepdims=True) if fused.norm == "layer" else x
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * weight + (shift if fused.norm == "layer" else 0)
    bias = bits(random.standard_normal((count, n)).astype(np.float32), bf16)
    added = values(bias, bf16).astype(np.float64)
    if offsets:
        wanted = np.empty((m, n))
        for expert in range(count):
            part = slice(*offsets[expert : expert + 2])
            wanted[part] = x[part] @ reference[expert].T + added[expert]
    else:
        wanted = x @ np.swapaxes(reference, 1, 2) + added[:, None]
    if fused.gated:
        gates = wanted.reshape(*wanted.shape[:-1], n // 16, 2, 8)
        gate, up = gates[..., 0, :], gates[..., 1, :]
        wanted = (gate / (1 + np.exp(-gate)) * up).reshape(*wanted.shape[:-1], n // 2)
    outputs = []
    for _ in range(2):
        if fused.output == "added":
            y = np.full(wanted.shape, 0.25, np.float32)
        else:
            y = np.full(wanted.shape, 0x7FFF, np.uint16)
        starts = None if offsets is None else np.array(offsets, np.int32)
        run(plan, packed, np.ascontiguousarray(given), y, bias, starts, norm, scale)
        outputs.append(y)
    assert (outputs[0].view(np.uint16) == outputs[1].view(np.uint16)).all()
    ours = outputs[0] - 0.25 if fused.output == "added" else values(outputs[0], bf16)
    error = np.linalg.norm(ours - wanted) / np.linalg.norm(wanted)
    assert error < tolerance, (error, plan)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("engine", [False, True])
def test_products_of_every_layout(layout, engine):
    form = plans.Form(2, 2, 2, engine=engine)
    # Odd numbers of rows and of tiles; columns in a partial group; several strips for each block.
    check(layout, form, (1, 70, 200))
    check(layout, form, (1, 21, 576), bf16=True)
    check(layout, form, (3, 37, 320))


@pytest.mark.parametrize("layout", ["int4_g32_fp16", "int4_lut16", "int8_sym", "int4_g128_fp16"])
def test_two_strips_and_more_tokens_than_a_chunk(layout):
    for engine in (False, True):
        check(layout, plans.Form(2, 3, 1, engine=engine), (19, 37, 192))
        check(layout, plans.Form(2, 2, 1, engine=engine), (2, 37, 330))
    check(layout, plans.Form(2, 2, 1, 2, True), (1, 90, 576))
    check(layout, plans.Form(2, 2, 1, 2, True), (5, 90, 576))
    check(layout, plans.Form(2, 3, 1, 2, True, copiers=3), (13, 55, 328), bf16=True)
    check(layout, plans.Form(2, 3, 1, 2, True, copiers=2), (19, 70, 640))


@pytest.mark.parametrize(
    "layout", ["int4_g32_fp16", "int4_g128_fp16", "int4_g8_u8", "int5_g32_u8", "int6_g32_u8", "int4_lut16", "int8_sym"]
)
def test_blocks_of_many_rows(layout):
    # One turn and several, also of tokens; an odd number of tiles; strips that are not there.
    check(layout, "rows", (13, 70, 576))
    check(layout, "rows", (5, 460, 192), bf16=True)
    check(layout, "rows", (19, 40, 128), batch=3)


#: Two blocks that share tiles, so that some are cut; and so little shared memory that stages are few.
TINY = plans.Device(3, 99 << 10, 100 << 10, 89)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bf16", [False, True])
def test_tiles_of_every_layout(layout, bf16):
    """Rows and columns that end within a tile; tokens of one tile and of several; matrices."""
    check(layout, "tiled", (35, 300, 328), bf16=bf16)
    check(layout, "tiled", (70, 270, 192), bf16=bf16, device=TINY)
    if not bf16:
        check(layout, "tiled", (150, 40, 136), batch=2, device=TINY)


def test_tiles_of_tokens_that_are_not_aligned():
    check("int4_g32_fp16", "tiled", (33, 77, 331))
    check("int4_g32_fp16", "tiled", (130, 77, 77), bf16=True, batch=3, device=TINY)


@pytest.mark.parametrize("layout", ["int4_g32_fp16", "int4_lut16", "int8_sym", "int4_g128_fp16"])
def test_tiles_of_experts(layout):
    """Some have no tokens, the first and the last among them, one has several tiles."""
    check(layout, "tiled", (200, 280, 200), batch=5, offsets=[0, 0, 70, 70, 200, 200])
    check(layout, "tiled", (300, 40, 136), batch=2, offsets=[0, 1, 300], device=TINY, bf16=True)
    check(layout, "tiled", (129, 40, 64), batch=1, offsets=[0, 129])
    # Fewer steps than blocks.
    many = plans.Device(40, *SHARED, 90)
    check(layout, "tiled", (36, 40, 200), batch=9, offsets=[0] * 5 + [36] * 5, device=many)


@pytest.mark.parametrize("layout", ["int4_g32_fp16", "int4_lut16"])
@pytest.mark.parametrize("engine", [False, True])
def test_slices_batches_and_experts(layout, engine):
    form = plans.Form(2, 2, 1, engine=engine)
    many = plans.Device(12, *SHARED, 90)
    for m in (1, 3):
        check(layout, form, (m, 20, 2112), device=many)
        check(layout, form, (m, 40, 136), batch=3)
    check(layout, form, (21, 40, 136), batch=3, offsets=[0, 2, 2, 21])
    # More blocks for an expert than it has strips.
    check(layout, form, (4, 70, 200), batch=5, offsets=[0, 2, 2, 2, 3, 4], device=plans.Device(40, *SHARED, 90))
    check(layout, form, (4, 20, 2112), batch=5, offsets=[0, 0, 0, 0, 0, 4], device=plans.Device(40, *SHARED, 90))
    # Fewer tokens than experts, of whom those that have any are in several words of 32.
    for experts in ([3, 34, 35, 69], [3, 69, 69, 69]):
        offsets = np.searchsorted(experts, np.arange(71)).tolist()
        check(layout, form, (4, 100, 72), batch=70, offsets=offsets)
        check(layout, form, (4, 100, 72), batch=70, offsets=offsets, device=many)


@pytest.mark.parametrize("layout", ["int4_g16_u8", "int4_g32_fp16", "int4_g128_fp16", "int4_lut16"])
@pytest.mark.parametrize("engine", [False, True])
def test_what_a_decoders_step_does_in_the_same_launch(layout, engine):
    form = plans.Form(2, 2, 1, engine=engine)
    for m in (1, 3):
        check(layout, form, (m, 36, 324), fused=plans.Fused("rms", output="added", overlaps=True))
        check(layout, form, (m, 48, 576), fused=plans.Fused("layer", overlaps=True))
        check(layout, form, (m, 48, 256), fused=plans.Fused(activation="silu", gated=True, overlaps=True))


@pytest.mark.parametrize("layout", ["int4_g32_fp16", "int4_g8_u8", "int4_lut16"])
def test_strips_that_are_left_over_are_cut(layout):
    def form(*which: int, **more: int) -> plans.Form:
        return plans.Form(*which, engine=True, head=True, **more)

    three = plans.Device(3, *SHARED, 90)
    # One strip is left over for two blocks, each with half; for six, of which the last has nothing of it.
    check(layout, form(2, 2, 1), (1, 70, 1024))
    check(layout, form(2, 2, 2), (1, 112, 1100), device=three)
    # Each block has the end of a strip and the beginning of the next, and rows are no multiple of sixteen.
    check(layout, form(4, 2, 1, sharers=2), (1, 75, 968), device=three, bf16=True)
    check(layout, form(2, 3, 2), (1, 148, 1100), device=three)
    check(layout, form(4, 4, 1, strips=2, copiers=2, sharers=2), (1, 170, 1216), device=three)
    check(layout, form(2, 3, 1), (5, 70, 1024))
    for m in (1, 3):
        check(layout, form(2, 2, 1), (m, 112, 576), device=three, batch=2)
        fused = plans.Fused("rms", activation="silu", gated=True, overlaps=True)
        check(layout, form(2, 2, 1), (m, 80, 768), fused=fused, device=three)
        check(layout, form(2, 2, 1), (m, 70, 768), fused=plans.Fused(output="added", overlaps=True), device=three)
