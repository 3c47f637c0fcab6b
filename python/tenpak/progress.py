"""What long work calls now and then, to say how far it is."""

from __future__ import annotations

from collections.abc import Callable

#: Called with what is done and in all, weights or tokens, several times a second.
Progress = Callable[[int, int], object]
#: Called with steps done and in all, and what is being done.
StageProgress = Callable[[int, int, str], object]
