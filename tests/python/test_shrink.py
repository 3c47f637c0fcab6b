"""Norms shrink by what least squares says, nothing else of an artifact changes, and compressing does it by itself."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import tenpak
from support import ROOT, files_in, require
from tenpak.decoder import Decoder
from tenpak.errors import UsageError
from tenpak.shrink import _STEP, shrink_norms

TEXT = ROOT / "README.md"
TOKENS = np.random.default_rng(0).integers(0, 2048, (8, 64))


@pytest.fixture
def plain(tmp_path: Path, model: Path) -> Path:
    path = tmp_path / "plain.tenpak"
    tenpak.compress(model, path, "int4_g32_fp16_v1")
    return path


def test_factors_are_those_of_least_squares(tmp_path, model, plain):
    shrunk = shrink_norms(plain, tmp_path / "b.tenpak", model, TOKENS)
    theirs, ours = Decoder.open(model), Decoder.open(plain)
    h, wanted = ours.embed(TOKENS), theirs.embed(TOKENS)
    norms = []
    for index, block in enumerate(ours.blocks):
        for names in ("attention_norm", "mlp_norm"):
            norms.append(getattr(block, names))
        # By hand, one norm after another, with all before it as they have become.
        for norm, group in ((block.attention_norm, block.qkv), (block.mlp_norm, block.up)):
            seen, right = {}, {}
            block(h, observe=seen.__setitem__)
            theirs.block(index)(wanted, observe=right.__setitem__)
            bias = getattr(norm, "bias", 0)
            y, target = (t[group].astype(np.float64).reshape(-1) for t in (seen, right))
            y, target = ((t.reshape(*h.shape) - bias).reshape(-1, 1) for t in (y, target))
            (factor,), *_ = np.linalg.lstsq(y, target[:, 0], rcond=None)
            assert shrunk.factors[norm.name] == pytest.approx(factor, abs=0.51 * _STEP + 1e-5)
            norm.weight = norm.weight * np.float32(shrunk.factors[norm.name])
        h, wanted = block(h), theirs.block(index)(wanted)
    assert len(shrunk.factors) == len(norms) + 1
    assert 0.9 < np.mean(list(shrunk.factors.values())) < 1
    assert all(factor % _STEP == 0 for factor in shrunk.factors.values())


def test_nothing_else_changes(tmp_path, model, plain):
    after = tmp_path / "b.tenpak"
    shrunk = shrink_norms(plain, after, model, TOKENS)
    with tenpak.open(plain) as old, tenpak.open(after) as new:
        new.verify()
        assert new.root == shrunk.root != old.root
        assert new.nbytes == old.nbytes == shrunk.file_bytes
        changed = set()
        for info in old.infos:
            if info.name in shrunk.factors:
                wanted = old.read(info.name, np.float32) * np.float32(shrunk.factors[info.name])
                np.testing.assert_array_equal(new.read(info.name), wanted.astype(new.read(info.name).dtype))
            for part, bits in old.parts(info.name).items():
                if (new.parts(info.name)[part] != bits).any():
                    changed.add(info.name)
        assert changed == {name for name, factor in shrunk.factors.items() if factor != 1}
    again = shrink_norms(after, tmp_path / "c.tenpak", model, TOKENS)
    assert max(abs(factor - 1) for factor in again.factors.values()) <= 2 * _STEP


def test_compressing_with_statistics_ends_with_it(tmp_path, model):
    statistics, first, second = tmp_path / "s.safetensors", tmp_path / "a.tenpak", tmp_path / "b.tenpak"
    tenpak.calibrate(model, statistics, TEXT, windows=8, context=64, gradients=False)
    said = []
    report = tenpak.compress(model, first, calibration=statistics, stages=lambda *step: said.append(step))
    assert 0.9 < report.norm_factor < 1
    assert report.root == tenpak.open(first).root
    assert report.file_bytes == first.stat().st_size
    layers = Decoder.open(model).config.layers
    assert said == [(i + 1, layers, "fitting norms") for i in range(layers)]
    assert tenpak.compress(model, second, calibration=statistics, dry_run=True).norm_factor is None
    tenpak.compress(model, second, calibration=statistics, threads=1)
    assert first.read_bytes() == second.read_bytes()
    assert tenpak.compress(model, second, force=True).norm_factor is None


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("before", [None, b"an older file"])
def test_interrupted_it_leaves_what_was_there(tmp_path, model, monkeypatch, before, links):
    statistics, out = tmp_path / "s.safetensors", tmp_path / "a.tenpak"
    tenpak.calibrate(model, statistics, TEXT, windows=8, context=64, gradients=False)
    if before is not None:
        out.write_bytes(before)
    if not links:

        def refuse(*_: object, **__: object) -> None:
            raise PermissionError

        monkeypatch.setattr(os, "link", refuse)
        monkeypatch.setattr(os, "supports_follow_symlinks", {refuse})

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(UsageError if before else KeyboardInterrupt):
        tenpak.compress(model, out, calibration=statistics, stages=stop)
    assert files_in(tmp_path) == {statistics.name} | ({out.name} if before else set())
    with pytest.raises(KeyboardInterrupt):
        tenpak.compress(model, out, calibration=statistics, stages=stop, force=True)
    if before is None:
        assert files_in(tmp_path) == {statistics.name}
        return
    assert files_in(tmp_path) == {statistics.name, out.name}
    if links:
        assert out.read_bytes() == before
    else:
        tenpak.open(out).verify()
    assert tenpak.compress(model, out, calibration=statistics, force=True).norm_factor < 1
    assert files_in(tmp_path) == {statistics.name, out.name}


def test_a_model_that_does_not_run_keeps_its_norms(tmp_path, llama):
    statistics, out = tmp_path / "s.safetensors", tmp_path / "a.tenpak"
    tenpak.calibrate(llama, statistics, TEXT, windows=8, context=64, gradients=False)
    alone = tmp_path / "alone.safetensors"
    shutil.copy(llama / "model.safetensors", alone)
    report = tenpak.compress(alone, out, calibration=statistics)
    assert report.norm_factor is None
    assert any("norms stay as they are" in note and "config.json" in note for note in report.notes)


def test_norms_that_a_rule_gives_a_codec_stay(tmp_path, llama):
    norm, artifact = "model.layers.0.post_attention_layernorm.weight", tmp_path / "a.tenpak"
    tenpak.compress(llama, artifact, rules=[("0.post_attention", "int8_sym_v1")])
    shrunk = shrink_norms(artifact, artifact, llama, TOKENS, force=True)
    assert norm not in shrunk.factors
    assert len(shrunk.factors) == 2 * Decoder.open(llama).config.layers


def test_only_artifacts_have_norms_to_shrink(tmp_path, llama):
    with pytest.raises(UsageError, match="compress the model first"):
        shrink_norms(llama, tmp_path / "b.tenpak", llama, TOKENS)


def test_a_device_that_is_missing_is_noticed_first(tmp_path, llama, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(UsageError, match="needs CuPy"):
        tenpak.compress(llama, tmp_path / "a.tenpak", calibration="none", device="cuda")
    assert not files_in(tmp_path)


def test_a_gpu_finds_the_same_factors(tmp_path, model, plain):
    require("cuda")
    on = {d: shrink_norms(plain, tmp_path / d, model, TOKENS, device=d).factors for d in ("cpu", "cuda")}
    assert on["cuda"] == pytest.approx(on["cpu"], abs=1.01 * _STEP)
