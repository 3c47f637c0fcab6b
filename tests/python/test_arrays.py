"""`encode` and `decode`: laws that every codec keeps for every shape, dtype and axis."""

from __future__ import annotations

import numpy as np
import pytest
import tenpak
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from support import gaussian, relative_error

CODECS = [codec.name for codec in tenpak.codecs()]
every_codec = pytest.mark.parametrize("codec", CODECS)


def test_the_table_has_the_codecs_that_the_documents_promise():
    table = {codec.name: codec for codec in tenpak.codecs()}
    assert set(table) == {
        "int4_opt_v1",
        "int4_opt_llama_v1",
        "int4_g8_fp16_v1",
        "int4_g16_fp16_v1",
        "int4_g32_fp16_v1",
        "int4_g8_v1",
        "int4_g16_v1",
        "int5_g32_v1",
        "int6_g32_v1",
        "int8_sym_v1",
        "int4_lut16_v1",
        "int4_lut32_v1",
    }
    bits = {name: codec.bits_per_weight for name, codec in table.items()}
    assert bits["int4_opt_v1"] == 6
    assert bits["int4_opt_llama_v1"] == 8
    assert bits["int4_g32_fp16_v1"] == 5
    assert bits["int4_lut16_v1"] == 4.5625
    assert bits["int4_lut32_v1"] == 4.28125
    assert table["int4_lut16_v1"].compression == pytest.approx(7.01, abs=0.01)
    assert table["int4_lut32_v1"].compression == pytest.approx(7.47, abs=0.01)


@every_codec
def test_bits_per_weight_are_what_the_table_says(codec):
    declared = next(c for c in tenpak.codecs() if c.name == codec)
    encoded = tenpak.encode(gaussian(64, 4096), codec)
    extra = encoded.bits_per_weight - declared.bits_per_weight
    assert 0 <= extra < 0.02
    assert (extra > 0) == declared.row_parameters
    assert encoded.nbytes * 8 == encoded.bits_per_weight * 64 * 4096


@every_codec
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_shape_axis_and_magnitude(codec, data):
    shape = data.draw(hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=40))
    axis = data.draw(st.integers(-len(shape), len(shape) - 1)) if shape else -1
    dtype = data.draw(st.sampled_from([np.float32, np.float16]))
    exponent = data.draw(st.integers(-30, 30) if dtype is np.float32 else st.integers(-8, 8))
    weights = (np.random.default_rng(1).standard_normal(shape) * 2.0**exponent).astype(dtype)

    encoded = tenpak.encode(weights, codec, axis, measure=True)
    rebuilt = tenpak.decode(encoded)
    assert rebuilt.shape == weights.shape
    assert rebuilt.dtype == weights.dtype
    assert np.isfinite(rebuilt).all()
    wide = tenpak.decode(encoded, np.float32)
    # Groups hold at most sixteen levels over their range; int8 has 255 over a row's.
    assert relative_error(weights, wide) < 0.05
    assert encoded.relative_error == pytest.approx(relative_error(weights, wide), rel=1e-3, abs=1e-12)
    # Groups run along the axis: the same rows with the axis moved to the end store the same bytes.
    if weights.ndim >= 2:
        moved = tenpak.encode(np.moveaxis(weights, axis, -1), codec)
        for name, part in encoded.parts.items():
            assert np.array_equal(part, moved.parts[name]), name


@every_codec
@settings(max_examples=60, deadline=None)
@given(
    weights=hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=1, max_dims=2, max_side=70),
        elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
    )
)
def test_any_finite_value_stays_finite_and_near(codec, weights):
    rebuilt = tenpak.decode(tenpak.encode(weights, codec))
    assert np.isfinite(rebuilt).all()
    if weights.size:
        # No layout moves a weight by more than its tensor's range.
        span = float(np.abs(weights.astype(np.float64)).max())
        assert np.abs(rebuilt.astype(np.float64) - weights).max() <= span * 1.01


@every_codec
def test_zeros_and_constants_come_back_exactly(codec):
    for value in (0.0, 0.5, -2.0):
        weights = np.full((3, 50), value, np.float32)
        rebuilt = tenpak.decode(tenpak.encode(weights, codec))
        if value == 0.0 or "fp16" in codec or "opt" in codec:
            assert np.array_equal(rebuilt, weights), value
        else:
            assert relative_error(weights, rebuilt) < 1e-3


