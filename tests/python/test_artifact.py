"""`tenpak.open`: names, infos, random access, zero-copy views, embedded files, and damage."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tenpak
from support import gaussian, relative_error

UP = "model.layers.0.mlp.up_proj.weight"


def test_an_artifact_says_what_it_holds(packed, llama):
    with tenpak.open(packed) as artifact:
        assert artifact.version == 1
        assert artifact.codec == "int4_opt_v1"
        assert len(artifact.root) == 64
        assert artifact.nbytes == packed.stat().st_size
        assert len(artifact) == len(artifact.names) == len(list(artifact)) == 57
        assert UP in artifact
        assert "absent" not in artifact
        assert "llama.tenpak" in repr(artifact)
        info = artifact.info(UP)
        assert (info.shape, info.dtype, info.codec, info.axis) == ((352, 128), "F16", "int4_opt_v1", 1)
        assert info.weights == 352 * 128
        assert info.bits_per_weight == 6
        assert artifact.info("lm_head.weight").codec == "int8_sym_v1"
        assert artifact.info("model.norm.weight").codec == "keep"
        assert {info.name for info in artifact.infos} == set(artifact.names)
        assert artifact.files == ["config.json", "tokenizer.json"]
        assert json.loads(artifact.file("config.json"))["model_type"] == "llama"
        assert artifact.file("tokenizer.json") == (llama / "tokenizer.json").read_bytes()


def test_reading_gives_the_same_weights_as_decoding_in_memory(tmp_path, llama):
    numpy_files = pytest.importorskip("safetensors.numpy")
    packed = tmp_path / "m.tenpak"
    tenpak.compress(llama, packed, calibration="none")
    source = numpy_files.load_file(llama / "model.safetensors")
    with tenpak.open(packed) as artifact:
        for name, weights in source.items():
            got = artifact.read(name)
            assert got.dtype == weights.dtype
            info = artifact.info(name)
            if info.codec == "keep":
                assert np.array_equal(got, weights), name
            else:
                assert np.array_equal(got, tenpak.decode(tenpak.encode(weights, info.codec, info.axis))), name
                assert relative_error(weights, artifact.read(name, np.float32)) < 4e-3
        assert artifact.read(UP, "F32").dtype == np.float32
        assert np.array_equal(artifact.read(UP, np.float16), artifact.read(UP, threads=1))


def test_parts_are_read_only_views_of_the_file_without_a_copy(packed):
    artifact = tenpak.open(packed)
    parts = artifact.parts(UP)
    assert {name: part.shape for name, part in parts.items()} == {
        "codes": (352, 64),
        "scales": (352, 8),
        "offsets": (352, 8),
    }
    data = np.frombuffer(packed.read_bytes(), np.uint8)
    for part in artifact.info(UP).parts:
        view = parts[part.name]
        assert not view.flags.owndata
        assert not view.flags.writeable
        assert part.offset % 256 == 0
        assert view.tobytes() == data[part.offset : part.offset + part.nbytes].tobytes()
    encoded = tenpak.encode(artifact.read(UP), "int4_g16_fp16_v1")
    assert set(encoded.parts) == set(parts)
    # Views outlive the artifact that they come from.
    artifact.close()
    del artifact
    assert int(parts["codes"].astype(np.int64).sum()) > 0


def test_a_weight_can_be_rebuilt_from_its_parts(packed):
    with tenpak.open(packed) as artifact:
        parts = artifact.parts(UP)
        codes = np.stack([parts["codes"] & 15, parts["codes"] >> 4], -1).reshape(352, 128)
        scales, offsets = (parts[name].astype(np.float32).repeat(16, axis=1) for name in ("scales", "offsets"))
        assert relative_error(artifact.read(UP, "F32"), codes * scales + offsets) < 1e-12


def test_names_that_do_not_exist_get_a_suggestion(packed):
    with tenpak.open(packed) as artifact:
        with pytest.raises(tenpak.UsageError, match=r"layers\.0\.mlp\.up_proj\.weight"):
            artifact.read("model.layers.0.mlp.up_prj.weight")
        with pytest.raises(tenpak.UsageError, match=r"config\.json"):
            artifact.file("absent.json")
        with pytest.raises(tenpak.UsageError):
            artifact.read(UP, np.int8)
    with pytest.raises(tenpak.UsageError, match="closed"):
        artifact.read(UP)


def test_verify_reads_every_byte(packed):
    seen = []
    with tenpak.open(packed) as artifact:
        assert artifact.verify(lambda done, total: seen.append((done, total))) == packed.stat().st_size
    assert seen[-1][0] == seen[-1][1] > 0


def test_damage_is_found_where_it_is_read(packed):
    with tenpak.open(packed) as artifact:
        part = next(p for p in artifact.info(UP).parts if p.name == "scales")
    data = bytearray(packed.read_bytes())
    data[part.offset + 5] ^= 4
    packed.write_bytes(data)
    with tenpak.open(packed) as artifact:
        # Others can still be had.
        artifact.read("lm_head.weight")
        for read in (lambda: artifact.read(UP), lambda: artifact.parts(UP), artifact.verify):
            with pytest.raises(tenpak.ArtifactError) as raised:
                read()
            assert UP in str(raised.value)
            assert "\n" not in str(raised.value)


@pytest.mark.parametrize("cut", [0, 1, 63, 64, 1000, -1, -64])
def test_a_truncated_artifact_is_refused(packed, cut):
    data = packed.read_bytes()
    packed.write_bytes(data[:cut])
    with pytest.raises(tenpak.ArtifactError):
        tenpak.open(packed)


def test_files_that_are_no_artifacts(tmp_path, llama):
    with pytest.raises(tenpak.StorageError):
        tenpak.open(tmp_path / "absent.tenpak")
    with pytest.raises(tenpak.TenpakError):
        tenpak.open(llama)
    with pytest.raises(tenpak.ArtifactError):
        tenpak.open(llama / "model.safetensors")


def test_exceptions_are_also_what_python_code_expects():
    assert issubclass(tenpak.UsageError, ValueError)
    assert issubclass(tenpak.StorageError, OSError)
    for error in ("UsageError", "InputError", "ArtifactError", "UnsupportedError", "StorageError"):
        assert issubclass(getattr(tenpak, error), tenpak.TenpakError)


def test_an_artifact_of_nothing(tmp_path):
    path = tmp_path / "none.tenpak"
    report = tenpak.compress({}, path)
    assert report.weights == 0
    with tenpak.open(path) as artifact:
        assert len(artifact) == 0
        assert artifact.verify() == path.stat().st_size
    assert tenpak.load_state_dict(path) == {}


def test_empty_and_scalar_tensors_come_back(tmp_path):
    arrays = {"scalar": np.float32(3.5), "empty": np.zeros((0, 5), np.float32), "w": gaussian(4, 64)}
    tenpak.compress(arrays, tmp_path / "a.tenpak")
    state = tenpak.load_state_dict(tmp_path / "a.tenpak")
    assert state["scalar"] == 3.5
    assert state["scalar"].shape == ()
    assert state["empty"].shape == (0, 5)
    assert relative_error(arrays["w"], state["w"]) < 4e-3


def test_kept_weights_that_a_smaller_dtype_cannot_hold_stay_finite(tmp_path):
    values = np.array([1.0, 65519.0, -1e6, 3.4e38, np.inf, -np.inf, np.nan], np.float32)
    path = tmp_path / "kept.tenpak"
    tenpak.compress({"bias": values}, path)
    half = tenpak.open(path).read("bias", np.float16)
    assert half.dtype == np.float16
    np.testing.assert_array_equal(half, [1, 65504, -65504, 65504, np.inf, -np.inf, np.nan])
    tenpak.decompress(path, tmp_path / "kept.safetensors", dtype="BF16")
    brain = np.frombuffer((tmp_path / "kept.safetensors").read_bytes()[-14:], np.uint16)
    assert brain.tolist()[3:6] == [0x7F7F, 0x7F80, 0xFF80]
