"""Products on a GPU, beside FP64: every layout, odd sizes, all numbers of tokens, and what callers may hand over.

Skipped where there is no GPU. Outputs are poisoned with NaN before they are written.
"""

from __future__ import annotations

import dataclasses
import threading
from functools import partial
from itertools import product
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import tenpak
from support import gaussian, require
from tenpak.cuda import layouts

LAYOUTS = list(layouts.LAYOUTS)
every_layout = pytest.mark.parametrize("layout", LAYOUTS)
every_dtype = pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
#: A relative error of the whole output: the weight is rounded to the type, sums are FP32. Relative to what sums of
#: such products are when nothing cancels, because a few outputs alone may cancel.
TOLERANCE = {"float16": 1.5e-3, "bfloat16": 8e-3}
#: n, k: below a tile, odd, K in a partial group, K cut into slices, many strips.
SHAPES = [(1, 8), (21, 150), (64, 64), (130, 1000), (48, 8200), (2500, 264)]
TOKENS = [1, 2, 7, 8, 9, 16, 17, 33, 64, 65, 130, 300, 700]


@pytest.fixture(scope="module")
def cupy() -> Any:
    require("cuda")
    import cupy

    return cupy


@pytest.fixture(scope="module")
def hopper(cupy: Any) -> Any:
    """The first GPU, as plans ask for it: with the copy engine and the products that rows.cu and wide.cu need."""
    from tenpak.cuda import products

    device = products.device_of(0)
    if not device.hopper:
        pytest.skip("the first GPU is not of Hopper's generation (9.0)")
    return device


def type_of(name: str) -> np.dtype:
    return np.dtype(name) if name != "bfloat16" else np.dtype(pytest.importorskip("ml_dtypes").bfloat16)


