"""A linear layer of PyTorch whose weight stays in four to eight bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.utils.dlpack

from tenpak import arrays
from tenpak.artifact import ArtifactFile
from tenpak.codecs import find as codec_named
from tenpak.cuda import layouts, ops
from tenpak.errors import UsageError

if TYPE_CHECKING:
    from tenpak.cuda.weight import QuantizedWeight


class G8Linear(torch.nn.Module):
    """y = x Wᵀ + b with a quantised weight, in place of `torch.nn.Linear` and transformers' `Conv1D`.

    Named for its default, groups of 8 with FP16 scales and offsets; it takes every codec. On a CUDA
    device with CuPy it computes in x's float16 or bfloat16 (float32 is cast to float16 and back) with FP32 sums;
    elsewhere PyTorch computes, which a warning says once. The weight has no gradient, x and bias have.

    Buffers, and so the state dict, hold the packed weight: `codes`, `params` and `row_params` as integers, which
    `half()` and its like leave alone, and `exponent`: weights are what is packed times two to that. They are the same
    on every device. Scales and offsets that an older version has packed are scaled as they are loaded.
    """

    codes: torch.Tensor
    params: torch.Tensor | None
    row_params: torch.Tensor | None
    exponent: torch.Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        codec: str = "int4_g8_fp16_v1",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """A layer of zeros, for `load_state_dict`; `dtype` is the bias's."""
        super().__init__()
        self.in_features, self.out_features, self.codec = in_features, out_features, codec
        self.layout = codec_named(codec).layout
        layout = layouts.find(self.layout)
        sizes = layout.sizes(out_features, in_features, 0)
        types = (torch.int32, _integer(layout.param), _integer(layout.row_param))
        for name, size, kind in zip(("codes", "params", "row_params"), sizes, types, strict=True):
            buffer = None if size is None else torch.zeros(size, dtype=kind, device=device)
            self.register_buffer(name, buffer)
        self.register_buffer("exponent", torch.zeros((), dtype=torch.int32, device=device))
        self._scale = 1.0
        self.bias: torch.nn.Parameter | None
        if bias:
            self.bias = torch.nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype), requires_grad=False)
        else:
            self.register_parameter("bias", None)

    @classmethod
    def from_linear(cls, layer: torch.nn.Module, codec: str = "int4_g8_fp16_v1") -> G8Linear:
        """Quantises a layer where it is; the layer itself is left alone, and shares its bias.

        Args:
            layer: `torch.nn.Linear`, or transformers' `Conv1D` (GPT-2), whose weight is [in, out].
            codec: A name from `tenpak.codecs()`. Min/max codecs encode on the GPU if the layer is there.

        Raises:
            UsageError: It is no such layer, its weight holds no data, or the codec is unknown.
            InputError: A weight is NaN or infinite.
        """
        if not is_linear(layer):
            raise UsageError(f"{type(layer).__name__} is no linear layer; give nn.Linear or transformers' Conv1D")
        weight, bias = layer.weight, layer.bias
        assert isinstance(weight, torch.Tensor)
        assert bias is None or isinstance(bias, torch.Tensor)
        if weight.is_meta:
            raise UsageError("the layer's weight is on the meta device; load the model before quantising it")
        layouts.find(codec_named(codec).layout)
        axis, weight = (0 if is_conv1d(layer) else 1), weight.detach()
        # FP32 holds bfloat16 exactly, and neither NumPy nor every CuPy has that.
        weight = weight.contiguous() if weight.dtype in (torch.float16, torch.float32) else weight.float().contiguous()
        if ops.missing(weight.device) is None:
            from tenpak.cuda import codec as gpu

            with torch.cuda.device(weight.device), ops.current_stream(weight.device):
                encoded = gpu.encode(gpu.borrowed(weight), codec, axis)
        else:
            encoded = arrays.encode(weight.cpu().numpy(), codec, axis)
        made = cls.from_parts(
            codec, encoded.parts, encoded.shape, axis, encoded.exponent, bias=bias, device=weight.device
        )
        return made.train(layer.training)

    @classmethod
    def from_artifact(
        cls,
        artifact: ArtifactFile,
        name: str,
        *,
        bias: torch.Tensor | None = None,
        device: torch.device | str | None = None,
    ) -> G8Linear:
        """The layer whose weight an open artifact holds under that name, without ever rebuilding it.

        Raises:
            UsageError: There is no such tensor, it was kept as it was, or it is no matrix.
            ArtifactError: The file is damaged.
        """
        return cls.from_parts(*artifact.quantised(name), bias=bias, device=device)

    @classmethod
    def from_parts(
        cls,
        codec: str,
        parts: Mapping[str, Any],
        shape: Sequence[int],
        axis: int = -1,
        exponent: int = 0,
        *,
        bias: torch.Tensor | None = None,
        device: torch.device | str | None = None,
    ) -> G8Linear:
        """Packs what a codec stores, as `tenpak.encode` and `ArtifactFile.parts` give it.

        Args:
            codec: The codec's name.
            parts: Its arrays by name, [rows, elements per row]; NumPy, or CuPy for a CUDA device.
            shape: The weight's shape: [out, in], or with axis 0 [in, out].
            axis: The input dimension.
            exponent: Weights are multiplied by two to this power.
            bias: [out], or None; taken as it is.
            device: Where the layer will be; None for the CPU.

        Raises:
            UsageError: Parts or shape do not fit, or the codec is unknown.
        """
        layout = layouts.find(codec_named(codec).layout)
        n, k, batch = layouts.matrices(shape, axis)
        if batch:
            raise UsageError(f"shape {list(shape)} is a batch of layers; tenpak.cuda.QuantizedWeight takes those")
        axis, where = axis % len(shape), torch.device("cpu" if device is None else device)
        if ops.missing(where) is None:
            from tenpak.cuda import codec as gpu

            with torch.cuda.device(where), ops.current_stream(where):
                *packed, power = gpu.pack(layout, gpu.parts_on_device(codec, parts, tuple(shape), axis), n, k, 0)
                tensors = [
                    None if a is None else torch.utils.dlpack.from_dlpack(a.view(_signed(a.dtype))) for a in packed
                ]
        else:
            given = [a if isinstance(a, np.ndarray) else a.get() for a in layouts.ordered(codec, parts, shape, axis)]
            *packed, power = layouts.pack(layout, given, n, k)
            tensors = [None if a is None else torch.from_numpy(a.view(_signed(a.dtype))).to(where) for a in packed]
        made = cls(k, n, bias=False, codec=codec, device="meta")
        made.codes, made.params, made.row_params = tensors  # type: ignore[assignment]
        made.exponent = torch.tensor(exponent - power, dtype=torch.int32, device=where)
        made._scale = 2.0 ** (exponent - power)
        if isinstance(bias, torch.nn.Parameter):
            made.bias = bias
        elif bias is not None:
            made.bias = torch.nn.Parameter(bias.to(where), requires_grad=False)
        return made

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] to [..., out], of x's dtype."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        matmul = ops.matmul_cuda if ops.unobserved(x, self.bias) else torch.ops.tenpak.matmul
        result: torch.Tensor = matmul(
            x,
            self.codes,
            self.params,
            self.row_params,
            self.layout,
            self.out_features,
            self.in_features,
            self._scale,
            self.bias,
        )
        return result

    def dequantise(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight [out, in] that the layer multiplies with."""
        weight: torch.Tensor = torch.ops.tenpak.dequantise(
            self.codes,
            self.params,
            self.row_params,
            self.layout,
            self.out_features,
            self.in_features,
            self._scale,
            dtype,
        )
        return weight

    def quantized_weight(self) -> QuantizedWeight:
        """The layer's weight for `tenpak.cuda.matmul`, in the same memory; the layer must be on a CUDA device."""
        from tenpak.cuda import codec as gpu
        from tenpak.cuda.weight import QuantizedWeight

        if not self.codes.is_cuda:
            raise UsageError(f"the layer is on {self.codes.device}; move it to a CUDA device first")
        params, row_params = (None if t is None else gpu.borrowed(t) for t in (self.params, self.row_params))
        return QuantizedWeight(
            self.layout,
            (self.out_features, self.in_features),
            0,
            gpu.borrowed(self.codes).view(np.uint32),
            params,
            row_params,
            self._scale,
            self.codes.get_device(),
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weight."""
        return sum(t.nbytes for t in (self.codes, self.params, self.row_params) if t is not None)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, codec={self.codec}"

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        # Read here, once: reading it in `forward` would wait for the GPU.
        if not self.exponent.is_meta:
            self._scale_halves()
            self._scale = 2.0 ** int(self.exponent)

    def _scale_halves(self) -> None:
        """Packs scales and offsets times a power of two, as `layouts.pack` does; those that are stay as they are."""
        halves = layouts.find(self.layout).halves
        if halves is None:
            return
        name, each = halves
        bits = getattr(self, name)
        if bits.is_meta:
            return
        floats = bits.view(torch.float16).float().reshape(-1, each)
        power = layouts.power_of(*layouts.largest(floats))
        if power:
            setattr(self, name, (floats * 2.0**power).half().view(bits.dtype).reshape(bits.shape))
            self.exponent = self.exponent - power


def is_conv1d(layer: torch.nn.Module) -> bool:
    """Whether it is transformers' `Conv1D`, known without importing transformers."""
    return any(
        kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.") for kind in type(layer).__mro__
    )


def is_linear(layer: torch.nn.Module) -> bool:
    """Whether `G8Linear.from_linear` takes it."""
    return isinstance(layer, torch.nn.Linear) or is_conv1d(layer)


def _signed(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """PyTorch knows few unsigned types; the bits are the same."""
    return dtype if dtype.itemsize == 1 else np.dtype(f"<i{dtype.itemsize}")


def _integer(dtype: np.dtype[Any] | None) -> torch.dtype | None:
    return None if dtype is None else {1: torch.uint8, 2: torch.int16, 4: torch.int32}[dtype.itemsize]
