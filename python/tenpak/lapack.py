"""The one thing that the core asks of NumPy's LAPACK: Cholesky factors."""

from __future__ import annotations

import numpy as np


def lower_factor(matrix: memoryview, n: int) -> bool:
    """Replaces a symmetric matrix by its lower Cholesky factor, in place.

    Args:
        matrix: [n, n] float64, writable; only what lies on and below the diagonal is read.
        n: Rows.

    Returns:
        Whether it is positive definite; otherwise nothing has changed.
    """
    array = np.frombuffer(matrix, np.float64).reshape(n, n)
    try:
        array[...] = np.linalg.cholesky(array)
    except np.linalg.LinAlgError:
        return False
    return True
