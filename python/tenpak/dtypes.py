"""Element types between NumPy and the core, which names them as safetensors does."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from tenpak.errors import UsageError

_NUMPY: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
#: Those that codecs take.
WEIGHTS = ("F32", "F16", "BF16")


def stored(name: str) -> np.dtype[Any]:
    """The NumPy dtype with the same bytes; BF16 and 8-bit floats, which NumPy lacks, as unsigned integers."""
    return _NUMPY.get(name) or np.dtype("<u2" if name == "BF16" else "u1")


def readable(name: str) -> str:
    """The dtype in which NumPy can read weights of that one: BF16 becomes F32."""
    return "F32" if name == "BF16" else name


def name_of(dtype: DTypeLike) -> str:
    """The core's name of a NumPy dtype, or of a name; `ml_dtypes.bfloat16` is BF16."""
    if isinstance(dtype, str) and dtype.upper() in {*_NUMPY, "BF16"}:
        return dtype.upper()
    if isinstance(dtype, str) and dtype == "bfloat16":
        return "BF16"
    try:
        found = np.dtype(dtype)
    except TypeError:
        raise UsageError(f"{dtype!r} is no dtype; use float32, float16 or bfloat16 for weights") from None
    if found.name == "bfloat16":
        return "BF16"
    for name, known in _NUMPY.items():
        if found.newbyteorder("<") == known:
            return name
    raise UsageError(f"arrays of {found} are not supported; use float32, float16 or bfloat16 for weights")


def bytes_of(array: NDArray[Any]) -> tuple[NDArray[np.uint8], str]:
    """The array's bytes, C-contiguous and little-endian, and the core's name of its dtype."""
    name = name_of(array.dtype)
    if not array.dtype.isnative:
        if name == "BF16":
            # NumPy knows no other order of a type that is not its own.
            array = np.ascontiguousarray(array).view(">u2")
        array = array.astype(array.dtype.newbyteorder("<"))
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8), name
