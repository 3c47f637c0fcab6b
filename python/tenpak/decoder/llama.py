"""Llama and its kin, Mistral, Qwen2 and Qwen3: rotated positions, RMS norms, gated MLP (Touvron et al. 2023)."""

from __future__ import annotations

from typing import Any

from tenpak.decoder.block import Block, Observe
from tenpak.decoder.cache import Cache
from tenpak.decoder.layers import RMSNorm, Rotary
from tenpak.decoder.weights import Weights

EMBEDDING = "embed_tokens.weight"


class LlamaBlock(Block):
    """A layer; `rotary` is shared by all of them."""

    def __init__(self, weights: Weights, index: int, rotary: Rotary) -> None:
        super().__init__(weights, index)
        config = self._config
        width, inner = config.width, config.intermediate
        queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
        at = f"layers.{index}"
        self._rotary = rotary
        self.attention_norm = norm(weights, f"{at}.input_layernorm", width)
        self.qkv = (
            self._add(weights.linear(f"{at}.self_attn.q_proj", queries, width, config.qkv_bias)),
            self._add(weights.linear(f"{at}.self_attn.k_proj", keys, width, config.qkv_bias)),
            self._add(weights.linear(f"{at}.self_attn.v_proj", keys, width, config.qkv_bias)),
        )
        if config.qk_norm:
            self.q_norm = norm(weights, f"{at}.self_attn.q_norm", config.head_dim)
            self.k_norm = norm(weights, f"{at}.self_attn.k_norm", config.head_dim)
        self.out = (self._add(weights.linear(f"{at}.self_attn.o_proj", width, queries, config.out_bias)),)
        self.mlp_norm = norm(weights, f"{at}.post_attention_layernorm", width)
        self.up = (
            self._add(weights.linear(f"{at}.mlp.gate_proj", inner, width, config.mlp_bias)),
            self._add(weights.linear(f"{at}.mlp.up_proj", inner, width, config.mlp_bias)),
        )
        self.down = (self._add(weights.linear(f"{at}.mlp.down_proj", width, inner, config.mlp_bias)),)

    def __call__(self, h: Any, start: int = 0, cache: Cache | None = None, observe: Observe | None = None) -> Any:
        q, k, v = self._split(self._project(self.qkv, self.attention_norm(h), observe))
        q, k = self._normed(q, k)
        mixed = self._attend(q, k, v, start, cache)
        (y,) = self._project(self.out, mixed, observe)
        h = h + y
        gate, up = self._project(self.up, self.mlp_norm(h), observe)
        up *= self._activate(gate)
        (y,) = self._project(self.down, up, observe)
        h += y
        return h


def norm(weights: Weights, name: str, width: int) -> RMSNorm:
    """The RMS norm of that name."""
    weight = weights.array(f"{name}.weight", width)
    return RMSNorm(weight, weights.config.norm_eps, xp=weights.xp, name=f"{weights.prefix}{name}.weight")
