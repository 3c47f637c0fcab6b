"""How many threads callers may ask for."""

from __future__ import annotations

import operator

from tenpak.errors import UsageError

_MOST = 1024


def checked_threads(threads: int | None) -> int:
    """As the core takes it: 0 for None, which is a thread on each core.

    Raises:
        UsageError: No number from 1 to 1024.
    """
    if threads is None:
        return 0
    try:
        number = operator.index(threads)
    except TypeError:
        number = 0
    if not 1 <= number <= _MOST:
        raise UsageError(f"threads {threads!r}: give a number from 1 to {_MOST}")
    return number
