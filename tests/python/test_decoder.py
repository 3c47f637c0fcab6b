"""Decoders: the same logits as transformers, in one piece or step by step, from any source."""

from __future__ import annotations

import json
import math
import shutil
import struct
import sys
import weakref
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import tenpak
from support import DATA, REFERENCE, gaussian, require
from tenpak import _core
from tenpak.decoder import Cache, Config, Decoder, Rope, gradients, layers
from tenpak.errors import ArtifactError, InputError, StorageError, UnsupportedError, UsageError

LLAMA = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
GPT2 = {"model_type": "gpt2", "vocab_size": 97, "n_embd": 48, "n_layer": 3, "n_head": 6, "n_positions": 128}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
#: Models that transformers builds at random; each has something that the small models lack.
VARIANTS = {
    "llama": LLAMA,
    "llama-tied": LLAMA | {"tie_word_embeddings": True},
    "llama-llama3": LLAMA | {"rope_scaling": LLAMA3, "rope_theta": 500.0},
    "llama-linear": LLAMA | {"rope_scaling": {"rope_type": "linear", "factor": 3.0}},
    "llama-biases": LLAMA | {"attention_bias": True, "mlp_bias": True, "head_dim": 20},
    "llama-gelu": LLAMA | {"hidden_act": "gelu", "num_key_value_heads": 6},
    "mistral": LLAMA | {"model_type": "mistral", "sliding_window": 9},
    "mistral-unlimited": LLAMA | {"model_type": "mistral", "sliding_window": None},
    "qwen2": LLAMA | {"model_type": "qwen2"},
    "qwen2-window": LLAMA
    | {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    "qwen3": LLAMA | {"model_type": "qwen3", "head_dim": 16},
    "gpt2": GPT2 | {"initializer_range": 0.2},
    "gpt2-gelu": GPT2 | {"activation_function": "gelu", "n_inner": 100, "initializer_range": 0.2},
    "gpt2-relu": GPT2 | {"activation_function": "relu", "scale_attn_by_inverse_layer_idx": True},
    "gpt2-untied": GPT2 | {"tie_word_embeddings": False, "scale_attn_weights": False},
}


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """‖a - b‖ / ‖b‖."""
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def some_tokens(model: Decoder, batch: int = 2, steps: int = 70, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, model.config.vocab, (batch, steps))


def transformers_logits(folder: Path, tokens: np.ndarray) -> np.ndarray:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(torch.from_numpy(tokens)).logits.numpy()


def build_with_transformers(folder: Path, config: dict) -> Path:
    """A random model in which biases and norms are random too."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    kind = config["model_type"]
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **{k: v for k, v in config.items() if k != "model_type"})
    )
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 1.0 if "norm" in name or "ln_" in name else 0.0, 0.2)
    model.save_pretrained(folder)
    return folder


def write_model(folder: Path, config: dict, seed: int = 0) -> Path:
    """A random Llama as a folder, without torch."""
    from test_sources import write_safetensors

    c = Config.parse(config)
    kv = c.kv_heads * c.head_dim
    shapes = {"model.embed_tokens.weight": (c.vocab, c.width), "model.norm.weight": (c.width,)}
    for i in range(c.layers):
        at = f"model.layers.{i}."
        shapes |= {
            at + "input_layernorm.weight": (c.width,),
            at + "self_attn.q_proj.weight": (c.heads * c.head_dim, c.width),
            at + "self_attn.k_proj.weight": (kv, c.width),
            at + "self_attn.v_proj.weight": (kv, c.width),
            at + "self_attn.o_proj.weight": (c.width, c.heads * c.head_dim),
            at + "post_attention_layernorm.weight": (c.width,),
            at + "mlp.gate_proj.weight": (c.intermediate, c.width),
            at + "mlp.up_proj.weight": (c.intermediate, c.width),
            at + "mlp.down_proj.weight": (c.width, c.intermediate),
        }
    if not c.tied:
        shapes["lm_head.weight"] = (c.vocab, c.width)
    arrays = {
        name: gaussian(*shape, seed=seed + n, scale=0.2) + (len(shape) == 1)
        for n, (name, shape) in enumerate(shapes.items())
    }
    folder.mkdir()
    write_safetensors(folder / "model.safetensors", {n: a.astype(np.float32) for n, a in arrays.items()})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """The folder of a random Llama."""
    return write_model(tmp_path / "small", LLAMA)


def change_config(folder: Path, **changes: object) -> None:
    """Rewrites config.json; None removes a key."""
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


@pytest.mark.parametrize("name", ["tiny-gpt2", "tiny-llama", "gpt2-books", "llama-books"])
def test_logits_are_those_of_transformers(name):
    require("torch")
    if name.endswith("-books"):
        require("reference")
    folder = REFERENCE / name if name.endswith("-books") else DATA / name
    model = Decoder.open(folder)
    tokens = some_tokens(model, steps=300)
    logits = model.logits(tokens)
    assert logits.dtype == np.float32
    assert logits.shape == (2, 300, model.config.vocab)
    assert distance(logits, transformers_logits(folder, tokens)) < 1e-4


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_have_the_logits_of_transformers(tmp_path, variant):
    require("torch")
    folder = build_with_transformers(tmp_path / "m", VARIANTS[variant])
    model = Decoder.open(folder)
    tokens = some_tokens(model, steps=100)
    assert distance(model.logits(tokens), transformers_logits(folder, tokens)) < 1e-4


@pytest.mark.parametrize("window", [None, 9])
def test_steps_with_a_cache_give_what_the_whole_gives(tmp_path, window):
    mistral = LLAMA | {"model_type": "mistral", "sliding_window": window}
    for folder in (write_model(tmp_path / "m", mistral), DATA / "tiny-gpt2"):
        model = Decoder.open(folder)
        tokens, cache = some_tokens(model, steps=150), model.cache()
        ends = [0, 1, 60, 61, 62, 130, *range(131, 151)]
        parts = [model.logits(tokens[:, a:b], cache) for a, b in pairwise(ends)]
        assert cache.length == 150
        assert distance(np.concatenate(parts, axis=1), model.logits(tokens)) < 1e-5
        cache.truncate(100)
        assert distance(model.logits(tokens[:, 100:], cache), model.logits(tokens)[:, 100:]) < 1e-5


def test_a_cache_must_end_where_the_tokens_begin(small):
    model = Decoder.open(small)
    h = model.embed([[1, 2, 3]])
    with pytest.raises(UsageError, match="the cache has 0 positions, but the next is 5"):
        model.block(0)(h, start=5, cache=Cache(model.config.layers, xp=np))


@pytest.mark.parametrize("window", [None, 1, 7, 1000])
@pytest.mark.parametrize("steps", [1, 33, 50])
def test_attention_is_the_sum_that_defines_it(monkeypatch, window, steps):
    # So few scores at once that queries come in blocks of several sizes.
    monkeypatch.setattr(layers, "_SCORES_CPU", 2 * 6 * 50 * 8)
    total, past = 50, 50 - steps
    q, k, v = (gaussian(2, h, n, 8, seed=h + n, scale=1) for h, n in ((6, steps), (3, total), (3, total)))
    got = layers.attention(q, k, v, 0.3, window, xp=np)
    wanted = np.zeros((2, steps, 6, 8))
    for b, h, i in np.ndindex(2, 6, steps):
        low = 0 if window is None else max(0, past + i + 1 - window)
        keys, values = (x[b, h // 2, low : past + i + 1].astype(np.float64) for x in (k, v))
        weights = np.exp(0.3 * keys @ q[b, h, i])
        wanted[b, i, h] = weights @ values / weights.sum()
    assert got.dtype == np.float32
    assert distance(got, wanted.reshape(2, steps, 48)) < 1e-6


def test_activations_are_what_their_names_say():
    x = np.linspace(-12, 12, 4001, dtype=np.float32)
    exact = np.array([math.erf(v) for v in x.tolist()])
    assert np.abs(layers.erf(x, xp=np) - exact).max() < 5e-7
    x64 = x.astype(np.float64)
    wanted = {
        "relu": np.maximum(x64, 0),
        "silu": x64 / (1 + np.exp(-x64)),
        "gelu": x64 * 0.5 * (1 + np.array([math.erf(v / math.sqrt(2)) for v in x.tolist()])),
        "gelu_tanh": 0.5 * x64 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x64 + 0.044715 * x64**3))),
    }
    for name, values in wanted.items():
        assert np.abs(layers.activation(name, xp=np)(x.copy()) - values).max() < 2e-6, name
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        far = layers.activation("silu", xp=np)(np.array([-1e4, -100, 1e4], np.float32))
    assert np.allclose(far, [0, 0, 1e4], atol=1e-30)


def test_old_and_new_spellings_of_rotation_mean_the_same():
    old = Config.parse(LLAMA | {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2}})
    new = Config.parse(LLAMA | {"rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 2}})
    assert old.rope == new.rope == Rope(5e5, "linear", 2.0)
    assert Config.parse(LLAMA).rope == Rope(10000.0)
    plain = layers.frequencies(Rope(500.0), 64)
    assert np.array_equal(layers.frequencies(Rope(500.0, "linear", 4.0), 64), plain / 4)
    stretched = layers.frequencies(Rope(500.0, "llama3", 8.0, 1.0, 4.0, 64), 64)
    assert stretched[0] == plain[0]
    assert stretched[-1] == pytest.approx(plain[-1] / 8)


def test_layers_that_see_a_window_are_those_of_the_config():
    qwen2 = LLAMA | {"model_type": "qwen2", "sliding_window": 9, "max_window_layers": 1}
    assert Config.parse(qwen2).windows == (None, None, None), "unless it is asked for"
    qwen2 |= {"use_sliding_window": True}
    assert Config.parse(qwen2).windows == (None, 9, 9)
    types = ["sliding_attention", "full_attention", "full_attention"]
    assert Config.parse(qwen2 | {"layer_types": types}).windows == (9, None, None)
    with pytest.raises(InputError, match="layer_types has 1 entries for 3 layers"):
        Config.parse(qwen2 | {"layer_types": types[:1]})
    assert Config.parse(LLAMA | {"model_type": "mistral"}).windows == (4096,) * 3
    assert Config.parse(LLAMA | {"sliding_window": 9}).windows == (None,) * 3


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"model_type": "mamba"}, UnsupportedError, "model_type 'mamba' cannot be run; gpt2, llama"),
        ({"model_type": None}, UnsupportedError, "model_type None"),
        ({"partial_rotary_factor": 0.5}, UnsupportedError, "partial_rotary_factor 0.5"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, UnsupportedError, "'dynamic'"),
        ({"rope_scaling": {"rope_type": "linear"}}, InputError, "factor is missing"),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, InputError, "high_freq_factor"),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": "4"}}, InputError, "high_freq_factor '4'"),
        ({"rope_scaling": "linear"}, InputError, "rope_scaling 'linear' is no object"),
        ({"rope_theta": 1e308}, InputError, "rope_theta"),
        ({"rms_norm_eps": "small"}, InputError, "rms_norm_eps 'small'"),
        ({"rms_norm_eps": -1.0}, InputError, "rms_norm_eps -1.0"),
        ({"num_hidden_layers": 10**18}, InputError, "num_hidden_layers"),
        ({"head_dim": 10**18}, InputError, "head_dim"),
        ({"hidden_act": ["silu"]}, UnsupportedError, "hidden_act"),
        ({"eos_token_id": "</s>"}, InputError, "eos_token_id '</s>' is no token"),
        ({"bos_token_id": 1.5}, InputError, "bos_token_id 1.5 is no token"),
        ({"hidden_act": "quick_gelu"}, UnsupportedError, "hidden_act 'quick_gelu'"),
        ({"quantization_config": {"quant_method": "gptq"}}, UnsupportedError, "quantization_config"),
        ({"num_hidden_layers": None}, InputError, "num_hidden_layers is missing"),
        ({"vocab_size": -5}, InputError, "vocab_size -5"),
        ({"num_key_value_heads": 4}, InputError, "num_attention_heads 6 is no multiple of num_key_value_heads 4"),
        ({"head_dim": 5}, InputError, "head_dim 5 is odd"),
        ({"intermediate_size": 81}, None, "config.json asks for 81 x 48"),
        ({"num_hidden_layers": 4}, None, "no tensor 'model.layers.3.input_layernorm.weight'"),
        ({"tie_word_embeddings": True, "attention_bias": True}, None, "q_proj.bias"),
    ],
)
def test_what_cannot_be_run_is_refused_with_its_place(small, changes, error, says):
    change_config(small, **changes)
    with pytest.raises(error or InputError, match=says) as raised:
        _ = Decoder.open(small).blocks
    assert str(small) in str(raised.value)


def test_a_model_without_its_head_is_refused_unless_they_are_tied(tmp_path):
    folder = write_model(tmp_path / "m", LLAMA | {"tie_word_embeddings": True})
    head = Decoder.open(folder).head
    assert head.linear.name == "model.embed_tokens.weight"
    change_config(folder, tie_word_embeddings=False)
    with pytest.raises(InputError, match=r"no tensor 'lm_head.weight'"):
        _ = Decoder.open(folder).head


def test_every_source_gives_the_same_logits(tmp_path, model):
    opened = Decoder.open(model)
    tokens = some_tokens(opened)
    logits = opened.logits(tokens)
    assert np.array_equal(Decoder.open(model / "model.safetensors").logits(tokens), logits)
    kept = tmp_path / "kept.tenpak"
    tenpak.compress(model, kept, rules=[("", "keep")])
    assert np.array_equal(Decoder.open(kept).logits(tokens), logits)
    packed = tmp_path / "packed.tenpak"
    tenpak.compress(model, packed, "int8_sym_v1")
    restored = tmp_path / "restored"
    tenpak.decompress(packed, restored, dtype="F32")
    from_packed = Decoder.open(packed).logits(tokens)
    assert np.array_equal(from_packed, Decoder.open(restored).logits(tokens))
    assert 1e-5 < distance(from_packed, logits) < 0.05


def test_digests_are_of_the_weights_alone(tmp_path, small):
    one = Decoder.open(small).source.digest()
    assert len(one) == 64
    moved = tmp_path / "moved"
    shutil.copytree(small, moved)
    change_config(moved, eos_token_id=7)
    assert Decoder.open(moved).source.digest() == one
    data = bytearray((moved / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (moved / "model.safetensors").write_bytes(data)
    assert Decoder.open(moved).source.digest() != one
    tenpak.compress(small, tmp_path / "m.tenpak")
    with tenpak.open(tmp_path / "m.tenpak") as artifact:
        assert Decoder.open(tmp_path / "m.tenpak").source.digest() == artifact.root


def test_sources_say_what_they_lack(tmp_path, small):
    with pytest.raises(StorageError, match="absent"):
        Decoder.open(tmp_path / "absent")
    with pytest.raises(InputError, match=r"has no tokenizer\.json|no tokenizer\.json"):
        _require_tokenizers(Decoder.open(small))
    (small / "config.json").write_text("[1]")
    with pytest.raises(InputError, match=r"config\.json"):
        Decoder.open(small / "model.safetensors")
    (small / "config.json").unlink()
    with pytest.raises(InputError, match=r"no config\.json in this folder"):
        Decoder.open(small)
    with pytest.raises(InputError, match=r"no config\.json beside this file"):
        Decoder.open(small / "model.safetensors")
    tenpak.compress(small, tmp_path / "bare.tenpak")
    with pytest.raises(InputError, match=r"no config\.json is embedded"):
        Decoder.open(tmp_path / "bare.tenpak")
    tenpak.delta(DATA / "tiny-llama", DATA / "tiny-llama", tmp_path / "delta.tenpak")
    with pytest.raises(UsageError, match=r"is a delta; .*materialize"):
        Decoder.open(tmp_path / "delta.tenpak")
    (tmp_path / "damaged.tenpak").write_bytes(b"?" * 999)
    with pytest.raises(ArtifactError, match=r"no \.tenpak artifact"):
        Decoder.open(tmp_path / "damaged.tenpak")


def _require_tokenizers(model: Decoder) -> None:
    require("text")
    _ = model.tokenizer


def test_models_without_the_prefix_of_their_names_are_run(tmp_path, gpt2):
    """As GPT-2 was first published: `wte.weight` and not `transformer.wte.weight`."""
    from test_sources import write_safetensors

    model = Decoder.open(gpt2)
    tokens = some_tokens(model)
    folder = tmp_path / "m"
    folder.mkdir()
    shutil.copy(gpt2 / "config.json", folder)
    names = {name: name.removeprefix("transformer.") for name in model.source.shapes}
    assert any(old != new for old, new in names.items())
    arrays = {new: model.source.read(old) for old, new in names.items()}
    write_safetensors(folder / "model.safetensors", arrays)
    assert np.array_equal(Decoder.open(folder).logits(tokens), model.logits(tokens))


def test_observers_see_each_input_once_with_all_that_share_it(model):
    opened = Decoder.open(model)
    block, h = opened.block(1), opened.embed(some_tokens(opened))
    seen: list[tuple[tuple[str, ...], np.ndarray]] = []
    out = block(h, observe=lambda names, x: seen.append((names, x.copy())))
    assert np.array_equal(out, block(h)), "watching changes nothing"
    assert [name for names, _ in seen for name in names] == list(block.linears)
    assert len(seen) == 4
    for names, x in seen:
        for name in names:
            linear = block.linears[name]
            assert linear.name == name
            stored = opened.source.read(name)
            assert np.array_equal(linear.weight, stored.T if opened.config.input_axis == 0 else stored)
            assert x.shape == (*h.shape[:2], linear.weight.shape[1])
            assert x.dtype == np.float32


def test_linears_can_be_changed_and_replaced(model):
    opened = Decoder.open(model)
    block, h = opened.block(0), opened.embed(some_tokens(opened))
    before = block(h)
    *_, name = block.linears
    inputs = []
    block(h, observe=lambda names, x: inputs.append(x) if name in names else None)
    linear = block.linears[name]
    wanted = before + inputs[0] @ linear.weight.T
    linear.weight = 2 * linear.weight
    assert distance(block(h), wanted) < 1e-6

    class Nothing:
        def __init__(self, name: str) -> None:
            self.name = name

        def __call__(self, x: np.ndarray) -> np.ndarray:
            return np.zeros(h.shape, np.float32)

    for name in block.linears:
        if "c_proj" in name or "o_proj" in name or "down_proj" in name:
            block.linears[name] = Nothing(name)
    assert np.array_equal(block(h), h), "nothing is left but what passes by"


def test_blocks_one_by_one_are_the_whole_and_are_not_kept(model):
    opened = Decoder.open(model)
    tokens = some_tokens(opened)
    h = opened.embed(tokens)
    for index in range(opened.config.layers):
        block = opened.block(index)
        untouched = h.copy()
        out = block(h)
        assert np.array_equal(h, untouched), "a block writes into no array of its caller"
        h, gone = out, weakref.ref(block)
        del block
        assert gone() is None
    assert np.array_equal(opened.head(h), opened.logits(tokens))
    assert opened.block(0) is not opened.block(0)
    assert opened.blocks is opened.blocks


@pytest.mark.parametrize(
    ("tokens", "says"),
    [
        ([[5, 2048]], "token 2048 is outside the vocabulary of 2048"),
        ([[-1, 4]], "token -1"),
        ([1, 2], "two dimensions"),
        ([[0.5, 1.0]], "integers"),
        (np.zeros((1, 0), np.int64), "two dimensions"),
    ],
)
def test_wrong_tokens_are_refused(llama, tokens, says):
    with pytest.raises(UsageError, match=says):
        Decoder.open(llama).logits(tokens)


def test_positions_that_were_not_learnt_are_refused(gpt2):
    model = Decoder.open(gpt2)
    cache = model.cache()
    model.logits(np.zeros((1, 512), np.int64), cache)
    with pytest.raises(UsageError, match="513 positions are too many"):
        model.logits([[1]], cache)
    with pytest.raises(UsageError, match="no layer 6"):
        model.block(6)


def test_text_becomes_tokens_and_nothing_else(tmp_path, model):
    require("text")
    opened = Decoder.open(model)
    tokens = opened.encode_text("It was a dark and stormy night.")
    assert opened.tokenizer.decode(tokens) == "It was a dark and stormy night."
    path = tmp_path / "m.tenpak"
    tenpak.compress(model, path)
    assert Decoder.open(path).encode_text("It was a dark and stormy night.") == tokens


def test_a_missing_tokenizers_package_says_what_to_install(monkeypatch, llama):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UsageError, match=r"pip install 'tenpak\[text\]'"):
        Decoder.open(llama).encode_text("text")


def test_the_core_reads_every_input_as_fp32(tmp_path):
    halves = np.array([[1.5, -0.25, 65504.0], [6e-8, 0.0, -2.0]], np.float16)
    header = {
        "half": {"dtype": "F16", "shape": [2, 3], "data_offsets": [0, 12]},
        "brain": {"dtype": "BF16", "shape": [3], "data_offsets": [12, 18]},
        "count": {"dtype": "I64", "shape": [1], "data_offsets": [18, 26]},
    }
    brain = np.array([1.0, -3.140625, 1e30], np.float32)
    text = json.dumps(header).encode()
    data = halves.tobytes() + (brain.view(np.uint32) >> 16).astype(np.uint16).tobytes() + bytes(8)
    path = tmp_path / "m.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    model = _core.Model(str(path))
    assert dict((name, (shape, dtype)) for name, shape, dtype in model.tensors()) == {
        "half": ([2, 3], "F16"),
        "brain": ([3], "BF16"),
        "count": ([1], "I64"),
    }
    assert model.config() is None
    assert model.sidecar("config.json") is None

    def read(name: str, elements: int) -> np.ndarray:
        out = np.full(elements, np.nan, np.float32)
        model.read(name, 1, out.view(np.uint8))
        return out

    assert np.array_equal(read("half", 6).reshape(2, 3), halves.astype(np.float32))
    assert np.array_equal(read("brain", 3), ((brain.view(np.uint32) >> 16) << 16).view(np.float32))
    for name, elements, says in (("count", 1, "I64"), ("half", 5, "20 bytes"), ("absent", 1, "no tensor")):
        with pytest.raises(UsageError, match=says):
            read(name, elements)


def test_large_tensors_are_read_whole_by_many_threads(tmp_path):
    from test_sources import write_safetensors

    array = gaussian(300, 1001)
    path = write_safetensors(tmp_path / "m.safetensors", {"w": array})
    out = np.empty_like(array)
    _core.Model(str(path)).read("w", 3, out.reshape(-1).view(np.uint8))
    assert np.array_equal(out, array)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_at_linear_outputs_are_those_of_torch(tmp_path, variant):
    require("torch")
    import torch
    from transformers import AutoModelForCausalLM

    folder = build_with_transformers(tmp_path / "model", VARIANTS[variant])
    decoder = Decoder.open(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    modules, wanted = dict(theirs.named_modules()), {}
    names = [name.removesuffix(".weight") for block in decoder.blocks for name in block.linears]
    for name in names:

        def keep(_module: object, _into: object, out: tuple, name: str = name) -> None:
            wanted[name] = out[0].numpy()

        modules[name].register_full_backward_hook(keep)
    tokens = some_tokens(decoder, steps=40)
    embedded = theirs.get_input_embeddings()(torch.from_numpy(tokens)).detach().requires_grad_(True)
    weights = gaussian(*tokens.shape, decoder.config.vocab, seed=1)
    (theirs(inputs_embeds=embedded).logits * torch.from_numpy(weights)).sum().backward()

    hidden = [decoder.embed(tokens)]
    for block in decoder.blocks:
        hidden.append(block(hidden[-1]))
    d = gradients.norm_backward(decoder.head.norm, hidden.pop(), weights @ decoder.head.linear.weight, xp=np)
    found = {}
    for block in reversed(decoder.blocks):
        d = block.backward(
            hidden.pop(),
            d,
            lambda names, x, at: found.update({n.removesuffix(".weight"): g for n, g in zip(names, at, strict=True)}),
        )
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        assert distance(gradient, wanted[name]) < 1e-4, name
    if decoder.config.family == "llama":
        assert distance(d, embedded.grad.numpy()) < 1e-4
