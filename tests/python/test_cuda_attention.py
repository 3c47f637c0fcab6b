"""The cache and attention kernels beside FP64: on the CPU, where their warps are played by fibers, and on a GPU if any.

The reference stores tokens as `tenpak.decoder.kv` says. Outputs are poisoned with NaN before they are written.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tenpak
from support import require
from tenpak.decoder import kv as reference
from tenpak.decoder.config import Rope
from tenpak.decoder.layers import RMSNorm, Rotary
from warps_on_cpu import COMPILER, warps_on_cpu

#: Relative errors of the whole output.
TOLERANCE = {"float16": 2e-3, "bfloat16": 8e-3}


@pytest.fixture(scope="module", params=["cpu", "cuda"])
def gpu(request: pytest.FixtureRequest) -> Iterator[SimpleNamespace]:
    if request.param == "cuda":
        require("cuda")
        import cupy
        from tenpak import cuda

        yield SimpleNamespace(
            **{
                name: getattr(cuda, name)
                for name in ("KVCache", "RotaryTable", "append_and_attend", "attend", "prefill")
            },
            array=cupy.asarray,
            large=True,
        )
    elif COMPILER is None:
        pytest.skip("no C++ compiler")
    else:
        with warps_on_cpu() as here:
            here.large = False
            yield here


def type_of(name: str) -> np.dtype:
    return np.dtype(name) if name != "bfloat16" else np.dtype(pytest.importorskip("ml_dtypes").bfloat16)


def get(x: Any) -> np.ndarray:
    return np.asarray(x.get() if hasattr(x, "get") else x).astype(np.float64)


def softmax_attention(q: Any, k: Any, v: Any, first: int, window: int | None, scale: float) -> np.ndarray:
    """FP64: q [T, heads, d] at positions `first` … over k, v [S, kv_heads, d]."""
    group = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    s = np.einsum("thd,shd->hts", q, k) * scale
    at, token = first + np.arange(len(q))[:, None], np.arange(len(k))[None, :]
    s[:, (token > at) | ((token <= at - window) if window else False)] = -np.inf
    p = np.exp(s - s.max(axis=-1, keepdims=True))
    return np.einsum("hts,shd->thd", p / p.sum(axis=-1, keepdims=True), v)


def stored(x: np.ndarray, bits: int, key: bool, total: int) -> np.ndarray:
    """[S, heads, d] as a cache of `total` tokens holds it, turned back."""
    x = np.clip(x, -65504, 65504).astype(np.float32)
    if bits == 16:
        return x.astype(np.float16).astype(np.float64)
    codes = reference.quantised(total)
    y = reference.turned(x, bits, np) if key else x
    y = np.concatenate([reference.rounded(y[:codes].astype(np.float16).astype(np.float32), bits, xp=np), y[codes:]])
    return (reference.turned(y, bits, np) if key else y).astype(np.float64)


class Session:
    """A cache with what was put into it; steps of any number of tokens, each checked."""

    def __init__(
        self, gpu: Any, kv: str, dim: int, heads: int, kv_heads: int, batch: int, room: int, dtype: str, **more: Any
    ):
        self.gpu, self.random, self.dtype = gpu, np.random.default_rng(dim + heads), type_of(dtype)
        self.heads, self.kv_heads, self.dim, self.batch = heads, kv_heads, dim, batch
        self.cache = gpu.KVCache(2, kv_heads, dim, room, kv, batch)
        self.bits = reference.BITS[kv]
        self.k: list[np.ndarray] = [np.zeros((0, kv_heads, dim))] * batch
        self.v = list(self.k)
        # Codes of four bits that fall the other way, where FP32 sums differ, show.
        self.tolerance = TOLERANCE[dtype] + (8e-3 if kv == "int4" else 0)
        self.window = more.get("window")

    def draw(self, tokens: int, heads: int) -> Any:
        """Vectors with channels of unlike size and an offset, as keys have."""
        x = self.random.standard_normal((self.batch, tokens, heads, self.dim))
        return x * np.linspace(0.3, 1.7, self.dim) + np.sin(np.arange(self.dim))

    def step(self, tokens: int, *, attend: bool = True, counts: list[int] | None = None) -> None:
        width = self.heads + 2 * self.kv_heads
        # One wide product, as models have: views into it.
        qkv = self.gpu.array(self.draw(tokens, width).astype(self.dtype))
        q, k, v = (
            qkv[:, :, at:to]
            for at, to in (
                (0, self.heads),
                (self.heads, self.heads + self.kv_heads),
                (self.heads + self.kv_heads, width),
            )
        )
        given = None if counts is None else self.gpu.array(np.array(counts, np.int32))
        for layer in range(2):
            self.cache.append(layer, k, v, counts=given)
        real = counts or [tokens] * self.batch
        for i, n in enumerate(real):
            self.k[i] = np.concatenate([self.k[i], get(k)[i, :n]])
            self.v[i] = np.concatenate([self.v[i], get(v)[i, :n]])
        if attend:
            out = self.gpu.array(np.full((self.batch, tokens, self.heads, self.dim), np.nan).astype(self.dtype))
            for layer in range(2):
                self.gpu.attend(q, self.cache, layer, window=self.window, counts=given, out=out)
            self.check(get(out), get(q), real)
        if given is None:
            self.cache.advance(tokens)
        else:
            self.cache.advance(given, most=tokens)
        assert get(self.cache.lengths).tolist() == [len(k) for k in self.k]

    def check(self, out: np.ndarray, q: np.ndarray, real: list[int]) -> None:
        for i, (k, v) in enumerate(zip(self.k, self.v, strict=True)):
            total, new = len(k), real[i]
            if new == 0:
                continue
            expected = softmax_attention(
                q[i, :new],
                stored(k, self.bits, True, total),
                stored(v, self.bits, False, total),
                total - new,
                self.window,
                self.dim**-0.5,
            )
            assert np.isfinite(out[i, :new]).all()
            error = np.linalg.norm(out[i, :new] - expected) / np.linalg.norm(expected)
            assert error < self.tolerance, (i, total, error)


@pytest.mark.parametrize("kv", ["int8", "int4", "fp16"])
@pytest.mark.parametrize(
    ("dim", "heads", "kv_heads"), [(32, 4, 2), (64, 4, 2), (80, 2, 2), (96, 3, 1), (128, 8, 2), (256, 2, 1)]
)
def test_steps_of_one_token_after_a_prompt(gpu, kv, dim, heads, kv_heads):
    session = Session(gpu, kv, dim, heads, kv_heads, 1, 400, "float16")
    session.step(147, attend=False)
    for _ in range(3):
        session.step(1)
    session.step(160, attend=False)
    session.step(1)


@pytest.mark.parametrize("kv", ["int8", "int4", "fp16"])
def test_from_the_first_token_on(gpu, kv):
    session = Session(gpu, kv, 64, 2, 1, 1, 100, "float16")
    for _ in range(100):
        session.step(1, attend=len(session.k[0]) in (0, 1, 15, 16, 63, 64, 79, 80, 81, 95, 96, 99))


@pytest.mark.parametrize(
    ("kv", "dtype"), [("int8", "float16"), ("int8", "bfloat16"), ("int4", "float16"), ("fp16", "bfloat16")]
)
def test_sequences_of_unlike_lengths(gpu, kv, dtype):
    session = Session(gpu, kv, 64, 4, 2, 3, 320, dtype)
    session.step(200, attend=False, counts=[200, 3, 97])
    session.step(1)
    session.step(40, attend=False, counts=[0, 40, 17])
    session.step(3, counts=[3, 1, 2])
    session.step(1)


@pytest.mark.parametrize("kv", ["int8", "int4", "fp16"])
@pytest.mark.parametrize("window", [1, 20, 90, 1000])
def test_a_sliding_window(gpu, kv, window):
    session = Session(gpu, kv, 64, 2, 1, 1, 256, "float16", window=window)
    session.step(180, attend=False)
    session.step(1)
    session.step(5)


@pytest.mark.parametrize("kv", ["int8", "fp16"])
def test_several_tokens_at_once_are_causal_among_themselves(gpu, kv):
    session = Session(gpu, kv, 64, 6, 2, 2, 200, "float16")
    session.step(7)
    session.step(90, attend=False)
    session.step(5)


def test_long_sequences_are_split_and_merged(gpu):
    session = Session(gpu, "int8", 64, 8, 1, 1, 1600, "float16")
    session.step(1500, attend=False)
    session.step(1)
    session.step(1)


@pytest.mark.parametrize("kv", ["fp16", "int8", "int4"])
@pytest.mark.parametrize(
    ("dim", "heads", "kv_heads", "batch", "norms", "pairs", "window", "dtype", "before", "room"),
    [
        (128, 4, 4, 1, False, 64, None, "float16", 60, 112),
        (64, 8, 2, 2, True, 16, None, "bfloat16", 60, 112),
        (80, 12, 1, 1, False, 40, 40, "float16", 60, 112),
        (64, 2, 1, 2, True, 0, 100, "float16", 60, 112),
        # Several blocks a head: not always the one that has the newest tile quantises one. Past the end, too.
        (64, 2, 1, 1, True, 32, None, "float16", 140, 160),
        (128, 2, 1, 1, False, 64, 140, "bfloat16", 300, 400),
    ],
)
def test_a_token_appended_on_the_way(gpu, kv, dim, heads, kv_heads, batch, norms, pairs, window, dtype, before, room):
    """Cache and output are those of `append` and `attend`, also where tiles begin, settle and leave the ring."""
    random, kind = np.random.default_rng(dim), type_of(dtype)

    def draw(*shape: int) -> Any:
        return gpu.array(random.standard_normal(shape).astype(kind))

    q_norm, k_norm = (draw(dim), draw(dim)) if norms else (None, None)
    options: dict[str, Any] = {"q_norm": q_norm, "k_norm": k_norm}
    if pairs:
        options["rotary"] = gpu.RotaryTable(np.geomspace(1, 1e-3, pairs).astype(np.float32), 128)
    one, other = (gpu.KVCache(1, kv_heads, dim, room, kv, batch) for _ in range(2))
    prompt = [draw(batch, before, kv_heads, dim) for _ in range(2)]
    for cache in (one, other):
        cache.append(0, prompt[0].copy(), prompt[1])
        # Sequences of unlike lengths.
        lengths = gpu.array(np.array([before - 5 * i for i in range(batch)], np.int32))
        cache.advance(lengths, most=before)
    for step in range(54 if gpu.large else 22):
        qkv = draw(batch, 1, heads + 2 * kv_heads, dim)
        same = qkv.copy()
        (q, k, v), (q2, k2, v2) = (
            (x[:, :, :heads], x[:, :, heads : heads + kv_heads], x[:, :, heads + kv_heads :]) for x in (qkv, same)
        )
        outs = [gpu.array(np.full((batch, 1, heads, dim), np.nan).astype(kind)) for _ in range(2)]
        one.append(0, k, v, q=q, **options)
        gpu.attend(q, one, 0, window=window, out=outs[0])
        gpu.append_and_attend(q2, k2, v2, other, 0, **options, window=window, out=outs[1])
        assert np.isfinite(get(outs[0])).all()
        assert (get(outs[0]) == get(outs[1])).all(), f"step {step}"
        assert (get(one._ring) == get(other._ring)).all(), f"ring, step {step}"
        if kv != "fp16":
            assert (get(one._store) == get(other._store)).all(), f"codes, step {step}"
        for cache in (one, other):
            cache.advance(1)


@pytest.mark.parametrize("kv", ["int8", "int4", "fp16"])
def test_truncate_and_reset(gpu, kv):
    session = Session(gpu, kv, 64, 2, 2, 2, 320, "float16")
    session.step(250, attend=False)
    session.cache.truncate([120, 250])
    session.k[0], session.v[0] = session.k[0][:120], session.v[0][:120]
    # What came back from codes is not what it was: that much more error.
    session.tolerance = {4: 0.1, 8: 6e-3, 16: 2e-3}[session.bits]
    session.step(1)
    session.cache.reset()
    session.k = [k[:0] for k in session.k]
    session.v = [v[:0] for v in session.v]
    session.tolerance = 2e-3
    session.step(30)
    with pytest.raises(tenpak.UsageError, match="length -1 is below 0"):
        session.cache.truncate(-1)


def test_what_passes_the_end_is_dropped(gpu):
    session = Session(gpu, "int8", 64, 2, 1, 1, 96, "float16")
    session.step(95)
    session.step(1)
    q = gpu.array(session.draw(1, 2).astype(np.float16))
    kv = gpu.array(session.draw(1, 1).astype(np.float16))
    session.cache.append(0, kv, kv)
    assert np.isfinite(get(gpu.attend(q, session.cache, 0))).all()
    session.cache.advance()
    assert get(session.cache.lengths).tolist() == [96]


@pytest.mark.parametrize("dim", [64, 80, 128])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("pairs", [None, 16])
def test_append_norms_and_turns(gpu, dim, dtype, pairs):
    rope = Rope(theta=10000.0)
    from tenpak.decoder.layers import frequencies

    rates = frequencies(rope, dim)[: pairs or dim // 2]
    table = gpu.RotaryTable(rates, 128)
    random, kind = np.random.default_rng(5), type_of(dtype)
    cache = gpu.KVCache(1, 2, dim, 128, "fp16")
    before = 0
    for tokens in (19, 1):
        q, k, v = (random.standard_normal((1, tokens, heads, dim)).astype(kind) for heads in (4, 2, 2))
        norms = [(1 + 0.1 * random.standard_normal(dim)).astype(kind) for _ in range(2)]
        expected = []
        for x, norm in zip((q, k), norms, strict=True):
            y = RMSNorm(norm.astype(np.float32), 1e-6, xp=np)(x.astype(np.float32)).transpose(0, 2, 1, 3)
            turn = Rotary(rope, dim, xp=np)
            turn._frequencies = rates
            y[..., : 2 * len(rates)] = turn(y[..., : 2 * len(rates)], before)
            expected.append(y.transpose(0, 2, 1, 3))
        q, k, v, q_norm, k_norm = (gpu.array(x) for x in (q, k, v, *norms))
        cache.append(0, k, v, q=q, rotary=table, q_norm=q_norm, k_norm=k_norm)
        cache.advance(tokens)
        before += tokens
        for x, y in zip((q, k), expected, strict=True):
            assert np.linalg.norm(get(x) - y) / np.linalg.norm(y) < {"float16": 5e-4, "bfloat16": 4e-3}[dtype]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(("dim", "heads", "kv_heads"), [(32, 2, 1), (64, 4, 2), (80, 1, 1), (128, 2, 1), (256, 1, 1)])
@pytest.mark.parametrize(("tokens", "window"), [(1, None), (64, None), (150, None), (150, 70)])
def test_prefill(gpu, dtype, dim, heads, kv_heads, tokens, window):
    random, kind = np.random.default_rng(tokens + dim), type_of(dtype)
    batch = 2 if dim == 64 else 1
    qkv = gpu.array(random.standard_normal((batch, tokens, heads + 2 * kv_heads, dim)).astype(kind))
    q, k, v = qkv[:, :, :heads], qkv[:, :, heads : heads + kv_heads], qkv[:, :, heads + kv_heads :]
    out = gpu.array(np.full(q.shape, np.nan).astype(kind))
    gpu.prefill(q, k, v, window=window, out=out)
    for i in range(batch):
        expected = softmax_attention(get(q)[i], get(k)[i], get(v)[i], 0, window, dim**-0.5)
        error = np.linalg.norm(get(out)[i] - expected) / np.linalg.norm(expected)
        assert error < TOLERANCE[dtype], error


def test_bytes(gpu):
    per_token = {kv: gpu.KVCache(2, 8, 128, 4096, kv).bytes_per_token for kv in ("fp16", "int8", "int4")}
    assert per_token["fp16"] / per_token["int8"] == pytest.approx(1.94, abs=0.01)
    assert per_token["fp16"] / per_token["int4"] == pytest.approx(3.76, abs=0.01)
    cache = gpu.KVCache(2, 8, 128, 4096, "int8", 3)
    recent = 80 * 8 * 128 * 2 * 2 * 2 * 3
    assert cache.nbytes == 3 * 4096 * per_token["int8"] + recent + 3 * 4


def test_refusals(gpu):
    for arguments, message in [
        ((0, 1, 64, 16), "layers 0 is too small"),
        ((1, 1, 65, 16), "head_dim 65 has no kernels; there are 32, 64"),
        ((1, 1, 64, 16, "int3"), "unknown kind of cache 'int3'; choose fp16, int8, int4"),
        ((1, 1, 64, 16, "int8", 0), "batch 0 is too small"),
    ]:
        with pytest.raises(tenpak.UsageError, match=message):
            gpu.KVCache(*arguments)
    cache = gpu.KVCache(1, 2, 64, 64)
    q, k = (gpu.array(np.zeros((1, 1, heads, 64), np.float16)) for heads in (4, 2))
    cache.append(0, k, k)

    def two(heads: int) -> Any:
        return gpu.array(np.zeros((1, 2, heads, 64), np.float16))

    for call, message in [
        (lambda: cache.append(1, k, k), "there is no layer 1"),
        (lambda: cache.append(0, q, q), r"k: \[1, 1, 4\] does not fit"),
        (lambda: cache.append(0, k.astype(np.float32), k), "k: float32 is no type"),
        (lambda: cache.append(0, k, k, counts=k), "counts: float16"),
        (lambda: gpu.attend(gpu.array(np.zeros((1, 1, 3, 64), np.float16)), cache, 0), "q has 3 heads"),
        (lambda: gpu.attend(q, cache, 0, window=0), "window 0 is too small"),
        (lambda: gpu.append_and_attend(two(4), two(2), two(2), cache, 0), "k: 2 tokens; one is appended here"),
        (lambda: gpu.attend(q, cache, 0, out=k), "out: float16"),
        (lambda: gpu.prefill(q, k, k.astype(np.float32)), "v: float32"),
    ]:
        with pytest.raises(tenpak.UsageError, match=message):
            call()
