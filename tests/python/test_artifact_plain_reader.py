"""Tenpak and the plain reader, which shares nothing with it but docs/format.md, read the same weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tenpak
from plain_reader import LAYOUTS, PlainReader

DATA = Path(__file__).resolve().parents[1] / "data"


def bits(array: np.ndarray) -> bytes:
    return np.ascontiguousarray(array).tobytes()


@pytest.mark.parametrize("model", ["tiny-llama", "tiny-gpt2"])
@pytest.mark.parametrize("codec", LAYOUTS)
def test_weights_files_and_aliases_agree(tmp_path, codec, model):
    path = tmp_path / "model.tenpak"
    tenpak.compress(DATA / model, path, codec=codec)
    plain, artifact = PlainReader(path), tenpak.open(path)

    assert codec in {tensor["codec"] for tensor in plain.tensors.values()}
    for name in [*plain.tensors, *plain.index["aliases"]]:
        got, want = np.asarray(artifact.read(name)), plain.read(name)
        assert got.shape == want.shape, name
        assert bits(got) == bits(want.astype(got.dtype)), name
    assert plain.files["config.json"] == (DATA / model / "config.json").read_bytes()


@pytest.mark.parametrize("codec", LAYOUTS)
def test_every_shape_agrees(tmp_path, codec):
    rng = np.random.default_rng(7)
    tensors = {}
    for shape in [(1, 1), (2, 17), (3, 259), (33, 15), (2, 5, 40)]:
        values = rng.standard_normal(shape).astype(np.float32)
        tensors["x".join(map(str, shape))] = {"shape": list(shape), "data": values.ravel().tolist()}
    # Magnitudes that FP16 parameters cannot hold are stored with an exponent.
    for name, magnitude in [("huge", 1e30), ("tiny", 1e-30)]:
        values = (rng.standard_normal((4, 40)) * magnitude).astype(np.float32)
        tensors[name] = {"shape": [4, 40], "data": [float(x) for x in values.ravel()]}
    source, path = tmp_path / "bundle.json", tmp_path / "model.tenpak"
    source.write_text(json.dumps({"tensors": tensors}))
    tenpak.compress(source, path, codec=codec)
    plain, artifact = PlainReader(path), tenpak.open(path)

    assert set(plain.tensors) == set(tensors)
    for name, tensor in tensors.items():
        got, want = np.asarray(artifact.read(name)), plain.read(name)
        assert list(got.shape) == tensor["shape"]
        assert bits(got) == bits(want.astype(got.dtype)), name


def test_the_plain_reader_knows_every_codec():
    assert {codec.name for codec in tenpak.codecs()} == set(LAYOUTS)
