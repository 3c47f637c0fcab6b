"""Products with quantised weights: which kernel, in which configuration, for which shape.

The choices are measured ones (tests/bench/bench_gemm.py) and ship with the package: nothing is tuned at run time.

- up to 8 tokens, and 16 where x fits in shared memory: `skinny`, bound by memory (one or two tokens of `int4_lut16`:
  in integers);
- more on Hopper: `prefill`, on its tensor cores' warpgroup instructions, or from `WIDE_FROM` tokens on `wide`, which
  the copy engine feeds;
- `DENSE_FROM` tokens and more: the weight is unpacked, a part at a time, for cuBLAS.

A plan is made once for each shape and kept; a call afterwards only launches. Nothing is allocated but `out`, except by
the last of the three, and by a stream's first calls, which make its workspace (call once before capturing a graph).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import cupy
import numpy as np

from tenpak.cuda import tensormap, wide
from tenpak.cuda.compile import function
from tenpak.errors import UsageError

if TYPE_CHECKING:
    from tenpak.cuda.weight import QuantizedWeight

TILE_ROWS = 16
TILE_COLS = 64

#: Bytes that two tiles take in shared memory: codes and parameters (STAGE_BYTES of cuda/layouts.cuh).
STAGE_BYTES = {
    "int4_g8_fp16": 2048,
    "int4_g16_fp16": 1536,
    "int4_g32_fp16": 1280,
    "int4_g64_fp16": 1152,
    "int4_g128_fp16": 1088,
    "int4_g8_u8": 1536,
    "int4_g16_u8": 1280,
    "int4_lut16": 1184,
    "int8_sym": 2048,
}

#: Layouts with products in integers, and for how many tokens (cuda/integers.cuh).
INTEGER = {"int4_lut16": 2}
#: Tokens from which unpacking the weight for cuBLAS is faster: on Hopper, and where only `skinny` runs.
DENSE_FROM = {True: 512, False: 64}
#: Tokens from which `wide` is faster than `prefill`, where the copy engine can read x. Not measured yet: never.
WIDE_FROM = 1 << 62
#: Bytes of a weight's rows that are unpacked at a time.
DENSE_BYTES = 128 << 20
#: Weights from which more tiles in flight pay for the shared memory they take.
LARGE = 100_000_000
#: Shared memory that a block keeps for itself: barriers, tables, and what the driver reserves.
RESERVED = 2048


@dataclass(frozen=True)
class Device:
    """What a choice depends on."""

    number: int
    multiprocessors: int
    shared: int  # bytes a block may have
    shared_all: int  # bytes of a multiprocessor
    hopper: bool


@dataclass(frozen=True)
class Plan:
    """A kernel ready to launch; `scalars` follow the pointers and strides."""

    function: Any
    prefill: bool
    grid: tuple[int, int, int]
    block: tuple[int]
    shared: int
    scalars: tuple[Any, ...]
    partial_bytes: int
    counters: int
    #: Tokens of a box, where the kernel takes a map of x (tensormap.py) and not its address.
    box: int = 0


@functools.cache
def device_of(number: int) -> Device:
    """The device's properties, asked for once."""
    attributes = cupy.cuda.Device(number).attributes
    return Device(
        number,
        attributes["MultiProcessorCount"],
        attributes["MaxSharedMemoryPerBlockOptin"] - RESERVED,
        attributes["MaxSharedMemoryPerMultiprocessor"],
        cupy.cuda.Device(number).compute_capability == "90",
    )


class Workspace:
    """Partial sums and counters of one stream of one device; the counters are zero between launches."""

    def __init__(self) -> None:
        self.partial = cupy.empty(0, cupy.uint8)
        self.counters = cupy.zeros(0, cupy.uint32)
        # Captured graphs hold addresses of what has been outgrown.
        self.outgrown: list[Any] = []

    def reserve(self, partial_bytes: int, counters: int) -> None:
        """Grows to what a launch needs; never shrinks."""
        if partial_bytes > self.partial.size:
            self.outgrown.append(self.partial)
            self.partial = cupy.empty(max(partial_bytes, 16 << 20), cupy.uint8)
        if counters > self.counters.size:
            self.outgrown.append(self.counters)
            self.counters = cupy.zeros(max(counters, 1 << 16), cupy.uint32)


@functools.cache
def workspace_of(device: int, stream: int) -> Workspace:
    """The workspace of a stream: launches on one stream follow each other, so one is enough."""
    return Workspace()