@every_codec
def test_threads_do_not_change_a_byte(codec):
    weights = gaussian(67, 1031)
    results = [tenpak.encode(weights, codec, threads=n) for n in (1, 2, 7)]
    for other in results[1:]:
        for name, part in results[0].parts.items():
            assert np.array_equal(part, other.parts[name])
    decoded = [tenpak.decode(results[0], threads=n) for n in (1, 2, 7)]
    assert all(np.array_equal(decoded[0], other) for other in decoded[1:])


@every_codec
def test_arrays_in_any_memory_order_are_the_same_array(codec):
    weights = gaussian(20, 36)
    wanted = tenpak.encode(weights, codec)
    wide = np.zeros((40, 72), np.float32)
    wide[::2, ::2] = weights
    for array in (np.asfortranarray(weights), wide[::2, ::2], weights.astype(">f4"), weights[::-1][::-1]):
        got = tenpak.encode(array, codec)
        assert all(np.array_equal(part, got.parts[name]) for name, part in wanted.parts.items())


def test_importance_lowers_the_error_of_the_inputs_that_matter():
    weights = gaussian(256, 512)
    importance = np.where(np.arange(512) % 2, 100.0, 0.01)
    for codec in ("int4_opt_v1", "int4_opt_llama_v1", "int4_lut16_v1"):
        plain = tenpak.decode(tenpak.encode(weights, codec))
        weighted = tenpak.decode(tenpak.encode(weights, codec, importance=importance))
        assert relative_error(weights[:, 1::2], weighted[:, 1::2]) < 0.9 * relative_error(
            weights[:, 1::2], plain[:, 1::2]
        )
        ones = tenpak.decode(tenpak.encode(weights, codec, importance=np.ones(512)))
        assert np.array_equal(ones, plain)


def test_search_beats_min_max_at_the_same_size():
    weights = gaussian(512, 1024)
    error = {
        c.name: (c.layout, relative_error(weights, tenpak.decode(tenpak.encode(weights, c.name))))
        for c in tenpak.codecs()
    }
    assert error["int4_opt_v1"][0] == error["int4_g16_fp16_v1"][0]
    assert error["int4_opt_v1"][1] < 0.9 * error["int4_g16_fp16_v1"][1]
    assert error["int4_opt_llama_v1"][1] < error["int4_g8_fp16_v1"][1]
    # The bounds that the documents state for Gaussian weights.
    assert error["int4_opt_v1"][1] <= 2.98e-3
    assert error["int4_lut16_v1"][1] <= 3.45e-3
    assert error["int8_sym_v1"][1] < 1e-4


def test_bfloat16_arrays():
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml-dtypes is not installed")
    weights = gaussian(8, 64).astype(ml_dtypes.bfloat16)
    encoded = tenpak.encode(weights, "int8_sym_v1")
    assert encoded.dtype == "BF16"
    rebuilt = tenpak.decode(encoded)
    assert rebuilt.dtype == np.float32
    assert relative_error(weights.astype(np.float32), rebuilt) < 1e-4


def test_memory_can_be_used_again():
    first = tenpak.encode(gaussian(16, 64), "int4_opt_v1")
    fresh = tenpak.encode(gaussian(16, 64, seed=2), "int4_opt_v1")
    again = tenpak.encode(gaussian(16, 64, seed=2), "int4_opt_v1", out=first)
    assert again.parts["codes"] is first.parts["codes"]
    assert all(np.array_equal(part, fresh.parts[name]) for name, part in again.parts.items())
    out = np.empty((16, 64), np.float16)
    assert tenpak.decode(again, out=out) is out
    assert np.array_equal(out, tenpak.decode(again, np.float16))


@pytest.mark.parametrize(
    ("weights", "options", "error", "words"),
    [
        (np.array([[1.0, np.nan]], np.float32), {}, tenpak.InputError, "[0, 1]"),
        (np.array([[1.0], [np.inf]], np.float16), {}, tenpak.InputError, "[1, 0]"),
        (gaussian(4, 4), {"codec": "int5"}, tenpak.UsageError, "int4_opt_v1"),
        (gaussian(4, 4), {"axis": 2}, tenpak.UsageError, "axis 2"),
        (np.zeros((4, 4), np.int32), {}, tenpak.UsageError, "I32"),
        (np.zeros((4, 4), np.complex64), {}, tenpak.UsageError, "complex64"),
        (gaussian(4, 4), {"importance": [1, 1, 1]}, tenpak.UsageError, "3 weights for 4 columns"),
        (gaussian(4, 4), {"importance": [1, 1, -1, 1]}, tenpak.UsageError, "importance[2]"),
    ],
)
def test_what_cannot_be_encoded_is_refused_in_one_sentence(weights, options, error, words):
    with pytest.raises(error) as raised:
        tenpak.encode(weights, **{"codec": "int4_opt_v1", **options})
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)
    assert isinstance(raised.value, tenpak.TenpakError)


