"""GPT-2: learnt positions, layer norms, one projection for queries, keys and values (Radford et al. 2019)."""

from __future__ import annotations

from typing import Any

from tenpak.decoder.block import Block, Observe
from tenpak.decoder.cache import Cache
from tenpak.decoder.layers import LayerNorm
from tenpak.decoder.weights import Weights

EMBEDDING, POSITIONS = "wte.weight", "wpe.weight"


class GPT2Block(Block):
    """A layer; its linear weights are stored as [in, out]."""

    def __init__(self, weights: Weights, index: int) -> None:
        super().__init__(weights, index)
        width, inner = self._config.width, self._config.intermediate
        at = f"h.{index}"
        self.attention_norm = norm(weights, f"{at}.ln_1")
        self.qkv = (self._add(weights.linear(f"{at}.attn.c_attn", 3 * width, width, bias=True)),)
        self.out = (self._add(weights.linear(f"{at}.attn.c_proj", width, width, bias=True)),)
        self.mlp_norm = norm(weights, f"{at}.ln_2")
        self.up = (self._add(weights.linear(f"{at}.mlp.c_fc", inner, width, bias=True)),)
        self.down = (self._add(weights.linear(f"{at}.mlp.c_proj", width, inner, bias=True)),)

    def __call__(self, h: Any, start: int = 0, cache: Cache | None = None, observe: Observe | None = None) -> Any:
        q, k, v = self._split(self._project(self.qkv, self.attention_norm(h), observe))
        mixed = self._attend(q, k, v, start, cache)
        (y,) = self._project(self.out, mixed, observe)
        h = h + y
        (up,) = self._project(self.up, self.mlp_norm(h), observe)
        (y,) = self._project(self.down, self._activate(up), observe)
        h += y
        return h


def norm(weights: Weights, name: str) -> LayerNorm:
    """The layer norm of that name."""
    config = weights.config
    weight, bias = (weights.array(f"{name}.{part}", config.width) for part in ("weight", "bias"))
    return LayerNorm(weight, bias, config.norm_eps, xp=weights.xp, name=f"{weights.prefix}{name}.weight")
