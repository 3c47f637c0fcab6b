"""Tiles, stages and blocks of `wide.cu` for a product, by what each would cost.

The estimate counts cycles of a multiprocessor of an H200: its tensor cores', its shared memory's, and those in which
its share of memory's speed brings the weights. It decides how large tiles are, and between tiles that come out even, of
one size or with fewer tokens in the last round, and tiles that are cut, whose sums then travel through memory or, in
clusters, between multiprocessors.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from tenpak.cuda.layouts import LAYOUTS, TABLES, TILE_COLS, TILE_ROWS

#: (GROUPS, the most TOKENS, STEP) by the most tokens of a product that would take them: all fit in registers. As many
#: tiles as that takes share a product's tokens evenly (`tokens_of_tile`).
SHAPES = (
    (16, ((3, 16, 2), (2, 16, 2))),
    (32, ((4, 32, 2), (3, 32, 2), (2, 32, 2), (4, 32, 4), (3, 32, 4))),
    (64, ((4, 64, 2), (3, 64, 2), (2, 64, 2))),
    (128, ((3, 128, 2), (2, 128, 2))),
    (1 << 31, ((2, 256, 1), (3, 128, 2), (2, 128, 2))),
)
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
MEMORY_SPEED, L2_SPEED, SHARED_SPEED = 22.0, 105.0, 128.0
#: What steps of tiles that are cut take longer, since blocks are at different columns; what more for each MiB that they
#: read in all, up to as many as L2 has; what weights from memory take longer where there are helpers.
CUT, CUT_MIB, L2_MIB, HEAD = 1.03, 0.001, 60.0, 1.08
#: Cycles to begin and end a tile, to wait for other blocks' sums, to hand them over as a helper, and for those of a
#: cluster.
TILE_CYCLES, SHARE_CYCLES, HELPER_CYCLES, CLUSTER_CYCLES = 7000.0, 6000.0, 3450.0, 3000.0
#: Cycles of a tile's products with a warpgroup's rows: for each token, of which tensor cores take two; for each byte of
#: a strip's parameters; for its look-ups.
TOKEN_CYCLES, PARAM_CYCLES, TABLE_CYCLES = 2.36, 0.06, 200.0
#: What three warpgroups, more of whose work overlaps, take of that.
THREE_GROUPS = 0.98
#: Cycles of each step beside those, and of each strip's step of two tiles, by code or in tables: what takes small tiles
#: their time.
STEP_CYCLES, STRIP_CYCLES, TABLE_STRIP_CYCLES = 190.0, 53.0, 180.0


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
        for groups, most, step in shapes
        # Narrow tiles are made for those of the most.
        for tokens in sorted({tokens_of_tile(m, most), *((most,) if most == NARROW_OF else ())})
        for choice in _of_shape((groups, tokens, step), layout, stage, multiprocessors, shared, n, k, m, batch)
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
    groups, tokens, step = shape
    rows, strips = 64 * groups, 4 * groups
    strip = strip_bytes(layout, stage, step)
    weights = strips * strip
    fixed, stage_bytes = shared_bytes(groups, tokens, step, strip)
    stages = min(MOST_STAGES, (shared - fixed) // stage_bytes)
    if stages < (3 if step == 4 else 2):
        return []
    token_tiles, steps = _up(m, tokens), _up(_up(k, TILE_COLS), step)
    # As many as fit, in bands as large as each other.
    bands = _up(token_tiles, max(1, BAND_BYTES // (2 * k * tokens)))
    band = _up(token_tiles, bands)
    tiles = batch * _up(n, rows) * token_tiles
    # Weights of tiles with other tokens come from L2.
    memory = weights / MEMORY_SPEED / min(token_tiles, 2)
    codes = TILE_ROWS * TILE_COLS * (8 if LAYOUTS[layout].code_bits == 8 else 4) // 8
    unpack = PARAM_CYCLES * (stage // 2 - codes) + TABLE_CYCLES * (layout in TABLES)

    def cycles_of(tokens: int) -> tuple[float, float]:
        """Of a step, and of a tile's end, with so many tokens."""
        products = step * groups * (TOKEN_CYCLES * tokens + unpack) * (THREE_GROUPS if groups == 3 else 1.0)
        reads = step * (groups * tokens + strips * 8) + shared_bytes(groups, tokens, step, strip)[1] / SHARED_SPEED
        asked = STEP_CYCLES + strips * (TABLE_STRIP_CYCLES if layout in TABLES else STRIP_CYCLES) * step / 2
        # The first step's weights have nothing to hide behind.
        return max(products, reads, asked, memory), TILE_CYCLES + rows * tokens * 2 / L2_SPEED + weights / MEMORY_SPEED

    step_cycles, store_cycles = cycles_of(tokens)
    sum_cycles = rows * tokens * 4 / L2_SPEED

    def choice(
        grid: int, cycles: float, head: int = 0, cluster: int = 1, tiles: int = tiles, narrow: int = 0
    ) -> Choice:
        shared_now = fixed + stages * stage_bytes
        return Choice(groups, tokens, step, stages, shared_now, grid, tiles, cycles, head, cluster, band, narrow)

    # Whole tiles go round in as many rounds as they need of all multiprocessors, or of fewer where those divide them;
    # cut ones take all multiprocessors, if there is a unit for each.
    rounds = _up(tiles, multiprocessors)
    even, every = _up(tiles, rounds), min(multiprocessors, tiles * steps)
    found = []
    if tiles % even == 0:
        found.append(choice(even, (steps * step_cycles + store_cycles) * rounds))
    if tiles % every:
        others = max(1, _up(every, tiles) - 1)
        sums = SHARE_CYCLES + (1 + others) * sum_cycles
        # Schedule of wide.cu: whole tiles go round after those that are cut.
        cut_tiles = tiles if tiles < every else tiles % every + every
        lines = _up(n, rows)
        bands_cut = _up(cut_tiles, lines * band)
        read = min(lines, _up(cut_tiles, band)) * weights * steps + 2 * k * tokens * min(token_tiles, band * bands_cut)
        # Where each tile is that of as many blocks, no block has parts of two.
        slower = (CUT if every % tiles else 1.0) + CUT_MIB * min(read / 2**20, L2_MIB)
        share = _up(cut_tiles * steps, every) * step_cycles * slower + store_cycles * (1 if tiles < every else 2)
        whole = (tiles - cut_tiles) // every * (steps * step_cycles + store_cycles)
        found.append(choice(every, share + whole + sums))
    # As many rows of tiles as fit before the last round; the others' tiles are as narrow as that round has room for.
    wide_rows = (rounds - 1) * multiprocessors // token_tiles
    if tokens == NARROW_OF and wide_rows and batch == 1:
        for narrow in NARROW:
            all_tiles = wide_rows * token_tiles + (_up(n, rows) - wide_rows) * _up(m, narrow)
            if all_tiles <= rounds * multiprocessors:
                last_step, last_store = cycles_of(narrow)
                cycles = (steps * step_cycles + store_cycles) * (rounds - 1) + steps * last_step + last_store
                found.append(choice(multiprocessors, cycles, wide_rows, tiles=all_tiles, narrow=narrow))
                break
    helpers = min(multiprocessors - tiles, tiles)
    if helpers > 0:
        # A helper does what is left of `each` tiles while their own blocks do their heads; storing sums takes it time.
        each = _up(tiles, helpers)
        helpers = _up(tiles, each)
        stored = (HELPER_CYCLES + sum_cycles) / step_cycles
        head = round(each * (steps + stored) / (each + 1))
        if 0 < head < steps:
            cycles = head * max(step_cycles, HEAD * memory) + SHARE_CYCLES + sum_cycles + store_cycles
            found.append(choice(tiles + helpers, cycles, head=head))
    # In shared memory a token's sums are longer by four (EXCHANGE_ROW of wide.cu).
    fits = (rows + 4) * tokens * 4 <= stages * stage_bytes
    for cluster, part in CLUSTERS.items():
        if cluster * tiles <= part * multiprocessors and steps >= cluster and fits:
            cycles = _up(steps, cluster) * step_cycles + CLUSTER_CYCLES + store_cycles
            found.append(choice(cluster * tiles, cycles, cluster=cluster))
    return found


def _up(a: int, b: int) -> int:
    return -(-a // b)
