"""How many threads callers may ask for, and work on all cores where NumPy takes one."""

from __future__ import annotations

import operator
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

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


def share_out(work: Callable[[slice], object], count: int) -> None:
    """Calls `work` with slices that cover `count` items, on all cores at once."""
    cores = _cores()
    each = max(1, -(-count // cores))
    list(_pool().map(work, [slice(i, i + each) for i in range(0, count, each)]))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_cores(), "tenpak")


if hasattr(os, "register_at_fork"):
    # A child has none of its parent's threads.
    os.register_at_fork(after_in_child=_pool.cache_clear)
