"""Evaluation: perplexity and divergence are what their definitions say, and wrong requests are refused."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import tenpak
from support import ROOT, require, tenpak_command
from tenpak.decoder import Decoder
from tenpak.errors import InputError, StorageError, UnsupportedError, UsageError

MODULE = sys.modules["tenpak.evaluate"]
TEXT = ROOT / "README.md"


def some_tokens(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2048, count)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def losses(model: Decoder, windows: np.ndarray) -> np.ndarray:
    """Mean negative log likelihood of each window, by the definition."""
    log_p = log_softmax(model.logits(windows))[:, :-1]
    return -np.take_along_axis(log_p, windows[:, 1:, None], axis=-1)[..., 0].mean(axis=1)


@pytest.fixture
def quantised(tmp_path: Path, model: Path) -> Path:
    path = tmp_path / "q.tenpak"
    tenpak.compress(model, path, "int4_opt_v1")
    return path


def test_perplexity_is_that_of_torch(model):
    require("torch")
    import torch
    from transformers import AutoModelForCausalLM

    tokens = some_tokens(3 * 100 + 50)
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    windows = torch.from_numpy(tokens[:300].reshape(3, 100))
    with torch.no_grad():
        logits = reference(windows).logits[:, :-1]
    wanted = torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), windows[:, 1:].reshape(-1))
    report = tenpak.evaluate(model, tokens, context=100)
    assert report.perplexity.value == pytest.approx(math.exp(wanted.item()), rel=1e-5)
    assert (report.windows, report.context, report.predicted) == (3, 100, 297)


# Three positions at once, over windows of 100, leave a chunk that is the last position alone.
@pytest.mark.parametrize(("positions", "batch"), [(256, 1), (3, 1), (7, 2), (1, 3), (60, 5)])
def test_the_report_is_what_the_definitions_say(monkeypatch, model, quantised, positions, batch):
    monkeypatch.setattr(MODULE, "POSITIONS", positions)
    tokens = some_tokens(4 * 100 + 99)
    windows = tokens[:400].reshape(4, 100)
    mine, original = Decoder.open(quantised), Decoder.open(model)
    report = tenpak.evaluate(mine, tokens, against=original, context=100, batch=batch)

    loss, loss_original = losses(mine, windows), losses(original, windows)
    log_q, log_p = log_softmax(mine.logits(windows)), log_softmax(original.logits(windows))
    divergence = (np.exp(log_p) * (log_p - log_q)).sum(axis=-1).mean(axis=1)
    top1 = (log_p.argmax(axis=-1) == log_q.argmax(axis=-1)).mean(axis=1)
    assert divergence.min() > 1e-4

    def error(values: np.ndarray) -> float:
        return values.std(ddof=1) / 2

    def close(mean: object, value: float, spread: float) -> None:
        assert mean.value == pytest.approx(value, rel=1e-4)
        assert mean.error == pytest.approx(spread, rel=1e-2)

    close(report.perplexity, np.exp(loss.mean()), np.exp(loss.mean()) * error(loss))
    against = report.comparison
    ppl = np.exp(loss_original.mean())
    close(against.perplexity, ppl, ppl * error(loss_original))
    ratio = np.exp((loss - loss_original).mean())
    close(against.change, 100 * (ratio - 1), 100 * ratio * error(loss - loss_original))
    close(against.divergence, divergence.mean(), error(divergence))
    close(against.top1, top1.mean(), error(top1))
    assert report.model == str(quantised)
    assert against.original == str(model)


def test_a_model_does_not_differ_from_itself(model):
    report = tenpak.evaluate(model, some_tokens(300), against=model, context=60)
    assert report.comparison.divergence == MODULE.Mean(0.0, 0.0)
    assert report.comparison.change == MODULE.Mean(0.0, 0.0)
    assert report.comparison.top1 == MODULE.Mean(1.0, 0.0)
    assert report.comparison.perplexity == report.perplexity


def test_finer_codecs_stay_nearer(tmp_path, llama):
    divergence = {}
    for codec in ("int8_sym_v1", "int4_opt_v1"):
        tenpak.compress(llama, tmp_path / codec, codec)
        report = tenpak.evaluate(tmp_path / codec, some_tokens(512), against=llama, context=128)
        divergence[codec] = report.comparison.divergence.value
    assert 0 < 5 * divergence["int8_sym_v1"] < divergence["int4_opt_v1"]


def test_windows(llama):
    tokens = some_tokens(1100)
    assert tenpak.evaluate(llama, tokens).context == 512, "as many as the model was made for"
    report = tenpak.evaluate(llama, tokens, context=500, windows=1)
    assert (report.windows, report.perplexity.error) == (1, None)
    assert report.perplexity == tenpak.evaluate(llama, tokens[:500], context=500).perplexity
    short = tenpak.evaluate(llama, tokens[:20].tolist(), context=500)
    assert (short.windows, short.context, short.predicted) == (1, 20, 19)
    seen = []
    tenpak.evaluate(llama, tokens, context=100, windows=5, batch=2, progress=lambda *n: seen.append(n))
    assert seen == [(200, 500), (400, 500), (500, 500)]


@pytest.mark.parametrize(
    ("tokens", "options", "error", "says"),
    [
        ([5], {}, UsageError, "has 1 tokens"),
        ([], {}, UsageError, "has 0 tokens"),
        ([0.5, 1.5], {}, UsageError, "integers"),
        ([[1, 2]], {}, UsageError, "one dimension"),
        ([1, 2, 9999], {}, UsageError, "token 9999 is outside the vocabulary"),
        ([1, 2, 3], {"context": 513}, UsageError, "context 513 is more than the 512 positions"),
        ([1, 2, 3], {"context": 1}, UsageError, "context 1 is too small"),
        ([1, 2, 3], {"windows": 0}, UsageError, "windows 0"),
        ([1, 2, 3], {"batch": 0}, UsageError, "batch 0"),
        ([1, 2, 3], {"device": "tpu"}, UsageError, "unknown device 'tpu'; choose cpu or cuda"),
        (Path("absent.txt"), {}, StorageError, r"absent\.txt"),
        (Path(tenpak.__file__).with_name("_core.abi3.so"), {}, InputError, "is no UTF-8"),
    ],
)
def test_wrong_requests_are_refused(llama, tokens, options, error, says):
    if isinstance(tokens, Path) and tokens.suffix == ".so":
        assert tokens.exists()
    with pytest.raises(error, match=says):
        tenpak.evaluate(llama, tokens, **options)


def test_a_model_that_computes_no_numbers_is_refused(tmp_path, llama, recwarn):
    from safetensors.numpy import load_file, save_file

    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_bytes((llama / "config.json").read_bytes())
    arrays = {name: array.astype(np.float32) for name, array in load_file(llama / "model.safetensors").items()}
    arrays["model.layers.2.mlp.up_proj.weight"][:] = 1e38
    save_file(arrays, broken / "model.safetensors")
    with pytest.raises(InputError, match=f"{broken} computes NaN or infinity"):
        tenpak.evaluate(broken, some_tokens(20))
    assert not recwarn.list


def test_only_models_of_one_vocabulary_and_tokenizer_are_compared(tmp_path, llama):
    other = tmp_path / "other"
    other.mkdir()
    for file in llama.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    config = json.loads((llama / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"vocab_size": 2000}))
    with pytest.raises(UsageError, match="vocabularies of 2048 and 2000 tokens"):
        tenpak.evaluate(llama, [1, 2, 3], against=other)
    (other / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((llama / "tokenizer.json").read_text())
    (other / "tokenizer.json").write_text(json.dumps(tokenizer, indent=3))
    assert (other / "tokenizer.json").read_bytes() != (llama / "tokenizer.json").read_bytes()
    require("text")
    assert tenpak.evaluate(llama, "It was a dark night.", against=other).comparison.divergence.value == 0
    tokenizer["model"]["merges"].pop()
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UsageError, match="different tokenizers"):
        tenpak.evaluate(llama, "It was a dark night.", against=other)


def test_text_needs_a_tokenizer(monkeypatch, tmp_path, llama):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((llama / name).read_bytes())
    if "tokenizers" in sys.modules or _has_tokenizers():
        with pytest.raises(InputError, match=r"has no tokenizer\.json; give tokens"):
            tenpak.evaluate(bare, "text")
    assert tenpak.evaluate(bare, [1, 2, 3]).predicted == 2
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UsageError, match=r"pip install 'tenpak\[text\]'"):
        tenpak.evaluate(llama, "text")


def _has_tokenizers() -> bool:
    import importlib.util

    return importlib.util.find_spec("tokenizers") is not None


def test_a_missing_cupy_says_what_to_install(monkeypatch, llama):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(UsageError, match=r"needs CuPy; pip install 'tenpak\[cuda13\]'"):
        tenpak.evaluate(llama, [1, 2, 3], device="cuda")


def test_a_text_file_is_its_tokens(llama):
    require("text")
    tokens = Decoder.open(llama).encode_text(TEXT.read_text(encoding="utf-8"))
    from_file = tenpak.evaluate(llama, TEXT, context=64, windows=3)
    assert from_file.perplexity == tenpak.evaluate(llama, tokens, context=64, windows=3).perplexity
    assert from_file.perplexity == tenpak.evaluate(llama, TEXT.read_text(), context=64, windows=3).perplexity


def test_the_command_prints_a_table_and_json(tmp_path, model, quantised):
    require("text")
    arguments = ["eval", quantised, "--text", TEXT, "--against", model, "--context", 64, "--windows", 3]
    ran = tenpak_command(*arguments, "--progress")
    assert "3 windows of 64 tokens" in ran.out
    for row in ("perplexity", "change in perplexity", "KL divergence", "same most likely token", "tokens/s on cpu"):
        assert row in ran.out
    assert "192 tokens of 192 tokens" in ran.err
    found = tenpak_command(*arguments, "--json").json
    assert found["windows"] == 3
    assert found["comparison"]["divergence"]["value"] > 0
    assert found["perplexity"]["value"] == tenpak.evaluate(quantised, TEXT, context=64, windows=3).perplexity.value


def test_the_command_s_exit_codes(tmp_path, llama):
    text = tmp_path / "t.txt"
    text.write_text("")
    require("text")
    assert "0 tokens" in tenpak_command("eval", llama, "--text", text, code=2).err
    assert "513" in tenpak_command("eval", llama, "--text", TEXT, "--context", 513, code=2).err
    assert "absent" in tenpak_command("eval", llama, "--text", tmp_path / "absent", code=6).err
    assert "absent" in tenpak_command("eval", tmp_path / "absent", "--text", TEXT, code=6).err
    other = tmp_path / "mamba"
    other.mkdir()
    (other / "model.safetensors").write_bytes((llama / "model.safetensors").read_bytes())
    (other / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(UnsupportedError):
        tenpak.evaluate(other, [1, 2])
    assert "mamba" in tenpak_command("eval", other, "--text", TEXT, code=5).err
