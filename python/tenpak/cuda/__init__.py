"""Weights that stay quantised in GPU memory, and products with them.

    from tenpak.cuda import QuantizedWeight, matmul

    weight = QuantizedWeight.from_artifact(tenpak.open("model.tenpak"), "model.layers.0.mlp.up_proj.weight")
    y = matmul(x, weight)                      # x: a CuPy array [..., in], float16 or bfloat16

    from tenpak.cuda import G8Linear           # the same for PyTorch
    layer = G8Linear.from_linear(torch_linear)

Names are loaded at first use: `G8Linear` needs PyTorch, the others CuPy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from tenpak.errors import UnsupportedError

if TYPE_CHECKING:
    from tenpak.cuda.attention import append_and_attend, attend, prefill
    from tenpak.cuda.cache import KVCache, RotaryTable
    from tenpak.cuda.codec import decode, encode
    from tenpak.cuda.linear import G8Linear
    from tenpak.cuda.products import grouped_matmul, matmul
    from tenpak.cuda.weight import QuantizedWeight

__all__ = [
    "G8Linear",
    "KVCache",
    "QuantizedWeight",
    "RotaryTable",
    "append_and_attend",
    "attend",
    "decode",
    "encode",
    "grouped_matmul",
    "matmul",
    "prefill",
]

#: Where each name is, and the package that it needs.
_MODULES = {
    "G8Linear": ("tenpak.cuda.linear", "torch"),
    "KVCache": ("tenpak.cuda.cache", "cupy"),
    "QuantizedWeight": ("tenpak.cuda.weight", "cupy"),
    "RotaryTable": ("tenpak.cuda.cache", "cupy"),
    "append_and_attend": ("tenpak.cuda.attention", "cupy"),
    "attend": ("tenpak.cuda.attention", "cupy"),
    "decode": ("tenpak.cuda.codec", "cupy"),
    "encode": ("tenpak.cuda.codec", "cupy"),
    "grouped_matmul": ("tenpak.cuda.products", "cupy"),
    "matmul": ("tenpak.cuda.products", "cupy"),
    "prefill": ("tenpak.cuda.attention", "cupy"),
}
_INSTALL = {
    "cupy": "CuPy is not installed; pip install 'tenpak[cuda13]' (or cuda12, for CUDA 12 drivers)",
    "torch": "PyTorch is not installed; pip install 'tenpak[torch]'",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, package = _MODULES[name]
    try:
        loaded = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise UnsupportedError(f"tenpak.cuda.{name}: {_INSTALL[package]}") from error
    found = globals()[name] = getattr(loaded, name)
    return found


def __dir__() -> list[str]:
    return __all__
