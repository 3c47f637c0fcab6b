"""What the blocks of every family share: linear layers by name, and attention over new and cached positions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from tenpak.decoder.cache import Cache
from tenpak.decoder.layers import LayerNorm, RMSNorm, Rotary, attention
from tenpak.decoder.linear import Linear
from tenpak.decoder.weights import Weights

#: Called with the names of the linear layers that share an input, and that input, [batch, T, in].
Observe = Callable[[tuple[str, ...], Any], object]


class Block(ABC):
    """One layer of a decoder.

    Which linear layers it has is told by their names, in the order of use: those that share an input stand together.
    """

    #: The norms before attention and before the MLP.
    attention_norm: RMSNorm | LayerNorm
    mlp_norm: RMSNorm | LayerNorm
    #: Norms of each query's and each key's elements, before rotation.
    q_norm: RMSNorm | None = None
    k_norm: RMSNorm | None = None
    #: Queries, keys and values, in one layer or in three; attention's output; the MLP's one or two upper layers, the
    #: first of two being the gate; and its lower one.
    qkv: tuple[str, ...]
    out: tuple[str, ...]
    up: tuple[str, ...]
    down: tuple[str, ...]

    def __init__(self, weights: Weights, index: int) -> None:
        config = weights.config
        self.index = index
        #: By the weight's name in the model, in the order of use; values may be replaced.
        self.linears: dict[str, Linear] = {}
        self._config, self._xp = config, weights.xp
        self._window, self._score_scale = config.windows[index], config.score_scales[index]

    @abstractmethod
    def __call__(self, h: Any, start: int = 0, cache: Cache | None = None, observe: Observe | None = None) -> Any:
        """Runs the layer.

        Args:
            h: Hidden states, [batch, T, width], FP32.
            start: The position of the first of them. Without a cache, earlier positions are not seen.
            cache: Holds keys and values of all positions before `start`, and gets the new ones.
            observe: Called once for each distinct input of linear layers, before they use it.

        Returns:
            Hidden states of the same shape, in a new array.
        """

    def _add(self, linear: Linear) -> str:
        self.linears[linear.name] = linear
        return linear.name

    def _project(self, names: tuple[str, ...], x: Any, observe: Observe | None) -> list[Any]:
        """The outputs of linear layers that share an input."""
        if observe is not None:
            observe(names, x)
        return [self.linears[name](x) for name in names]

    def _attend(self, q: Any, k: Any, v: Any, start: int, cache: Cache | None, rotary: Rotary | None) -> Any:
        """Attention of [batch, heads, T, head_dim] over themselves and the cache; [batch, T, heads · head_dim]."""
        if rotary is not None:
            q, k = rotary(q, start), rotary(k, start)
        if cache is not None:
            return cache.attend(self.index, start, q, k, v, self._score_scale, self._window)
        return attention(q, k, v, self._score_scale, self._window, xp=self._xp)

    def _heads(self, x: Any, heads: int) -> Any:
        """[batch, T, heads · head_dim] as [batch, heads, T, head_dim]."""
        return x.reshape(*x.shape[:2], heads, self._config.head_dim).transpose(0, 2, 1, 3)
