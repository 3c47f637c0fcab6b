"""Other kernels that multiply with weights of four bits, each as a list of layers that are called with x.

Every one is optional: what is missing is not measured. Layers hold random weights, since speed does not depend on what
they hold, and each copy its own memory.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch

#: Called with x [m, k] in its `dtype`.
Layer = Callable[[torch.Tensor], object]


class Peer:
    """A kernel to be compared with; `dtype` is that of activations."""

    dtype = torch.float16

    def __init__(self, name: str, make: Callable[[int, int, int], Layer], groups: tuple[int, ...]) -> None:
        self.name, self._make, self.groups = name, make, groups

    def layers(self, n: int, k: int, group: int, copies: int) -> list[Layer]:
        """Layers of [n, k] with groups of `group`; raises what the package raises."""
        first = self._make(n, k, group)
        return [first, *(copy.deepcopy(first) for _ in range(copies - 1))]


class _Bfloat16Peer(Peer):
    dtype = torch.bfloat16


def peers() -> list[Peer]:
    """Those that are installed."""
    found = [_Bfloat16Peer("tinygemm", _tinygemm, (32, 64, 128))]
    for package, peer in (
        ("humming", Peer("Humming", _humming, (32, 64, 128))),
        ("gemlite", Peer("GemLite", _gemlite, (32, 64, 128))),
    ):
        try:
            __import__(package)
        except Exception:  # a peer that does not load is one that is not there
            continue
        found.append(peer)
    return found


def _tinygemm(n: int, k: int, group: int) -> Layer:
    """PyTorch's own, for BF16: https://github.com/pytorch/pytorch, aten/src/ATen/native/cuda/int4mm.cu."""
    codes = torch.randint(0, 256, (n, k // 2), device="cuda", dtype=torch.uint8)
    packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
    scales = torch.rand(k // group, n, 2, device="cuda", dtype=torch.bfloat16) * 0.01
    return partial(_int4pack_mm, packed=packed, group=group, scales=scales)


def _int4pack_mm(x: torch.Tensor, packed: torch.Tensor, group: int, scales: torch.Tensor) -> torch.Tensor:
    return torch.ops.aten._weight_int4pack_mm(x, packed, group, scales)


def _humming(n: int, k: int, group: int) -> Layer:
    """Humming with a floating-point zero, q · scale + offset: https://pypi.org/project/humming-kernels."""
    from humming.layer import HummingLayer

    config = {"dtype": "uint4", "weight_scale_group_size": group, "has_zero_point": True, "is_fp_zero_point": True}
    layer = HummingLayer(n, k, weight_config=config, torch_dtype=torch.float16).cuda()
    layer.load_from_unquantized(torch.randn(n, k, device="cuda", dtype=torch.float16) * 0.02)
    layer.transform()
    return layer


def _gemlite(n: int, k: int, group: int) -> Layer:
    """GemLite, which tunes itself at the first calls: https://pypi.org/project/gemlite."""
    from gemlite.core import DType, GemLiteLinear

    layer = GemLiteLinear(4, group, k, n, input_dtype=DType.FP16, output_dtype=DType.FP16)
    codes = torch.randint(0, 16, (n, k), device="cuda", dtype=torch.uint8)
    scales, zeros = (torch.rand(n * k // group, 1, device="cuda", dtype=torch.float16) for _ in range(2))
    layer.pack(codes, scales * 0.01, zeros * 15, None)
    return layer
