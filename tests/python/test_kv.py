"""The quantised cache on a CPU: what it stores, what each position reads, and how little that changes a model."""

from __future__ import annotations

import numpy as np
import pytest
import tenpak
from support import REFERENCE, ROOT
from tenpak.decoder import Decoder, kv
from tenpak.decoder.layers import attention

MODELS = ROOT / "tests" / "data"


@pytest.mark.parametrize("dim", [32, 64, 80, 96, 128, 256])
def test_the_hadamard_matrix_keeps_products(dim):
    matrix = kv.hadamard(dim)
    assert np.abs(matrix @ matrix.T - np.eye(dim)).max() < 1e-6
    assert (matrix == matrix.T).all()
    # It spreads a single channel over its whole block.
    assert (np.abs(matrix[0]) > 0).sum() == dim & -dim


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_are_within_half_a_step(bits):
    x = np.random.default_rng(0).normal(3, 2, (50, 4, 64)).astype(np.float32)
    x[0], x[1, 0], x[1, 1] = 0, 7.25, -1e-7
    step = (x.max(-1) - x.min(-1)) / (2**bits - 1)
    off = np.abs(kv.rounded(x, bits, xp=np) - x).max(-1)
    # Half a step, and what FP16 makes of the scale and the offset.
    assert (off <= 0.5 * step + 2**-10 * np.abs(x).max(-1) + 1e-6).all()
    assert kv.rounded(x, bits, xp=np)[0].max() == 0


def test_the_newest_tokens_are_no_codes():
    assert [kv.quantised(n) for n in (0, 63, 64, 79, 80, 95, 96, 1000)] == [0, 0, 0, 0, 16, 16, 32, 928]


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("window", [None, 70])
def test_every_position_reads_what_it_would_alone(kind, window):
    random = np.random.default_rng(1)
    q, k, v = (random.standard_normal((2, heads, 150, 64)).astype(np.float32) for heads in (4, 2, 2))
    whole = kv.QuantizedCache(1, kind, xp=np).attend(0, 0, q, k, v, 0.125, window)
    parts = kv.QuantizedCache(1, kind, xp=np)
    out = []
    for start, end in ((0, 1), (1, 40), (40, 97), (97, 98), (98, 150)):
        steps = (x[:, :, start:end] for x in (q, k, v))
        out.append(parts.attend(0, start, *steps, 0.125, window))
    assert np.abs(np.concatenate(out, axis=1) - whole).max() < 1e-5
    # The last position, from what is stored.
    bits, codes = kv.BITS[kind], kv.quantised(150)
    stored = []
    for x, key in ((k, True), (v, False)):
        y = x.astype(np.float16).astype(np.float32)
        turned = kv.turned(y, bits, np) if key else y
        rebuilt = kv.rounded(turned, bits, xp=np)
        rebuilt = kv.turned(rebuilt, bits, np) if key else rebuilt
        stored.append(np.concatenate([rebuilt[:, :, :codes], y[:, :, codes:]], axis=2))
    last = attention(q[:, :, -1:], *stored, 0.125, window, xp=np)
    assert np.abs(whole[:, -1:] - last).max() < 1e-5
    exact = attention(q, k, v, 0.125, window, xp=np)
    assert 1e-4 < np.linalg.norm(whole - exact) / np.linalg.norm(exact) < {"int8": 0.02, "int4": 0.3}[kind]


def test_fp16_is_fp16():
    q, k, v = np.random.default_rng(2).standard_normal((3, 1, 2, 30, 64)).astype(np.float32)
    rounded = [x.astype(np.float16).astype(np.float32) for x in (k, v)]
    out = kv.QuantizedCache(1, "fp16", xp=np).attend(0, 0, q, k, v, 0.125, None)
    assert (out == attention(q, *rounded, 0.125, None, xp=np)).all()


@pytest.mark.parametrize("name", ["tiny-gpt2", "tiny-llama"])
def test_truncated_caches_go_on(name):
    decoder = Decoder.open(MODELS / name)
    tokens = np.random.default_rng(3).integers(0, decoder.config.vocab, (1, 120))
    cache = decoder.cache("int8")
    decoder.logits(tokens[:, :110], cache)
    cache.truncate(50)
    after = decoder.logits(tokens[:, 50:], cache)
    whole = decoder.logits(tokens, decoder.cache("int8"))[:, 50:]
    assert np.abs(after - whole).max() < 1e-3 * np.abs(whole).max()
    with pytest.raises(tenpak.UsageError, match="the cache has 120 positions, but the next is 3"):
        decoder.block(0)(np.zeros((1, 1, decoder.config.width), np.float32), 3, cache)
    with pytest.raises(tenpak.UsageError, match="unknown kind of cache 'int3'; choose fp16, int8, int4"):
        decoder.cache("int3")


@pytest.mark.parametrize("name", ["tiny-gpt2", "tiny-llama"])
def test_evaluation_compares_with_an_fp16_cache(name):
    decoder = Decoder.open(MODELS / name)
    tokens = np.random.default_rng(4).integers(0, decoder.config.vocab, 2 * 128)
    reports = {k: tenpak.evaluate(decoder, tokens, context=128, kv=k) for k in kv.KV_TYPES}
    for kind, report in reports.items():
        assert report.kv == kind
        assert report.comparison.kv == (None if kind == "fp16" else "fp16")
        assert report.to_dict()["kv"] == kind
    divergence = {k: r.comparison.divergence.value for k, r in reports.items()}
    assert 0 < divergence["fp16"] < divergence["int8"] < divergence["int4"]
    assert tenpak.evaluate(decoder, tokens, context=128).comparison is None


def test_quality_on_the_reference_models():
    """What the cache may cost, as promised in the documentation: on a window of each model."""
    for name in ("gpt2-books", "llama-books"):
        path = REFERENCE / name
        if not path.exists():
            pytest.skip(f"{path} is not here")
        decoder = Decoder.open(path)
        text = (REFERENCE.parent / "text" / "dev.txt").read_text()[:20000]
        for kind, most in (("int8", 2e-4), ("int4", 1e-2)):
            report = tenpak.evaluate(decoder, text, windows=1, kv=kind)
            assert report.comparison.divergence.value < most
