"""File to file: a 124M-parameter GPT-2-shaped FP16 model, and a 4 GB sharded one with its peak memory.

    python tests/bench/bench_files.py [--large-gb 4] [--keep FOLDER]

Weights are Gaussian; files lie in the folder that TMPDIR names. Peak memory is the largest anonymous resident
size (RssAnon in /proc) of the `tenpak compress` process, sampled every 5 ms: pages of a mapped input are the
system's cache, not the process's memory.
"""

from __future__ import annotations

import argparse
import json
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from harness import machine, report


def write_safetensors(path: Path, tensors: dict[str, tuple[int, ...]], seed: int) -> None:
    """Writes FP16 Gaussian tensors, one at a time."""
    header, offset = {}, 0
    for name, shape in tensors.items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    rng = np.random.default_rng(seed)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for shape in tensors.values():
            file.write((rng.standard_normal(shape, dtype=np.float32) * 0.02).astype(np.float16).tobytes())


def gpt2(layers: int = 12, width: int = 768, vocabulary: int = 50257) -> dict[str, tuple[int, ...]]:
    """The shapes of GPT-2 small: 124M weights, `Conv1D` stored as [in, out]."""
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (vocabulary, width), "wpe.weight": (1024, width)}
    for i in range(layers):
        for name, out, inner in [
            ("attn.c_attn", 3 * width, width),
            ("attn.c_proj", width, width),
            ("mlp.c_fc", 4 * width, width),
            ("mlp.c_proj", width, 4 * width),
        ]:
            shapes[f"h.{i}.{name}.weight"] = (inner, out)
            shapes[f"h.{i}.{name}.bias"] = (out,)
        for name in ("ln_1", "ln_2"):
            shapes[f"h.{i}.{name}.weight"] = shapes[f"h.{i}.{name}.bias"] = (width,)
    return shapes | {"ln_f.weight": (width,), "ln_f.bias": (width,)}


def compress(source: Path, target: Path, codec: str) -> tuple[float, int, dict]:
    """Runs the console script; returns seconds, peak anonymous bytes and its report."""
    command = [sys.executable, "-m", "tenpak", "compress", "--input", source, "--output", target]
    start = time.perf_counter()
    process = subprocess.Popen(
        [*map(str, command), "--codec", codec, "--force", "--json", "--quiet"], stdout=subprocess.PIPE, text=True
    )
    peak = 0
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        try:
            for line in status.read_text().splitlines():
                if line.startswith("RssAnon:"):
                    peak = max(peak, int(line.split()[1]) * 1024)
        except OSError:
            pass
        time.sleep(0.005)
    seconds = time.perf_counter() - start
    assert process.returncode == 0, "tenpak compress failed"
    return seconds, peak, json.load(process.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large-gb", type=float, default=4.0, help="size of the sharded model; 0 leaves it out")
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    rows, notes = [], []
    with tempfile.TemporaryDirectory() as folder:
        small = Path(folder) / "gpt2"
        small.mkdir()
        (small / "config.json").write_text('{"model_type":"gpt2"}')
        write_safetensors(small / "model.safetensors", gpt2(), 1)
        for codec in ("int4_opt_v1", "int4_lut16_v1"):
            runs = [compress(small, Path(folder) / "gpt2.tenpak", codec) for _ in range(args.runs)]
            runs.sort(key=lambda run: run[0])
            seconds, peak, result = runs[len(runs) // 2]
            rows.append(
                {
                    "model": "GPT-2 124M FP16",
                    "codec": codec,
                    "command s": seconds,
                    "compress s": result["seconds"],
                    "fastest s": runs[0][2]["seconds"],
                    "peak anonymous MB": peak / 1e6,
                }
            )
        if args.large_gb:
            large = Path(folder) / "large"
            large.mkdir()
            width = 4096
            layer = {"up.weight": (4 * width, width), "down.weight": (width, 4 * width)}
            layers = max(1, round(args.large_gb * 1e9 / (2 * 8 * width * width)))
            weight_map = {}
            for i in range(layers):
                shard = f"model-{i + 1:05}-of-{layers:05}.safetensors"
                tensors = {f"layers.{i}.{name}": shape for name, shape in layer.items()}
                write_safetensors(large / shard, tensors, i)
                weight_map |= dict.fromkeys(tensors, shard)
            (large / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
            seconds, peak, result = compress(large, Path(folder) / "large.tenpak", "int4_opt_v1")
            bound = 4 * 4 * width * width + 200e6
            rows.append(
                {
                    "model": f"{args.large_gb:g} GB in {layers} shards",
                    "codec": "int4_opt_v1",
                    "command s": seconds,
                    "compress s": result["seconds"],
                    "peak anonymous MB": peak / 1e6,
                }
            )
            notes.append(f"bound on memory: the largest tensor in FP32 and 200 MB, {bound / 1e6:.0f} MB")
    report("files", machine("tenpak", "numpy"), rows, notes)


if __name__ == "__main__":
    main()
