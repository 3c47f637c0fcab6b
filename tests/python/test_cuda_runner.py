"""Decoders as one captured step on a GPU: what stands between their products, and the tokens that come out.

On the CPU, where their warps are played by fibers and graphs are lists of calls, and on a GPU if any.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tenpak
from runner_on_cpu import runner_on_cpu
from support import DATA, ROOT, require
from tenpak.decoder import Decoder
from tenpak.decoder.layers import LayerNorm, RMSNorm, activation
from tenpak.sampling import Sampling, choose
from warps_on_cpu import COMPILER

sys.path.insert(0, str(ROOT / "tests" / "bench"))
from random_source import RandomSource


@pytest.fixture(scope="module", params=["cpu", "cuda"])
def gpu(request: pytest.FixtureRequest) -> Iterator[SimpleNamespace]:
    if request.param == "cuda":
        require("cuda")
        import cupy
        from tenpak.cuda import glue, projections, runner, weight

        yield SimpleNamespace(cupy=cupy, glue=glue, runner=runner, weight=weight, projections=projections)
    elif COMPILER is None:
        pytest.skip("no C++ compiler")
    else:
        with runner_on_cpu() as here:
            yield here


def needs_cupy(gpu: Any) -> None:
    if not hasattr(gpu.cupy, "linalg"):
        pytest.skip("the stand-in for CuPy has no more than a runner needs")


def get(x: Any) -> np.ndarray:
    return np.asarray(x.get() if hasattr(x, "get") else x)


def close(x: Any, expected: np.ndarray, tolerance: float = 1e-3) -> bool:
    return bool(np.linalg.norm(get(x) - expected) <= tolerance * np.linalg.norm(expected))


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize(("tokens", "width"), [(1, 768), (3, 130)])
def test_norm(gpu, centred, tokens, width):
    random, xp = np.random.default_rng(width), gpu.cupy
    h, y = random.standard_normal((2, tokens, width)).astype(np.float32) + np.float32(0.3)
    weight, bias = random.standard_normal((2, width)).astype(np.float32)
    y = y.astype(np.float16)
    norm = LayerNorm(weight, bias, 1e-5, xp=np) if centred else RMSNorm(weight, 1e-5, xp=np)
    on = (
        LayerNorm(xp.asarray(weight), xp.asarray(bias), 1e-5, xp=xp)
        if centred
        else RMSNorm(xp.asarray(weight), 1e-5, xp=xp)
    )
    for added in (None, y):
        stream = xp.asarray(h.copy())
        out = xp.zeros((tokens, width), np.float16)
        gpu.glue.norm(on, stream, None if added is None else xp.asarray(added), out)
        summed = h if added is None else h + added.astype(np.float32)
        assert np.allclose(get(stream), summed, atol=1e-6)
        assert close(out, norm(summed.copy()))


@pytest.mark.parametrize("name", ["silu", "gelu_tanh", "gelu", "relu"])
def test_gates(gpu, name):
    random, xp = np.random.default_rng(3), gpu.cupy
    gates, others = (4 * random.standard_normal((2, 5, 24))).astype(np.float16)
    activated = activation(name, xp=np)(gates.astype(np.float32))
    y = np.stack([gates.reshape(5, 3, 8), others.reshape(5, 3, 8)], 2).reshape(5, 48)
    for given, expected in (
        ((gates, {}), activated),
        ((y, {"in_turns": True}), activated * others),
        ((gates, {"others": xp.asarray(others)}), activated * others),
    ):
        out = xp.zeros((5, 24), np.float16)
        gpu.glue.gate(xp.asarray(given[0]), out, name, **given[1])
        assert close(out, expected)


@pytest.mark.parametrize("codec", [None, "float32", "int8_sym_v1", "int4_lut16_v1", "int4_g8_v1", "int4_g32_fp16_v1"])
@pytest.mark.parametrize("learnt", [False, True])
def test_embeddings(gpu, codec, learnt):
    random, xp = np.random.default_rng(1), gpu.cupy
    table = random.standard_normal((50, 300)).astype(np.float32)
    positions = random.standard_normal((9, 300)).astype(np.float32)
    if codec in (None, "float32"):
        kept = table.astype(np.float16 if codec is None else np.float32)
        embedding, rows = xp.asarray(kept), kept.astype(np.float32)
    else:
        encoded = tenpak.encode(table, codec)
        embedding = gpu.weight.QuantizedWeight.from_parts(codec, encoded.parts, table.shape, 1, encoded.exponent)
        rows = tenpak.decode(encoded)
    tokens = np.array([0, 49, 17, 3], np.int32)
    expected = rows[tokens]
    if learnt:
        # The last position that was learnt stands for all later ones.
        expected = expected + positions[np.minimum(np.arange(6, 10), 8)]
    h = xp.zeros((4, 300), np.float32)
    lengths = xp.asarray(np.array([6], np.int32))
    gpu.glue.embed(xp.asarray(tokens), embedding, xp.asarray(positions) if learnt else None, lengths, h)
    assert np.allclose(get(h), expected, rtol=0, atol=1e-6)
    gpu.glue.embed(xp.asarray(np.array([-1], np.int32)), embedding, None, lengths, h[:1])
    assert np.isfinite(get(h)).all()


@pytest.mark.parametrize("kind", ["float16", "float32"])
@pytest.mark.parametrize(("n", "k"), [(20, 264), (9, 37)])
def test_products_with_weights_that_are_not_quantised(gpu, kind, n, k):
    random, xp = np.random.default_rng(2), gpu.cupy
    weight = random.standard_normal((n, k)).astype(kind)
    x, bias = (random.standard_normal(size).astype(np.float16) for size in (k, n))
    expected = weight.astype(np.float64) @ x + bias
    for output, dtype in (("activations", np.float16), ("float32", np.float32), ("added", np.float32)):
        y = xp.asarray(np.ones(n, dtype))
        gpu.glue.product(xp.asarray(weight), xp.asarray(x), y, xp.asarray(bias), output)
        assert close(y, expected + (output == "added"))


def scores_of(kind: str) -> np.ndarray:
    random = np.random.default_rng(8)
    if kind == "equal":
        return np.zeros(700, np.float32)
    if kind == "coarse":  # many alike
        return np.round(random.standard_normal(3000) * 2).astype(np.float32)
    if kind == "far":
        return np.where(np.arange(900) % 90 == 7, 20, -np.inf).astype(np.float32)
    return (random.standard_normal(4000) * 3).astype(np.float32)


@pytest.mark.parametrize("kind", ["plain", "coarse", "equal", "far"])
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(0.0, 0, 1.0), (1.0, 0, 1.0), (0.7, 0, 0.9), (1.3, 5, 1.0), (0.9, 40, 0.8), (1.0, 10**6, 1e-9), (1e-60, 0, 0.5)],
)
def test_tokens_are_those_of_the_sampler(gpu, kind, temperature, top_k, top_p):
    xp, scores = gpu.cupy, scores_of(kind)
    on, token = xp.asarray(scores), xp.zeros(1, np.int32)
    same = 0
    for position in range(12):
        sampling = Sampling(temperature, top_k, top_p, seed=2**63 + 5)
        how, lengths = xp.asarray(gpu.glue.sampling_bytes(sampling).copy()), xp.asarray(np.array([position], np.int32))
        gpu.glue.sample(on, how, lengths, token)
        same += int(get(token)[0]) == choose(scores, sampling, position)
    # A number that falls within rounding of the border between two tokens may go to either.
    assert same >= 11


def test_scores_that_are_no_numbers_are_told(gpu):
    xp = gpu.cupy
    how, token = xp.asarray(gpu.glue.sampling_bytes(Sampling()).copy()), xp.zeros(1, np.int32)
    for bad in (np.nan, np.inf):
        scores = np.zeros(100, np.float32)
        scores[63] = bad
        gpu.glue.sample(xp.asarray(scores), how, xp.zeros(1, np.int32), token)
        assert int(get(token)[0]) == -1


def compressed(folder: Path, name: str, codec: str, rules: dict[str, str] | None = None) -> Path:
    to = folder / "model.tenpak"
    tenpak.compress(DATA / name, to, codec=codec, rules=list((rules or {}).items()))
    return to


@pytest.mark.parametrize("name", ["tiny-gpt2", "tiny-llama"])
@pytest.mark.parametrize(("codec", "kv"), [("int4_g32_fp16_v1", None), ("int4_lut16_v1", "int8")])
def test_a_runner_writes_what_the_decoder_would(gpu, tmp_path, name, codec, kv):
    path = compressed(tmp_path, name, codec)
    check(gpu, path, kv)


def test_layers_of_several_codecs(gpu, tmp_path):
    rules = {
        "layers.0.*v_proj": "int8_sym_v1",
        "layers.1.*k_proj": "keep",
        "layers.2.*gate": "keep",
        "layers.3.*(gate|up)": "keep",
        "o_proj": "int5_g32_v1",
        "layers.4.*[qkv]_proj": "keep",
        "layers.4.*down": "keep",
    }
    check(gpu, compressed(tmp_path, "tiny-llama", "int4_g16_fp16_v1", rules), "fp16")


def check(gpu: Any, path: Path, kv: str | None) -> None:
    """The runner's tokens, step by step, are the likeliest that an FP32 decoder sees, or as good as these."""
    decoder = Decoder.open(path)
    runner = gpu.runner.Runner(Decoder.open(path, xp=gpu.cupy), kv)
    random = np.random.default_rng(4)
    for length in (70, 1):
        prompt = random.integers(1, decoder.config.vocab, length).tolist()
        written = list(runner.tokens(prompt, Sampling(temperature=0), 6))
        assert len(written) == 6
        logits = decoder.logits([prompt + written[:-1]])[0, length - 1 :]
        for token, scores in zip(written, logits, strict=True):
            assert scores[token] >= scores.max() - 0.02 * scores.std(), (token, int(scores.argmax()))
        again = list(runner.tokens(prompt, Sampling(temperature=0), 6))
        assert again == written
    assert runner.weight_bytes > 0
    assert math.isclose(runner.bytes_per_step, runner.weight_bytes, rel_tol=1)


