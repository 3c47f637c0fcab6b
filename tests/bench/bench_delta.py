"""Deltas of three fine-tunes: size and speed beside zstd and ZipNN, and what modes codes and bit1 lose.

    pip install zipnn zstandard
    python tests/bench/fine_tunes.py --base MODEL_FOLDER --text TRAINING_TEXT --output FOLDER
    python tests/bench/bench_delta.py --models FOLDER --text HELD_OUT_TEXT [--windows 24]

Files lie in the folder that TMPDIR names. `CPU GB/s` is the fine-tune's bytes over the processor time of all threads,
which other programs on the machine disturb less than the clock's; `--realtime` (root on Linux) keeps them away while
speeds are measured. `tiled` is the full fine-tune sixteen times over, 1 GB, in which to start counts for less. zstd and
ZipNN work on bytes in memory, without digests and files; ZipNN is given the base (`delta_second_data`) and as many
threads.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import tenpak
import zstandard
from harness import machine, report
from zipnn import ZipNN

CODEC = "int4_g16_v1"
TILES = 16


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    """The tensors of one safetensors file, as unsigned integers of 16 bits."""
    data = (folder / "model.safetensors").read_bytes()
    head = int.from_bytes(data[:8], "little")
    index = json.loads(data[8 : 8 + head])
    index.pop("__metadata__", None)
    places = {name: t["data_offsets"] for name, t in index.items()}
    return {name: np.frombuffer(data, np.uint16, (b - a) // 2, 8 + head + a) for name, (a, b) in places.items()}


def timed(call: Callable[[], object], runs: int) -> tuple[float, float]:
    """The least seconds of several calls, and the least processor seconds."""
    call()
    seconds, processor = [], []
    for _ in range(runs):
        clock, used = time.perf_counter(), time.process_time()
        call()
        seconds.append(time.perf_counter() - clock)
        processor.append(time.process_time() - used)
    return min(seconds), min(processor)


@contextmanager
def alone(realtime: bool) -> Iterator[None]:
    """Real-time priority for what is measured, if it is asked for."""
    if realtime:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    yield
    if realtime:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def tile(models: Path, folder: Path) -> None:
    """`base` and `full` sixteen times over; elements are rotated, so that no two tensors are equal."""
    for name in ("base", "full"):
        tensors = tensors_of(models / name)
        made = {f"{i}.{key}": np.roll(t, 1001 * i) for i in range(TILES) for key, t in tensors.items()}
        index, end = {}, 0
        for key, t in made.items():
            index[key] = {"dtype": "BF16", "shape": [t.size], "data_offsets": [end, end + t.nbytes]}
            end += t.nbytes
        head = json.dumps(index).encode()
        (folder / name).mkdir()
        with (folder / name / "model.safetensors").open("wb") as file:
            file.write(len(head).to_bytes(8, "little") + head)
            file.writelines(t.tobytes() for t in made.values())
        (folder / name / "config.json").write_text("{}")


def exact(models: Path, name: str, folder: Path, runs: int, threads: int, shown: str = "") -> list[dict[str, Any]]:
    """One fine-tune: Tenpak, zstd on the XOR of every tensor, ZipNN."""
    base, tuned = models / "base", models / name
    before, after = tensors_of(base), tensors_of(tuned)
    size = sum(t.nbytes for t in after.values())
    rows = []

    def row(what: str, stored: int, make: Callable[[], object], back: Callable[[], object]) -> None:
        (made, made_cpu), (restored, restored_cpu) = timed(make, runs), timed(back, runs)
        speeds = [size / 1e9 / max(s, 1e-9) for s in (made, restored, made_cpu, restored_cpu)]
        keys = ["make GB/s", "restore GB/s", "make CPU GB/s", "restore CPU GB/s"]
        rows.append(
            {"fine-tune": shown or name, "what": what, "of BF16": stored / size} | dict(zip(keys, speeds, strict=True))
        )

    delta, out = folder / f"{name}.tenpak", folder / f"{name}.safetensors"

    def make() -> int:
        return tenpak.delta(base, tuned, delta, threads=threads, force=True).file_bytes

    def back() -> object:
        return tenpak.materialize(base, delta, out, threads=threads, force=True)

    stored = make()
    back()
    restored = tensors_of_file(out)
    assert all(np.array_equal(restored[key], after[key]) for key in after)
    row("tenpak exact", stored, make, back)
    for level in () if shown else (1, 3):
        xor = [(after[key] ^ before[key]).tobytes() for key in after]
        packed = [zstandard.ZstdCompressor(level).compress(data) for data in xor]
        row(
            f"zstd -{level} of the XOR",
            sum(map(len, packed)),
            lambda xor=xor, level=level: [zstandard.ZstdCompressor(level).compress(data) for data in xor],
            lambda packed=packed: [zstandard.ZstdDecompressor().decompress(data) for data in packed],
        )
    one, two = (b"".join(t.tobytes() for t in tensors.values()) for tensors in (before, after))
    zipnn = ZipNN(input_format="byte", bytearray_dtype="bfloat16", delta_compressed_type="byte", threads=threads)
    packed = zipnn.compress(two, delta_second_data=one)
    assert bytes(zipnn.decompress(packed, delta_second_data=one)) == two
    row(
        "ZipNN delta",
        len(packed),
        lambda: zipnn.compress(two, delta_second_data=one),
        lambda: zipnn.decompress(packed, delta_second_data=one),
    )
    return rows


def tensors_of_file(path: Path) -> dict[str, np.ndarray]:
    link = path.parent / "model.safetensors"
    link.unlink(missing_ok=True)
    os.link(path, link)
    return tensors_of(path.parent)


def lossy(models: Path, text: Path, windows: int, folder: Path) -> list[dict[str, Any]]:
    """Modes codes and bit1 of the full fine-tune, with perplexities."""

    def perplexity(model: Path) -> float:
        return tenpak.evaluate(str(model), text, windows=windows).perplexity.value

    base, tuned = models / "base", models / "full"
    quantised, fresh = folder / "base.tenpak", folder / "fresh.tenpak"
    for source, target in ((base, quantised), (tuned, fresh)):
        tenpak.compress(source, target, CODEC, embeddings=CODEC, force=True)
    rows: list[dict[str, Any]] = [
        {"what": "base, BF16", "perplexity": perplexity(base)},
        {"what": "fine-tune, BF16", "perplexity": perplexity(tuned)},
        {"what": f"fine-tune as {CODEC}", "perplexity": perplexity(fresh)},
    ]
    afresh = rows[-1]["perplexity"]
    codes = tenpak.delta(quantised, tuned, folder / "codes.tenpak", "codes", force=True)
    tenpak.materialize(quantised, folder / "codes.tenpak", folder / "codes-back.tenpak", force=True)
    found = perplexity(folder / "codes-back.tenpak")
    rows.append(
        {
            "what": "delta, mode codes",
            "bits/weight": codes.bits_per_weight,
            "of BF16": codes.ratio,
            "perplexity": found,
            "% from afresh": 100 * (found / afresh - 1),
            "s": codes.seconds,
        }
    )
    bit1 = tenpak.delta(base, tuned, folder / "bit1.tenpak", "bit1", force=True)
    tenpak.materialize(base, folder / "bit1.tenpak", folder / "bit1-back", force=True)
    rows.append(
        {
            "what": "delta, mode bit1",
            "bits/weight": bit1.bits_per_weight,
            "of BF16": bit1.ratio,
            "perplexity": perplexity(folder / "bit1-back"),
            "change lost": bit1.change_lost,
            "s": bit1.seconds,
        }
    )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--realtime", action="store_true")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        with alone(options.realtime):
            for name in ("full", "lora", "five"):
                rows += exact(options.models, name, Path(folder), options.runs, options.threads)
        tile(options.models, Path(folder))
        with alone(options.realtime):
            rows += exact(Path(folder), "full", Path(folder), min(options.runs, 3), options.threads, "tiled")
        rows += lossy(options.models, options.text, options.windows, Path(folder))
    notes = [f"{options.threads} threads, best of {options.runs} runs; perplexity over {options.windows} windows."]
    if options.realtime:
        notes.append("Speeds were measured with real-time priority, for other programs shared the machine.")
    report("delta", machine("zipnn", "zstandard", "numpy"), rows, notes)


if __name__ == "__main__":
    main()
