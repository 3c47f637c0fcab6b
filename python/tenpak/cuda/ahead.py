"""Machine code of the kernels ahead of time, for machines that shall not compile: `python -m tenpak.cuda.ahead`.

    make -C cuda CAPABILITY=90 OUTPUT=/opt/tenpak-cubins          # what common models need, with nvcc
    TENPAK_CUBIN_DIR=/opt/tenpak-cubins tenpak generate …          # takes it; compiles only what is not there

With nvcc where one is installed, else with NVRTC. Which kernels a product needs depends on its shape and on the GPU:
shapes are those of common models, or of the models that are named; GPUs those in `DEVICES`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tenpak.artifact import KEEP
from tenpak.codecs import codecs
from tenpak.codecs import find as codec_named
from tenpak.cuda import compile as kernels
from tenpak.cuda import layouts
from tenpak.cuda.plans import (
    ACTIVATIONS,
    FEW,
    HEAD_DIMS,
    NORMS,
    RESERVED,
    ROWS_FROM,
    ROWS_FROM_LARGE,
    Device,
    Fused,
    cache_defines,
    choose,
    choose_attention,
    dense_from,
    norm_defines,
    sample_defines,
)
from tenpak.decoder import Config
from tenpak.decoder.kv import BITS
from tenpak.decoder.source import ArtifactSource
from tenpak.errors import TenpakError, UsageError

#: By compute capability, GPUs as (multiprocessors, KiB of shared memory: of a block, of a multiprocessor).
DEVICES: dict[str, tuple[tuple[int, int, int], ...]] = {
    "80": ((108, 163, 164),),  # A100
    "86": ((84, 99, 100), (82, 99, 100), (68, 99, 100)),  # A40 and A6000, RTX 3090, RTX 3080
    "89": ((142, 99, 100), (128, 99, 100), (58, 99, 100)),  # L40, RTX 4090, L4
    "90": ((132, 227, 228), (114, 227, 228)),  # H100 SXM, H200 and GH200; H100 PCIe
    "100": ((148, 227, 228),),  # B200
    "120": ((188, 99, 100), (170, 99, 100)),  # RTX PRO 6000, RTX 5090
}

#: Inputs and outputs of the layers of common models of 1 to 70 billion weights.
SHAPES = (
    (4096, 4096),
    (12288, 4096),
    (6144, 4096),
    (22016, 4096),
    (28672, 4096),
    (11008, 4096),
    (14336, 4096),
    (4096, 11008),
    (4096, 14336),
    (2048, 2048),
    (16384, 2048),
    (2048, 8192),
    (5120, 5120),
    (27648, 5120),
    (5120, 13824),
    (8192, 8192),
    (10240, 8192),
    (57344, 8192),
    (28672, 8192),
    (8192, 28672),
    (32000, 4096),
    (128256, 4096),
    (128256, 8192),
)

#: A source and its macros.
Build = tuple[str, tuple[tuple[str, object], ...]]


def device(multiprocessors: int, block_kib: int, all_kib: int, capability: str) -> Device:
    """What `choose` asks of a GPU."""
    return Device(multiprocessors, (block_kib << 10) - RESERVED, all_kib << 10, int(capability))


def builds(
    capability: str,
    shapes: Iterable[tuple[int, int]] = SHAPES,
    chosen: Sequence[str] = tuple(layouts.LAYOUTS),
    head_dims: Iterable[int] = HEAD_DIMS,
    types: Sequence[bool] = (False, True),
) -> list[Build]:
    """Every kernel that products, caches and decoders of such shapes and layouts need, each once.

    Args:
        capability: A key of `DEVICES`.
        shapes: (n, k) of weights.
        chosen: Layouts, by their names.
        head_dims: Sizes of heads.
        types: Whether activations are BF16.
    """
    found: dict[Build, None] = {}

    def add(source: str, defines: Mapping[str, object]) -> None:
        found[source, tuple(sorted(defines.items()))] = None

    for here in (device(*about, capability) for about in DEVICES[capability]):
        for layout in chosen:
            for plan in _plans(here, layout, list(shapes), types):
                add(plan[0], plan[1])
        for head_dim in head_dims:
            for bits in BITS.values():
                for bf16 in types:
                    # Tokens, heads and capacity change the grid alone.
                    attention = choose_attention(here, bits, head_dim, bf16, 1, 1, 8, 8, 64)
                    add("attention.cu", attention.defines)
                    add("attention.cu", attention.appending)
        add("sample.cu", sample_defines(here))
    for layout in chosen:
        add("pack.cu", {"LAYOUT": layout})
        add("embed.cu", {"LAYOUT": layout})
        for out in (32, 16, 116):
            add("decode.cu", {"LAYOUT": layout, "OUT": out})
        for bf16 in types:
            add("dense.cu", {"LAYOUT": layout, "BF16": int(bf16)})
    for codec in codecs():
        if codec.layout in chosen and codec.group and codec.encoder == "min/max":
            for kind in (32, 16, 116):
                add("encode.cu", {"WIDTH": codec.group, "IN": kind})
    for head_dim in head_dims:
        for bf16 in types:
            add("attention_prefill.cu", {"DIM": head_dim, "BF16": int(bf16)})
            for bits in BITS.values():
                add("append.cu", cache_defines(bits, head_dim, bf16))
        for bits in BITS.values():
            add("append.cu", cache_defines(bits, head_dim, False))
    # What stands between a decoder's products (tenpak.cuda.glue).
    for width in sorted({k for _, k in shapes}):
        for centred in (False, True):
            add("norm.cu", norm_defines(width, centred))
    for activation in range(1, len(ACTIVATIONS)):
        for gated in range(3):
            add("gate.cu", {"ACTIVATION": activation, "BF16": 0, "GATED": gated})
    for kind in (16, 32):
        add("embed.cu", {"IN": kind})
        for output in range(3):
            add("product.cu", {"IN": kind, "BF16": 0, "OUTPUT": output})
    return list(found)


def _plans(
    here: Device, layout: str, shapes: Sequence[tuple[int, int]], types: Sequence[bool]
) -> Iterator[tuple[str, Mapping[str, object]]]:
    launches = [
        Fused(overlaps=True),
        Fused(output="float32", overlaps=True),
        Fused(output="added", overlaps=True),
        *(Fused(norm, output=output, overlaps=True) for norm in NORMS[1:] for output in ("activations", "float32")),
        *(Fused("layer", activation=name, overlaps=True) for name in ACTIVATIONS[1:]),
        Fused("rms", activation="silu", gated=True, overlaps=True),
    ]
    for n, k in shapes:
        for bf16 in types:
            # Beyond, tokens come in tiles of up to 128, the sizes of which are those of so many.
            for m in range(1, min(dense_from(layout, here.hopper, False), 130)):
                plan = choose(here, layout, n, k, m, bf16=bf16)
                yield plan.source, plan.defines
            for m in (1, 8, 20, 40, 100, 500):
                for in_boxes in {here.hopper, False}:
                    plan = choose(here, layout, n, k, m, bf16=bf16, grouped=True, in_boxes=in_boxes)
                    yield plan.source, plan.defines
            plan = choose(here, layout, n, k, 1, bf16=bf16, heads=False)
            yield plan.source, plan.defines
            # `wide` has tiles of up to 256, and which of them fit best changes with their number.
            more = range(FEW + 1, min(dense_from(layout, here.hopper, True), 8192), 16)
            for m in (ROWS_FROM, ROWS_FROM_LARGE, *more) if here.hopper else ():
                plan = choose(here, layout, n, k, m, bf16=bf16, in_boxes=True)
                yield plan.source, plan.defines
        for fused in launches:
            plan = choose(here, layout, n, k, 1, fused=fused)
            yield plan.source, plan.defines


def of_models(paths: Sequence[str]) -> tuple[set[tuple[int, int]], set[str], set[int]]:
    """Shapes, as they are and as decoders join them, layouts and sizes of heads of `.tenpak` files."""
    shapes, used, head_dims = set(), set(), set()
    for path in paths:
        source = ArtifactSource(path)
        config = Config.parse(source.config)
        head_dims.add(config.head_dim)
        for name in source.artifact:
            info = source.artifact.info(name)
            if info.codec == KEEP or len(info.shape) != 2:
                continue
            n, k, _ = layouts.matrices(info.shape, info.axis)
            shapes.add((n, k))
            used.add(codec_named(info.codec).layout)
        heads = (config.heads + 2 * config.kv_heads) * config.head_dim
        shapes |= {(heads, config.width), (2 * config.intermediate, config.width)}
    return shapes, used, head_dims


def compile_with_nvcc(nvcc: str, build: Build, arch: str, output: Path, sources: Path) -> None:
    """One kernel's machine code by nvcc, under the name that `TENPAK_CUBIN_DIR` is asked for."""
    name, defines = build
    target = output / kernels.ahead_name(name, dict(defines), arch)
    if target.exists():
        return
    handle, temporary = tempfile.mkstemp(dir=output, suffix=".part")
    os.close(handle)
    # nvcc takes several macros where there are commas.
    given = kernels.options(name, dict(defines), arch)
    told = [option.replace(",", "\\,") for option in given if option != "-default-device"]
    done = subprocess.run(
        [nvcc, "-cubin", *told, "-o", temporary, str(sources / name)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        os.unlink(temporary)
        raise TenpakError(f"nvcc: cuda/{name} does not compile with {' '.join(told)}: {done.stderr.strip()}")
    os.replace(temporary, target)


def compile_with_nvrtc(build: Build, arch: str, output: Path) -> None:
    """The same by NVRTC."""
    name, defines = build
    target = output / kernels.ahead_name(name, dict(defines), arch)
    if not target.exists():
        cubin = kernels.compile_to_cubin(name, dict(defines), arch)
        part = target.with_suffix(".part")
        part.write_bytes(cubin)
        part.replace(target)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tenpak.cuda.ahead", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", metavar="MODEL.tenpak", help="for these models alone (common shapes)")
    parser.add_argument(
        "--capability", default="90", choices=DEVICES, help="the GPUs' compute capability (%(default)s)"
    )
    parser.add_argument("--output", "-o", default="cubins", metavar="FOLDER", help="where to (%(default)s)")
    parser.add_argument("--layouts", default="", metavar="NAMES", help="layouts, separated by commas (all)")
    parser.add_argument("--no-bf16", action="store_true", help="for FP16 activations alone")
    parser.add_argument("--nvcc", metavar="PATH", help="the compiler (nvcc if it is found, else NVRTC)")
    parser.add_argument(
        "--jobs", "-j", type=int, default=os.cpu_count() or 1, metavar="N", help="at a time (all cores)"
    )
    parser.add_argument("--list", action="store_true", help="print what would be compiled")
    args = parser.parse_args(arguments)
    try:
        return _run(args)
    except TenpakError as error:
        print(f"tenpak: {error}", file=sys.stderr)
        return 2


def _run(args: argparse.Namespace) -> int:
    wanted = [name for name in args.layouts.split(",") if name]
    for name in wanted:
        layouts.find(name)
    if args.models:
        shapes, used, head_dims = of_models(args.models)
        wanted = wanted or sorted(used)
    else:
        shapes, head_dims = set(SHAPES), set(HEAD_DIMS)
    types = (False,) if args.no_bf16 else (False, True)
    chosen = tuple(wanted) or tuple(layouts.LAYOUTS)
    todo = builds(args.capability, sorted(shapes), chosen, sorted(head_dims & set(HEAD_DIMS)), types)
    if args.list:
        for name, defines in todo:
            print(name, *(f"-D{key}={value}" for key, value in defines))
        return 0
    nvcc = args.nvcc or shutil.which("nvcc")
    if args.nvcc and not shutil.which(args.nvcc):
        raise UsageError(f"there is no compiler {args.nvcc}")
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    done = 0
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(max(1, args.jobs)) as pool:
        sources = Path(folder)
        for name in {name for name, _ in todo}:
            for file, text in {name: kernels.source(name), **kernels.headers(name)}.items():
                (sources / file).write_text(text)

        def one(build: Build) -> None:
            arch = kernels.architecture(build[0], args.capability)
            if nvcc:
                compile_with_nvcc(nvcc, build, arch, output, sources)
            else:
                compile_with_nvrtc(build, arch, output)

        try:
            for _ in pool.map(one, todo):
                done += 1
                if sys.stderr.isatty():
                    print(f"\r{done} of {len(todo)} kernels", end="", file=sys.stderr, flush=True)
        finally:
            pool.shutdown(cancel_futures=True)
            if sys.stderr.isatty():
                print(file=sys.stderr)
    print(f"{len(todo)} kernels in {output}, by {nvcc or 'NVRTC'}; use them with TENPAK_CUBIN_DIR={output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
