"""GGUF files as llama.cpp's converter writes them, from arrays or from a Hugging Face folder."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tenpak import _core

_LLAMA_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_GPT2_NAMES = {
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm",
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}


def write_gguf(path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, Any] | None = None) -> Path:
    """GGUF version 3, which lists dimensions from the innermost out; arrays are FP32 or FP16."""
    pairs = {"general.architecture": "llama"} if metadata is None else metadata
    head = b"GGUF" + struct.pack("<IQQ", 3, len(arrays), len(pairs))
    for key, value in pairs.items():
        head += _text(key) + _value(value)
    data = b""
    for name, array in arrays.items():
        data += bytes(-len(data) % 32)
        dimensions = array.shape[::-1]
        kind = {"float32": 0, "float16": 1}[array.dtype.name]
        head += _text(name) + struct.pack(f"<I{len(dimensions)}QIQ", len(dimensions), *dimensions, kind, len(data))
        data += array.tobytes()
    path.write_bytes(head + bytes(-len(head) % 32) + data)
    return path


def convert(folder: Path, path: Path, **more: Any) -> Path:
    """The folder's model under GGUF names, every tensor FP32, with the metadata that llama.cpp reads.

    `more` are further pairs of metadata; `__` stands for a dot.
    """
    config = json.loads((folder / "config.json").read_text())
    kind = config["model_type"]
    source = _core.Model(str(folder))
    arrays = {}
    for name, shape, _ in source.tensors():
        array = np.empty(shape, np.float32)
        source.read(name, 1, array.reshape(-1).view(np.uint8))
        arrays[name] = array
    metadata = {"general.architecture": kind} | (_gpt2_metadata(config) if kind == "gpt2" else _metadata(config))
    if (folder / "tokenizer.json").exists():
        metadata |= tokenizer_metadata(json.loads((folder / "tokenizer.json").read_text()))
    metadata |= {key.replace("__", "."): value for key, value in more.items()}
    converted = dict(_converted(config, name, array) for name, array in arrays.items())
    if (config.get("rope_scaling") or {}).get("rope_type") == "llama3":
        converted["rope_freqs.weight"] = _rope_factors(config)
    return write_gguf(path, converted, metadata)


def tokenizer_metadata(tokenizer: dict[str, Any]) -> dict[str, Any]:
    """A byte-level BPE tokenizer without steps before its pattern."""
    vocabulary = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].__getitem__)
    special = {token["id"] for token in tokenizer["added_tokens"]}
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in tokenizer["model"]["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": vocabulary,
        "tokenizer.ggml.token_type": [3 if i in special else 1 for i in range(len(vocabulary))],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 0,
    }


def _converted(config: dict[str, Any], name: str, array: np.ndarray) -> tuple[str, np.ndarray]:
    gpt2 = config["model_type"] == "gpt2"
    module, part = name.rsplit(".", 1)
    prefix, names = "", _GPT2_NAMES if gpt2 else _LLAMA_NAMES
    layers = "transformer.h." if gpt2 else "model.layers."
    if module.startswith(layers):
        index, module = module.removeprefix(layers).split(".", 1)
        prefix = f"blk.{index}."
    if gpt2 and module in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj") and part == "weight":
        array = np.ascontiguousarray(array.T)
    heads = {"self_attn.q_proj": "num_attention_heads", "self_attn.k_proj": "num_key_value_heads"}.get(module)
    if config["model_type"] == "llama" and heads:
        # llama.cpp rotates neighbours, so that its converter interleaves the halves of each head.
        halves = array.reshape(config[heads], 2, -1, *array.shape[1:])
        array = np.ascontiguousarray(halves.swapaxes(1, 2).reshape(array.shape))
    return f"{prefix}{names[module]}.{part}", array


def _metadata(config: dict[str, Any]) -> dict[str, Any]:
    kind = config["model_type"]
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    out = {
        f"{kind}.block_count": config["num_hidden_layers"],
        f"{kind}.context_length": config["max_position_embeddings"],
        f"{kind}.embedding_length": config["hidden_size"],
        f"{kind}.feed_forward_length": config["intermediate_size"],
        f"{kind}.attention.head_count": config["num_attention_heads"],
        f"{kind}.attention.head_count_kv": config["num_key_value_heads"],
        f"{kind}.attention.key_length": head_dim,
        f"{kind}.attention.value_length": head_dim,
        f"{kind}.rope.dimension_count": head_dim,
        f"{kind}.rope.freq_base": float(config.get("rope_theta", 10000.0)),
        f"{kind}.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
    }
    scaling = config.get("rope_scaling") or {}
    if scaling.get("rope_type") == "linear":
        out |= {f"{kind}.rope.scaling.type": "linear", f"{kind}.rope.scaling.factor": scaling["factor"]}
    return out


def _gpt2_metadata(config: dict[str, Any]) -> dict[str, Any]:
    return {
        "gpt2.block_count": config["n_layer"],
        "gpt2.context_length": config["n_positions"],
        "gpt2.embedding_length": config["n_embd"],
        "gpt2.feed_forward_length": config.get("n_inner") or 4 * config["n_embd"],
        "gpt2.attention.head_count": config["n_head"],
        "gpt2.attention.layer_norm_epsilon": config["layer_norm_epsilon"],
    }


def _rope_factors(config: dict[str, Any]) -> np.ndarray:
    """What each frequency is divided by, as in llama.cpp's converter."""
    scaling = config["rope_scaling"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    original, factor, head_dim = scaling["original_max_position_embeddings"], scaling["factor"], config["head_dim"]
    factors = []
    for i in range(0, head_dim, 2):
        wave = 2 * math.pi * config["rope_theta"] ** (i / head_dim)
        kept = min(max((original / wave - low) / (high - low), 0.0), 1.0)
        factors.append(1 / ((1 - kept) / factor + kept))
    return np.array(factors, np.float32)


def _text(value: str) -> bytes:
    encoded = value.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def _value(value: Any) -> bytes:
    if isinstance(value, list):
        items = [_value(item) for item in value]
        return struct.pack("<I", 9) + items[0][:4] + struct.pack("<Q", len(items)) + b"".join(i[4:] for i in items)
    if isinstance(value, str):
        return struct.pack("<I", 8) + _text(value)
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    return struct.pack("<If", 6, value) if isinstance(value, float) else struct.pack("<Ii", 5, value)
