"""The PyTorch operators `tenpak::matmul` and `tenpak::dequantise` on packed weights.

Registered with implementations for CUDA and for CPU, with fake ones for torch.compile, and with a gradient for inputs
and bias. On CUDA they launch the kernels on PyTorch's current stream and allocate through PyTorch, so that they can be
captured in CUDA graphs. Where the kernels cannot run, PyTorch computes instead, which a warning says once.
"""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass
from typing import Any

import torch

from tenpak.cuda import fallback, layouts
from tenpak.cuda.plans import Plan

#: Bytes of a weight's rows that are unpacked at a time for a product by cuBLAS.
_DENSE_BYTES = 64 << 20

_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}

_library = torch.library.Library("tenpak", "DEF")
_WEIGHT = "Tensor codes, Tensor? params, Tensor? row_params, str layout, int n, int k, float scale"
_library.define(f"matmul(Tensor x, {_WEIGHT}, Tensor? bias) -> Tensor")
_library.define(f"dequantise({_WEIGHT}, ScalarType dtype) -> Tensor")


class _Memory:
    """A tensor as `tenpak.cuda.products.launch` reads CuPy's arrays."""

    __slots__ = ("nbytes", "ptr", "shape")

    def __init__(self, tensor: torch.Tensor) -> None:
        self.ptr, self.nbytes, self.shape = tensor.data_ptr(), tensor.nbytes, tensor.shape

    @property
    def data(self) -> _Memory:
        return self


@dataclass(slots=True)
class _Weight:
    """Packed tensors as kernels' callers read a `QuantizedWeight`."""

    layout: str
    shape: tuple[int, int]
    codes: _Memory
    params: _Memory | None
    row_params: _Memory | None
    scale: float
    device: int
    batch: int = 0


@dataclass(slots=True)
class _Workspace:
    partial: _Memory
    counters: _Memory


@functools.cache
def missing(device: torch.device) -> str | None:
    """Why the kernels cannot run on a device, or None."""
    if device.type != "cuda":
        return f"on {device.type} PyTorch computes with"
    if torch.version.cuda is None:
        return "this PyTorch is not built for CUDA: it computes itself with"
    try:
        import cupy  # noqa: F401
    except ImportError:
        return "CuPy is not installed (pip install 'tenpak[cuda13]', or cuda12): PyTorch computes with"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"the kernels need compute capability 8.0, {device} has {major}.{minor}: PyTorch computes with"
    return None


_said = False


def _say_once(device: torch.device) -> None:
    """Warns, the first time that PyTorch must compute."""
    global _said
    reason = missing(device)
    if reason is not None and not _said:
        _said = True
        warnings.warn(f"{reason} quantised weights, which it unpacks for every product: slowly", stacklevel=2)


@functools.lru_cache(maxsize=256)
def stream_of(pointer: int, device: int) -> Any:
    """CuPy's view of a stream of PyTorch's."""
    import cupy

    if not hasattr(cupy.cuda.Stream, "from_external"):  # before CuPy 14
        return cupy.cuda.ExternalStream(pointer, device)

    class Stream:
        def __cuda_stream__(self) -> tuple[int, int]:
            return 0, pointer

    return cupy.cuda.Stream.from_external(Stream())


def current_stream(device: torch.device) -> Any:
    """PyTorch's current stream of a device, for CuPy."""
    index = torch.cuda.current_device() if device.index is None else device.index
    # What torch.cuda.current_stream asks too, without an object around it.
    return stream_of(torch._C._cuda_getCurrentRawStream(index), index)


def _weight(
    codes: torch.Tensor,
    params: torch.Tensor | None,
    row_params: torch.Tensor | None,
    layout: str,
    n: int,
    k: int,
    scale: float,
) -> _Weight:
    return _Weight(
        layout,
        (n, k),
        _Memory(codes),
        None if params is None else _Memory(params),
        None if row_params is None else _Memory(row_params),
        scale,
        codes.get_device(),
    )


def _matmul_torch(
    x: torch.Tensor,
    codes: torch.Tensor,
    params: torch.Tensor | None,
    row_params: torch.Tensor | None,
    layout: str,
    n: int,
    k: int,
    scale: float,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    _say_once(x.device)
    weight = fallback.dequantise(layouts.find(layout), codes, params, row_params, n, k, scale, x.dtype)
    return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))