def _divide_up(a: int, b: int) -> int:
    return -(-a // b)


def _skinny(device: Device, layout: str, n: int, k: int, m: int, batch: int, bf16: bool, grouped: bool) -> Plan:
    """`m` is the number of tokens a matrix, or, grouped, of all experts together."""
    strips, tiles, stage = _divide_up(n, TILE_ROWS), _divide_up(k, TILE_COLS), STAGE_BYTES[layout]
    average = _divide_up(m, batch) if grouped else m
    columns = next((c for c in (1, 2, 4) if average <= 8 * c), 8)
    # Tokens that are multiplied in integers; not experts', of which one may have many.
    integer = m if m <= INTEGER.get(layout, 0) and not grouped else 0
    chunk = integer or 8 * columns
    at_once = min(chunk, m)
    depth = 3 if n * k >= LARGE and stage <= 1280 and not integer else 2

    # Strips whose sums a block adds at a time, each by a warp (BUFFERS of cuda/skinny.cu).
    buffers = 2 if columns <= 2 else 1

    def shared(warps: int, depth: int, slice_tiles: int) -> int:
        # A row of x, padded (row_bytes of cuda/halves.cuh and, with its scales, of cuda/integers.cuh).
        row = slice_tiles * TILE_COLS * 2 + (2 * slice_tiles + 160 if integer else 64)
        x = at_once * row
        return buffers * warps * columns * 512 + warps * depth * stage + x

    # K goes over several blocks where there are too few rows for all multiprocessors, or x is too large for one.
    slices = 1
    if strips * batch <= device.multiprocessors:
        slices = max(1, min(2 * device.multiprocessors // (strips * batch), tiles // 16))
    # (warps of a block, steps in flight, a multiprocessor's blocks), the best first, as measured.
    choices = [(8, depth, 2), (16, 2, 1), (8, depth, 1)]
    if integer * tiles > 128:
        choices.insert(0, (16, 2, 1))
    elif m > 2 and slices == 1 and n * k < LARGE and layout not in INTEGER:
        choices[:0] = [(12, 3, 1), (12, 2, 1)]
    while True:
        slice_tiles = _divide_up(_divide_up(tiles, slices), 2) * 2
        bytes_ = [shared(warps, depth, slice_tiles) for warps, depth, _ in choices]
        fits = [
            i
            for i, (_, _, blocks) in enumerate(choices)
            if bytes_[i] <= device.shared and blocks * (bytes_[i] + RESERVED) <= device.shared_all
        ]
        if fits:
            break
        slices += 1
    warps, depth, blocks = choices[fits[0]]
    slices = _divide_up(tiles, slice_tiles)
    per_matrix = max(1, device.multiprocessors * blocks // (slices * batch))
    defines = {
        "LAYOUT": layout,
        "BF16": int(bf16),
        "WARPS": warps,
        "DEPTH": depth,
        "COLUMNS": columns,
        "BLOCKS": blocks,
        "INTEGER": integer,
    }
    # Slots of partial sums: one for each chunk of tokens of each matrix.
    slots = (m // chunk + batch if grouped else batch * _divide_up(m, chunk) + batch) if slices > 1 else 0
    int32 = np.int32
    return Plan(
        function("skinny.cu", "skinny", defines, device.number),
        False,
        (min(strips, per_matrix), slices, batch),
        (32 * (warps + buffers),),
        bytes_[fits[0]],
        (int32(m), int32(n), int32(k), int32(tiles), int32(_divide_up(k, 256)), int32(slice_tiles)),
        slots * slices * strips * columns * 512,
        slots * strips,
    )


def _prefill(device: Device, layout: str, n: int, k: int, m: int, batch: int, bf16: bool) -> Plan:
    tiles, stage = _divide_up(k, TILE_COLS), STAGE_BYTES[layout]
    tokens = next(t for t in (16, 32, 64, 128) if m <= t or t == 128)
    groups, blocks = (2, 2) if tokens == 128 else (4, 2 if tokens <= 32 and n * k >= LARGE else 1)
    if tokens < 128 and 4 * batch * _divide_up(n, 256) <= device.multiprocessors:
        groups = 2  # tiles of fewer rows, so that fewer blocks share one
    depth, stages = (3, 3) if blocks == 2 or stage > 1536 else (4, 3)

    def shared() -> int:
        return 1024 + 2 * stages * tokens * TILE_COLS * 2 + 4 * groups * depth * blocks * stage

    while shared() > device.shared:
        if stages > 2:
            stages -= 1
        else:
            depth -= 1
    rows = 64 * groups * blocks
    output_tiles = batch * _divide_up(n, rows) * _divide_up(m, tokens)
    grid = min(device.multiprocessors, output_tiles * _divide_up(tiles, 2))
    defines = {
        "LAYOUT": layout,
        "BF16": int(bf16),
        "GROUPS": groups,
        "BLOCKS": blocks,
        "TOKENS": tokens,
        "DEPTH": depth,
        "STAGES": stages,
    }
    int32 = np.int32
    return Plan(
        function("prefill.cu", "prefill", defines, device.number),
        True,
        (grid, 1, 1),
        (128 * groups + 128,),
        shared(),
        (int32(batch), int32(m), int32(n), int32(k), int32(tiles), int32(_divide_up(k, 256))),
        grid * rows * tokens * 4,
        output_tiles * groups,
    )


def _wide(device: Device, layout: str, n: int, k: int, m: int, batch: int, bf16: bool, choice: wide.Choice) -> Plan:
    defines = {
        "LAYOUT": layout,
        "BF16": int(bf16),
        "GROUPS": choice.groups,
        "BLOCKS": choice.blocks,
        "TOKENS": choice.tokens,
        "STEP": choice.step,
        "STAGES": choice.stages,
    }
    int32 = np.int32
    return Plan(
        function("wide.cu", "wide", defines, device.number),
        True,
        (choice.grid, 1, 1),
        (choice.threads,),
        choice.shared,
        (int32(batch), int32(m), int32(n), int32(_divide_up(k, TILE_COLS)), int32(_divide_up(k, 256))),
        choice.partial_bytes,
        choice.counters,
        choice.tokens,
    )


def wide_choices(device: Device, layout: str, n: int, k: int, m: int, batch: int) -> tuple[wide.Choice, ...]:
    """Configurations of `wide` for a product, the best estimate first."""
    return wide.choices(layout, STAGE_BYTES[layout], device.multiprocessors, device.shared, n, k, m, batch)


@functools.lru_cache(maxsize=4096)
def plan(
    device: int,
    layout: str,
    n: int,
    k: int,
    m: int,
    batch: int,
    bf16: bool,
    grouped: bool = False,
    in_boxes: bool = False,
) -> Plan:
    """The kernel and configuration for a product of `m` tokens with a weight [batch, n, k].

    `in_boxes`: the copy engine can read x.
    """
    here = device_of(device)
    if here.hopper and not grouped and in_boxes and m >= WIDE_FROM:
        return _wide(here, layout, n, k, m, batch, bf16, wide_choices(here, layout, n, k, m, batch)[0])
    if here.hopper and not grouped:
        # x of 16 tokens: 32 bytes a column.
        fits = m <= 8 or (m <= 16 and 32 * k <= 160 << 10 and n * k < LARGE)
        if not fits:
            return _prefill(here, layout, n, k, m, batch, bf16)
    return _skinny(here, layout, n, k, m, batch, bf16, grouped)


def plan_for(w: QuantizedWeight, x: int, stride: int, m: int, bf16: bool, grouped: bool = False) -> Plan:
    """The plan that `launch` takes for x at an address, rows `stride` elements apart: what workspace it will need."""
    in_boxes = m >= WIDE_FROM and tensormap.fits(x, stride)
    return plan(w.device, w.layout, *w.shape, m, max(w.batch, 1), bf16, grouped, in_boxes)


def launch(
    w: QuantizedWeight,
    x: int,
    y: int,
    m: int,
    *,
    bf16: bool,
    stream: Any,
    x_stride: int | None = None,
    bias: int = 0,
    offsets: int = 0,
    workspace: Workspace | None = None,
) -> None:
    """Launches y = x Wᵀ + bias on addresses of device memory, for callers that have their own arrays.

    `x` [m, k] (or [batch, m, k]; with `offsets`, all experts' tokens [m, k]) with rows of `x_stride` elements (k), `y`
    [m, n] alike, in FP16 or BF16; `bias` [n] (or [batch, n]) of the same type, or 0; `offsets` int32 [batch + 1] or 0;
    `stream` a CuPy stream of the weight's device; `workspace` what the plan asks for, or None for the stream's own.
    Checks nothing.
    """
    stride = w.shape[1] if x_stride is None else x_stride
    p = plan_for(w, x, stride, m, bf16, offsets != 0)
    run(p, w, x, y, m, stride, bf16=bf16, stream=stream, bias=bias, offsets=offsets, workspace=workspace)


def run(
    p: Plan,
    w: QuantizedWeight,
    x: int,
    y: int,
    m: int,
    stride: int,
    *,
    bf16: bool,
    stream: Any,
    bias: int = 0,
    offsets: int = 0,
    workspace: Workspace | None = None,
) -> None:
    """`launch` of a plan made for this product."""
    batch = max(w.batch, 1)
    if workspace is None:
        workspace = workspace_of(w.device, stream.ptr)
        workspace.reserve(p.partial_bytes, p.counters)
    row_params = w.row_params
    params = w.params
    weights = (
        w.codes.data.ptr,
        0 if params is None else params.data.ptr,
        0 if row_params is None else row_params.data.ptr,
    )
    steps = (
        w.codes.nbytes // batch,
        0 if params is None else params.nbytes // batch,
        0 if row_params is None else row_params.nbytes // batch,
    )
    partial, counters = workspace.partial.data.ptr, workspace.counters.data.ptr
    arguments: tuple[Any, ...]
    if p.box:
        boxes = tensormap.map_of(x, w.shape[1], m, batch, stride, p.box, bf16)
        arguments = (boxes, *weights, y, bias, partial, counters, *steps)
    elif p.prefill:
        arguments = (*weights, x, y, bias, partial, counters, *steps, stride)
    else:
        arguments = (*weights, x, y, bias, offsets, partial, counters, *steps, stride)
    arguments = (*arguments, *p.scalars, np.float32(w.scale))
    p.function(p.grid, p.block, arguments, p.shared, stream)


def matmul(x: Any, w: QuantizedWeight, bias: Any = None, out: Any = None, stream: Any = None) -> Any:
    """y = x Wᵀ + bias, with the weight unpacked on the fly.

    `x` is a CuPy array [..., k], float16 or bfloat16, on the weight's device; for a weight of `batch` matrices
    [batch, m, k]. `bias` [n] (or [batch, n]) and `out` [..., n] are of x's dtype. Sums are FP32. Runs on `stream`
    (CuPy's current one). x is copied if its rows do not lie one after another. Raises UsageError for shapes and dtypes
    that do not fit.
    """
    n, k = w.shape
    if x.shape[-1:] != (k,) or (w.batch and (x.ndim != 3 or x.shape[0] != w.batch)):
        wanted = f"[{w.batch}, m, {k}]" if w.batch else f"[..., {k}]"
        raise UsageError(f"x: shape {list(x.shape)} does not fit the weight; it must be {wanted}")
    shape = (*x.shape[:-1], n)
    _check(x, bias, (w.batch, n) if w.batch else (n,), out, shape)
    with cupy.cuda.Device(w.device):
        stream = cupy.cuda.get_current_stream() if stream is None else stream
        with stream:
            if out is None:
                out = cupy.empty(shape, x.dtype)
            x, stride = _rows(x)
            if bias is not None:
                bias = cupy.ascontiguousarray(bias)
            m = x.shape[-2] if w.batch else x.size // k if k else 0
            if m == 0 or out.size == 0:
                return out
            bf16 = _is_bf16(x)
            if m >= DENSE_FROM[device_of(w.device).hopper] and not _capturing(stream):
                _dense(w, x, stride, out, m, bf16, bias, stream)
            else:
                address = 0 if bias is None else bias.data.ptr
                launch(w, x.data.ptr, out.data.ptr, m, bf16=bf16, stream=stream, x_stride=stride, bias=address)
    return out


def grouped_matmul(
    x: Any, w: QuantizedWeight, offsets: Any, bias: Any = None, out: Any = None, stream: Any = None
) -> Any:
    """Each token times its expert's matrix, in one launch.

    `x` [tokens, k] holds all experts' tokens, sorted by expert; `offsets` (int32 [batch + 1], on the device) says where
    each expert's begin, the last being `tokens`. Otherwise as `matmul`; returns [tokens, n].
    """
    n, k = w.shape
    if not w.batch:
        raise UsageError("w: a single matrix has no experts; use matmul")
    if x.ndim != 2 or x.shape[1] != k:
        raise UsageError(f"x: shape {list(x.shape)} does not fit the weight; it must be [tokens, {k}]")
    if offsets.shape != (w.batch + 1,) or offsets.dtype != np.int32 or not offsets.flags.c_contiguous:
        here = f"{offsets.dtype.name} {list(offsets.shape)}"
        raise UsageError(f"offsets: {here} does not fit; it must be contiguous int32 [{w.batch + 1}]")
    shape = (x.shape[0], n)
    _check(x, bias, (w.batch, n), out, shape)
    with cupy.cuda.Device(w.device):
        stream = cupy.cuda.get_current_stream() if stream is None else stream
        with stream:
            if out is None:
                out = cupy.empty(shape, x.dtype)
            if out.size == 0:
                return out
            x, stride = _rows(x)
            bias = None if bias is None else cupy.ascontiguousarray(bias)
            launch(
                w,
                x.data.ptr,
                out.data.ptr,
                x.shape[0],
                bf16=_is_bf16(x),
                stream=stream,
                x_stride=stride,
                bias=0 if bias is None else bias.data.ptr,
                offsets=offsets.data.ptr,
            )
    return out


def _is_bf16(x: Any) -> bool:
    return bool(np.dtype(x.dtype).name == "bfloat16")


def _check(x: Any, bias: Any, bias_shape: tuple[int, ...], out: Any, shape: tuple[int, ...]) -> None:
    """Refuses types and shapes that the kernels would misread."""
    name = np.dtype(x.dtype).name
    if name not in ("float16", "bfloat16"):
        raise UsageError(f"x: {name} is no type of these kernels; cast it to float16 or bfloat16")
    if bias is not None and (bias.shape != bias_shape or bias.dtype != x.dtype):
        here = f"{bias.dtype.name} {list(bias.shape)}"
        raise UsageError(f"bias: {here} does not fit; it must be {name} {list(bias_shape)}")
    if out is not None and (out.shape != shape or out.dtype != x.dtype or not out.flags.c_contiguous):
        here = f"{out.dtype.name} {list(out.shape)}"
        raise UsageError(f"out: {here} does not fit; it must be contiguous {name} {list(shape)}")


def _rows(x: Any) -> tuple[Any, int]:
    """x, or a copy, whose rows are evenly spaced runs of memory, and their distance in elements."""
    if x.ndim == 2 and x.strides[1] == x.itemsize and x.strides[0] % x.itemsize == 0 and x.strides[0] > 0:
        return x, x.strides[0] // x.itemsize
    return cupy.ascontiguousarray(x), x.shape[-1]


def _capturing(stream: Any) -> bool:
    return stream.ptr != 0 and bool(cupy.cuda.runtime.streamIsCapturing(stream.ptr))


def unpack(w: QuantizedWeight, out: Any, bf16: bool, stream: Any, matrix: int = 0, first_row: int = 0) -> None:
    """Rows `first_row` (a multiple of 16) and on of a matrix to `out`, contiguous [rows, k] in FP16 or BF16."""
    k = w.shape[1]
    rows, tiles = out.shape[0], _divide_up(k, TILE_COLS)
    batch = max(w.batch, 1)

    def address(array: Any) -> int:
        return 0 if array is None else array.data.ptr + matrix * (array.nbytes // batch)

    kernel = function("dense.cu", "dense", {"LAYOUT": w.layout, "BF16": int(bf16)}, w.device)
    int32 = np.int32
    arguments = (
        address(w.codes),
        address(w.params),
        address(w.row_params),
        out.data.ptr,
        int32(first_row),
        int32(rows),
        int32(k),
        int32(tiles),
        int32(_divide_up(k, 256)),
        np.float32(w.scale),
    )
    kernel((_divide_up(tiles, 8), _divide_up(rows, TILE_ROWS), 1), (128,), arguments, 0, stream)


def _dense(w: QuantizedWeight, x: Any, stride: int, out: Any, m: int, bf16: bool, bias: Any, stream: Any) -> None:
    """The product by cuBLAS, the weight being unpacked `DENSE_BYTES` at a time."""
    from cupy.cuda import cublas, device, runtime

    n, k = w.shape
    rows = min(n, max(TILE_ROWS, DENSE_BYTES // (2 * k) // TILE_ROWS * TILE_ROWS))
    part = cupy.empty((rows, k), x.dtype)
    kind = runtime.CUDA_R_16BF if bf16 else runtime.CUDA_R_16F
    one, zero = np.ones(1, np.float32), np.zeros(1, np.float32)
    handle = device.get_cublas_handle()
    for matrix in range(max(w.batch, 1)):
        from_x, to = x.data.ptr + matrix * m * k * 2, out.data.ptr + matrix * m * n * 2
        for first in range(0, n, rows):
            count = min(rows, n - first)
            unpack(w, part[:count], bf16, stream, matrix, first)
            # Column-major: out [n, m] = part [k, n]ᵀ x [k, m].
            cublas.gemmEx(
                handle,
                cublas.CUBLAS_OP_T,
                cublas.CUBLAS_OP_N,
                count,
                m,
                k,
                one.ctypes.data,
                part.data.ptr,
                kind,
                k,
                from_x,
                kind,
                stride,
                zero.ctypes.data,
                to + 2 * first,
                kind,
                n,
                cublas.CUBLAS_COMPUTE_32F,
                cublas.CUBLAS_GEMM_DEFAULT,
            )
    if bias is not None:
        view = out if w.batch else out.reshape(m, n)
        view += bias[:, None, :] if w.batch else bias
