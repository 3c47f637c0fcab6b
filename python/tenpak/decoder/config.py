"""What a model's `config.json` says of its decoder, in one set of words for every family.

The defaults of absent keys are those of transformers' configuration classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tenpak.errors import InputError, UnsupportedError

#: `model_type` of every model that can be run.
SUPPORTED = ("gpt2", "llama", "mistral", "qwen2", "qwen3")

Activation = Literal["gelu", "gelu_tanh", "relu", "silu"]

_ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}

#: What claims may reach before any weight has been compared with them.
_MOST_LAYERS = _MOST_HEAD_DIM = 1 << 16
#: Numbers must be FP32's.
_MOST = 3e38

_LLAMA_DEFAULTS: dict[str, Any] = {
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "max_position_embeddings": 2048,
}

#: What differs from Llama where a key is absent.
_TYPE_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096},
    "qwen3": {
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
        "head_dim": 128,
    },
}


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: angles are position times frequency."""

    theta: float
    kind: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    #: Wavelengths longer than `original / low` are stretched by `factor`, shorter than `original / high` are not.
    low: float = 1.0
    high: float = 4.0
    #: Positions that the model was first trained for.
    original: int = 8192


@dataclass(frozen=True)
class Config:
    """The shape of a decoder."""

    model_type: str
    family: Literal["gpt2", "llama"]
    layers: int
    #: Elements of a hidden state.
    width: int
    heads: int
    #: Heads of keys and values; each serves `heads / kv_heads` heads of queries.
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    #: Positions that the model was made for.
    max_positions: int
    norm_eps: float
    activation: Activation
    #: Whether the output head is the embedding.
    tied: bool
    qkv_bias: bool
    #: Whether the attention's output projection has a bias.
    out_bias: bool
    mlp_bias: bool
    #: Whether queries and keys are normalised, head by head, before rotation.
    qk_norm: bool
    #: None for learnt positions.
    rope: Rope | None
    #: For each layer the last positions that it sees, its own included; None for all.
    windows: tuple[int | None, ...]
    #: For each layer what scores are multiplied with.
    score_scales: tuple[float, ...]
    bos: int | None
    eos: tuple[int, ...]

    @property
    def input_axis(self) -> int:
        """The input dimension of linear layers' weights as they are stored: GPT-2 has [in, out], the rest [out, in]."""
        return 0 if self.family == "gpt2" else 1

    @staticmethod
    def parse(config: Mapping[str, Any]) -> Config:
        """Reads the object of a `config.json`.

        Raises:
            UnsupportedError: A kind of model, position or activation that cannot be run; the text names those that can.
            InputError: A key is missing or makes no sense.
        """
        kind = config.get("model_type")
        if kind not in SUPPORTED:
            raise UnsupportedError(f"config.json: model_type {kind!r} cannot be run; {', '.join(SUPPORTED)} can")
        if config.get("quantization_config"):
            raise UnsupportedError(
                "config.json: weights under another tool's quantization_config cannot be run; give the original model"
            )
        return _gpt2(config) if kind == "gpt2" else _llama(kind, config)