def test_what_cannot_be_decoded_is_refused():
    encoded = tenpak.encode(gaussian(4, 32), "int4_opt_v1")
    with pytest.raises(tenpak.UsageError):
        tenpak.decode(encoded, np.int8)
    with pytest.raises(tenpak.UsageError):
        tenpak.decode(encoded, out=np.empty((32, 4), np.float32))
    with pytest.raises(tenpak.UsageError):
        tenpak.decode(encoded, out=np.empty((4, 64), np.float32)[:, ::2])
    encoded.parts["codes"] = encoded.parts["codes"][:2]
    with pytest.raises(tenpak.UsageError, match="do not fit shape"):
        tenpak.decode(encoded)


@pytest.mark.parametrize("threads", [-1, 0, 1 << 40, 1.5, "2"])
def test_threads_are_a_sensible_number(tmp_path, threads):
    """2^40 of them would keep the core busy for ever."""
    array = np.ones((4, 32), np.float32)
    encoded = tenpak.encode(array, "int8_sym_v1")
    path = tmp_path / "m.tenpak"
    tenpak.compress({"linear.weight": array}, path)
    calls = [
        lambda: tenpak.encode(array, "int8_sym_v1", threads=threads),
        lambda: tenpak.decode(encoded, threads=threads),
        lambda: tenpak.compress({"linear.weight": array}, path, force=True, threads=threads),
        lambda: tenpak.decompress(path, tmp_path / "m.safetensors", threads=threads),
        lambda: tenpak.load_state_dict(path, threads=threads),
    ]
    for call in calls:
        with pytest.raises(tenpak.UsageError, match="give a number from 1 to 1024"):
            call()


def test_bytes_in_another_order_are_not_taken_as_they_lie():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    weight = gaussian(3, 64)
    for kind in (np.float32, np.float16, ml_dtypes.bfloat16):
        array = weight.astype(kind)
        raw = array.view(np.uint32 if kind is np.float32 else np.uint16)
        swapped = raw.byteswap().view(array.dtype.newbyteorder(">"))
        ours, theirs = (tenpak.decode(tenpak.encode(given, "int8_sym_v1")) for given in (array, swapped))
        np.testing.assert_array_equal(ours, theirs)
    encoded = tenpak.encode(weight, "int4_g32_fp16_v1")
    with pytest.raises(tenpak.UsageError, match="another order"):
        tenpak.decode(encoded, out=np.empty(weight.shape, ">f4"))
    wanted = tenpak.decode(encoded)
    encoded.parts = {name: part.astype(part.dtype.newbyteorder(">")) for name, part in encoded.parts.items()}
    np.testing.assert_array_equal(tenpak.decode(encoded), wanted)


def test_parts_that_cannot_be_filled_in_place_are_refused():
    weight = gaussian(8, 64)
    encoded = tenpak.encode(weight, "int4_g32_fp16_v1")
    encoded.parts["codes"] = np.asfortranarray(encoded.parts["codes"])
    with pytest.raises(tenpak.UsageError, match="writable C-contiguous"):
        tenpak.encode(weight, "int4_g32_fp16_v1", out=encoded)


@pytest.mark.parametrize(
    "wrong",
    [{"axis": 1.0}, {"axis": "1"}, {"tokens": -1}, {"tokens": 2**70}, {"importance": np.ones((2, 32))}],
)
def test_wrong_arguments_are_usage_errors(wrong):
    with pytest.raises(tenpak.UsageError, match=r"whole number|number of tokens|one number per input"):
        tenpak.encode(gaussian(3, 64), "int4_g32_fp16_v1", **wrong)


def test_wrong_names_are_usage_errors(tmp_path):
    encoded = tenpak.encode(gaussian(3, 64), "int4_g32_fp16_v1")
    with pytest.raises(tenpak.UsageError, match="is no dtype"):
        tenpak.decode(encoded, "float99")
    for name in ("", 5, "__metadata__"):
        with pytest.raises(tenpak.UsageError, match="is no tensor's name"):
            tenpak.compress({name: gaussian(3, 64)}, tmp_path / "a.tenpak")
    tenpak.compress({"a": gaussian(3, 64)}, tmp_path / "a.tenpak")
    for size in (0, -1, 2**70):
        with pytest.raises(tenpak.UsageError, match="no size of a file"):
            tenpak.decompress(tmp_path / "a.tenpak", tmp_path / "folder", shard_bytes=size)
