"""Keys and values of the positions that a decoder has seen, layer by layer."""

from __future__ import annotations

from typing import Any

from tenpak.decoder.layers import attention
from tenpak.errors import UsageError


class Cache:
    """Grows as blocks append to it; it belongs to one batch of sequences of equal length."""

    def __init__(self, layers: int, *, xp: Any, room: int = 0) -> None:
        """`room` is how many positions it holds before it has to grow."""
        self._xp, self._room = xp, max(room, 64)
        self._keys: list[Any] = [None] * layers
        self._values: list[Any] = [None] * layers
        self._lengths = [0] * layers

    @property
    def length(self) -> int:
        """Positions that every layer has seen."""
        return min(self._lengths)

    def append(self, layer: int, keys: Any, values: Any) -> tuple[Any, Any]:
        """Adds [batch, kv_heads, new, head_dim] to a layer; returns all of it, as views that the next call ends."""
        start = self._lengths[layer]
        end = start + keys.shape[2]
        for held, new in ((self._keys, keys), (self._values, values)):
            if held[layer] is None or held[layer].shape[2] < end:
                held[layer] = self._grown(held[layer], new, start, end)
            held[layer][:, :, start:end] = new
        self._lengths[layer] = end
        return self._keys[layer][:, :, :end], self._values[layer][:, :, :end]

    def attend(self, layer: int, start: int, q: Any, k: Any, v: Any, scale: float, window: int | None) -> Any:
        """Adds keys and values at positions `start …`; their queries' attention over all, [batch, T, heads · head_dim].

        Raises:
            UsageError: `start` is not where the layer's tokens end.
        """
        self._check_start(layer, start)
        k, v = self.append(layer, k, v)
        return attention(q, k, v, scale, window, xp=self._xp)

    def _check_start(self, layer: int, start: int) -> None:
        if self._lengths[layer] != start:
            raise UsageError(f"the cache has {self._lengths[layer]} positions, but the next is {start}")

    def truncate(self, length: int) -> None:
        """Forgets positions from `length` on."""
        self._lengths = [min(n, length) for n in self._lengths]

    def _grown(self, old: Any, new: Any, start: int, end: int) -> Any:
        # Doubling keeps the copies of a long generation below its own size.
        batch, heads, _, head_dim = new.shape
        room = max(end, self._room) if old is None else max(end, 2 * old.shape[2])
        grown = self._xp.empty((batch, heads, room, head_dim), new.dtype)
        if old is not None:
            grown[:, :, :start] = old[:, :, :start]
        return grown
