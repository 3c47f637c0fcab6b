"""Tuning: gradients are those of the divergence, what was learned is what is stored, and the model loses less."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import tenpak
from support import DATA, ROOT, files_in, gaussian, require, tenpak_command
from tenpak import _core
from tenpak.decoder import Decoder
from tenpak.errors import UsageError
from tenpak.movable import open_artifact

TEXT = ROOT / "README.md"
OPTIONS = {"windows": 24, "context": 64, "epochs": 2}
module = sys.modules["tenpak.tune"]


def tuner(artifact: Path, model: Path, windows: int = 3) -> module._Tuner:
    (student, stored), teacher = open_artifact(artifact, np), Decoder.open(model)
    tokens = np.random.default_rng(0).integers(0, 2048, (windows, 24))
    return module._Tuner(student, stored, teacher, tokens, 1, None)


@pytest.mark.parametrize("codec", ["int4_opt_v1", "int4_lut16_v1"])
def test_gradients_are_those_of_the_divergence(tmp_path, model, codec):
    tenpak.compress(model, tmp_path / "a.tenpak", codec)
    one = tuner(tmp_path / "a.tenpak", model)
    random, learned = np.random.default_rng(1), [1, 2]
    gradients = one._gradients(learned)
    assert set(gradients) == set(one.movables)
    one.compared = learned
    for kind in ("proj", "c_", "norm", "ln_"):
        names = [name for name in gradients if kind in name]
        steps = {name: random.standard_normal(gradients[name].shape).astype(np.float32) for name in names}
        wanted = sum(float((gradients[name] * steps[name]).sum()) for name in names)
        found = []
        for size in (2e-3, -2e-3):
            for name in names:
                one.movables[name].moves += np.float32(size) * steps[name]
            found.append(one._divergence())
            for name in names:
                one.movables[name].moves -= np.float32(size) * steps[name]
        if names:
            assert (found[0] - found[1]) / 4e-3 == pytest.approx(wanted, rel=0.05, abs=1e-4), kind


@pytest.mark.parametrize(
    ("codec", "moved"),
    [
        ("int4_opt_v1", {"scales", "offsets"}),
        ("int4_g32_fp16_v1", {"scales", "offsets"}),
        ("int4_lut16_v1", {"supers"}),
        ("int4_lut32_v1", {"supers"}),
        ("int4_g16_v1", set()),
        ("int5_g32_v1", set()),
    ],
)
def test_what_was_learned_is_what_is_read(tmp_path, llama, codec, moved, monkeypatch):
    # One step must be more than FP16 rounds away.
    for kind in ("Gain", "_Affine", "_Supers"):
        monkeypatch.setattr(f"tenpak.movable.{kind}.rate", 0.05)
    monkeypatch.setattr(module, "_TINY", 1e-15)
    before, after = tmp_path / "a.tenpak", tmp_path / "b.tenpak"
    # The smallest are stored with an exponent.
    small = llama if codec != "int4_opt_v1" else _scaled(tmp_path, llama)
    tenpak.compress(small, before, codec, calibration="none")
    one = tuner(before, small)
    one.run(np.random.default_rng(0))
    _core.replace_parts(str(before), str(after), one.parts(), False)
    with tenpak.open(before) as old, tenpak.open(after) as new:
        assert new.nbytes == old.nbytes
        new.verify()
        blocks = [one.block(index)[0] for index in range(one.student.config.layers)]
        linears = {name: linear for block in blocks for name, linear in block.linears.items()}
        for info in old.infos:
            changed = {p for p in new.parts(info.name) if (new.parts(info.name)[p] != old.parts(info.name)[p]).any()}
            if info.name in linears:
                assert changed == moved
                np.testing.assert_allclose(
                    new.read(info.name, np.float32), linears[info.name].weight, rtol=2e-6, atol=0
                )
            else:
                assert changed == ({"data"} if "norm" in info.name else set())
        norm = one.head().norm
        np.testing.assert_array_equal(new.read(norm.name, np.float32), norm.weight)


def _scaled(folder: Path, llama: Path) -> Path:
    """The model with weights so small that FP16 parameters need an exponent."""
    restored = folder / "small"
    tenpak.compress(llama, folder / "whole.tenpak", rules=[("", "keep")])
    tenpak.decompress(folder / "whole.tenpak", restored, dtype="F32")
    from safetensors.numpy import load_file, save_file

    path = restored / "model.safetensors"
    tensors = load_file(path)
    save_file({n: t * np.float32(1e-6 if "up_proj" in n else 1) for n, t in tensors.items()}, path)
    return restored


def test_models_lose_less(tmp_path, model, monkeypatch):
    # Four windows a step.
    monkeypatch.setattr(module, "TOKENS_AT_ONCE", 256)
    before, after, again = (tmp_path / f"{name}.tenpak" for name in "abc")
    tenpak.compress(model, before)
    report = tenpak.tune(before, after, model, TEXT, **OPTIONS)
    assert report.better
    assert report.divergence < report.divergence_before
    assert report.windows == 21
    assert report.root == tenpak.open(after).root
    assert report.file_bytes == before.stat().st_size == after.stat().st_size
    text = ROOT / "CONTRIBUTING.md"
    losses = [tenpak.evaluate(path, text, against=model, context=64).comparison for path in (before, after)]
    assert losses[1].divergence.value < losses[0].divergence.value
    # Layers that are read again are the same.
    monkeypatch.setattr(module, "KEPT", 500_000)
    tenpak.tune(before, again, model, TEXT, **OPTIONS)
    assert again.read_bytes() == after.read_bytes()
    tenpak.tune(again, again, Decoder.open(model), TEXT, force=True, **OPTIONS)
    assert again.read_bytes() != after.read_bytes()


def test_a_gpu_learns_the_same(tmp_path, model):
    require("cuda")
    before = tmp_path / "a.tenpak"
    tenpak.compress(model, before)
    reports = [
        tenpak.tune(before, tmp_path / device, model, TEXT, device=device, **OPTIONS) for device in ("cpu", "cuda")
    ]
    assert reports[1].divergence_before == pytest.approx(reports[0].divergence_before, rel=1e-3)
    assert reports[1].divergence == pytest.approx(reports[0].divergence, rel=1e-2)


def test_what_does_not_help_is_not_kept(tmp_path, packed, llama, monkeypatch):
    monkeypatch.setattr("tenpak.movable._Affine.rate", 1.0)
    report = tenpak.tune(packed, tmp_path / "b.tenpak", llama, TEXT, **OPTIONS)
    assert not report.better
    assert report.divergence == report.divergence_before
    assert report.root == tenpak.open(packed).root


def test_what_is_shared_or_has_another_form_stays(tmp_path, llama):
    from safetensors.numpy import load_file, save_file

    same, artifact = tmp_path / "same", tmp_path / "a.tenpak"
    shutil.copytree(llama, same)
    tensors = load_file(same / "model.safetensors")
    first, second = (f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 1))
    tensors[second] = tensors[first].copy()
    save_file(tensors, same / "model.safetensors")
    norm = "model.layers.1.input_layernorm.weight"
    tenpak.compress(same, artifact, rules=[("layers.1.mlp.down_proj", "keep"), (norm, "int8_sym_v1")])
    with tenpak.open(artifact) as opened:
        stays = {first, second, "model.layers.1.mlp.down_proj.weight"}
        assert set(opened.aliases) < stays
        stays |= {norm} if opened.info(norm).codec != "keep" else set()
    one = tuner(artifact, same)
    assert not stays & set(one.movables)
    one.run(np.random.default_rng(0))
    _core.replace_parts(str(artifact), str(tmp_path / "b.tenpak"), one.parts(), False)


def test_bfloat16_gains_are_rounded_to_even():
    from tenpak.movable import Gain

    gain = np.array([1.0, 1.00390625, 1.01171875, -3.3, 0.0], np.float32)
    one = Gain("BF16", gain, np)
    bits = one.parts()["data"]
    read = (bits.astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_array_equal(read, np.array([1.0, 1.0, 1.015625, -3.296875, 0.0], np.float32))
    np.testing.assert_array_equal(one.rebuilt(rounded=True), read)


def test_requests_that_make_no_sense(tmp_path, packed, llama, gpt2):
    out = tmp_path / "b.tenpak"
    tune = {"output": out, "original": llama, "text": TEXT, **OPTIONS}
    with pytest.raises(UsageError, match="compress the model first"):
        tenpak.tune(llama, **tune)
    with pytest.raises(UsageError, match="was not made from"):
        tenpak.tune(packed, **{**tune, "original": gpt2})
    with pytest.raises(UsageError, match="less than two windows"):
        tenpak.tune(packed, **{**tune, "text": np.arange(70)})
    with pytest.raises(UsageError, match="epochs 0 is too small"):
        tenpak.tune(packed, **{**tune, "epochs": 0})
    with pytest.raises(UsageError, match="more than the 512 positions"):
        tenpak.tune(packed, **{**tune, "context": 1024})
    out.touch()
    with pytest.raises(UsageError, match="exists"):
        tenpak.tune(packed, **tune)


def test_parts_must_fit(tmp_path, packed):
    out = tmp_path / "b.tenpak"
    name = "model.norm.weight"
    with pytest.raises(UsageError, match="3 bytes were given for part"):
        _core.replace_parts(str(packed), str(out), [(name, "data", b"abc")], False)
    with pytest.raises(UsageError, match="has none"):
        _core.replace_parts(str(packed), str(out), [(name, "codes", b"abc")], False)
    with pytest.raises(UsageError, match="no tensor"):
        _core.replace_parts(str(packed), str(out), [("x", "data", b"abc")], False)
    assert files_in(tmp_path) == {packed.name}


def test_command(tmp_path, packed):
    out = tmp_path / "b.tenpak"
    request = ("tune", packed, "--against", DATA / "tiny-llama", "--output", out, "--windows", 8, "--context", 32)
    ran = tenpak_command(*request, "--self", "--epochs", 1, "--json")
    report = json.loads(ran.out)
    assert report["text"] == "sampled"
    assert report["root"] == tenpak.open(out).root
    ran = tenpak_command(*request, "--text", TEXT, "--epochs", 1, "--force")
    assert "KL divergence" in ran.out
    tenpak_command(*request, "--text", TEXT, code=2)


def test_parts_are_of_tensors_and_of_whole_artifacts(tmp_path, packed, llama):
    tied, out = tmp_path / "tied.tenpak", tmp_path / "b.tenpak"
    up = gaussian(64, 64)
    tenpak.compress({"up.weight": up, "again.weight": up}, tied)
    with tenpak.open(tied) as artifact:
        ((alias, name),) = artifact.aliases.items()
    with pytest.raises(UsageError, match=f'is an alias; give parts of "{name}"'):
        _core.replace_parts(str(tied), str(out), [(alias, "codes", b"")], False)
    again, delta = tmp_path / "c.tenpak", tmp_path / "d.delta"
    _core.replace_parts(str(packed), str(again), [], False)
    assert again.read_bytes() == packed.read_bytes()
    tenpak.delta(llama, llama, delta)
    with pytest.raises(UsageError, match="is a delta; materialize it first"):
        _core.replace_parts(str(delta), str(out), [], False)
