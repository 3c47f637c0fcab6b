"""Learns the four tables of `int4_lut16` and `int4_lut32` (rust/codec/lut.rs) by Lloyd's algorithm.

    python tests/bench/learn_tables.py [--group 16|32] [--seed N] [--noise X] [--rounds 60] [--blocks 1500]

Training weights are Gaussian ones and the linear layers of gpt2-books and llama-books under TENPAK_REFERENCE
(../shared), in runs of sixteen groups as they lie in rows, each tensor scaled to unit variance so that all count
alike. A round
encodes them with the tables of the round before, as the codec's search does, and moves every entry to the mean of the
weights that took it, weighted by their squared scales; half of the rounds disturb the tables a little first, because
there are many local optima. Prints the tables and their relative squared error, rounded to int8, on runs that were not
trained on. The ones in use were learned for groups of 16: the best of 130 starts, most of them from the best of the
starts before. For groups of 32 they leave an error of 4.71e-3, where what was learned from them left 4.69e-3.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file
from tenpak import _core

REFERENCE = Path(os.environ.get("TENPAK_REFERENCE", Path(__file__).resolve().parents[3] / "shared"))
SHIFTS = (-12, -6, 0, 6, 12)
Array = NDArray[np.float32]


def runs(blocks: int, width: int, random: np.random.Generator) -> Array:
    """[runs, width] of all sources in equal numbers."""
    found = [random.standard_normal((blocks, width), np.float32)]
    for model in ("gpt2-books", "llama-books"):
        tensors = []
        for name, weight in load_file(REFERENCE / "models" / model / "model.safetensors").items():
            if weight.ndim != 2 or not any(part in name for part in ("attn", "mlp")):
                continue
            rows = weight.astype(np.float32).T if "gpt2" in model else weight.astype(np.float32)
            long = np.ascontiguousarray(rows[:, : rows.shape[1] // width * width]).reshape(-1, width)
            tensors.append(long / long.std())
        each = -(-blocks // len(tensors))
        found.append(np.concatenate([t[random.choice(len(t), each, replace=False)] for t in tensors])[:blocks])
    return np.concatenate(found)


def values(table: Array, y: Array) -> Array:
    return table[np.searchsorted((table[1:] + table[:-1]) / 2, y, side="right")]


def sums(table: Array, x: Array, inverse: Array) -> tuple[Array, Array]:
    """Σv·x and Σv² over groups x [groups, group] for the values nearest to x·inverse."""
    v = values(table, x * inverse[:, None])
    return (v * x).sum(1), (v * v).sum(1)


def encode(tables: Array, data: Array) -> tuple[Array, NDArray[np.intp]]:
    """Scale and table of every group of [runs, 16 groups]."""
    x = data.reshape(-1, data.shape[1] // 16)
    largest = np.take_along_axis(x, np.abs(x).argmax(1)[:, None], 1)[:, 0]
    gain, d, curvature = (np.zeros(len(x), np.float32) for _ in range(3))
    for table in tables:
        for sign in (1, -1):
            for shift in SHIFTS:
                vx, vv = sums(table, x, sign * (table[0] + shift) / largest)
                better = vx * vx > gain * vv
                gain, d = np.where(better, vx * vx / vv, gain), np.where(better, vx / vv, d)
                curvature = np.where(better, vv, curvature)
    d, curvature = d.reshape(-1, 16), curvature.reshape(-1, 16)
    supers = np.abs(d).max(1, keepdims=True) / (31.5 - np.arange(17, dtype=np.float32) / 2)
    off = d[:, None] - supers[:, :, None] * np.clip(np.rint(d[:, None] / supers[:, :, None]), -32, 31)
    best = (curvature[:, None] * off * off).sum(2).argmin(1)
    unit = np.repeat(supers[np.arange(len(supers)), best], 16)
    whole = np.clip(np.rint(d.reshape(-1) / unit), -32, 31)
    least, scale, chosen = np.full(len(x), np.inf, np.float32), np.zeros(len(x), np.float32), np.zeros(len(x), np.intp)
    for t, table in enumerate(tables):
        for step in (0, -1, 1):
            tried = np.clip(whole + step, -32, 31) * unit
            vx, vv = sums(table, x, 1 / np.where(tried == 0, np.float32(np.inf), tried))
            error = tried * (tried * vv - 2 * vx)
            better = error < least
            least, scale = np.where(better, error, least), np.where(better, tried, scale)
            chosen = np.where(better, t, chosen)
    return scale, chosen


def rebuilt(tables: Array, data: Array, scale: Array, chosen: NDArray[np.intp]) -> tuple[Array, NDArray[np.intp]]:
    """Weights and codes, [groups, group]."""
    y = data.reshape(len(scale), -1) / np.where(scale == 0, np.float32(np.inf), scale)[:, None]
    codes = np.zeros(y.shape, np.intp)
    for t, table in enumerate(tables):
        here = chosen == t
        codes[here] = np.searchsorted((table[1:] + table[:-1]) / 2, y[here], side="right")
    return scale[:, None] * tables[chosen[:, None], codes], codes


def loss(tables: Array, data: Array) -> float:
    out, _ = rebuilt(tables, data, *encode(tables, data))
    return float(np.square(out.reshape(data.shape) - data).sum() / np.square(data).sum())


def moved(tables: Array, data: Array) -> Array:
    """Every entry at the best value for the weights that take it, each table to its largest magnitude of 127."""
    scale, chosen = encode(tables, data)
    _, codes = rebuilt(tables, data, scale, chosen)
    index = (chosen[:, None] * 16 + codes).reshape(-1)
    s = np.repeat(scale, data.size // len(scale)).astype(np.float64)
    top = np.bincount(index, s * data.reshape(-1), 64).reshape(4, 16)
    bottom = np.bincount(index, s * s, 64).reshape(4, 16)
    out = np.sort(np.where(bottom > 0, top / np.maximum(bottom, 1e-30), tables), axis=1)
    return (out * (127 / np.abs(out).max(1, keepdims=True))).astype(np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--group", type=int, choices=(16, 32), default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--noise", type=float, default=0.0, help="disturbs the tables in use, which are the start")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--blocks", type=int, default=1500, help="runs of sixteen groups from each source")
    args = parser.parse_args()
    random = np.random.default_rng(args.seed)
    train, held_out = (runs(args.blocks, 16 * args.group, r) for r in (random, np.random.default_rng(args.seed + 1)))
    tables = np.array(_core.tables(f"int4_lut{args.group}"), np.float32)
    print(f"in use: {1e3 * loss(tables, held_out):.4f}e-3")
    tables = np.sort(tables + args.noise * random.uniform(-1, 1, (4, 16)).astype(np.float32), axis=1)
    for i in range(args.rounds):
        tables = moved(tables, train)
        shake = args.noise * 0.3 * max(0.0, 1 - 2 * i / args.rounds)
        tables = np.sort(tables + shake * random.uniform(-0.5, 0.5, (4, 16)).astype(np.float32), axis=1)
    tables = np.rint(tables)
    print(f"learned: {1e3 * loss(tables, held_out):.4f}e-3")
    for table in tables.astype(int):
        print(f"    {table.tolist()},")


if __name__ == "__main__":
    main()