def test_one_text_at_a_time(gpu, tmp_path):
    runner = gpu.runner.Runner(Decoder.open(compressed(tmp_path, "tiny-llama", "int4_g32_fp16_v1"), xp=gpu.cupy))
    first = runner.tokens([5, 6], Sampling(), 3)
    next(first)
    second = runner.tokens([7], Sampling(), 3)
    next(second)
    with pytest.raises(tenpak.UsageError, match="another text was begun"):
        next(first)
    assert len(list(second)) == 2


def test_a_model_with_made_up_weights(gpu):
    """What bench_generate.py measures is all that a runner asks for."""
    config = {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 100,
        "max_position_embeddings": 64,
    }
    source = RandomSource(config, "int4_g32_fp16_v1", "int8_sym_v1")
    runner = gpu.runner.Runner(Decoder(source, xp=gpu.cupy), "int8")
    assert len(list(runner.tokens([1, 2, 3], Sampling(), 3))) == 3
    # A matrix has 5 bits a weight, or 8 and a scale of each row.
    weights = 64 * (64 + 32 + 32 + 64 + 3 * 96)
    assert runner.weight_bytes >= weights * 5 // 8 + 2 * 100 * 64


@pytest.mark.parametrize("name", ["tiny-gpt2", "tiny-llama"])
def test_perplexity_on_a_gpu_is_the_cpus(gpu, tmp_path, name):
    needs_cupy(gpu)
    path = compressed(tmp_path, name, "int4_g32_fp16_v1")
    tokens = np.random.default_rng(0).integers(0, 2048, 1024)
    here, there = (tenpak.evaluate(path, tokens, context=256, device=device).perplexity for device in ("cpu", "cuda"))
    assert there.value == pytest.approx(here.value, rel=1e-3)


def test_a_model_on_a_gpu_writes_what_it_writes_on_the_cpu(gpu, tmp_path):
    needs_cupy(gpu)
    require("text")
    path = compressed(tmp_path, "tiny-llama", "int8_sym_v1")
    texts = [
        tenpak.Model.open(path, device=device).generate("It was a dark and stormy", max_tokens=12, temperature=0).tokens
        for device in ("cpu", "cuda")
    ]
    # After a token that was nearly a tie everything may differ.
    assert texts[0][:4] == texts[1][:4]
