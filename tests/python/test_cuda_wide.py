"""`wide.cu` beside FP64, on the CPU: layouts, tails, shares of tiles, and what may be overwritten when."""

from __future__ import annotations

import dataclasses
import sys

import numpy as np
import pytest
import tenpak
from hopper_on_cpu import wide
from tenpak.cuda import layouts
from tenpak.cuda import wide as plans
from tenpak.cuda.plans import STAGE_BYTES
from warps_on_cpu import COMPILER

pytestmark = pytest.mark.skipif(
    COMPILER is None or sys.maxsize < 2**32, reason="a C++ compiler, fibers and the linker's options of Linux"
)

CODECS = {codec.layout: codec.name for codec in tenpak.codecs()}


def bits(x: np.ndarray, bf16: bool) -> np.ndarray:
    if not bf16:
        return x.astype(np.float16).view(np.uint16)
    raw = x.astype(np.float32).view(np.uint32)
    return ((raw + 0x7FFF + (raw >> 16 & 1)) >> 16).astype(np.uint16)


def values(raw: np.ndarray, bf16: bool) -> np.ndarray:
    return (raw.astype(np.uint32) << 16).view(np.float32) if bf16 else raw.view(np.float16)


def random_weight(layout: str, shape: tuple[int, ...]) -> tuple[list[np.ndarray], np.ndarray, float]:
    """Parts in the layout's order, the weight in FP64 before it is scaled, and the scale."""
    random, k = np.random.default_rng(sum(shape)), shape[-1]
    if layout in CODECS:
        weight = (0.05 * random.standard_normal(shape)).astype(np.float32)
        encoded = tenpak.encode(weight, CODECS[layout])
        scale = float(2.0**encoded.exponent)
        parts = layouts.ordered(CODECS[layout], encoded.parts, weight.shape, len(shape) - 1)
        return parts, tenpak.decode(encoded).astype(np.float64) / scale, scale
    # No codec of the core's has groups so long.
    scales = 0.002 * (1 + random.random((int(np.prod(shape[:-1])), -(-k // layouts.find(layout).group))))
    parts, weight = weight_of(layout, scales, -7.5, k)
    return parts, weight.reshape(shape), 1.0


def weight_of(layout: str, scales: np.ndarray, middle: float, k: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Parts and the weight in FP64 [rows, k] of random codes; `scales` [rows, groups], offsets `middle` times those."""
    group, rows = layouts.find(layout).group, len(scales)
    codes = np.random.default_rng(k).integers(0, 256, (rows, -(-k // 2)), np.uint8)
    scales = scales.astype(np.float16)
    offsets = (middle * scales).astype(np.float16)
    each = np.stack([codes & 15, codes >> 4], -1).reshape(rows, -1)[:, :k].astype(np.float64)
    wide_scales, wide_offsets = (np.repeat(part.astype(np.float64), group, 1)[:, :k] for part in (scales, offsets))
    return [codes, scales, offsets], each * wide_scales + wide_offsets


def check(
    layout: str,
    shape: tuple[int, int, int],
    grid: int,
    batch: int = 0,
    bf16: int = 0,
    head: int = 0,
    band: int = 1 << 16,
    offsets: list[int] | None = None,
    **defines: int,
) -> None:
    m, n, k = shape
    random = np.random.default_rng(m + n + k)
    lead = (batch,) if batch else ()
    parts, reference, scale = random_weight(layout, (*lead, n, k))
    *packed, power = layouts.pack(layouts.find(layout), parts, n, k, batch)
    x = random.standard_normal((1 if offsets else max(batch, 1), m, -(-k // 8) * 8)).astype(np.float32)
    x = bits(x, bool(bf16))
    bias = bits(random.standard_normal((max(batch, 1), n)), bool(bf16))
    given = {"LAYOUT": layout, "BF16": bf16, **defines, **({"GROUPED": 1} if offsets else {})}
    starts = np.array(offsets, np.int32) if offsets else None
    y = wide(given, grid, x, k, packed, n, scale / 2.0**power, bias, head, band, starts)
    tokens, added = values(x, bool(bf16)).astype(np.float64)[..., :k], values(bias, bool(bf16)).astype(np.float64)
    weights = (scale * reference.reshape(-1, n, k)).swapaxes(1, 2)
    if offsets:
        parts_of = [slice(*offsets[expert : expert + 2]) for expert in range(batch)]
        exact = np.concatenate([tokens[0, part] @ w + b for part, w, b in zip(parts_of, weights, added, strict=True)])[
            None
        ]
    else:
        exact = tokens @ weights + added[:, None]
    error = np.linalg.norm(values(y, bool(bf16)).astype(np.float64) - exact) / np.linalg.norm(exact)
    assert error < (1e-2 if bf16 else 1.5e-3)
    assert np.isfinite(values(y, bool(bf16)).astype(np.float32)).all()


SMALL = {"GROUPS": 2, "TOKENS": 16, "STEP": 1, "STAGES": 2}


@pytest.mark.parametrize("bf16", [0, 1])
@pytest.mark.parametrize("layout", list(layouts.LAYOUTS))
def test_every_layout(layout, bf16):
    """Columns in the tokens' order; K ends in a partial group, N in a partial strip."""
    check(layout, (13, 72, 328), 2, bf16=bf16, **SMALL)
    if not bf16:
        for step in (2, 4):
            check(layout, (5, 40, 328), 1, **{**SMALL, "STEP": step})


@pytest.mark.parametrize("bf16", [0, 1])
@pytest.mark.parametrize("layout", [f"int4_g{group}_fp16" for group in (8, 16, 32, 64, 128)])
def test_scales_of_every_size(layout, bf16):
    """From subnormal halves to the largest; zeros; offsets alone; one group that is 1000 times as large as others."""
    n, k, m, random = 72, 328, 5, np.random.default_rng(2)
    x = bits(random.standard_normal((1, m, k)).astype(np.float32), bool(bf16))
    shape = (n, -(-k // layouts.find(layout).group))
    alike = 1 + random.random(shape)
    outlier = np.where(np.arange(n * shape[1]).reshape(shape) == 5, 1000.0, 1.0)
    for scales, middle in (
        *((size * alike, -7.5) for size in (1e-7, 1e-3, 1.9, 1000.0, 4000.0)),
        (0 * alike, 0.0),
        (1e-5 * alike, 60000.0),
        (0.01 * alike * outlier, -7.5),
    ):
        parts, weight = weight_of(layout, scales, middle, k)
        *packed, power = layouts.pack(layouts.find(layout), parts, n, k)
        y = wide({"LAYOUT": layout, "BF16": bf16, **SMALL}, 1, x, k, packed, n, 2.0**-power * 2.0**-12, None)
        given, weight = values(x, bool(bf16)).astype(np.float64)[0], weight / 2**12
        # Each row by itself, those too that have no outlier; FP16 has no smaller numbers than 6e-8.
        error = np.square(values(y, bool(bf16))[0].astype(np.float64) - given @ weight.T).sum(0)
        norm = (np.square(given) @ np.square(weight).T).sum(0)
        assert (np.sqrt(error) <= (1.5e-2 if bf16 else 4e-3) * np.sqrt(norm) + 6e-8).all(), (scales.max(), middle)


@pytest.mark.parametrize("bf16", [0, 1])
@pytest.mark.parametrize("layout", sorted(layouts.TABLES))
def test_super_scales_of_every_size(layout, bf16):
    """From subnormal halves to the largest; zeros; one that is 1000 times as large as others."""
    n, k, m, random = 72, 648, 5, np.random.default_rng(2)
    encoded = tenpak.encode(random.standard_normal((n, k)).astype(np.float32), CODECS[layout])
    x = bits(random.standard_normal((1, m, k)).astype(np.float32), bool(bf16))
    alike = 1 + random.random(encoded.parts["supers"].shape)
    outlier = np.where(np.arange(alike.size).reshape(alike.shape) == 5, 1000.0, 1.0)
    for supers in (*(size * alike for size in (1e-6, 1e-3, 1.9, 500.0)), 0 * alike, 0.001 * alike * outlier):
        given = dataclasses.replace(encoded, parts={**encoded.parts, "supers": supers.astype(np.float16)}, exponent=0)
        parts = layouts.ordered(CODECS[layout], given.parts, (n, k), 1)
        *packed, power = layouts.pack(layouts.find(layout), parts, n, k)
        y = wide({"LAYOUT": layout, "BF16": bf16, **SMALL}, 1, x, k, packed, n, 2.0**-power * 2.0**-12, None)
        exact, weight = values(x, bool(bf16)).astype(np.float64)[0], tenpak.decode(given).astype(np.float64) / 2**12
        error = np.square(values(y, bool(bf16))[0].astype(np.float64) - exact @ weight.T).sum(0)
        norm = (np.square(exact) @ np.square(weight).T).sum(0)
        assert (np.sqrt(error) <= (1.5e-2 if bf16 else 4e-3) * np.sqrt(norm) + 6e-8).all(), supers.max()


@pytest.mark.parametrize("grid", [1, 2, 3, 4, 5, 7, 12, 18])
def test_shares(grid):
    """Six tiles of three units: whole ones, what is left over cut evenly, and one tile cut for several blocks."""
    check("int4_g32_fp16", (20, 300, 192), grid, **SMALL)


@pytest.mark.parametrize("band", [1, 2, 3])
@pytest.mark.parametrize("grid", [2, 5])
def test_bands_of_tokens(grid, band):
    """Two matrices of two by five tiles."""
    check("int4_g32_fp16", (75, 200, 192), grid, batch=2, band=band, **SMALL)


@pytest.mark.parametrize(("grid", "head"), [(7, 2), (8, 2), (9, 1), (12, 1)])
def test_helpers(grid, head):
    """Six tiles of three units; one to six helpers, with one to six tiles each."""
    check("int4_g32_fp16", (20, 300, 192), grid, head=head, **SMALL)


@pytest.mark.parametrize("bf16", [0, 1])
@pytest.mark.parametrize("layout", ["int4_g32_fp16", "int4_lut16", "int8_sym"])
def test_narrow_tiles(layout, bf16):
    """Of four rows of tiles one to three are wide; tokens end within a tile of either kind, rows within a strip."""
    for head, grid, band in ((1, 3, 3), (2, 4, 2), (3, 7, 1)):
        check(layout, (75, 430, 200), grid, bf16=bf16, head=head, band=band, NARROW=16, **{**SMALL, "TOKENS": 32})
    check(layout, (150, 150, 200), 2, bf16=bf16, head=1, NARROW=48, **{**SMALL, "TOKENS": 128})


@pytest.mark.parametrize("layout", ["int4_g32_fp16", "int8_sym"])
def test_clusters(layout):
    """Blocks share the columns of a tile; of the last tile's rows some are beyond the weight; N is odd or even."""
    for n in (292, 299):
        for blocks in (2, 3, 4):
            check(layout, (20, n, 456), 6 * blocks, CLUSTER=blocks, **SMALL)


@pytest.mark.parametrize("layout", ["int4_g32_fp16", "int4_lut16", "int8_sym", "int4_g128_fp16"])
def test_experts(layout):
    """Some have no tokens; tiles are whole and cut, and their boxes reach into the tokens of the next."""
    for grid in (1, 3, 7):
        check(layout, (100, 150, 200), grid, batch=5, offsets=[0, 0, 35, 35, 100, 100], **SMALL)
    check(layout, (70, 299, 328), 4, batch=2, bf16=1, offsets=[0, 1, 70], **{**SMALL, "TOKENS": 48, "STEP": 2})
    check(layout, (17, 40, 64), 2, batch=1, offsets=[0, 17], **SMALL)
    # Fewer steps than blocks.
    check(layout, (30, 150, 200), 21, batch=4, offsets=[0, 0, 30, 30, 30], **SMALL)


@pytest.mark.parametrize(
    "defines",
    [
        {"GROUPS": 2, "TOKENS": 256, "STEP": 1, "STAGES": 5},
        {"GROUPS": 3, "TOKENS": 128, "STEP": 2, "STAGES": 3},
        {"GROUPS": 2, "TOKENS": 192, "STEP": 1, "STAGES": 3},
        {"GROUPS": 2, "TOKENS": 144, "STEP": 1, "STAGES": 3},
        {"GROUPS": 3, "TOKENS": 80, "STEP": 2, "STAGES": 3},
        {"GROUPS": 4, "TOKENS": 64, "STEP": 2, "STAGES": 5},
        {"GROUPS": 4, "TOKENS": 48, "STEP": 2, "STAGES": 5},
        {"GROUPS": 4, "TOKENS": 32, "STEP": 4, "STAGES": 3},
    ],
)
def test_configurations(defines):
    """More units than stages; tokens and rows that end within a tile; sums of others that take one stage or several."""
    tokens, rows = defines["TOKENS"], 64 * defines["GROUPS"]
    check("int4_g32_fp16", (tokens - 5, rows + 56, 64 * 13), 3, **defines)


def test_batches_and_rows_that_are_not_aligned():
    check("int4_g16_fp16", (21, 77, 200), 5, batch=3, **SMALL)
    check("int4_g16_fp16", (21, 77, 200), 10, batch=3, head=3, **SMALL)
    check("int4_g16_fp16", (21, 77, 200), 12, batch=3, CLUSTER=2, **SMALL)
    check("int4_g128_fp16", (16, 16, 640), 3, batch=2, **{**SMALL, "STEP": 2})


@pytest.mark.parametrize("most", [16, 32, 64, 128, 256])
def test_tiles_share_tokens_evenly(most):
    """As few tiles as fit, and none with sixteen tokens more than it needs."""
    for m in range(1, 1500):
        tokens, tiles = plans.tokens_of_tile(m, most), -(-m // most)
        assert tokens % 16 == 0
        assert tokens <= most
        assert m <= tokens * tiles < m + 16 * tiles


@pytest.mark.parametrize("layout", list(layouts.LAYOUTS))
@pytest.mark.parametrize("m", [9, 16, 17, 64, 100, 130, 256, 700, 2048])
@pytest.mark.parametrize(("n", "k"), [(8, 8), (4096, 4096), (11008, 4096), (28672, 8192)])
def test_choices_fit(layout, m, n, k):
    """What a launch needs of a choice: shared memory, blocks that all have something to do, tiles that are covered."""
    stage = STAGE_BYTES[layout]
    found = plans.choices(layout, stage, 132, 230400, n, k, m, 1)
    assert found
    for choice in found:
        steps = (k + 64 * choice.step - 1) // (64 * choice.step)
        rows, wide = -(-n // choice.rows), choice.head if choice.narrow else 0
        if choice.narrow:
            assert 0 < wide < rows
            assert choice.tiles == wide * -(-m // choice.tokens) + (rows - wide) * -(-m // choice.narrow)
            # The last round has narrow ones alone.
            rounds = -(-choice.tiles // choice.grid)
            assert wide * -(-m // choice.tokens) <= (rounds - 1) * choice.grid
        else:
            assert choice.tiles == rows * -(-m // choice.tokens)
        assert 1 <= choice.grid <= min(132, choice.tiles * steps)
        boxes = plans.boxes(m, choice.tokens, choice.narrow)
        assert len(boxes) == (4 if choice.narrow else 2)
        for tile, last in zip(boxes[::2], boxes[1::2], strict=True):
            assert 0 < last <= tile <= 256
            assert (m - last) % tile == 0
        assert choice.stages >= 2
        assert choice.shared <= 230400
        if choice.head and not choice.narrow:
            assert choice.tiles < choice.grid <= 2 * choice.tiles
            assert 0 < choice.head < steps
            assert choice.partial_bytes == choice.tiles * choice.rows * choice.tokens * 4
        whole = choice.cluster > 1 or choice.narrow > 0 or choice.tiles % choice.grid == 0
        assert (choice.partial_bytes == 0, choice.counters == 0) == (whole, whole)
        if choice.cluster > 1:
            assert choice.grid == choice.cluster * choice.tiles
            assert choice.cluster <= steps
            assert (choice.rows + 4) * choice.tokens * 4 <= choice.shared - 1024
        sums = choice.tokens // 2
        assert sums + 70 <= {2: 232, 3: 152, 4: 112}[choice.groups]
