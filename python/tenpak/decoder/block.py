"""What the blocks of every family share: linear layers by name, and attention over new and cached positions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from tenpak.decoder.cache import Cache
from tenpak.decoder.gradients import attention_backward, derivative, norm_backward
from tenpak.decoder.layers import LayerNorm, RMSNorm, Rotary, activation, attention
from tenpak.decoder.linear import Linear
from tenpak.decoder.weights import Weights

#: Called with the names of the linear layers that share an input, and that input, [batch, T, in], which may be changed.
Observe = Callable[[tuple[str, ...], Any], object]
#: The same, and the gradients at the outputs of each of them, [batch, T, out].
ObserveBackward = Callable[[tuple[str, ...], Any, list[Any]], object]
#: Called with a norm, its input, and the gradient at its output, of one shape.
ObserveNorm = Callable[[RMSNorm | LayerNorm, Any, Any], object]


#: A block's norms, by their attributes.
NORMS = ("attention_norm", "mlp_norm", "q_norm", "k_norm")


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
        self._rotary: Rotary | None = None
        self._activate = activation(config.activation, xp=weights.xp)
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

    def backward(self, h: Any, d: Any, observe: ObserveBackward, observe_norm: ObserveNorm | None = None) -> Any:
        """Goes through the layer backwards, computing it again.

        Args:
            h: What the layer was given, [batch, T, width], at the first positions.
            d: The gradient of a loss at its output, of the same shape.
            observe: Called once for each distinct input of linear layers, in the order of use turned round.
            observe_norm: Called once for each norm, in that order too.

        Returns:
            The gradient at `h`, in a new array.
        """
        xp, config = self._xp, self._config

        def through(norm: RMSNorm | LayerNorm, x: Any, d: Any) -> Any:
            if observe_norm is not None:
                observe_norm(norm, x, d)
            return norm_backward(norm, x, d, xp=xp)

        x = self.attention_norm(h)
        q, k, v = self._split(self._project(self.qkv, x, None))
        rotated_q, rotated_k = (t if self._rotary is None else self._rotary(t, 0) for t in self._normed(q, k))
        mixed = attention(rotated_q, rotated_k, v, self._score_scale, self._window, xp=xp)
        after = h + self.linears[self.out[0]](mixed)
        y = self.mlp_norm(after)
        upper = self._project(self.up, y, None)
        # The function may write over what it is given.
        activated = self._activate(upper[0].copy())
        slope = derivative(config.activation, xp=xp)(upper[0])
        inner = activated * upper[1] if len(upper) == 2 else activated

        observe(self.down, inner, [d])
        d_inner = self._back(self.down, [d])
        slope *= d_inner
        d_upper = [slope] if len(upper) == 1 else [slope * upper[1], d_inner * activated]
        observe(self.up, y, d_upper)
        d = d + through(self.mlp_norm, after, self._back(self.up, d_upper))
        observe(self.out, mixed, [d])
        d_mixed = self._back(self.out, [d])
        d_q, d_k, d_v = attention_backward(rotated_q, rotated_k, v, d_mixed, self._score_scale, self._window, xp=xp)
        if self._rotary is not None:
            d_q, d_k = (self._rotary(t, 0, back=True) for t in (d_q, d_k))
        if self.q_norm is not None and self.k_norm is not None:
            d_q, d_k = through(self.q_norm, q, d_q), through(self.k_norm, k, d_k)
        d_qkv = [t.transpose(0, 2, 1, 3).reshape(*h.shape[:2], -1) for t in (d_q, d_k, d_v)]
        if len(self.qkv) == 1:
            d_qkv = [xp.concatenate(d_qkv, axis=-1)]
        observe(self.qkv, x, d_qkv)
        return d + through(self.attention_norm, h, self._back(self.qkv, d_qkv))

    def _back(self, names: tuple[str, ...], d: list[Any]) -> Any:
        """The gradient at the input that linear layers share, from those at their outputs."""
        parts = [g.reshape(-1, g.shape[-1]) @ self.linears[name].weight for name, g in zip(names, d, strict=True)]
        return sum(parts[1:], parts[0]).reshape(*d[0].shape[:-1], -1)

    def _split(self, qkv: list[Any]) -> list[Any]:
        """Queries, keys and values by heads, from what one layer or three have put out."""
        config, xp = self._config, self._xp
        if len(qkv) == 1:
            qkv = xp.split(qkv[0], 3, axis=-1)
        return [self._heads(t, n) for t, n in zip(qkv, (config.heads, config.kv_heads, config.kv_heads), strict=True)]

    def _normed(self, q: Any, k: Any) -> tuple[Any, Any]:
        if self.q_norm is None or self.k_norm is None:
            return q, k
        return self.q_norm(q), self.k_norm(k)

    def _add(self, linear: Linear) -> str:
        self.linears[linear.name] = linear
        return linear.name

    def _project(self, names: tuple[str, ...], x: Any, observe: Observe | None) -> list[Any]:
        """The outputs of linear layers that share an input."""
        if observe is not None:
            observe(names, x)
        return [self.linears[name](x) for name in names]

    def _attend(self, q: Any, k: Any, v: Any, start: int, cache: Cache | None) -> Any:
        """Attention of [batch, heads, T, head_dim] over themselves and the cache; [batch, T, heads · head_dim]."""
        if self._rotary is not None:
            q, k = self._rotary(q, start), self._rotary(k, start)
        if cache is not None:
            return cache.attend(self.index, start, q, k, v, self._score_scale, self._window)
        return attention(q, k, v, self._score_scale, self._window, xp=self._xp)

    def _heads(self, x: Any, heads: int) -> Any:
        """[batch, T, heads · head_dim] as [batch, heads, T, head_dim]."""
        return x.reshape(*x.shape[:2], heads, self._config.head_dim).transpose(0, 2, 1, 3)