def random_weight(layout: str, n: int, k: int, batch: int = 0, seed: int = 0) -> Any:
    """Of random codes and parameters with a real weight's size; layouts need no codec for it."""
    from tenpak.cuda import QuantizedWeight, codec

    about, random = layouts.find(layout), np.random.default_rng(seed)
    rows, group = max(batch, 1) * n, about.group or k
    groups = -(-k // group)
    if about.code_bits == 8:
        scales = (0.001 * (1 + random.random((rows, 1)))).astype(np.float32)
        parts = [random.integers(-127, 128, (rows, k)).astype(np.int8), scales]
    else:
        parts = [random.integers(0, 256, (rows, -(-k // 2)), np.uint8)]
        if about.param == np.dtype("<u4"):
            scale = 0.002 * (1 + random.random((rows, groups)))
            parts += [scale.astype(np.float16), (-7.5 * scale).astype(np.float16)]
        else:
            parts += [random.integers(0, 256, (rows, groups), np.uint8) for _ in about.group_parts]
        if about.row_run:
            parts += [(2e-5 * (1 + random.random((rows, -(-k // about.row_run))))).astype(np.float16)]
        elif about.row_part is not None:
            line = np.array([0.001, 1e-5, -0.02, 6e-5]) * (1 + random.random((rows, 4)))
            parts += [line.astype(np.float16)]
        if about.high_bits:
            parts += [random.integers(0, 256, (rows, -(-k * about.high_bits // 8)), np.uint8)]
    import cupy

    *packed, power = codec.pack(about, [cupy.asarray(part) for part in parts], n, k, batch)
    scale = 0.25 / 2.0**power
    return QuantizedWeight(layout, (n, k), batch, *packed, scale=scale, device=packed[0].device.id)


def activations(cupy: Any, *shape: int, dtype: str, seed: int = 1) -> Any:
    x = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return cupy.asarray(x.astype(type_of(dtype)))


def poisoned(cupy: Any, *shape: int, dtype: str) -> Any:
    bits = 0x7FFF
    return cupy.full(shape, bits, np.uint16).view(type_of(dtype))


def exact(x: Any, w: Any, bias: Any = None) -> np.ndarray:
    """x Wᵀ + bias in FP64."""
    y = x.get().astype(np.float64) @ np.swapaxes(w.to_dense(np.float32).get().astype(np.float64), -1, -2)
    if bias is not None:
        bias = bias.get().astype(np.float64)
        y = y + (bias[:, None, :] if w.batch else bias)
    return y


def expected_norm(x: Any, w: Any) -> float:
    """‖x Wᵀ‖ if the signs of all products were random."""
    squares = np.square(w.to_dense(np.float32).get().astype(np.float64))
    return float(np.sqrt((np.square(x.get().astype(np.float64)) @ np.swapaxes(squares, -1, -2)).sum()))


def error(ours: Any, wanted: np.ndarray, at_least: float = 0.0) -> float:
    """‖ours − wanted‖ / ‖wanted‖."""
    norm = max(float(np.linalg.norm(wanted)), at_least)
    return float(np.linalg.norm(ours.get().astype(np.float64) - wanted)) / norm


@every_layout
@every_dtype
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_products_of_every_shape(cupy, layout, dtype, n, k):
    from tenpak.cuda import matmul

    w = random_weight(layout, n, k)
    bias = activations(cupy, n, dtype=dtype, seed=2)
    for m in TOKENS:
        x = activations(cupy, m, k, dtype=dtype, seed=m)
        out = poisoned(cupy, m, n, dtype=dtype)
        assert matmul(x, w, out=out) is out
        norm = expected_norm(x, w)
        assert error(out, exact(x, w), at_least=norm) < TOLERANCE[dtype], m
        assert error(matmul(x, w, bias), exact(x, w, bias), at_least=norm) < TOLERANCE[dtype], m


@every_layout
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_the_norm_before_a_product(cupy, layout, kind):
    """And outputs that are added to what was there; waiting for the launch before, or not."""
    from tenpak.cuda import plans, products
    from tenpak.cuda.launch import overlapping

    stream = cupy.cuda.get_current_stream()
    # K in one part, in slices, and with a tile that is not full.
    for n, k in [(40, 256), (48, 8200), (2500, 1000)]:
        w = random_weight(layout, n, k)
        weight, bias = (
            cupy.asarray(np.random.default_rng(seed).standard_normal(k).astype(np.float32)) for seed in (3, 4)
        )
        for m in (1, 2, 5, 8):
            h = cupy.asarray(np.random.default_rng(m).standard_normal((m, k)).astype(np.float32) * 3 + 0.5)
            rows = h.get().astype(np.float64)
            rows = rows - rows.mean(-1, keepdims=True) if kind == "layer" else rows
            rows = rows / np.sqrt((rows**2).mean(-1, keepdims=True) + 1e-5) * weight.get()
            x = cupy.asarray((rows + bias.get() if kind == "layer" else rows).astype(np.float16))
            before = cupy.asarray(np.random.default_rng(5).standard_normal((m, n)).astype(np.float32))
            for overlaps in (False, True):
                fused, y = plans.Fused(kind, output="added", overlaps=overlaps), before.copy()
                norm = (weight.data.ptr, bias.data.ptr if kind == "layer" else 0, 1e-5)
                with overlapping():
                    products.launch(w, h.data.ptr, y.data.ptr, m, bf16=False, stream=stream, fused=fused, norm=norm)
                wanted = exact(x, w)
                added = y - before
                assert error(added, wanted, at_least=expected_norm(x, w)) < TOLERANCE["float16"], (n, k, m, overlaps)


#: n, k and batch of every kind: below a tile, odd, K cut into slices, many strips, several matrices.
KINDS = ((21, 152, 0), (130, 1000, 0), (48, 8200, 0), (2500, 264, 0), (70, 200, 3))


def check_every_plan(
    cupy: Any, layout: str, dtype: str, tokens: tuple[int, ...], plans_of: Any, shapes: Any = KINDS
) -> None:
    """Each of plans_of(n, k, m, batch, bf16) beside FP64, for all shapes; twice the same."""
    from tenpak.cuda import products
    from tenpak.cuda.compile import function

    bf16, stream = dtype == "bfloat16", cupy.cuda.get_current_stream()
    for n, k, batch in shapes:
        w = random_weight(layout, n, k, batch)
        lead = (batch,) if batch else ()
        bias = activations(cupy, *lead, n, dtype=dtype, seed=2)
        for m in tokens:
            x = activations(cupy, *lead, m, k, dtype=dtype, seed=m)
            wanted, norm = exact(x, w, bias), expected_norm(x, w)
            for plan in plans_of(n, k, m, max(batch, 1), bf16):
                kernel = function(plan.source, plan.kernel, plan.defines, 0)
                outputs = []
                for _ in range(2):
                    out = poisoned(cupy, *lead, m, n, dtype=dtype)
                    addresses = (x.data.ptr, out.data.ptr)
                    products.run((plan, kernel), w, *addresses, m, k, bf16=bf16, stream=stream, bias=bias.data.ptr)
                    outputs.append(out)
                assert error(outputs[0], wanted, at_least=norm) < TOLERANCE[dtype], (m, plan)
                assert bool((outputs[0].view(np.uint16) == outputs[1].view(np.uint16)).all()), (m, plan)


@every_layout
@every_dtype
def test_products_of_few_tokens(cupy, layout, dtype):
    """skinny.cu in every configuration that it may be taken in for a shape."""
    from tenpak.cuda import plans, products

    device = products.device_of(0)
    check_every_plan(cupy, layout, dtype, (1, 2, 3, 4, 7, 16, 19), partial(plans.skinny_plans, device, layout))


@every_layout
@every_dtype
def test_strips_that_are_left_over_are_cut(cupy, hopper, layout, dtype):
    """Along K, each block's share first: of one strip, of two, or nothing; and with two strips at a time."""
    from tenpak.cuda import plans

    few = dataclasses.replace(hopper, multiprocessors=4)
    forms = [plans.Form(8, 4, 2, 1, True, 1, 4, head=True), plans.Form(16, 4, 1, 2, True, 2, 4, head=True)]

    def plans_of(*about: Any) -> list[plans.Plan]:
        with patch.object(plans, "_forms", lambda *_: forms):
            found = plans.skinny_plans(few, layout, *about)
        assert any("HEAD" in plan.defines for plan in found)
        return found

    check_every_plan(cupy, layout, dtype, (1, 5), plans_of, ((150, 2112, 0), (277, 2112, 0), (420, 1290, 0)))


@every_layout
@every_dtype
def test_products_of_many_rows(cupy, hopper, layout, dtype):
    """rows.cu with two strips a block and with fourteen, in one turn and in two, and for several matrices."""
    from tenpak.cuda import plans

    shapes = ((2500, 320, 0), (29000, 192, 0), (60000, 64, 0), (1300, 192, 3))
    one = partial(plans.rows_plan, hopper, layout)
    check_every_plan(cupy, layout, dtype, (2, 5, 8, 9, 16, 19), lambda *about: [one(*about)], shapes)


@every_layout
@every_dtype
def test_products_of_tiles(cupy, layout, dtype):
    """tiled.cu, which Hopper takes for experts and for tokens that the copy engine cannot read."""
    from tenpak.cuda import plans, products

    one = partial(plans.tiled_plan, products.device_of(0), layout)
    check_every_plan(cupy, layout, dtype, (1, 33, 72, 100, 300), lambda *about: [one(*about)])


@every_layout
@every_dtype
def test_products_of_boxes(cupy, hopper, layout, dtype, monkeypatch):
    """wide.cu wherever the copy engine can read x, in every configuration it may choose for a shape."""
    from tenpak.cuda import plans, products, tensormap

    check_every_plan(cupy, layout, dtype, (1, 9, 17, 40, 72, 130, 300), partial(plans.wide_plans, hopper, layout))

    # Rows enough for two rounds, whose last tiles have fewer tokens.
    def narrow(*about: Any) -> list[Any]:
        return [plan for plan in plans.wide_plans(hopper, layout, *about) if "NARROW" in plan.defines]

    check_every_plan(cupy, layout, dtype, (519,), narrow, ((5700, 200, 0),))
    # As `matmul` takes it once it is chosen; rows that do not fit take another kernel.
    monkeypatch.setattr(plans, "WIDE_FROM", 9)
    w = random_weight(layout, 130, 1001)
    for stride in (1001, 1008):
        x = activations(cupy, 40, stride, dtype=dtype)[:, :1001]
        assert tensormap.fits(x.data.ptr, stride) == (stride == 1008)
        assert error(products.matmul(x, w), exact(x, w), at_least=expected_norm(x, w)) < TOLERANCE[dtype]


@every_layout
@every_dtype
def test_a_large_value_and_what_is_not_finite_stay_in_their_token(cupy, layout, dtype):
    """Where activations share a scale, one among thousands decides it."""
    from tenpak.cuda import matmul

    w = random_weight(layout, 100, 2200)
    for m in (2, 12, 40):
        values = np.random.default_rng(m).standard_normal((m, 2200)).astype(np.float32)
        values[:, 77] *= 1000
        x = cupy.asarray(values.astype(type_of(dtype)))
        assert error(matmul(x, w), exact(x, w)) < TOLERANCE[dtype]
        for value in (np.nan, np.inf):
            values[0, 500] = value
            y = matmul(cupy.asarray(values.astype(type_of(dtype))), w).get().astype(np.float32)
            assert not np.isfinite(y[0]).any()
            assert np.isfinite(y[1:]).all()


@every_layout
@every_dtype
def test_batches_and_experts(cupy, layout, dtype):
    from tenpak.cuda import grouped_matmul, matmul

    batch, n, k = 5, 70, 200
    w = random_weight(layout, n, k, batch)
    bias = activations(cupy, batch, n, dtype=dtype, seed=2)
    dense = w.to_dense(np.float32).get().astype(np.float64)
    for m in (1, 12, 100, 600):
        x = activations(cupy, batch, m, k, dtype=dtype)
        assert error(matmul(x, w, bias), exact(x, w, bias)) < TOLERANCE[dtype], m
    # Experts without tokens, and with most of them; few tokens, and so many that they are multiplied in tiles; and
    # those that the copy engine cannot read.
    for ends, beside in product(([0, 0, 2, 2, 3, 7], [0, 3, 3, 90, 91, 97], [0, 0, 1, 301, 302, 400]), (0, 1)):
        offsets, count = np.array(ends, np.int32), ends[-1]
        x = activations(cupy, count, k + beside, dtype=dtype)[:, beside:]
        wanted = np.empty((count, n))
        for expert in range(batch):
            rows = slice(*offsets[expert : expert + 2])
            wanted[rows] = x[rows].get().astype(np.float64) @ dense[expert].T + bias[expert].get().astype(np.float64)
        ours = grouped_matmul(x, w, cupy.asarray(offsets), bias, out=poisoned(cupy, count, n, dtype=dtype))
        assert error(ours, wanted) < TOLERANCE[dtype]


@every_layout
def test_unpacked_rows_are_the_weights(cupy, layout):
    from tenpak.cuda import products

    w = random_weight(layout, 70, 200, batch=2)
    for dtype in ("float16", "bfloat16"):
        out = poisoned(cupy, 40, 200, dtype=dtype)
        products.unpack(w, out, dtype == "bfloat16", cupy.cuda.get_current_stream(), 1, 16)
        assert error(out, w.to_dense(np.float32).get()[1, 16:56].astype(np.float64)) < TOLERANCE[dtype]


def test_arrays_that_are_not_row_after_row(cupy):
    from tenpak.cuda import matmul

    w = random_weight("int4_g16_fp16", 100, 256)
    for m in (3, 40, 600):
        wide = activations(cupy, 2 * m, 300, dtype="float16")
        for x in (wide[::2, :256], wide[:m, 7:263], activations(cupy, 256, m, dtype="float16").T):
            assert error(matmul(x, w), exact(x, w)) < 1.5e-3
    x = activations(cupy, 2, 3, 4, 256, dtype="float16")
    assert matmul(x, w).shape == (2, 3, 4, 100)
    assert matmul(x[:0], w).shape == (0, 3, 4, 100)


def test_streams_threads_and_graphs(cupy):
    from tenpak.cuda import matmul

    w = random_weight("int4_g32_fp16", 200, 4096)
    for m in (1, 16, 100):
        x = activations(cupy, m, 4096, dtype="float16")
        wanted = exact(x, w)
        streams = [cupy.cuda.Stream(non_blocking=True) for _ in range(4)]
        cupy.cuda.Device().synchronize()
        results = [matmul(x, w, stream=stream) for stream in streams * 8]
        for stream in streams:
            stream.synchronize()
        assert all(error(result, wanted) < 1.5e-3 for result in results)

        found = []

        def work(x: Any = x, found: list[Any] = found) -> None:
            with cupy.cuda.Stream(non_blocking=True) as stream:
                found.append(matmul(x, w))
                stream.synchronize()

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 4
        assert all(error(result, wanted) < 1.5e-3 for result in found)

        stream, out = streams[0], poisoned(cupy, m, 200, dtype="float16")
        cupy.cuda.Device().synchronize()
        matmul(x, w, out=out, stream=stream)
        stream.synchronize()
        with stream:
            stream.begin_capture()
            matmul(x, w, out=out, stream=stream)
            graph = stream.end_capture()
        for seed in range(3):
            x[...] = activations(cupy, m, 4096, dtype="float16", seed=10 + seed)
            out[...] = poisoned(cupy, m, 200, dtype="float16")
            cupy.cuda.Device().synchronize()
            graph.launch(stream)
            stream.synchronize()
            assert error(out, exact(x, w)) < 1.5e-3


def test_every_device_has_its_own(cupy):
    from tenpak.cuda import QuantizedWeight, matmul

    for number in range(cupy.cuda.runtime.getDeviceCount()):
        with cupy.cuda.Device(number):
            w = QuantizedWeight.from_array(gaussian(100, 300), "int4_g8_fp16_v1")
            x = activations(cupy, 5, 300, dtype="float16")
        # The weight's device is not the current one.
        y = matmul(x, w)
        assert (w.device, y.device.id) == (number, number)
        with cupy.cuda.Device(number):
            assert error(y, exact(x, w)) < 1.5e-3


def test_what_does_not_fit_is_refused(cupy):
    from tenpak.cuda import grouped_matmul, matmul

    w = random_weight("int4_g8_fp16", 32, 64)
    x = activations(cupy, 3, 64, dtype="float16")
    for given, text in (
        ((x[:, :63], w), r"x: shape \[3, 63\] does not fit the weight; it must be \[..., 64\]"),
        ((x.astype(np.float32), w), "x: float32 is no type of these kernels"),
        ((x, w, cupy.zeros(31, np.float16)), r"bias: float16 \[31\] does not fit"),
        ((x, w, None, cupy.zeros((3, 31), np.float16)), r"out: float16 \[3, 31\] does not fit"),
    ):
        with pytest.raises(tenpak.UsageError, match=text):
            matmul(*given)
    with pytest.raises(tenpak.UsageError, match="no experts"):
        grouped_matmul(x, w, cupy.zeros(2, np.int32))
