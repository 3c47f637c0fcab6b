"""Tiles, stages and blocks of `wide.cu` for a product, by what each would cost.

The estimate counts cycles of a multiprocessor of an H200: its tensor cores', its shared memory's, and those in which
its share of memory's speed brings the weights. It decides between tiles that come out even and tiles that are cut,
whose sums then travel through memory.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from tenpak.cuda.layouts import TILE_COLS

#: (GROUPS, BLOCKS, TOKENS) by the most tokens of a product that would take them: all fit in registers.
SHAPES = (
    (16, ((4, 1, 16), (2, 1, 16))),
    (32, ((4, 1, 32), (3, 1, 32), (2, 1, 32))),
    (64, ((4, 1, 64), (3, 1, 64), (2, 1, 64))),
    (128, ((2, 2, 128), (3, 1, 128), (2, 1, 128))),
    (192, ((2, 1, 192), (2, 2, 128), (3, 1, 128), (2, 1, 128))),
    (1 << 31, ((2, 1, 256), (2, 2, 128), (3, 1, 128), (2, 1, 128))),
)
#: Parameters that two tiles share, or that go beyond tiles: bytes of one tile where they are not half of two.
ONE_TILE = {"int4_g128_fp16": 576, "int4_lut16": 608, "int4_lut32": 608}
MOST_STAGES = 10
#: Bytes a cycle and multiprocessor: of weights from memory, of sums through L2, of shared memory.
MEMORY_SPEED, L2_SPEED, SHARED_SPEED = 18.0, 20.0, 128.0
#: Cycles to begin and end a tile, and to wait for other blocks' sums.
TILE_CYCLES, SHARE_CYCLES = 1500.0, 3000.0
#: What products of at least so many tokens reach of the tensor cores' speed: fewer use an unpacked weight less often.
PRODUCTS = ((256, 0.82), (192, 0.75), (128, 0.66), (0, 0.5))
#: Cycles of each step beside those, and of each strip's step of two tiles: what takes small tiles their time.
STEP_CYCLES, STRIP_CYCLES = 420.0, 80.0


@dataclass(frozen=True)
class Choice:
    """A configuration of `wide.cu`; `grid` blocks that own `tiles` tiles, and estimated `cycles`."""

    groups: int
    blocks: int
    tokens: int
    step: int
    stages: int
    shared: int
    grid: int
    tiles: int
    cycles: float

    @property
    def defines(self) -> dict[str, object]:
        """Macros of wide.cu."""
        return {
            "GROUPS": self.groups,
            "BLOCKS": self.blocks,
            "TOKENS": self.tokens,
            "STEP": self.step,
            "STAGES": self.stages,
        }

    @property
    def rows(self) -> int:
        return 64 * self.groups * self.blocks

    @property
    def partial_bytes(self) -> int:
        """What blocks write of tiles that others finish."""
        return self.grid * self.rows * self.tokens * 4 if self.tiles % self.grid else 0

    @property
    def counters(self) -> int:
        return self.tiles * self.groups

    @property
    def threads(self) -> int:
        return 128 * self.groups + 128


def strip_bytes(layout: str, stage: int, step: int) -> int:
    """Bytes of 16 rows by `step` times 64 columns (STRIP_BYTES of wide.cu); `stage` those of two tiles."""
    return stage if step == 2 else ONE_TILE.get(layout, stage // 2)


def shared_bytes(groups: int, blocks: int, tokens: int, step: int, strip: int) -> tuple[int, int]:
    """Shared memory of a block: what it has anyway, and what each stage adds; `strip` is `strip_bytes`."""
    stage = _up(step * tokens * TILE_COLS * 2 + 4 * groups * blocks * strip, 1024) * 1024
    # To begin at a multiple of 1024, and what y's rows pass through (CHUNKS * CHUNK_BYTES of wide.cu).
    return 1024 + groups * min(tokens, 64) * (64 * 2 + 16), stage


@functools.cache
def choices(
    layout: str, stage: int, multiprocessors: int, shared: int, n: int, k: int, m: int, batch: int
) -> tuple[Choice, ...]:
    """All configurations for a product of `m` tokens, the cheapest first.

    Args:
        layout: The weight's layout.
        stage: Bytes that two tiles of a strip take.
        multiprocessors: The device's.
        shared: Bytes of shared memory that a block may have.
        n, k, m, batch: y [batch, m, n] = x [batch, m, k] Wᵀ.
    """
    shapes = next(shapes for most, shapes in SHAPES if m <= most)
    found = [
        choice
        for shape in shapes
        for choice in _of_shape(shape, layout, stage, multiprocessors, shared, n, k, m, batch)
    ]
    return tuple(sorted(found, key=lambda choice: choice.cycles))


def _of_shape(
    shape: tuple[int, int, int],
    layout: str,
    stage: int,
    multiprocessors: int,
    shared: int,
    n: int,
    k: int,
    m: int,
    batch: int,
) -> list[Choice]:
    groups, blocks, tokens = shape
    step = 2 if tokens <= 64 else 1
    rows, strips = 64 * groups * blocks, 4 * groups * blocks
    strip = strip_bytes(layout, stage, step)
    weights = strips * strip
    fixed, stage_bytes = shared_bytes(groups, blocks, tokens, step, strip)
    stages = min(MOST_STAGES, (shared - fixed) // stage_bytes)
    if stages < 2:
        return []
    token_tiles, steps = _up(m, tokens), _up(_up(k, TILE_COLS), step)
    tiles = batch * _up(n, rows) * token_tiles
    products = step * 2 * (rows // 64) * tokens / next(share for least, share in PRODUCTS if tokens >= least)
    reads = step * ((rows // 64) * tokens + strips * 20) + stage_bytes / SHARED_SPEED
    # Weights of tiles with other tokens come from L2.
    asked = STEP_CYCLES + strips * STRIP_CYCLES * step / 2
    step_cycles = max(products, reads, asked, weights / MEMORY_SPEED / min(token_tiles, 2))
    store_cycles = TILE_CYCLES + rows * tokens * 2 / L2_SPEED

    def choice(grid: int, cycles: float) -> Choice:
        return Choice(groups, blocks, tokens, step, stages, fixed + stages * stage_bytes, grid, tiles, cycles)

    # Whole tiles go round in as many rounds as they need of all multiprocessors, or of fewer where those divide them;
    # cut ones take all multiprocessors, if there is a unit for each.
    rounds = _up(tiles, multiprocessors)
    even, every = _up(tiles, rounds), min(multiprocessors, tiles * steps)
    found = []
    if tiles % even == 0:
        found.append(choice(even, (steps * step_cycles + store_cycles) * rounds))
    if tiles % every:
        sums = SHARE_CYCLES + 2 * rows * tokens * 4 / L2_SPEED
        found.append(choice(every, tiles * steps / every * step_cycles + store_cycles * max(1, rounds - 1) + sums))
    return found


def _up(a: int, b: int) -> int:
    return -(-a // b)
