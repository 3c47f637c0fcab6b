"""The same tensors give the same artifact whatever format they come from."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import tenpak
from gguf_files import write_gguf
from support import files_in, gaussian, write_bundle

ARRAYS = {
    "model.embed_tokens.weight": gaussian(50, 64, seed=1),
    "model.layers.0.mlp.up_proj.weight": gaussian(48, 64, seed=2),
    "model.norm.weight": gaussian(64, seed=3),
}


def write_safetensors(path: Path, arrays: dict[str, np.ndarray]) -> Path:
    header, data = {}, b""
    for name, array in arrays.items():
        start, data = len(data), data + array.tobytes()
        header[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": [start, len(data)]}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def write_folder(folder: Path, arrays: dict[str, np.ndarray], shards: int) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    if shards == 1:
        write_safetensors(folder / "model.safetensors", arrays)
        return folder
    places = {}
    for i, (name, array) in enumerate(arrays.items()):
        places[name] = f"model-{i + 1:05}-of-{len(arrays):05}.safetensors"
        write_safetensors(folder / places[name], {name: array})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


SOURCES = {
    "bundle": lambda at: write_bundle(at / "m.json", **ARRAYS),
    "folder": lambda at: write_folder(at / "model", ARRAYS, 1),
    "gguf": lambda at: write_gguf(at / "m.gguf", ARRAYS),
    "safetensors": lambda at: write_safetensors(at / "m.safetensors", ARRAYS),
    "shards": lambda at: write_folder(at / "model", ARRAYS, 3),
}


@pytest.mark.parametrize("codec", ["int4_opt_v1", "int8_sym_v1", "keep"])
@pytest.mark.parametrize("source", SOURCES)
def test_every_format_gives_what_a_mapping_of_arrays_gives(tmp_path, source, codec):
    rules = [("", "keep")] if codec == "keep" else [("up_proj", codec)]
    tenpak.compress(ARRAYS, tmp_path / "arrays.tenpak", rules=rules)
    tenpak.compress(SOURCES[source](tmp_path), tmp_path / "m.tenpak", rules=rules)
    with tenpak.open(tmp_path / "arrays.tenpak") as wanted, tenpak.open(tmp_path / "m.tenpak") as got:
        assert got.info("model.layers.0.mlp.up_proj.weight").codec == codec
        assert set(got.names) == set(wanted.names) == set(ARRAYS)
        for name in wanted:
            assert (got.info(name).codec, got.info(name).axis) == (wanted.info(name).codec, wanted.info(name).axis)
            parts = got.parts(name)
            for part, array in wanted.parts(name).items():
                assert np.array_equal(parts[part], array), (name, part)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("target", ["m2.json", "m2.safetensors", "folder"])
def test_a_model_that_is_kept_comes_back_bit_for_bit(tmp_path, source, target):
    tenpak.compress(SOURCES[source](tmp_path), tmp_path / "m.tenpak", rules=[("", "keep")])
    tenpak.decompress(tmp_path / "m.tenpak", tmp_path / target)
    tenpak.compress(tmp_path / target, tmp_path / "again.tenpak", rules=[("", "keep")])
    state = tenpak.load_state_dict(tmp_path / "again.tenpak")
    assert set(state) == set(ARRAYS)
    assert all(np.array_equal(state[name], array) for name, array in ARRAYS.items())


def test_metadata_of_gguf_is_embedded(tmp_path):
    tenpak.compress(write_gguf(tmp_path / "m.gguf", ARRAYS), tmp_path / "m.tenpak")
    with tenpak.open(tmp_path / "m.tenpak") as artifact:
        assert artifact.files == ["gguf_metadata.json"]
        assert json.loads(artifact.file("gguf_metadata.json"))["general.architecture"] == "llama"


def test_conv1d_weights_are_stored_as_their_transpose_would_be(tmp_path, gpt2):
    numpy_files = pytest.importorskip("safetensors.numpy")
    weights = numpy_files.load_file(gpt2 / "model.safetensors")
    name = next(key for key in weights if key.endswith("h.0.attn.c_attn.weight"))
    tenpak.compress(gpt2, tmp_path / "m.tenpak", calibration="none")
    transposed = tenpak.encode(weights[name].T, "int4_opt_v1")
    with tenpak.open(tmp_path / "m.tenpak") as artifact:
        assert artifact.info(name).shape == weights[name].shape
        for part, array in artifact.parts(name).items():
            assert np.array_equal(array, transposed.parts[part]), part
        assert np.array_equal(artifact.read(name).T, tenpak.decode(transposed))


@pytest.mark.parametrize("lost", ["shard", "tensor"])
def test_a_folder_that_lacks_weights_is_refused_with_the_name(tmp_path, lost):
    folder = write_folder(tmp_path / "model", ARRAYS, 3)
    shard = folder / "model-00002-of-00003.safetensors"
    if lost == "shard":
        shard.unlink()
    else:
        write_safetensors(shard, {})
    with pytest.raises(tenpak.TenpakError, match=shard.name if lost == "shard" else "up_proj"):
        tenpak.compress(folder, tmp_path / "m.tenpak")
    assert files_in(tmp_path) == {"model"}
