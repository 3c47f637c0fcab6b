"""Tiles, stages and blocks of `wide.cu` for a product, by what each would cost.

The estimate counts cycles of a multiprocessor of an H200: its tensor cores', its shared memory's, and those in which
its share of memory's speed brings the weights. It decides how large tiles are, and between tiles that come out even, of
one size or with fewer tokens in the last round, and tiles that are cut, whose sums then travel through memory or, in
clusters, between multiprocessors.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from tenpak.cuda.layouts import LAYOUTS, TABLES, TILE_COLS, TILE_ROWS

#: (GROUPS, the fewest and the most TOKENS, STEP) by the most tokens of a product that would take them: all fit in
#: registers. However many tiles that makes share a product's tokens evenly (`tokens_of_tile`).
SHAPES = (
    (16, ((3, 16, 16, 2), (2, 16, 16, 2))),
    (32, ((4, 32, 32, 2), (3, 32, 32, 2), (2, 32, 32, 2), (4, 32, 32, 4), (3, 32, 32, 4))),
    (64, ((4, 64, 64, 2), (3, 64, 64, 2), (2, 64, 64, 2))),
    (128, ((3, 128, 128, 2), (2, 128, 128, 2))),
    (1 << 31, ((2, 144, 256, 1), (3, 96, 128, 2), (2, 96, 128, 2))),
)
#: Tokens of experts' tiles, by the most that an expert has on average.
OF_EXPERTS = ((10, 16), (24, 32), (48, 64), (400, 96), (1 << 31, 128))
#: Tokens of tiles in a last round that is not full (-DNARROW), where others have so many.
NARROW_OF = 256
NARROW = (64, 96, 128, 160, 176, 192, 208, 224)
#: Parameters that tiles share: bytes of one tile, and of four, where they are not half of two, and twice as many.
ONE_TILE = {"int4_g128_fp16": 576, "int4_lut16": 608, "int4_lut32": 608}
FOUR_TILES = {"int4_lut16": 2336, "int4_lut32": 2336}
MOST_STAGES = 10
#: The part of the multiprocessors that clusters of so many blocks have at a time: some of each sixteen to eighteen
#: are left over.
CLUSTERS = {2: 1.0, 3: 0.88, 4: 0.9}
#: Bytes of tokens of a band of tiles: a third of what L2 holds.
BAND_BYTES = 17 << 20
#: Bytes a cycle and multiprocessor: of weights from memory, of sums through L2, of shared memory.
MEMORY_SPEED, L2_SPEED, SHARED_SPEED = 22.0, 65.0, 128.0
#: What steps of tiles that are cut take longer, since blocks are at different columns; what more for each MiB that they
#: read in all, up to as many as L2 has; what weights from memory take longer where there are helpers.
CUT, CUT_MIB, L2_MIB, HEAD = 1.04, 0.0011, 44.0, 1.07
#: Cycles to begin and end a tile, to wait for other blocks' sums, to hand them over as a helper, and for those of a
#: cluster.
TILE_CYCLES, SHARE_CYCLES, HELPER_CYCLES, CLUSTER_CYCLES = 4500.0, 5700.0, 3450.0, 3700.0
#: Cycles of a tile's products with a warpgroup's rows: for each token, of which tensor cores take two; for each byte of
#: a strip's parameters; for its look-ups.
TOKEN_CYCLES, PARAM_CYCLES, TABLE_CYCLES = 2.13, 0.22, 210.0
#: What three warpgroups, more of whose work overlaps, take of that.
THREE_GROUPS = 0.965
#: Cycles of each step beside those, and of each strip's step of two tiles, by code or in tables: what takes small tiles
#: their time.
STEP_CYCLES, STRIP_CYCLES, TABLE_STRIP_CYCLES = 230.0, 46.0, 175.0


@dataclass(frozen=True)
class Choice:
    """A configuration of `wide.cu`; `grid` blocks that own `tiles` tiles, and estimated `cycles`."""

    groups: int
    tokens: int
    step: int
    stages: int
    shared: int
    grid: int
    tiles: int
    cycles: float
    #: Units of a tile that its own block does, if others help; rows of tiles before narrow ones, if there are; or 0.
    head: int = 0
    cluster: int = 1
    #: Tiles of tokens that go round together.
    band: int = 1
    #: Tokens of the last rows' tiles, or 0.
    narrow: int = 0

    @property
    def defines(self) -> dict[str, object]:
        """Macros of wide.cu."""
        values: dict[str, object] = {
            "GROUPS": self.groups,
            "TOKENS": self.tokens,
            "STEP": self.step,
            "STAGES": self.stages,
        }
        more = {"CLUSTER": self.cluster if self.cluster > 1 else 0, "NARROW": self.narrow}
        return {**values, **{name: value for name, value in more.items() if value}}

    @property
    def rows(self) -> int:
        return 64 * self.groups

    @property
    def partial_bytes(self) -> int:
        """What blocks write of tiles that others finish."""
        if self.cluster > 1 or self.narrow:
            return 0
        cut = self.tiles if self.head else self.grid if self.tiles % self.grid else 0
        return cut * self.rows * self.tokens * 4

    @property
    def counters(self) -> int:
        """Where blocks say that they have written those; captured graphs of PyTorch make them zero at each replay."""
        return self.tiles * self.groups if self.partial_bytes else 0

    @property
    def threads(self) -> int:
        return 128 * self.groups + 128


def tokens_of_tile(m: int, most: int) -> int:
    """Tokens of the tiles of `m`, a multiple of 16: as few as as many tiles need."""
    return 16 * _up(_up(m, _up(m, most)), 16)


def sizes_of_tiles(m: int, fewest: int, most: int) -> set[int]:
    """Tokens of as few tiles of `m` as there may be, and of more that have `fewest` at least."""
    return {size for size in (tokens_of_tile(m, most), *range(fewest, most, 16)) if size == tokens_of_tile(m, size)}


def tokens_of_experts(m: int, batch: int) -> int:
    """Tokens of the tiles of `batch` experts that have `m` in all."""
    return next(tokens for most, tokens in OF_EXPERTS if m <= most * batch)


def boxes(m: int, tokens: int, narrow: int = 0) -> tuple[int, ...]:
    """Tokens of boxes of x (Maps of wide.cu): of a tile and of the last of `m` tokens; and the same of narrow tiles."""
    return tuple(rows for most in (tokens, narrow) if most for rows in (most, (m - 1) % most + 1))


def strip_bytes(layout: str, stage: int, step: int) -> int:
    """Bytes of 16 rows by `step` times 64 columns (STRIP_BYTES of wide.cu); `stage` those of two tiles."""
    if step == 2:
        return stage
    return ONE_TILE.get(layout, stage // 2) if step == 1 else FOUR_TILES.get(layout, 2 * stage)


def shared_bytes(groups: int, tokens: int, step: int, strip: int) -> tuple[int, int]:
    """Shared memory of a block: what it has anyway, and what each stage adds; `strip` is `strip_bytes`."""
    stage = _up(step * tokens * TILE_COLS * 2 + 4 * groups * strip, 1024) * 1024
    # To begin at a multiple of 1024, and what y's rows pass through (CHUNKS * CHUNK_BYTES of wide.cu).
    return 1024 + groups * (tokens if tokens <= 32 else 64) * (64 * 2 + 16), stage


@functools.lru_cache(maxsize=256)
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
        for groups, fewest, most, step in shapes
        # Narrow tiles are made for those of the most.
        for tokens in sorted({*sizes_of_tiles(m, fewest, most), *({most} & {NARROW_OF})})
        for choice in _Tiles(groups, tokens, step, layout, stage, multiprocessors, shared, n, k, m, batch).forms()
    ]
    return tuple(sorted(found, key=lambda choice: choice.cycles))


def choice_of_experts(
    layout: str, stage: int, multiprocessors: int, shared: int, n: int, k: int, m: int, batch: int
) -> Choice:
    """The configuration for `m` tokens of `batch` experts in all, which take them at random; as for `choices`."""
    tokens = tokens_of_experts(m, batch)
    every = [
        _Tiles(groups, tokens, 2, layout, stage, multiprocessors, shared, n, k, _up(m, batch), batch)
        for groups in ((4, 3, 2) if tokens <= 64 else (3, 2))
    ]
    return min((tiles.of_experts(m / batch) for tiles in every if tiles.fit), key=lambda choice: choice.cycles)


class _Tiles:
    """Tiles of one size for a product, and what they would cost in every form that wide.cu has for them."""

    def __init__(
        self,
        groups: int,
        tokens: int,
        step: int,
        layout: str,
        stage: int,
        multiprocessors: int,
        shared: int,
        n: int,
        k: int,
        m: int,
        batch: int,
    ) -> None:
        self.groups, self.tokens, self.step = groups, tokens, step
        self.multiprocessors, self.k, self.m, self.batch = multiprocessors, k, m, batch
        self.rows, self.strips = 64 * groups, 4 * groups
        self.strip = strip_bytes(layout, stage, step)
        fixed, self.stage_bytes = shared_bytes(groups, tokens, step, self.strip)
        self.stages = min(MOST_STAGES, (shared - fixed) // self.stage_bytes)
        self.shared = fixed + self.stages * self.stage_bytes
        self.lines, self.token_tiles = _up(n, self.rows), _up(m, tokens)
        self.count = batch * self.lines * self.token_tiles
        self.steps = _up(_up(k, TILE_COLS), step)
        # As many as fit, in bands as large as each other.
        self.band = _up(self.token_tiles, _up(self.token_tiles, max(1, BAND_BYTES // (2 * k * tokens))))
        self.rounds = _up(self.count, multiprocessors)

        self.weights = self.strips * self.strip
        # Weights of tiles with other tokens come from L2.
        self.memory = self.weights / MEMORY_SPEED / min(self.token_tiles, 2)
        codes = TILE_ROWS * TILE_COLS * (8 if LAYOUTS[layout].code_bits == 8 else 4) // 8
        self.unpack = PARAM_CYCLES * (stage // 2 - codes) + TABLE_CYCLES * (layout in TABLES)
        self.asked = STEP_CYCLES + self.strips * (TABLE_STRIP_CYCLES if layout in TABLES else STRIP_CYCLES) * step / 2
        self.step_cycles, self.end_cycles = self._cycles(tokens, self.stage_bytes)
        self.tile_cycles = self.steps * self.step_cycles + self.end_cycles
        self.sum_cycles = self.rows * tokens * 4 / L2_SPEED

    @property
    def fit(self) -> bool:
        """Whether shared memory is large enough."""
        return self.stages >= (3 if self.step == 4 else 2)

    def forms(self) -> list[Choice]:
        """Those that there are, if they fit."""
        if not self.fit:
            return []
        found = [self._whole(), self._cut(), self._narrow(), self._helped(), *map(self._clusters, CLUSTERS)]
        return [choice for choice in found if choice is not None]

    def of_experts(self, mean: float) -> Choice:
        """Whole or cut, for `mean` tokens of an expert: half of the last tile of each that has any is empty."""
        count = self.batch * (1 - math.exp(-mean)) * self.lines * max(1.0, mean / self.tokens + 0.5)
        cycles = self.tile_cycles * max(count / self.multiprocessors, 1 / self.steps)
        return self._choice(self.multiprocessors, cycles, band=1)

    def _cycles(self, tokens: int, stage_bytes: int) -> tuple[float, float]:
        """Of a step, and to begin and end a tile, with so many tokens."""
        products = self.step * self.groups * (TOKEN_CYCLES * tokens + self.unpack)
        if self.groups == 3:
            products *= THREE_GROUPS
        reads = self.step * (self.groups * tokens + self.strips * 8) + stage_bytes / SHARED_SPEED
        # The first step's weights have nothing to hide behind.
        end = TILE_CYCLES + self.rows * tokens * 2 / L2_SPEED + self.weights / MEMORY_SPEED
        return max(products, reads, self.asked, self.memory), end

    def _choice(self, grid: int, cycles: float, **more: int) -> Choice:
        about = {"tiles": self.count, "band": self.band, **more}
        return Choice(self.groups, self.tokens, self.step, self.stages, self.shared, grid, cycles=cycles, **about)

    def _whole(self) -> Choice | None:
        """In as many rounds as they need of all multiprocessors, or of fewer where those divide them."""
        even = _up(self.count, self.rounds)
        if self.count % even:
            return None
        return self._choice(even, self.tile_cycles * self.rounds)

    def _cut(self) -> Choice | None:
        """By all multiprocessors, if there is a unit for each; whole tiles go round after those that are cut."""
        blocks = min(self.multiprocessors, self.count * self.steps)
        if self.count % blocks == 0:
            return None
        cut = self.count if self.count < blocks else self.count % blocks + blocks
        read = min(self.lines, _up(cut, self.band)) * self.weights * self.steps
        read += 2 * self.k * self.tokens * min(self.token_tiles, self.band * _up(cut, self.lines * self.band))
        # Where each tile is that of as many blocks, no block has parts of two.
        slower = (CUT if blocks % self.count else 1.0) + CUT_MIB * min(read / 2**20, L2_MIB)
        cycles = _up(cut * self.steps, blocks) * self.step_cycles * slower
        cycles += self.end_cycles * (1 if self.count < blocks else 2)
        cycles += SHARE_CYCLES + (1 + max(1, _up(blocks, self.count) - 1)) * self.sum_cycles
        cycles += (self.count - cut) // blocks * self.tile_cycles
        return self._choice(blocks, cycles)

    def _narrow(self) -> Choice | None:
        """As many rows of tiles as fit before the last round; the others' are as narrow as that round has room for."""
        before = (self.rounds - 1) * self.multiprocessors // self.token_tiles
        if self.tokens != NARROW_OF or not before or self.batch > 1:
            return None
        for narrow in NARROW:
            count = before * self.token_tiles + (self.lines - before) * _up(self.m, narrow)
            if count <= self.rounds * self.multiprocessors:
                stage_bytes = shared_bytes(self.groups, narrow, self.step, self.strip)[1]
                step, end = self._cycles(narrow, stage_bytes)
                cycles = self.tile_cycles * (self.rounds - 1) + self.steps * step + end
                return self._choice(self.multiprocessors, cycles, tiles=count, head=before, narrow=narrow)
        return None

    def _helped(self) -> Choice | None:
        """Helpers do what is left of some tiles each while their own blocks do their heads; storing sums takes time."""
        helpers = min(self.multiprocessors - self.count, self.count)
        if helpers <= 0:
            return None
        each = _up(self.count, helpers)
        stored = (HELPER_CYCLES + self.sum_cycles) / self.step_cycles
        head = round(each * (self.steps + stored) / (each + 1))
        if not 0 < head < self.steps:
            return None
        cycles = head * max(self.step_cycles, HEAD * self.memory) + SHARE_CYCLES + self.sum_cycles + self.end_cycles
        return self._choice(self.count + _up(self.count, each), cycles, head=head)

    def _clusters(self, cluster: int) -> Choice | None:
        """The blocks of a cluster share a tile's columns."""
        # In shared memory a token's sums are longer by four (EXCHANGE_ROW of wide.cu).
        fits = (self.rows + 4) * self.tokens * 4 <= self.stages * self.stage_bytes
        blocks = cluster * self.count
        if blocks > CLUSTERS[cluster] * self.multiprocessors or self.steps < cluster or not fits:
            return None
        cycles = _up(self.steps, cluster) * self.step_cycles + CLUSTER_CYCLES + self.end_cycles
        return self._choice(blocks, cycles, cluster=cluster)


def _up(a: int, b: int) -> int:
    return -(-a // b)
