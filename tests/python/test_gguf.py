"""GGUF models: the logits, tokens and files of the Hugging Face folders they were made from."""

from __future__ import annotations

import json
import random
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import tenpak
from gguf_files import convert, write_gguf
from support import gaussian, require, tenpak_command
from tenpak.decoder import Config, Decoder
from tenpak.errors import TenpakError, UnsupportedError

TEXTS = [
    "It was the best of times, it was the worst of times.",
    "  leading and   inner spaces ",
    "tabs\tand\r\nlines\n\n\nand 12345 numbers, 3.14",
    "naïve café, 日本語, 🙂 and <|endoftext|> inside",
    "it's they're I'll WE'VE",
    "",
]

BASE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "head_dim": 8,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
#: What the small models of the repository lack.
VARIANTS = {
    "llama-tied": BASE | {"model_type": "llama", "tie_word_embeddings": True},
    "llama-biases": BASE | {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama-wide-heads": BASE | {"model_type": "llama", "head_dim": 20, "num_key_value_heads": 4},
    "llama-linear": BASE | {"model_type": "llama", "rope_scaling": {"rope_type": "linear", "factor": 3.0}},
    "llama-llama3": BASE | {"model_type": "llama", "head_dim": 32, "rope_theta": 500.0, "rope_scaling": LLAMA3},
    "qwen2": BASE | {"model_type": "qwen2", "rope_theta": 1e6},
    "qwen3": BASE | {"model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True},
}


def write_variant(folder: Path, config: dict) -> Path:
    """A folder of small random weights."""
    from test_sources import write_safetensors

    width, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    queries, keys = (config["head_dim"] * config[f"num_{k}_heads"] for k in ("attention", "key_value"))
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, width), "model.norm.weight": (width,)}
    if not config.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (vocab, width)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        linear = {"q_proj": (queries, width), "k_proj": (keys, width), "v_proj": (keys, width)}
        linear = {f"self_attn.{k}": v for k, v in (linear | {"o_proj": (width, queries)}).items()}
        linear |= {"mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width), "mlp.down_proj": (width, inner)}
        for name, shape in linear.items():
            shapes[f"{at}.{name}.weight"] = shape
            attention = config.get("attention_bias") or (config["model_type"] == "qwen2" and "o_proj" not in name)
            if attention if "attn" in name else config.get("mlp_bias"):
                shapes[f"{at}.{name}.bias"] = shape[:1]
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{at}.{norm}.weight"] = (width,)
        if config["model_type"] == "qwen3":
            shapes |= {f"{at}.self_attn.{k}_norm.weight": (config["head_dim"],) for k in "qk"}
    arrays = {name: gaussian(*shape, seed=i, scale=0.3) for i, (name, shape) in enumerate(shapes.items())}
    folder.mkdir()
    write_safetensors(folder / "model.safetensors", arrays)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def assert_same_model(original: Path, *others: Path) -> None:
    wanted = Decoder.open(original)
    tokens = np.random.default_rng(0).integers(0, wanted.config.vocab, (2, 40))
    logits = wanted.logits(tokens)
    for path in others:
        got = Decoder.open(path)
        assert set(got.source.shapes) == set(wanted.source.shapes)
        np.testing.assert_array_equal(got.logits(tokens), logits, str(path))


def test_the_repositorys_models_come_back_with_config_tokenizer_and_logits(tmp_path, model):
    gguf = convert(model, tmp_path / "m.gguf")
    report = tenpak.compress(gguf, tmp_path / "m.tenpak", rules=[("", "keep")])
    assert report.notes == ()
    tenpak.decompress(tmp_path / "m.tenpak", tmp_path / "restored")
    assert_same_model(model, gguf, tmp_path / "m.tenpak", tmp_path / "restored")
    original, got = Decoder.open(model), Decoder.open(gguf)
    assert got.config == original.config
    require("text")
    for text in TEXTS:
        assert got.encode_text(text) == original.encode_text(text), text


@pytest.mark.parametrize("variant", VARIANTS)
def test_other_members_of_the_families_give_the_same_logits(tmp_path, variant):
    folder = write_variant(tmp_path / "folder", VARIANTS[variant])
    gguf = convert(folder, tmp_path / "m.gguf")
    assert_same_model(folder, gguf)
    rope = Config.parse(VARIANTS[variant]).rope
    assert Decoder.open(gguf).config.rope.kind == rope.kind


def test_codes_are_those_of_the_folder(tmp_path, model):
    tenpak.compress(model, tmp_path / "folder.tenpak")
    tenpak.compress(convert(model, tmp_path / "m.gguf"), tmp_path / "gguf.tenpak")
    with tenpak.open(tmp_path / "folder.tenpak") as wanted, tenpak.open(tmp_path / "gguf.tenpak") as got:
        assert set(wanted) == set(got)
        for name in (n for n in wanted if wanted.info(n).codec != "keep"):
            assert (got.info(name).codec, got.info(name).axis) == (wanted.info(name).codec, wanted.info(name).axis)
            for part, array in wanted.parts(name).items():
                np.testing.assert_array_equal(got.parts(name)[part], array, f"{name} {part}")


def test_the_files_depend_on_the_gguf_alone_and_repeat_nothing(tmp_path, llama):
    gguf = convert(llama, tmp_path / "m.gguf", tokenizer__chat_template="{{ messages }}", general__name="tiny")
    for name in ("a", "b"):
        tenpak.compress(gguf, tmp_path / f"{name}.tenpak", threads=1 if name == "a" else 2)
    assert (tmp_path / "a.tenpak").read_bytes() == (tmp_path / "b.tenpak").read_bytes()
    with tenpak.open(tmp_path / "a.tenpak") as artifact:
        files = {name: json.loads(artifact.file(name)) for name in artifact.files}
    assert set(files) == {
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "gguf_metadata.json",
    }  # fmt: skip
    assert files["generation_config.json"] == {"bos_token_id": 0, "eos_token_id": 0}
    assert files["tokenizer_config.json"]["chat_template"] == "{{ messages }}"
    assert files["tokenizer_config.json"]["eos_token"] == "<|endoftext|>"
    assert files["gguf_metadata.json"]["general.name"] == "tiny"
    assert "tokenizer.ggml.tokens" not in files["gguf_metadata.json"]


def test_transformers_loads_what_was_restored(tmp_path, model):
    require("torch")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf = convert(model, tmp_path / "m.gguf", tokenizer__chat_template="{{ messages[0].content + eos_token }}")
    tenpak.compress(gguf, tmp_path / "m.tenpak", "int8_sym_v1")
    tenpak.decompress(tmp_path / "m.tenpak", tmp_path / "restored")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "restored", torch_dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "restored")
    decoder = Decoder.open(tmp_path / "m.tenpak")
    for text in filter(None, TEXTS):
        assert tokenizer(text)["input_ids"] == decoder.encode_text(text)
    tokens = np.array([decoder.encode_text(TEXTS[0])])
    with torch.no_grad():
        logits = loaded(torch.from_numpy(tokens)).logits.numpy()
    np.testing.assert_allclose(logits, decoder.logits(tokens), atol=2e-4)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    assert chat == "hello<|endoftext|>"