def unobserved(x: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether a product may go straight to the kernels, because nothing of PyTorch's is there to see the operator.

    That is so on CUDA unless it is compiled, traced, watched by a mode, or needs a gradient. The operator's dispatch
    costs twice what its launch does.
    """
    return (
        not torch.compiler.is_compiling()
        and type(x) is torch.Tensor
        and x.is_cuda
        and not (torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)))
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._len_torch_function_stack()
        and not torch._C._is_tracing()
    )


def matmul_cuda(
    x: torch.Tensor,
    codes: torch.Tensor,
    params: torch.Tensor | None,
    row_params: torch.Tensor | None,
    layout: str,
    n: int,
    k: int,
    scale: float,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """The operator's implementation for CUDA; its arguments are `tenpak::matmul`'s."""
    if k == 0 or missing(x.device) is not None:
        return _matmul_torch(x, codes, params, row_params, layout, n, k, scale, bias)
    if x.device != torch.device("cuda", torch.cuda.current_device()):
        with torch.cuda.device(x.device):
            return matmul_cuda(x, codes, params, row_params, layout, n, k, scale, bias)
    from tenpak.cuda.products import is_dense, plan_for, run

    compute = x.dtype if x.dtype in (torch.float16, torch.bfloat16) else torch.float16
    rows = x if x.dim() == 2 and x.dtype == compute else x.reshape(-1, k).to(compute)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    bias = None if bias is None else bias.to(compute).contiguous()
    m, bf16 = rows.shape[0], compute == torch.bfloat16
    weight = _weight(codes, params, row_params, layout, n, k, scale)
    stream = current_stream(x.device)
    if is_dense(weight, rows.data_ptr(), rows.stride(0), m):  # type: ignore[arg-type]
        y = _by_cublas(rows, weight, bias, bf16, stream)
    else:
        y = torch.empty(m, n, dtype=compute, device=x.device)
        if m and n:
            stride = rows.stride(0) if m > 1 else k
            capturing = torch.cuda.is_current_stream_capturing()
            # Counters of a graph's own are made zero at each replay.
            chosen = plan_for(weight, rows.data_ptr(), stride, m, bf16, heads=not capturing)  # type: ignore[arg-type]
            run(
                chosen,
                weight,  # type: ignore[arg-type]
                rows.data_ptr(),
                y.data_ptr(),
                m,
                stride,
                bf16=bf16,
                stream=stream,
                bias=0 if bias is None else bias.data_ptr(),
                workspace=_workspace(chosen[0], weight.device, stream, capturing),
            )
    y = y if x.dim() == 2 else y.view(*x.shape[:-1], n)
    return y if x.dtype == compute else y.to(x.dtype)


def _workspace(plan: Plan, device: int, stream: Any, capturing: bool) -> Any:
    """The stream's workspace; memory of the graph's own while one is captured, because CuPy could not allocate then."""
    from tenpak.cuda.products import workspace_of

    if capturing:
        return _Workspace(
            _Memory(torch.empty(plan.partial_bytes, dtype=torch.uint8, device=device)),
            _Memory(torch.zeros(plan.counters, dtype=torch.int32, device=device)),
        )
    workspace = workspace_of(device, stream.ptr)
    if plan.partial_bytes > workspace.partial.size or plan.counters > workspace.counters.size:
        # It is CuPy's memory, and must be made on the stream that will use it.
        with stream:
            workspace.reserve(plan.partial_bytes, plan.counters)
    return workspace


def _by_cublas(rows: torch.Tensor, weight: _Weight, bias: torch.Tensor | None, bf16: bool, stream: Any) -> torch.Tensor:
    """The product of many tokens, the weight being unpacked `_DENSE_BYTES` at a time."""
    from tenpak.cuda.products import unpack

    n, k = weight.shape
    step = max(layouts.TILE_ROWS, _DENSE_BYTES // (2 * k) // layouts.TILE_ROWS * layouts.TILE_ROWS)
    part = torch.empty(min(n, step), k, dtype=rows.dtype, device=rows.device)
    parts = []
    for first in range(0, n, step):
        here = part[: min(step, n - first)]
        unpack(weight, _Memory(here), bf16, stream, 0, first)  # type: ignore[arg-type]
        parts.append(torch.nn.functional.linear(rows, here, None if bias is None else bias[first : first + step]))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _dequantise_torch(
    codes: torch.Tensor,
    params: torch.Tensor | None,
    row_params: torch.Tensor | None,
    layout: str,
    n: int,
    k: int,
    scale: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    return fallback.dequantise(layouts.find(layout), codes, params, row_params, n, k, scale, dtype)


def _dequantise_cuda(
    codes: torch.Tensor,
    params: torch.Tensor | None,
    row_params: torch.Tensor | None,
    layout: str,
    n: int,
    k: int,
    scale: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    if dtype not in _DTYPES or n * k == 0 or missing(codes.device) is not None:
        return _dequantise_torch(codes, params, row_params, layout, n, k, scale, dtype)
    from tenpak.cuda import codec

    out = torch.empty(n, k, dtype=dtype, device=codes.device)
    with torch.cuda.device(codes.device):
        weight = _weight(codes, params, row_params, layout, n, k, scale)
        codec.decode_packed_into(weight, out.data_ptr(), _DTYPES[dtype], current_stream(codes.device))
    return out


def _matmul_fake(x: torch.Tensor, codes: torch.Tensor, *weight: Any) -> torch.Tensor:
    n, k = weight[3], weight[4]
    torch._check(x.shape[-1] == k, lambda: f"x: shape {list(x.shape)} does not fit the weight [{n}, {k}]")
    return x.new_empty((*x.shape[:-1], n))


def _dequantise_fake(codes: torch.Tensor, *weight: Any) -> torch.Tensor:
    return codes.new_empty((weight[3], weight[4]), dtype=weight[6])


def _remember(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, codes, params, row_params, *ctx.layout, bias = inputs
    ctx.weight = codes, params, row_params
    ctx.dtype, ctx.bias_dtype = x.dtype, None if bias is None else bias.dtype


def _gradient(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """Of x and bias; the quantised weight has none."""
    of_x = of_bias = None
    if ctx.needs_input_grad[0]:
        of_x = grad @ torch.ops.tenpak.dequantise(*ctx.weight, *ctx.layout, grad.dtype)
    if ctx.needs_input_grad[8]:
        of_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
    return of_x, None, None, None, None, None, None, None, of_bias


_library.impl("matmul", matmul_cuda, "CUDA")
_library.impl("matmul", _matmul_torch, "CPU")
_library.impl("dequantise", _dequantise_cuda, "CUDA")
_library.impl("dequantise", _dequantise_torch, "CPU")
torch.library.register_fake("tenpak::matmul", _matmul_fake, lib=_library)
torch.library.register_fake("tenpak::dequantise", _dequantise_fake, lib=_library)
torch.library.register_autograd("tenpak::matmul", _gradient, setup_context=_remember, lib=_library)
