"""A model of any size with made-up weights, for what runs decoders and does not care what they say."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import tenpak
from tenpak.decoder.source import ArtifactSource


class RandomSource(ArtifactSource):
    """A source that makes up its tensors: Gaussian matrices under a codec, norms of ones.

    Args:
        config: A Llama's, as its `config.json`; heads are `hidden_size` / `num_attention_heads` wide.
        codec: For the layers' matrices, each shape of which is encoded once.
        embeddings: The codec for both matrices of `vocab_size` rows.
    """

    def __init__(self, config: dict[str, Any], codec: str, embeddings: str) -> None:
        self.path, self.config = f"random weights, {codec}", config
        width, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
        kv = width * config["num_key_value_heads"] // config["num_attention_heads"]
        self.shapes = {"model.embed_tokens.weight": (vocab, width), "lm_head.weight": (vocab, width)}
        for i in range(config["num_hidden_layers"]):
            at = f"model.layers.{i}"
            for name, n, k in (
                ("self_attn.q_proj", width, width),
                ("self_attn.k_proj", kv, width),
                ("self_attn.v_proj", kv, width),
                ("self_attn.o_proj", width, width),
                ("mlp.gate_proj", inner, width),
                ("mlp.up_proj", inner, width),
                ("mlp.down_proj", width, inner),
            ):
                self.shapes[f"{at}.{name}.weight"] = (n, k)
            for name in ("input_layernorm", "post_attention_layernorm"):
                self.shapes[f"{at}.{name}.weight"] = (width,)
        self.shapes["model.norm.weight"] = (width,)
        self._codec, self._embeddings = codec, embeddings
        self._encoded: dict[tuple[tuple[int, ...], str], Any] = {}
        self.artifact = self  # type: ignore[assignment]

    def _one(self, name: str) -> Any:
        shape = self.shapes[name]
        codec = self._embeddings if shape[0] == self.config["vocab_size"] else self._codec
        if (shape, codec) not in self._encoded:
            random = np.random.default_rng(len(self._encoded))
            weights = random.standard_normal(shape, np.float32) * np.float32(0.02)
            self._encoded[shape, codec] = tenpak.encode(weights, codec)
        return self._encoded[shape, codec]

    def info(self, name: str) -> Any:
        one = self._one(name)
        return SimpleNamespace(codec=one.codec, exponent=one.exponent, shape=one.shape, axis=one.axis)

    def parts(self, name: str) -> Any:
        return self._one(name).parts

    def quantised(self, name: str) -> tuple[str, Any, tuple[int, ...], int, int]:
        one = self._one(name)
        return one.codec, one.parts, one.shape, one.axis, one.exponent

    def read(self, name: str, dtype: Any = None) -> Any:
        return np.ones(self.shapes[name], np.float32)