def test_eval_runs_an_artifact_that_was_a_gguf_file(tmp_path, llama):
    require("text")
    gguf = convert(llama, tmp_path / "m.gguf")
    tenpak_command("compress", "--input", gguf, "--output", tmp_path / "m.tenpak")
    (tmp_path / "text.txt").write_text(" ".join(TEXTS) * 20)
    ran = tenpak_command(
        "eval", tmp_path / "m.tenpak", "--text", tmp_path / "text.txt", "--context", 128, "--against", gguf, "--json"
    )
    assert 0 < json.loads(ran.out)["comparison"]["divergence"]["value"] < 0.1


def test_what_cannot_be_run_is_compressed_under_its_own_names_with_a_word(tmp_path):
    arrays = {"token_embd.weight": gaussian(64, 32), "blk.0.attn_q.weight": gaussian(32, 32)}
    gguf = write_gguf(tmp_path / "m.gguf", arrays, {"general.architecture": "gemma3"})
    ran = tenpak_command("compress", "--input", gguf, "--output", tmp_path / "m.tenpak")
    assert "gemma3" in ran.err
    assert "keep their GGUF names" in ran.err
    with tenpak.open(tmp_path / "m.tenpak") as artifact:
        assert set(artifact) == set(arrays)
        assert artifact.files == ["gguf_metadata.json"]
    assert "cannot be run" in tenpak_command("inspect", tmp_path / "m.tenpak", "--summary").out
    with pytest.raises(UnsupportedError, match="gemma3"):
        Decoder.open(gguf)
    with pytest.raises(UnsupportedError, match="GGUF file of a kind that cannot be run"):
        Decoder.open(tmp_path / "m.tenpak")


def tokenizer_of(path: Path, metadata: dict):
    """The tokenizer of a GGUF file with that vocabulary, and its notes."""
    from tenpak import _core
    from tokenizers import Tokenizer

    shape = {
        "block_count": 1, "context_length": 64, "embedding_length": 8, "feed_forward_length": 8,
        "attention.head_count": 1, "attention.layer_norm_rms_epsilon": 1e-5,
    }  # fmt: skip
    pairs = {"general.architecture": "qwen3"} | {f"qwen3.{key}": value for key, value in shape.items()}
    write_gguf(path, {"token_embd.weight": gaussian(len(metadata["tokenizer.ggml.tokens"]), 8)}, pairs | metadata)
    model = _core.Model(str(path))
    text = model.sidecar("tokenizer.json")
    return text and Tokenizer.from_str(text.decode()), model.notes()


