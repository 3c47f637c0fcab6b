"""One linear layer."""

from __future__ import annotations

from typing import Any

#: Rows of inputs up to which they are better on the right.
_FEW = 64


class Linear:
    """y = x Wᵀ + b.

    Anything with a `name` that is called with inputs can stand in its place, among `Block.linears`.
    """

    def __init__(self, name: str, weight: Any, bias: Any | None = None) -> None:
        #: The weight's name in the model.
        self.name = name
        #: [out, in]; may be replaced by an array of the same shape.
        self.weight = weight
        #: [out], or None.
        self.bias = bias

    def __call__(self, x: Any) -> Any:
        """[…, in] to […, out]."""
        # One product of matrices is faster than one for each sequence.
        x2 = x.reshape(-1, x.shape[-1])
        # OpenBLAS reads a large matrix with few columns beside it up to three times as fast as one with few rows.
        y = (self.weight @ x2.T).T.copy() if 1 < len(x2) <= _FEW else x2 @ self.weight.T
        if self.bias is not None:
            y += self.bias
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def __repr__(self) -> str:
        out, width = self.weight.shape
        return f"Linear({self.name!r}, {width} -> {out}{', bias' if self.bias is not None else ''})"
