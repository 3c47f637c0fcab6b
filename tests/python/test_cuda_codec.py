"""Packing, encoding and decoding kernels: to the bit what the core and the packed format's reference give."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import cuda_on_cpu
import numpy as np
import pytest
import tenpak
from support import gaussian, require
from tenpak.cuda import layouts

CODECS = [codec.name for codec in tenpak.codecs()]
MINMAX = [codec.name for codec in tenpak.codecs() if codec.encoder == "min/max"]
#: Odd sizes, sizes below a tile, whole tiles; a batch of each orientation.
SHAPES = [((37, 200), -1), ((130, 19), 0), ((16, 64), 1), ((1, 1), -1), ((3, 21, 75), -1), ((2, 300, 18), 1)]
every_codec = pytest.mark.parametrize("codec", CODECS)
every_shape = pytest.mark.parametrize(("shape", "axis"), SHAPES)


@pytest.fixture(scope="module", params=["cpu", "cuda"])
def cuda(request: pytest.FixtureRequest) -> Iterator[SimpleNamespace]:
    """The modules over NumPy and a C++ compiler, and over CuPy and a GPU."""
    require("c++" if request.param == "cpu" else "cuda")
    if request.param == "cpu":
        with cuda_on_cpu.cuda_on_cpu() as modules:
            yield SimpleNamespace(**vars(modules), numpy=np.asarray, array=cuda_on_cpu.array)
    else:
        import cupy
        from tenpak.cuda import QuantizedWeight, codec

        yield SimpleNamespace(codec=codec, QuantizedWeight=QuantizedWeight, numpy=cupy.asnumpy, array=cupy.asarray)


def matrix(array: np.ndarray, axis: int) -> np.ndarray:
    """[n, k] or [batch, n, k]."""
    return np.moveaxis(array, axis, -1)


@every_codec
@every_shape
def test_packed_weights_are_the_references_and_rebuild_the_cores_weights(cuda, codec, shape, axis):
    encoded = tenpak.encode(gaussian(*shape), codec, axis)
    weight = cuda.QuantizedWeight.from_parts(codec, encoded.parts, shape, axis, encoded.exponent)
    n, k, batch = layouts.matrices(shape, axis)
    layout = layouts.find(weight.layout)
    *reference, power = layouts.pack(layout, list(encoded.parts.values()), n, k, batch)
    assert (weight.shape, weight.batch, weight.scale) == ((n, k), batch, 2.0 ** (encoded.exponent - power))

    for ours, wanted in zip((weight.codes, weight.params, weight.row_params), reference, strict=True):
        assert (ours is None) == (wanted is None)
        if ours is not None:
            assert np.array_equal(cuda.numpy(ours), wanted)

    for dtype in (np.float32, np.float16):
        dense = cuda.numpy(weight.to_dense(dtype))
        assert dense.dtype == dtype
        assert np.array_equal(dense, matrix(tenpak.decode(encoded, dtype), axis))


@every_codec
@every_shape
def test_parts_are_rebuilt_with_the_cores_bits(cuda, codec, shape, axis):
    for scale in (0.02, 2.0**-20, 2.0**17):
        encoded = tenpak.encode(gaussian(*shape, scale=scale), codec, axis)
        for dtype in (np.float32, np.float16):
            rebuilt = cuda.numpy(cuda.codec.decode(encoded, dtype))
            assert np.array_equal(rebuilt, tenpak.decode(encoded, dtype)), (scale, dtype)
        weight = cuda.QuantizedWeight.from_parts(codec, encoded.parts, shape, axis, encoded.exponent)
        assert np.array_equal(cuda.numpy(weight.to_dense(np.float32)), matrix(tenpak.decode(encoded, np.float32), axis))


@every_codec
def test_bfloat16_is_rounded_to_nearest_even(cuda, codec):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    encoded = tenpak.encode(gaussian(20, 100), codec)
    rebuilt = cuda.numpy(cuda.codec.decode(encoded, ml_dtypes.bfloat16))
    wanted = tenpak.decode(encoded, np.float32).astype(ml_dtypes.bfloat16)
    assert np.array_equal(rebuilt.view(np.uint16), wanted.view(np.uint16))


@pytest.mark.parametrize("codec", MINMAX)
@every_shape
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_min_max_encodes_the_cores_bytes(cuda, codec, shape, axis, dtype):
    random = np.random.default_rng(3)
    plain = gaussian(*shape, seed=4)
    zeros = plain * 0 * random.choice([-1.0, 1.0], shape)  # of both signs
    sparse = np.where(random.random(shape) < 0.7, zeros, plain)
    coarse = np.round(plain * 300) / 64  # ties between codes
    cases = [plain, zeros, sparse, coarse, plain * 1e-6, np.full(shape, -0.3)]
    cases += [plain * 2.0**21, plain * 2.0**-120] if dtype is np.float32 else []
    for case in cases:
        given = np.ascontiguousarray(case.astype(dtype))
        ours, wanted = cuda.codec.encode(cuda.array(given), codec, axis), tenpak.encode(given, codec, axis)
        for what in ("codec", "shape", "axis", "dtype", "exponent"):
            assert getattr(ours, what) == getattr(wanted, what)
        for name, part in wanted.parts.items():
            assert np.array_equal(cuda.numpy(ours.parts[name]).view(np.uint8), part.view(np.uint8)), name


@every_codec
def test_an_array_becomes_the_weight_that_its_parts_make(cuda, codec):
    array = gaussian(24, 130)
    weight = cuda.QuantizedWeight.from_array(array, codec)
    assert np.array_equal(cuda.numpy(weight.to_dense(np.float32)), tenpak.decode(tenpak.encode(array, codec)))
    parts = (weight.codes, weight.params, weight.row_params)
    assert weight.nbytes == sum(part.nbytes for part in parts if part is not None)


@pytest.mark.parametrize(
    "layout", ["int4_g32_fp16", "int4_g128_fp16", "int4_g8_u8", "int6_g32_u8", "int4_lut16", "int4_lut32"]
)
@pytest.mark.parametrize("largest", [2.0**-20, 0.02, 3.99, 4.0, 60000.0])
def test_scales_are_packed_as_large_as_kernels_want_them(cuda, layout, largest):
    about = layouts.find(layout)
    n, k, random = 21, 264, np.random.default_rng(5)
    codes = random.integers(0, 256, (n, k // 2), np.uint8)
    shape = (n, -(-k // about.group))
    for offset in (0.0, -7.5, 2.0**14):
        if about.halves == ("params", 2):
            # Neighbours of one group that is as large as none other.
            scales = largest * np.where(np.arange(shape[1]) == 1, 1.0, random.random(shape) / 64)
            parts = [codes, scales.astype(np.float16), np.clip(offset * scales, -65504, 65504).astype(np.float16)]
            halves = np.stack([part.astype(np.float32) for part in parts[1:]], -1)
        elif about.name in layouts.TABLES:
            groups = -(-k // (about.group * about.repeat))
            supers = largest * (0.5 + 0.5 * random.random((n, -(-k // (about.row_run * about.repeat)))))
            supers[3, 0] = largest
            parts = [codes, random.integers(0, 256, (n, groups), np.uint8), supers.astype(np.float16)]
            halves = parts[2].astype(np.float32)[..., None]
        else:
            line = largest * np.array([0.25, 0.75 / 255, 0.25 * offset, 0.75 * offset / 255])
            line = (line * (0.5 + 0.5 * random.random((n, 1)))).clip(-60000, 60000).astype(np.float16)
            line[3] = 0
            parts = [codes, *(random.integers(0, 256, shape, np.uint8) for _ in range(2)), line]
            parts += [random.integers(0, 256, (n, k * about.high_bits // 8), np.uint8)] if about.high_bits else []
            halves = line.astype(np.float32)
        ours = cuda.codec.pack(about, [cuda.array(part) for part in parts], n, k, 0)
        reference = layouts.pack(about, parts, n, k)
        assert ours.power == reference.power
        for array, wanted in zip(ours[:3], reference[:3], strict=True):
            assert (array is None) == (wanted is None)
            if array is not None:
                assert np.array_equal(cuda.numpy(array), wanted)
        scale, highest = layouts.largest(halves * np.float32(2.0**ours.power))
        assert scale < layouts.SCALE_BOUND
        assert highest <= 65504
        assert scale >= layouts.SCALE_BOUND / 2 or highest >= 32752 or ours.power == layouts.MOST_POWER
        # What is packed once stays as it is.
        assert layouts.power_of(scale, highest) in (0, layouts.MOST_POWER) or ours.power == layouts.MOST_POWER


def test_an_artifacts_tensors_become_weights(cuda, packed):
    with tenpak.open(packed) as artifact:
        for info in artifact.infos:
            if info.codec == "keep":
                with pytest.raises(tenpak.UsageError, match="is kept as"):
                    cuda.QuantizedWeight.from_artifact(artifact, info.name)
                continue
            weight = cuda.QuantizedWeight.from_artifact(artifact, info.name)
            assert np.array_equal(cuda.numpy(weight.to_dense(np.float32)), artifact.read(info.name, np.float32))


def test_what_is_no_finite_weight_is_named(cuda):
    array = gaussian(8, 16)
    array[3, 5] = np.inf
    with pytest.raises(tenpak.InputError, match=r"inf at index \[3, 5\]"):
        cuda.codec.encode(cuda.array(array), "int4_g8_fp16_v1")


def test_parts_that_do_not_fit_are_refused(cuda):
    encoded = tenpak.encode(gaussian(8, 32), "int4_g8_fp16_v1")
    make = cuda.QuantizedWeight.from_parts
    with pytest.raises(tenpak.UsageError, match="lack 'scales'"):
        make(encoded.codec, {"codes": encoded.parts["codes"]}, (8, 32))
    with pytest.raises(tenpak.UsageError, match=r"codes: uint8 \[8, 16\] does not fit"):
        make(encoded.codec, encoded.parts, (8, 64))
    with pytest.raises(tenpak.UsageError, match="no linear layer"):
        make(encoded.codec, encoded.parts, (4, 2, 32), 0)


@pytest.mark.parametrize("name", layouts.LAYOUTS)
def test_lanes_and_words_of_the_reference_are_those_that_layouts_cuh_draws(name):
    """Codes, element by element, from the drawing; parameters that `fragment` would read beside them."""
    layout = layouts.find(name)
    n, k, rng = 21, 150, np.random.default_rng(1)
    group, eight = layout.group or k, layout.code_bits == 8
    tables, part_group = name.startswith("int4_lut"), group * layout.repeat
    codes = rng.integers(0, 256, (n, k if eight else -(-k // 2)), np.uint8)
    fields = {i: rng.integers(0, 256, (n, -(-k // part_group)), np.uint8) for i in layout.group_parts}
    if layout.param is not None and layout.param.itemsize == 4:
        fields = {i: rng.integers(0, 2**16, part.shape, np.uint16) for i, part in fields.items()}
    parts = [codes, *(np.empty((n, 0), np.uint8) for _ in range(3))]
    for i, part in fields.items():
        parts[i] = part
    if layout.row_part is not None:
        width = -(-k // (layout.row_run * layout.repeat)) if layout.row_run else layout.row_params
        parts[layout.row_part] = rng.integers(0, 2**16, (n, width)).astype(layout.row_param)
        if tables:
            parts[layout.row_part][0, 0] = 0x7C00
    more = layout.high_bits
    if more:
        parts.append(rng.integers(0, 256, (n, -(-k * more // 8)), np.uint8))
    packed, params, rows, power = layouts.pack(layout, parts, n, k)
    assert power == 0, "among random halves are some that are not finite"
    supers = None if not layout.row_run else rows
    # A tile's parameters, then its lanes' words of high bits.
    planes = None if not more else np.ascontiguousarray(params[..., 1024 // group :]).view(np.uint32)
    params = params if not more else params[..., : 1024 // group]

    for row in range(n):
        for column in range(k):
            strip, tile, g, t = row // 16, column // 64, row % 8, column % 32 // 8
            word, lane, i = row % 16 // 8 + 2 * (column % 64 // 32), g * 4 + t, column % 8
            if eight:
                plane = packed[strip, tile].reshape(2, 32, 4)[word // 2, lane].copy()
                assert plane.view(np.uint8).reshape(4, 2, 2)[i // 2, word % 2, i % 2] == codes[row, column] ^ 128
            else:
                at, place = (word, i) if tables else (i // 2, word + i % 2 * 4)
                code = int(codes[row, column // 2]) >> (4 * (column % 2)) & 15
            if planes is not None:
                # Both rows' codes in one number, whose low byte is where two nibbles would be.
                code |= (int(parts[4][row, column * more // 8]) >> (column * more % 8) & ((1 << more) - 1)) << 4
                half, pair, second, pairs = word // 2, i // 2, i % 2, 4 // more
                low = int(packed[strip, tile].reshape(32, 4)[lane, pair]) >> (8 * (half + 2 * second)) & 255
                plane = int(planes[strip, tile].reshape(more, 32)[pair // pairs, lane])
                both = low | (plane >> (8 * (2 * half + second) + pair % pairs * 2 * more) & ((1 << 2 * more) - 1)) << 8
                assert both >> (word % 2 * (4 + more)) & ((1 << 4 + more) - 1) == code
            elif not eight:
                if tables:
                    code = code & 3 | (code & 4) << 1 | (code & 8) >> 1
                assert packed[strip, tile].reshape(32, 4)[lane, at] >> np.uint32(4 * place) & 15 == code
            if params is None:
                continue
            raw = [int(fields[j][row, column // part_group]) for j in fields]
            bits = 8 * next(iter(fields.values())).itemsize
            wanted = sum(value << (bits * j) for j, value in enumerate(raw))
            if group <= 32:
                subgroups = 32 // group
                assert params[strip, tile].reshape(8 * subgroups, 4)[g * subgroups + t * subgroups // 4, word] == wanted
            else:
                assert params[strip, column // group].reshape(8, 2)[g, word % 2] == wanted
        if supers is not None:
            repeated = np.repeat(parts[layout.row_part][row], layout.repeat)[: -(-k // layout.row_run)]
            assert np.array_equal(supers[row // 16, :, row % 16], repeated)
        elif layout.row_part is not None:
            assert np.array_equal(rows.reshape(-1, parts[layout.row_part].shape[1])[row], parts[layout.row_part][row])
