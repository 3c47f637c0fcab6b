"""Products with quantised weights on AMD, Intel, Apple and NVIDIA GPUs, through Vulkan, Metal or DX12.

    import tenpak
    from tenpak.wgpu import Context, QuantizedWeight, matmul

    context = Context()                          # the fastest GPU; Context("radeon") chooses by name
    weight = QuantizedWeight.from_artifact(tenpak.open("model.tenpak"), "model.layers.0.mlp.up_proj.weight", context)
    y = matmul(x, weight)                        # x: a NumPy array [..., in]; y is float32 [..., out]

Weights stay quantised in GPU memory; inputs and outputs travel with each call. Wheels without these kernels have the
same names, which raise UnsupportedError. docs/gpu.md says which GPU backend to choose.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tenpak import _core
from tenpak.arrays import encode
from tenpak.artifact import KEEP, ArtifactFile
from tenpak.codecs import find as codec_named
from tenpak.decoder import Decoder
from tenpak.decoder.linear import Linear
from tenpak.decoder.source import ArtifactSource
from tenpak.errors import UsageError

__all__ = ["Adapter", "Context", "QuantizedLinear", "QuantizedWeight", "adapters", "default_context", "matmul", "place"]


@dataclass(frozen=True)
class Adapter:
    """A GPU, as its driver describes it."""

    name: str
    #: `vulkan`, `metal` or `dx12`.
    backend: str
    #: `discrete`, `integrated`, `virtual`, `cpu` or `other`.
    kind: str
    driver: str
    #: Whether it computes in half precision.
    half: bool
    #: Whether it has subgroup operations.
    subgroups: bool
    #: Whether its own clock can be read.
    timestamps: bool
    #: The most bytes of a weight that are bound at once; larger weights are cut into slabs of rows.
    binding_bytes: int


def adapters() -> list[Adapter]:
    """Every GPU that can be used, the fastest kind first and software renderers last.

    Raises:
        UnsupportedError: This wheel was built without the kernels.
    """
    return [Adapter(**adapter) for adapter in _core.wgpu_adapters()]


class Context:
    """An open GPU; the kernels that it needs are compiled at first use and kept."""

    def __init__(
        self,
        adapter: str | None = None,
        *,
        power: Literal["high", "low"] = "high",
        precision: Literal["auto", "full"] = "auto",
        binding_bytes: int | None = None,
    ) -> None:
        """Opens a GPU.

        Args:
            adapter: A part of its name or its backend; None for what the variable TENPAK_WGPU_ADAPTER says, or else
                for `power` to decide.
            power: `high` prefers discrete GPUs, `low` integrated ones.
            precision: `auto` multiplies in half precision where the GPU has it, more than four tokens come at once, and
                nothing overflows; sums over the inputs are float32. `full` is float32 throughout.
            binding_bytes: A limit below the GPU's own on what is bound at once.

        Raises:
            UnsupportedError: No such GPU, or a wheel without the kernels.
            StorageError: The driver refuses.
        """
        for name, value, choices in (("power", power, ("high", "low")), ("precision", precision, ("auto", "full"))):
            if value not in choices:
                raise UsageError(f"unknown {name} {value!r}; choose one of {', '.join(choices)}")
        self._core = _core.WgpuContext(adapter, power == "low", precision == "full", binding_bytes)
        #: What was opened.
        self.adapter = Adapter(**self._core.adapter())

    def matmul(self, products: Sequence[tuple[ArrayLike, QuantizedWeight]]) -> list[NDArray[np.float32]]:
        """Many products in one submission, which costs less than one for each.

        Args:
            products: Inputs [..., in] and their weights, all of this context.

        Returns:
            Outputs [..., out] in the same order.

        Raises:
            UsageError: Inputs that do not fit their weight, or a weight of another context.
            StorageError: The GPU is lost or out of memory.
        """
        inputs, outs, shapes = [], [], []
        for given, weight in products:
            if weight.context is not self:
                raise UsageError("the weight belongs to another context")
            n, k = weight.shape
            x = np.ascontiguousarray(given, np.float32)
            if x.ndim == 0 or x.shape[-1] != k:
                raise UsageError(f"x: shape {list(x.shape)} does not fit the weight; it must be [..., {k}]")
            tokens = int(np.prod(x.shape[:-1], dtype=np.int64))
            inputs.append((x.reshape(-1).view(np.uint8), tokens, weight._core))
            outs.append(np.empty(tokens * n, np.float32))
            shapes.append((*x.shape[:-1], n))
        self._core.matmul(inputs, [out.view(np.uint8) for out in outs])
        return [out.reshape(shape) for out, shape in zip(outs, shapes, strict=True)]

    def time(self, weights: Sequence[QuantizedWeight], tokens: int = 1, rounds: int = 20) -> list[float]:
        """Seconds of a product on the GPU's own clock, transfers left out.

        Args:
            weights: Multiplied one after another; more than the GPU's cache holds show what memory gives.
            tokens: Inputs of each product.
            rounds: How often; each gives one mean over `weights`.

        Raises:
            UnsupportedError: The GPU's clock cannot be read.
        """
        return self._core.time([weight._core for weight in weights], tokens, rounds)


_default: Context | None = None
_default_lock = threading.Lock()


def default_context() -> Context:
    """The context that is used where none is given, opened at first use."""
    global _default
    with _default_lock:
        if _default is None:
            _default = Context()
        return _default


@dataclass(frozen=True)
class QuantizedWeight:
    """A linear layer's weight [n outputs, k inputs] in GPU memory, in the codec's own bits."""

    #: The layout's name, as in `tenpak.codecs()`.
    layout: str
    #: (n, k): outputs and inputs.
    shape: tuple[int, int]
    context: Context
    _core: Any = field(repr=False)

    @classmethod
    def from_artifact(cls, artifact: ArtifactFile, name: str, context: Context | None = None) -> QuantizedWeight:
        """Uploads one tensor of an open artifact.

        Raises:
            UsageError: There is no such tensor, it was kept as it was, or it is no matrix.
            ArtifactError: The file is damaged.
            StorageError: The GPU is lost or out of memory.
        """
        return cls.from_parts(*artifact.quantised(name), context=context)

    @classmethod
    def from_parts(
        cls,
        codec: str,
        parts: Mapping[str, Any],
        shape: Sequence[int],
        axis: int = -1,
        exponent: int = 0,
        *,
        context: Context | None = None,
    ) -> QuantizedWeight:
        """Uploads what a codec stores.

        Args:
            codec: The codec's name.
            parts: Its arrays by name, [rows, elements per row], as `ArtifactFile.parts` and `tenpak.encode` give them.
            shape: The tensor's shape: [n, k], or with axis 0 [k, n].
            axis: The input dimension.
            exponent: Weights are multiplied by two to this power.
            context: Where; None for `default_context()`.

        Raises:
            UsageError: Parts or shape do not fit.
            UnsupportedError: A layout without kernels, or rows too long for the GPU.
            StorageError: The GPU is lost or out of memory.
        """
        if len(shape) != 2 or axis not in (-2, -1, 0, 1):
            raise UsageError(
                f"shape {list(shape)} with axis {axis} is no linear layer's; it must be [out, in] or [in, out]"
            )
        context = default_context() if context is None else context
        found = codec_named(codec)
        k = shape[axis]
        n = shape[0] if axis in (-1, 1) else shape[1]
        missing = [part.name for part in found.parts if part.name not in parts]
        if missing:
            raise UsageError(f"parts of {codec} lack {', '.join(missing)}")
        arrays = [np.ascontiguousarray(parts[part.name]).reshape(-1).view(np.uint8) for part in found.parts]
        return cls(found.layout, (n, k), context, context._core.weight(codec, arrays, n, k, exponent))

    @classmethod
    def from_array(
        cls, array: ArrayLike, codec: str, axis: int = -1, *, context: Context | None = None
    ) -> QuantizedWeight:
        """Quantises an array on the CPU and uploads it.

        Raises:
            InputError: A weight is NaN or infinite.
            UsageError: An unknown codec or dtype, or a shape that is no linear layer's.
        """
        encoded = encode(array, codec, axis)
        return cls.from_parts(codec, encoded.parts, encoded.shape, encoded.axis, encoded.exponent, context=context)

    @property
    def nbytes(self) -> int:
        """Bytes of GPU memory."""
        return int(self._core.nbytes())

    @property
    def slabs(self) -> int:
        """Slabs of rows that it was cut into."""
        return int(self._core.slabs())

    @property
    def bits_per_weight(self) -> float:
        """Bits of GPU memory over the number of weights, padding counted in."""
        weights = self.shape[0] * self.shape[1]
        return 8 * self.nbytes / weights if weights else 0.0


def matmul(x: ArrayLike, weight: QuantizedWeight) -> NDArray[np.float32]:
    """y = x Wᵀ.

    `x` is [..., k], of any type that NumPy casts to float32; returns float32 [..., n]. Raises as `Context.matmul`.
    """
    return weight.context.matmul([(x, weight)])[0]


class QuantizedLinear:
    """y = x Wᵀ + b on the GPU, in the place of a decoder's `Linear`; arrays are NumPy's."""

    def __init__(self, name: str, weight: QuantizedWeight, bias: NDArray[np.float32] | None = None) -> None:
        #: The weight's name in the model.
        self.name = name
        self.weight = weight
        #: [out], or None.
        self.bias = bias

    def __call__(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """[…, in] to […, out]."""
        y = matmul(x, self.weight)
        if self.bias is not None:
            y += self.bias
        return y

    def __repr__(self) -> str:
        n, k = self.weight.shape
        return f"QuantizedLinear({self.name!r}, {k} -> {n}{', bias' if self.bias is not None else ''})"


def place(decoder: Decoder, context: Context | None = None) -> int:
    """Moves a decoder's quantised linear layers, and its head if that is quantised, to a GPU.

    Their weights are those of the artifact, bit for bit; layers that were kept as they were stay on the CPU, as do
    norms, attention and the embedding. Returns how many layers were moved.

    Raises:
        UsageError: The decoder computes on CuPy, or its model is no `.tenpak` and so has no quantised weights.
        UnsupportedError: No GPU, or a wheel without the kernels.
        StorageError: The GPU is lost or out of memory.
    """
    source = decoder.source
    if decoder.xp is not np:
        raise UsageError("device wgpu takes over from NumPy; open the decoder without another array module")
    if not isinstance(source, ArtifactSource):
        raise UsageError(f"{source.path} is not quantised; compress it, or choose device cpu")
    context = default_context() if context is None else context

    def moved(linear: Linear) -> Any:
        name = linear.name
        if not isinstance(linear, Linear):
            return linear
        if source.artifact.info(name).codec == KEEP:
            return linear
        return QuantizedLinear(name, QuantizedWeight.from_artifact(source.artifact, name, context), linear.bias)

    count = decoder.replace_linears(moved)
    decoder.device = "wgpu"
    return count
