"""Quantised weights in GPU memory, packed for products."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import cupy
import numpy as np
from numpy.typing import DTypeLike

from tenpak import dtypes
from tenpak.artifact import ArtifactFile
from tenpak.codecs import find as codec_named
from tenpak.cuda import codec as gpu
from tenpak.cuda import layouts


@dataclass(frozen=True)
class QuantizedWeight:
    """A linear layer's weight [n outputs, k inputs], or a batch of them, in four to eight bits.

    Made by `from_artifact`, `from_parts` or `from_array`; `tenpak.cuda.matmul` multiplies with it. Its bytes are those
    of the artifact in another order (cuda/layouts.cuh), the same for every number of tokens, and scales and offsets are
    times a power of two that `scale` takes back.
    """

    #: The layout's name, as in `tenpak.codecs()`.
    layout: str
    #: (n, k): outputs and inputs.
    shape: tuple[int, int]
    #: How many matrices; 0 for one that is no batch.
    batch: int
    #: uint32 [strips, tiles, words]; a batch has its own dimension before these.
    codes: Any = field(repr=False)
    #: Parameters of groups as raw bits, or None.
    params: Any = field(repr=False)
    #: Parameters of rows as raw bits, or None.
    row_params: Any = field(repr=False)
    #: Products are multiplied by this: 2 to the artifact's exponent less that of packed scales (`layouts.power_of`).
    scale: float
    #: The CUDA device's number.
    device: int

    @classmethod
    def from_artifact(cls, artifact: ArtifactFile, name: str) -> QuantizedWeight:
        """Puts one tensor of an open artifact on the current device.

        Raises:
            UsageError: There is no such tensor, it was kept as it was, or it is no matrix.
            ArtifactError: The file is damaged.
        """
        return cls.from_parts(*artifact.quantised(name))

    @classmethod
    def from_parts(
        cls, codec: str, parts: Mapping[str, Any], shape: Sequence[int], axis: int = -1, exponent: int = 0
    ) -> QuantizedWeight:
        """Packs what a codec stores, on the current device.

        Args:
            codec: The codec's name.
            parts: Its arrays by name, [rows, elements per row], NumPy or CuPy, as `ArtifactFile.parts` and
                `tenpak.encode` give them.
            shape: The tensor's shape: [n, k], with axis 0 [k, n], or a batch of either.
            axis: The input dimension.
            exponent: Weights are multiplied by two to this power.

        Raises:
            UsageError: Parts or shape do not fit.
        """
        layout = layouts.find(codec_named(codec).layout)
        n, k, batch = layouts.matrices(shape, axis)
        arrays = gpu.parts_on_device(codec, parts, tuple(shape), axis % len(shape))
        codes, params, row_params, power = gpu.pack(layout, arrays, n, k, batch)
        scale = 2.0 ** (exponent - power)
        return cls(layout.name, (n, k), batch, codes, params, row_params, scale, codes.device.id)

    @classmethod
    def from_array(cls, array: Any, codec: str, axis: int = -1) -> QuantizedWeight:
        """Quantises a float array: a CuPy array on its device, a NumPy array for the current one.

        Min/max codecs encode on the GPU, the others on the CPU; either gives what `tenpak.encode` gives.

        Raises:
            InputError: A weight is NaN or infinite.
            UsageError: An unknown codec or dtype, or a shape that is no linear layer's.
        """
        layouts.matrices(array.shape, axis)
        if not isinstance(array, cupy.ndarray):
            given = np.asarray(array)
            # CuPy takes bfloat16 from version 14 on; FP32 holds it exactly.
            array = cupy.asarray(given.astype(np.float32) if dtypes.name_of(given.dtype) == "BF16" else given)
        with cupy.cuda.Device(array.device.id):
            encoded = gpu.encode(array, codec, axis)
            return cls.from_parts(codec, encoded.parts, encoded.shape, encoded.axis, encoded.exponent)

    def to_dense(self, dtype: DTypeLike = np.float16) -> Any:
        """The weight as a CuPy array [n, k] (or [batch, n, k]), in the bits of `tenpak.decode`.

        Args:
            dtype: float16, float32, or bfloat16 (`ml_dtypes`).
        """
        return gpu.decode_packed(self, dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of GPU memory."""
        return sum(a.nbytes for a in (self.codes, self.params, self.row_params) if a is not None)

    @property
    def bits_per_weight(self) -> float:
        """Bits of GPU memory over the number of weights, padding counted in."""
        weights = max(self.batch, 1) * self.shape[0] * self.shape[1]
        return 8 * self.nbytes / weights if weights else 0.0
