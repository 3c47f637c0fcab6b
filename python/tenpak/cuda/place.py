"""Moves a decoder's quantised layers to the kernels of this package, where its weights stay quantised."""

from __future__ import annotations

from typing import Any

import cupy

from tenpak.artifact import KEEP
from tenpak.cuda.products import matmul
from tenpak.cuda.weight import QuantizedWeight
from tenpak.decoder import Decoder, Linear
from tenpak.decoder.source import ArtifactSource


class QuantizedLinear:
    """y = x Wᵀ + b in the place of a decoder's `Linear`: FP32 outside, FP16 products with FP32 sums inside."""

    def __init__(self, name: str, weight: QuantizedWeight, bias: Any | None = None) -> None:
        #: The weight's name in the model.
        self.name = name
        self.weight = weight
        #: [out], or None.
        self.bias = bias

    def __call__(self, x: Any) -> Any:
        """[…, in] to […, out]."""
        y = matmul(x.astype(cupy.float16), self.weight).astype(cupy.float32)
        if self.bias is not None:
            y += self.bias
        return y

    def __repr__(self) -> str:
        n, k = self.weight.shape
        return f"QuantizedLinear({self.name!r}, {k} -> {n}{', bias' if self.bias is not None else ''})"


def place(decoder: Decoder) -> int:
    """Replaces the linear layers of a decoder on CuPy whose weights a `.tenpak` holds under a codec.

    Others stay as they are, in FP32. Returns how many were replaced.

    Raises:
        ArtifactError: The file is damaged.
    """
    source = decoder.source
    if not isinstance(source, ArtifactSource):
        return 0
    artifact = source.artifact

    def moved(linear: Linear) -> Any:
        if not isinstance(linear, Linear) or artifact.info(linear.name).codec == KEEP:
            return linear
        return QuantizedLinear(linear.name, QuantizedWeight.from_artifact(artifact, linear.name), linear.bias)

    return decoder.replace_linears(moved)