KINDS = {
    "gpt-2": ["abc", "Ġ12", "Ġ", "Ġ'", "s", "Ċ"],
    "smollm": ["abc", "Ġ", "1", "2", "Ġ", "Ġ'", "s", "Ċ"],
    "llama-bpe": ["abc", "Ġ", "12", "Ġ", "Ġ'", "s", "Ċ"],
    "qwen2": ["abc", "Ġ", "1", "2", "Ġ", "Ġ'", "s", "Ċ"],
    "tekken": ["abc", "Ġ", "1", "2", "Ġ", "Ġ'", "s", "Ċ"],
    "deepseek-coder": ["abc", "Ġ", "1", "2", "Ġ", "Ġ'", "s", "Ċ"],
}


def byte_vocabulary() -> list[str]:
    """One token for each byte, as byte-level BPE spells them."""
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


def test_every_kind_of_splitting_is_one_that_tokenizers_knows(tmp_path):
    require("text")
    tokens = ["<|end|>", "<think>", *byte_vocabulary()]
    base = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 4] + [1] * (len(tokens) - 2),
        "tokenizer.ggml.merges": ["a b", "x nonsense"],
        "tokenizer.ggml.bos_token_id": 0,
    }
    text = "abc 12  's\n<|end|>Ünï 日本"
    for kind in ("default", "refact", "command-r", "smaug-bpe", "stablelm2", *KINDS):
        tokenizer, notes = tokenizer_of(tmp_path / "m.gguf", base | {"tokenizer.ggml.pre": kind})
        assert bool(notes) == (kind == "default"), (kind, notes)
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text, kind
        assert ids.count(0) == 1, kind
        begins = tokenizer.encode("a").ids[0] == 0
        assert begins == (kind in ("llama-bpe", "tekken")), kind
        if kind in KINDS:
            pieces = [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str("abc 12  's\n")]
            assert pieces == KINDS[kind], kind
    tokenizer, _ = tokenizer_of(tmp_path / "m.gguf", base)
    assert tokenizer.encode("<think>").ids == [1]
    assert tokenizer.decode([1, 0]) == "<think>"
    tokenizer, notes = tokenizer_of(tmp_path / "m.gguf", base | {"tokenizer.ggml.pre": "from the future"})
    assert tokenizer is None
    assert len(notes) == 1
    assert "from the future" in notes[0]


SPIECE = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
PIECES = {
    "▁": -1.0, "a": -2.0, "b": -3.0, "c": -4.0, "ab": -5.0, "bc": -5.5, "▁a": -6.0, "abc": -7.0, "▁ab": -6.5,
    "ca": -9.0, "▁▁": -1.5, "cab": -20.0, "▁abc": -8.0,
}  # fmt: skip


def sentence_piece(text: str) -> list[int]:
    """SentencePiece's BPE, step by step: the neighbours with the best score are joined, the first of equals first."""
    tokens = SPIECE + list(PIECES)
    symbols = list("▁" + text.replace(" ", "▁"))
    while True:
        joined = [(PIECES[a + b], -i) for i, (a, b) in enumerate(pairwise(symbols)) if a + b in PIECES]
        if not joined:
            break
        at = -max(joined)[1]
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    ids = []
    for symbol in symbols:
        in_bytes = [tokens.index(f"<0x{byte:02X}>") for byte in symbol.encode()]
        ids += [tokens.index(symbol)] if symbol in PIECES else in_bytes
    return ids


@pytest.mark.parametrize("prefix", [True, False])
def test_sentence_piece_vocabularies_join_by_score_and_fall_back_to_bytes(tmp_path, prefix):
    require("text")
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": SPIECE + list(PIECES),
        "tokenizer.ggml.scores": [0.0] * len(SPIECE) + list(PIECES.values()),
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(PIECES),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    if not prefix:
        metadata["tokenizer.ggml.add_space_prefix"] = False
    tokenizer, notes = tokenizer_of(tmp_path / "m.gguf", metadata)
    assert notes == []
    choose = random.Random(0)
    texts = ["".join(choose.choices("aabbcc  é🙂", k=choose.randint(1, 24))) for _ in range(300)]
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids) == text
        if prefix:
            assert ids == sentence_piece(text), text
    assert tokenizer.encode("a</s>").ids[0] == 1
    assert tokenizer.encode("a</s>").ids[-1] == 2


def test_damaged_metadata_is_refused_or_explained_and_never_more(tmp_path, llama):
    from tenpak import _core

    whole = convert(llama, tmp_path / "m.gguf").read_bytes()
    choose = random.Random(1)
    path = tmp_path / "damaged.gguf"
    opened = 0
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(choose.randint(1, 3)):
            damaged[choose.randrange(24, 1500)] = choose.randrange(256)
        path.write_bytes(damaged)
        # Whatever else is raised fails the test.
        with suppress(TenpakError):
            model = _core.Model(str(path))
            opened += 1
            assert model.config() is not None or model.notes()
    assert 0 < opened < 150