def _gpt2(config: Mapping[str, Any]) -> Config:
    width, heads, layers = _size(config, "n_embd"), _size(config, "n_head"), _size(config, "n_layer", _MOST_LAYERS)
    _divides(config, "n_head", "n_embd")
    inner = config.get("n_inner")
    scale = (width // heads) ** -0.5 if config.get("scale_attn_weights", True) else 1.0
    by_layer = config.get("scale_attn_by_inverse_layer_idx", False)
    return Config(
        model_type="gpt2",
        family="gpt2",
        layers=layers,
        width=width,
        heads=heads,
        kv_heads=heads,
        head_dim=width // heads,
        intermediate=4 * width if inner is None else _size(config, "n_inner"),
        vocab=_size(config, "vocab_size"),
        max_positions=_size({"n_positions": 1024, **config}, "n_positions"),
        norm_eps=_epsilon("layer_norm_epsilon", config.get("layer_norm_epsilon", 1e-5)),
        activation=_activation(config, "activation_function", "gelu_new"),
        tied=bool(config.get("tie_word_embeddings", True)),
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        qk_norm=False,
        rope=None,
        windows=(None,) * layers,
        score_scales=tuple(scale / (i + 1 if by_layer else 1) for i in range(layers)),
        bos=next(iter(_ids(config, "bos_token_id")), None),
        eos=_ids(config, "eos_token_id"),
    )


def _llama(kind: str, given: Mapping[str, Any]) -> Config:
    config = {**_LLAMA_DEFAULTS, **_TYPE_DEFAULTS[kind], **given}
    width, heads = _size(config, "hidden_size"), _size(config, "num_attention_heads")
    layers = _size(config, "num_hidden_layers", _MOST_LAYERS)
    if config.get("num_key_value_heads") is None:
        config["num_key_value_heads"] = heads
    _divides(config, "num_key_value_heads", "num_attention_heads")
    if config.get("head_dim") is None:
        _divides(config, "num_attention_heads", "hidden_size")
        config["head_dim"] = width // heads
    head_dim = _size(config, "head_dim", _MOST_HEAD_DIM)
    if head_dim % 2:
        raise InputError(f"config.json: head_dim {head_dim} is odd, so that it cannot be rotated")
    attention_bias = bool(config["attention_bias"])
    return Config(
        model_type=kind,
        family="llama",
        layers=layers,
        width=width,
        heads=heads,
        kv_heads=_size(config, "num_key_value_heads"),
        head_dim=head_dim,
        intermediate=_size(config, "intermediate_size"),
        vocab=_size(config, "vocab_size"),
        max_positions=_size(config, "max_position_embeddings"),
        norm_eps=_epsilon("rms_norm_eps", config["rms_norm_eps"]),
        activation=_activation(config, "hidden_act", "silu"),
        tied=bool(config["tie_word_embeddings"]),
        # Transformers gives Qwen2 these biases, and Mistral none, whatever the config says.
        qkv_bias=kind == "qwen2" or (kind in ("llama", "qwen3") and attention_bias),
        out_bias=kind in ("llama", "qwen3") and attention_bias,
        mlp_bias=kind == "llama" and bool(config["mlp_bias"]),
        qk_norm=kind == "qwen3",
        rope=_rope(config),
        windows=_windows(kind, config, layers),
        score_scales=(head_dim**-0.5,) * layers,
        bos=next(iter(_ids(config, "bos_token_id")), None),
        eos=_ids(config, "eos_token_id"),
    )


def _rope(config: Mapping[str, Any]) -> Rope:
    # Newer configs hold theta among `rope_parameters`, older ones beside `rope_scaling`.
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(given, Mapping):
        raise InputError(f"config.json: rope_scaling {given!r} is no object")
    theta = given.get("rope_theta", config.get("rope_theta", 10000.0))
    partial = given.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if partial not in (None, 1, 1.0):
        raise UnsupportedError(
            f"config.json: partial_rotary_factor {partial} of model_type "
            f"{config['model_type']!r} cannot be run; whole heads must be rotated"
        )
    kind = given.get("rope_type", given.get("type", "default"))
    if kind == "default":
        return Rope(_positive("rope_theta", theta))
    if kind == "linear":
        return Rope(_positive("rope_theta", theta), "linear", _positive("factor", given.get("factor")))
    if kind == "llama3":
        low, high = (_positive(key, given.get(key)) for key in ("low_freq_factor", "high_freq_factor"))
        if not low < high:
            raise InputError("config.json: high_freq_factor must be greater than low_freq_factor")
        original = given.get("original_max_position_embeddings", config["max_position_embeddings"])
        return Rope(
            _positive("rope_theta", theta),
            "llama3",
            _positive("factor", given.get("factor")),
            low,
            high,
            int(_positive("original_max_position_embeddings", original)),
        )
    raise UnsupportedError(f"config.json: rotary scaling {kind!r} cannot be run; default, linear, llama3 can")


def _windows(kind: str, config: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
    if config.get("sliding_window") is None or kind == "llama":
        return (None,) * layers
    if kind != "mistral" and not config.get("use_sliding_window", False):
        return (None,) * layers
    window = _size(config, "sliding_window")
    if kind == "mistral":
        return (window,) * layers
    types = config.get("layer_types")
    if types is None:
        first = config.get("max_window_layers", 28)
        if not isinstance(first, int):
            raise InputError(f"config.json: max_window_layers {first!r} is no integer")
        types = ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    if not isinstance(types, list) or len(types) != layers:
        entries = len(types) if isinstance(types, list) else "no"
        raise InputError(f"config.json: layer_types has {entries} entries for {layers} layers")
    return tuple(window if layer == "sliding_attention" else None for layer in types)


def _activation(config: Mapping[str, Any], key: str, default: str) -> Activation:
    name = config.get(key, default)
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        raise UnsupportedError(f"config.json: {key} {name!r} cannot be run; {', '.join(_ACTIVATIONS)} can")
    return _ACTIVATIONS[name]


def _size(config: Mapping[str, Any], key: str, most: int | None = None) -> int:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        what = "is missing" if value is None else f"{value!r} is no positive integer"
        raise InputError(f"config.json: {key} {what}")
    if most is not None and value > most:
        raise InputError(f"config.json: {key} {value} is too large; at most {most} can be run")
    return value


def _positive(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < _MOST:
        what = "is missing" if value is None else f"{value!r} is no positive number"
        raise InputError(f"config.json: {key} {what}")
    return float(value)


def _divides(config: Mapping[str, Any], part: str, whole: str) -> None:
    if _size(config, whole) % _size(config, part):
        raise InputError(f"config.json: {whole} {config[whole]} is no multiple of {part} {config[part]}")


def _epsilon(key: str, value: Any) -> float:
    return 0.0 if value == 0 and not isinstance(value, bool) else _positive(key, value)


def _ids(config: Mapping[str, Any], key: str) -> tuple[int, ...]:
    value = config.get(key)
    found = [] if value is None else value if isinstance(value, list) else [value]
    for token in found:
        if isinstance(token, bool) or not isinstance(token, int):
            raise InputError(f"config.json: {key} {token!r} is no token")
    return tuple(found)
