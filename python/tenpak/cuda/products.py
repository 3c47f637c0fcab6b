"""Products with quantised weights in GPU memory: `matmul`, `grouped_matmul`, and launches for callers with own arrays.

What runs is chosen by `tenpak.cuda.plans`. A plan is made once for each shape and kept; a call afterwards only
launches. Nothing is allocated but `out`, except where the weight is unpacked for cuBLAS, and by a stream's first calls,
which make its workspace (call once before capturing a graph).
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import cupy
import numpy as np

from tenpak.cuda import plans, tensormap
from tenpak.cuda.compile import function
from tenpak.cuda.layouts import TILE_COLS, TILE_ROWS
from tenpak.cuda.plans import PLAIN, RESERVED, Device, Fused, Plan, choose, dense_from, divide_up
from tenpak.errors import UsageError

if TYPE_CHECKING:
    from tenpak.cuda.weight import QuantizedWeight

#: Bytes of a weight's rows that are unpacked at a time.
DENSE_BYTES = 128 << 20


@functools.cache
def device_of(number: int) -> Device:
    """The device's properties, asked for once."""
    attributes = cupy.cuda.Device(number).attributes
    return Device(
        attributes["MultiProcessorCount"],
        attributes["MaxSharedMemoryPerBlockOptin"] - RESERVED,
        attributes["MaxSharedMemoryPerMultiprocessor"],
        int(cupy.cuda.Device(number).compute_capability),
    )


#: Addresses of a norm's weight and bias (0 for none), FP32 [k], and its epsilon.
Norm = tuple[int, int, float]


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
    fused: Fused = PLAIN,
    in_boxes: bool = False,
    heads: bool = True,
) -> tuple[Plan, Any]:
    """What `choose` says for a device, and the loaded kernel."""
    chosen = choose(device_of(device), layout, n, k, m, batch, bf16, grouped, fused, in_boxes, heads)
    return chosen, function(chosen.source, chosen.kernel, chosen.defines, device)


def plan_for(
    w: QuantizedWeight,
    x: int,
    stride: int,
    m: int,
    bf16: bool,
    grouped: bool = False,
    fused: Fused = PLAIN,
    heads: bool = True,
) -> tuple[Plan, Any]:
    """What `launch` takes for x at an address, rows `stride` elements apart: it says what workspace that needs.

    `heads`: as for `plans.choose`; `launch` itself always allows them.
    """
    in_boxes = m >= plans.ROWS_FROM and tensormap.fits(x, stride)
    return plan(w.device, w.layout, *w.shape, m, max(w.batch, 1), bf16, grouped, fused, in_boxes, heads)


def is_dense(w: QuantizedWeight, x: int, stride: int, m: int) -> bool:
    """Whether `m` tokens at an address, rows `stride` elements apart, are for cuBLAS, the weight being unpacked."""
    return m >= dense_from(w.layout, device_of(w.device).hopper, tensormap.fits(x, stride))


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
    fused: Fused = PLAIN,
    norm: Norm | None = None,
) -> None:
    """Launches y = x Wᵀ + bias on addresses of device memory, for callers that have their own arrays.

    `x` [m, k] (or [batch, m, k]; with `offsets`, all experts' tokens [m, k]) with rows of `x_stride` elements (k), `y`
    [m, n] alike, in FP16 or BF16; `bias` [n] (or [batch, n]) of the same type, or 0; `offsets` int32 [batch + 1] or 0;
    `stream` a CuPy stream of the weight's device; `workspace` what the plan asks for, or None for the stream's own.
    With another `fused`, x and y are what that says, and there are at most `FEW` tokens; `norm` is what its norm reads.
    Checks nothing.
    """
    stride = w.shape[1] if x_stride is None else x_stride
    chosen = plan_for(w, x, stride, m, bf16, offsets != 0, fused)
    run(
        chosen, w, x, y, m, stride, bf16=bf16, stream=stream, bias=bias, offsets=offsets, workspace=workspace, norm=norm
    )


def run(
    chosen: tuple[Plan, Any],
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
    norm: Norm | None = None,
) -> None:
    """`launch` with a plan, and its kernel, that were made for this product."""
    p, kernel = chosen
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
    if p.boxes:
        # Experts' tokens are one matrix.
        matrices = 1 if offsets else batch
        maps = tensormap.maps_of(x, w.shape[1], m, matrices, stride, p.boxes, bf16, p.box_tiles)
        arguments = (maps, *weights, y, bias, offsets, partial, counters, *steps)
    else:
        arguments = (*weights, x, y, bias, offsets, partial, counters, *steps, stride)
    arguments = (*arguments, *p.scalars, np.float32(w.scale))
    if norm is not None:
        arguments = (*arguments, *norm[:2], np.float32(norm[2]))
    kernel(p.grid, p.block, arguments, p.shared, stream)


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
            if is_dense(w, x.data.ptr, stride, m) and not _capturing(stream):
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
    rows, tiles = out.shape[0], divide_up(k, TILE_COLS)
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
        int32(divide_up(k, 256)),
        np.float32(w.scale),
    )
    kernel((divide_up(tiles, 8), divide_up(rows, TILE_ROWS), 1), (128,), arguments, 0, stream)


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
