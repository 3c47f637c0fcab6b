"""Deltas: what goes in comes out, from the base that it was made from and from no other."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tenpak
from support import DATA, files_in, gaussian, relative_error, tenpak_command

BASE = DATA / "tiny-llama"


def bf16(array: np.ndarray) -> np.ndarray:
    """FP32 rounded toward zero to what BF16 holds."""
    return (array.view(np.uint32) & 0xFFFF0000).view(np.float32)


def read_safetensors(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    data = path.read_bytes()
    head = int.from_bytes(data[:8], "little")
    index = json.loads(data[8 : 8 + head])
    index.pop("__metadata__", None)
    return {
        name: (t["dtype"], tuple(t["shape"]), data[8 + head + t["data_offsets"][0] : 8 + head + t["data_offsets"][1]])
        for name, t in index.items()
    }


def write_safetensors(path: Path, tensors: dict[str, tuple[str, tuple[int, ...], bytes]]) -> Path:
    index, at = {}, 0
    for name, (dtype, shape, data) in tensors.items():
        index[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + len(data)]}
        at += len(data)
    head = json.dumps(index).encode()
    path.write_bytes(len(head).to_bytes(8, "little") + head + b"".join(data for _, _, data in tensors.values()))
    return path


def f16(tensors: dict[str, tuple[str, tuple[int, ...], bytes]], name: str) -> np.ndarray:
    _, shape, data = tensors[name]
    return np.frombuffer(data, np.float16).reshape(shape).copy()


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny-llama with changes of every kind."""
    folder = tmp_path_factory.mktemp("tuned")
    for name in ("config.json", "tokenizer.json"):
        shutil.copyfile(BASE / name, folder / name)
    (folder / "generation_config.json").write_text('{"do_sample": true}\n')
    tensors = read_safetensors(BASE / "model.safetensors")
    rng = np.random.default_rng(0)

    def put(name: str, array: np.ndarray, dtype: str = "F16") -> None:
        tensors[name] = (dtype, array.shape, array.tobytes())

    dense = "model.layers.0.mlp.up_proj.weight"
    w = f16(tensors, dense)
    put(dense, w + (rng.standard_normal(w.shape) * 3e-4).astype(np.float16))
    few = "model.layers.1.mlp.up_proj.weight"
    w = f16(tensors, few)
    w.reshape(-1)[rng.choice(w.size, 50, replace=False)] += np.float16(0.01)
    put(few, w)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        w = f16(tensors, name)
        put(name, np.concatenate([w, gaussian(7, w.shape[1], seed=1, dtype=np.float16)]))
    tensors["renamed.weight"] = tensors.pop("model.layers.0.mlp.down_proj.weight")
    shape = tensors["model.layers.1.mlp.down_proj.weight"][1]
    kind, _, data = tensors["model.layers.1.mlp.down_proj.weight"]
    tensors["model.layers.1.mlp.down_proj.weight"] = (kind, (shape[1], shape[0]), data)
    del tensors["model.layers.1.mlp.gate_proj.weight"]
    put("new.weight", gaussian(64, 48, seed=2))
    tensors["new.weight"] = ("F32", (64, 48), gaussian(64, 48, seed=2).tobytes())
    tensors["counts"] = ("I64", (3,), np.array([1, -2, 3]).tobytes())
    tensors["none"] = ("BF16", (0, 4), b"")
    odd = np.array([0x7FC1, 0xFF80, 0x8000, 1], np.uint16)
    tensors["model.norm.weight"] = ("BF16", (4,), odd.tobytes())
    write_safetensors(folder / "model.safetensors", tensors)
    return folder


def test_exact_restores_every_bit_and_file(tmp_path: Path, tuned: Path) -> None:
    delta, back = tmp_path / "d.tenpak", tmp_path / "back"
    report = tenpak.delta(BASE, tuned, delta)
    done = tenpak.materialize(BASE, delta, back)
    before, after = (read_safetensors(folder / "model.safetensors") for folder in (tuned, back))
    assert before == after
    assert files_in(back) == files_in(tuned)
    for name in ("config.json", "tokenizer.json", "generation_config.json"):
        assert (back / name).read_bytes() == (tuned / name).read_bytes()
    assert report.files == ("generation_config.json",), "the base's own files are not stored again"
    assert done.result == report.result
    by_name = {t.name: t for t in report.tensors}
    assert by_name["renamed.weight"].base == "model.layers.0.mlp.down_proj.weight"
    assert by_name["renamed.weight"].bytes == 0
    assert by_name["model.layers.1.mlp.down_proj.weight"].method == "same", "reshaped"
    assert by_name["model.layers.1.mlp.up_proj.weight"].changed == 50
    assert by_name["model.layers.1.mlp.up_proj.weight"].bytes < 400
    embedding = by_name["model.embed_tokens.weight"]
    assert embedding.changed == 7 * 128
    assert embedding.bytes < 2 * 7 * 128 * 1.1 + 200
    assert report.removed == ("model.layers.0.mlp.down_proj.weight", "model.layers.1.mlp.gate_proj.weight")
    assert tenpak.open(delta).verify() == delta.stat().st_size
    assert delta.stat().st_size == report.file_bytes < 0.2 * report.input_bytes


def test_threads_out_of_range_are_refused(tmp_path: Path, tuned: Path) -> None:
    for threads in (0, -1, 2**40):
        with pytest.raises(tenpak.UsageError, match=r"threads .*: give a number from 1 to 1024"):
            tenpak.delta(BASE, tuned, tmp_path / "d.tenpak", threads=threads)
    made = tenpak_command(
        "delta", "--base", BASE, "--input", tuned, "--output", tmp_path / "d.tenpak", "--threads", 0, code=2
    )
    assert "give a number from 1 to 1024" in made.err
    assert not files_in(tmp_path) - {tuned.name}


@pytest.mark.parametrize("mode", ["exact", "bit1"])
def test_bytes_do_not_depend_on_threads(tmp_path: Path, tuned: Path, mode: str) -> None:
    written = []
    for threads in (1, 2, 5):
        path = tmp_path / f"{threads}.tenpak"
        tenpak.delta(BASE, tuned, path, mode, threads=threads)
        written.append(path.read_bytes())
    assert written[0] == written[1] == written[2]


def test_single_tensors_are_read_without_the_rest(tmp_path: Path, tuned: Path) -> None:
    delta = tmp_path / "d.tenpak"
    tenpak.delta(BASE, tuned, delta)
    wanted = read_safetensors(tuned / "model.safetensors")
    with tenpak.open(delta, base=BASE) as opened:
        assert set(opened.names) == set(wanted)
        for name, (dtype, shape, data) in wanted.items():
            assert (opened.tensors[name].dtype, opened.tensors[name].shape) == (dtype, shape)
            assert opened.read_stored(name).tobytes() == data
        read = opened.read("model.layers.0.mlp.up_proj.weight", "float32")
        assert read.dtype == np.float32
        assert json.loads(opened.file("generation_config.json")) == {"do_sample": True}
        with pytest.raises(tenpak.UsageError, match="no tensor"):
            opened.read("nothing")
    with pytest.raises(tenpak.UsageError, match="closed"):
        opened.read("new.weight")
    with pytest.raises(tenpak.UsageError, match="base is needed"):
        tenpak.open(delta).read("model.layers.0.mlp.up_proj.weight")


def test_the_wrong_base_is_refused_with_both_digests(tmp_path: Path, tuned: Path) -> None:
    delta = tmp_path / "d.tenpak"
    report = tenpak.delta(BASE, tuned, delta)
    with pytest.raises(tenpak.UsageError) as refused:
        tenpak.materialize(tuned, delta, tmp_path / "back")
    assert report.base in str(refused.value)
    assert report.result in str(refused.value), "the fine-tune's own digest is what was given"
    assert not (tmp_path / "back").exists()
    with pytest.raises(tenpak.UsageError, match="not the one"):
        tenpak.open(delta, base=tuned)
    other = tmp_path / "other"
    shutil.copytree(BASE, other)
    tensors = read_safetensors(BASE / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = (*tensors[name][:2], bytes(len(tensors[name][2])))
    write_safetensors(other / "model.safetensors", tensors)
    with tenpak.open(delta, base=other) as opened:
        opened.read("model.layers.0.mlp.up_proj.weight")
        with pytest.raises(tenpak.UsageError, match="not the one"):
            opened.read(name)


def test_chains_reach_sixteen_deep_and_no_deeper(tmp_path: Path) -> None:
    weights = gaussian(32, 64, dtype=np.float32)
    base = write_safetensors(tmp_path / "base.safetensors", {"w": ("F32", weights.shape, weights.tobytes())})
    chain: list[Path] = []
    for step in range(16):
        weights = weights + np.float32(1e-3) * gaussian(32, 64, seed=step + 1)
        path = tmp_path / f"{step}.tenpak"
        tenpak.delta([base, *chain], {"w": weights}, path)
        chain.append(path)
    done = tenpak.materialize(base, chain, tmp_path / "last.safetensors")
    assert done.deltas == 16
    assert read_safetensors(tmp_path / "last.safetensors")["w"][2] == weights.tobytes()
    with tenpak.open(chain[-1], base=[base, *chain[:-1]]) as opened:
        assert np.array_equal(opened.read("w"), weights)
    with pytest.raises(tenpak.UsageError, match="most allowed"):
        tenpak.delta([base, *chain], {"w": weights + 1}, tmp_path / "17.tenpak")
    with pytest.raises(tenpak.UsageError, match="at most 16"):
        tenpak.materialize(base, [*chain, chain[0]], tmp_path / "no.safetensors")
    with pytest.raises(tenpak.UsageError, match="made from"):
        tenpak.materialize(base, chain[1:], tmp_path / "no.safetensors")
    with pytest.raises(tenpak.UsageError, match="is a delta and no base"):
        tenpak.materialize(chain[0], chain[1:], tmp_path / "no.safetensors")


def test_a_circle_is_refused(tmp_path: Path) -> None:
    one, two = gaussian(8, 64), gaussian(8, 64, seed=1)
    base = write_safetensors(tmp_path / "base.safetensors", {"w": ("F32", one.shape, one.tobytes())})
    there, back = tmp_path / "there.tenpak", tmp_path / "back.tenpak"
    tenpak.delta(base, {"w": two}, there)
    tenpak.delta([base, there], {"w": one}, back)
    with pytest.raises(tenpak.UsageError, match="circle"):
        tenpak.materialize(base, [there, back], tmp_path / "no.safetensors")


def test_bit1_keeps_signs_and_one_scale_a_row(tmp_path: Path) -> None:
    base = gaussian(256, 512)
    change = gaussian(256, 512, seed=1, scale=1e-3)
    report = tenpak.delta(
        write_safetensors(tmp_path / "base.safetensors", {"w": ("F32", base.shape, base.tobytes())}),
        {"w": base + change},
        tmp_path / "d.tenpak",
        "bit1",
    )
    assert report.tensors[0].method == "bit1"
    assert 8 * report.tensors[0].bytes / base.size == pytest.approx(1 + 16 / 512)
    # For a Gaussian, the best scale under given signs leaves 1 - 2/pi.
    assert report.change_lost == pytest.approx(1 - 2 / np.pi, abs=0.01)
    tenpak.materialize(tmp_path / "base.safetensors", tmp_path / "d.tenpak", tmp_path / "out.safetensors")
    out = np.frombuffer(read_safetensors(tmp_path / "out.safetensors")["w"][2], np.float32).reshape(base.shape)
    assert relative_error(base + change, out) == pytest.approx(report.relative_error, rel=1e-3)
    steps = np.abs(out - base)
    assert np.allclose(steps, np.abs(change).mean(1, keepdims=True), rtol=2**-7)


@pytest.mark.parametrize("codec", [c.name for c in tenpak.codecs()])
def test_codes_of_every_codec_come_back_as_a_sound_artifact(tmp_path: Path, codec: str) -> None:
    weights = gaussian(48, 272)
    norm = gaussian(272, dtype=np.float16)
    tuned = weights + gaussian(48, 272, seed=1, scale=1e-4)
    longer = np.concatenate([tuned, gaussian(3, 272, seed=2)])
    base = tmp_path / "base.tenpak"
    tenpak.compress({"w.weight": weights, "x.weight": weights, "norm.weight": norm}, base, codec)
    made = {"w.weight": tuned, "x.weight": longer, "norm.weight": norm, "new.weight": gaussian(32, 64)}
    written = []
    for threads in (1, 2):
        report = tenpak.delta(base, made, tmp_path / "d.tenpak", "codes", threads=threads, force=True)
        written.append((tmp_path / "d.tenpak").read_bytes())
    assert written[0] == written[1]
    done = tenpak.materialize(base, tmp_path / "d.tenpak", tmp_path / "out.tenpak")
    with tenpak.open(tmp_path / "out.tenpak") as out, tenpak.open(base) as old:
        out.verify()
        assert out.root == report.result == done.result
        assert out.info("w.weight").codec == old.info("w.weight").codec == codec
        fresh = tenpak.decode(tenpak.encode(tuned, codec))
        assert relative_error(tuned, out.read("w.weight")) < 1.06 * relative_error(tuned, fresh)
        assert relative_error(longer, out.read("x.weight")) < 1.06 * relative_error(
            longer, tenpak.decode(tenpak.encode(longer, codec))
        )
        assert np.array_equal(out.read("norm.weight"), norm)
        with tenpak.open(tmp_path / "d.tenpak", base=base) as opened:
            for name in out.names:
                assert np.array_equal(opened.read(name, out.read(name).dtype), out.read(name))
    found = {t.name: t for t in report.tensors}
    assert found["w.weight"].method == "codes"
    assert found["norm.weight"].method == "same"
    # A change of 0.5 % is seven steps of the finest codec here, and a fortieth of one of the coarsest.
    assert found["w.weight"].bytes < 0.9 * tenpak.open(base).info("w.weight").nbytes
    tenpak.materialize(base, tmp_path / "d.tenpak", tmp_path / "floats.safetensors")
    assert set(read_safetensors(tmp_path / "floats.safetensors")) == set(made)


def test_codes_chain_and_an_unchanged_model_costs_nothing(tmp_path: Path) -> None:
    weights = gaussian(64, 256)
    base = tmp_path / "base.tenpak"
    tenpak.compress({"w.weight": weights}, base, "int4_g16_v1")
    first, second = tmp_path / "1.tenpak", tmp_path / "2.tenpak"
    assert tenpak.delta(base, {"w.weight": weights}, tmp_path / "0.tenpak", "codes").tensors[0].method == "same"
    one = weights + gaussian(64, 256, seed=1, scale=1e-3)
    tenpak.delta(base, {"w.weight": one}, first, "codes")
    two = one + gaussian(64, 256, seed=2, scale=1e-3)
    report = tenpak.delta([base, first], {"w.weight": two}, second, "codes")
    tenpak.materialize(base, [first, second], tmp_path / "out.tenpak")
    with tenpak.open(tmp_path / "out.tenpak") as out:
        assert out.root == report.result
        assert relative_error(two, out.read("w.weight")) < 4e-3
    with pytest.raises(tenpak.UsageError, match="quantised base"):
        tenpak.delta(BASE, BASE, tmp_path / "no.tenpak", "codes")


def test_every_damage_is_found_and_leaves_nothing(tmp_path: Path) -> None:
    weights = gaussian(16, 64)
    base = write_safetensors(tmp_path / "base.safetensors", {"w": ("F32", weights.shape, weights.tobytes())})
    tenpak.delta(base, {"w": weights * np.float32(1.01)}, tmp_path / "d.tenpak")
    sound = (tmp_path / "d.tenpak").read_bytes()
    before = files_in(tmp_path)
    for at in range(0, len(sound), 97):
        damaged = bytearray(sound)
        damaged[at] ^= 16
        (tmp_path / "d.tenpak").write_bytes(damaged)
        with pytest.raises(tenpak.TenpakError), tenpak.open(tmp_path / "d.tenpak") as opened:
            opened.verify()
        try:
            tenpak.materialize(base, tmp_path / "d.tenpak", tmp_path / "out.safetensors")
        except tenpak.TenpakError:
            assert files_in(tmp_path) == before
        else:
            out = read_safetensors(tmp_path / "out.safetensors")
            assert out["w"][2] == (weights * np.float32(1.01)).tobytes(), "padding alone was damaged"
            (tmp_path / "out.safetensors").unlink()


def test_the_console_script(tmp_path: Path, tuned: Path) -> None:
    delta, back = tmp_path / "d.tenpak", tmp_path / "back"
    made = tenpak_command("delta", "--base", BASE, "--input", tuned, "--output", delta)
    assert "exact" in made.out
    report = tenpak_command("delta", "-b", BASE, "-i", tuned, "-o", delta, "--force", "--json").json
    assert report["mode"] == "exact"
    shown = tenpak_command("inspect", delta).out
    assert report["base"] in shown
    assert "sparse" in shown
    assert "model.layers.0.mlp.down_proj.weight" in shown, "what a renamed tensor comes from"
    found = tenpak_command("inspect", delta, "--json").json["delta"]
    assert found["methods"]["exact"]["bytes"] == sum(t["bytes"] for t in report["tensors"])
    tenpak_command("verify", delta)
    done = tenpak_command("materialize", "--base", BASE, "--delta", delta, "--output", back, "--json").json
    assert done["result"] == report["result"]
    tenpak_command("materialize", "-b", BASE, "-d", delta, "-o", back, code=2)
    tenpak_command("materialize", "-b", BASE, "-d", delta, "-o", tmp_path / "x.tenpak", code=2)
    tenpak_command("delta", "-b", BASE, "-i", tuned, "-o", tuned / "model.safetensors", "-f", code=2)
    second = tmp_path / "2.tenpak"
    tenpak_command("delta", "-b", BASE, "-b", delta, "-i", BASE, "-o", second, code=0)
    refused = tenpak_command("materialize", "-b", BASE, "-d", delta, "-d", second, "-o", tmp_path / "x", code=2).err
    assert "circle" in refused, "the option may stand twice"
    refused = tenpak_command("decompress", "-i", delta, "-o", tmp_path / "no", code=2).err
    assert refused.count("materialize") == 1
    assert "tensor" not in refused, "it is about the file"
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("mode", ["exact", "codes", "bit1"])
def test_perplexities_of_what_comes_back(tmp_path: Path, mode: str) -> None:
    tuned = shutil.copytree(BASE, tmp_path / "tuned")
    tensors = read_safetensors(BASE / "model.safetensors")
    rng = np.random.default_rng(0)
    for name, (dtype, shape, _) in list(tensors.items()):
        if name.endswith("_proj.weight"):
            w = f16(tensors, name) + (rng.standard_normal(shape) * 1e-3).astype(np.float16)
            tensors[name] = (dtype, shape, w.tobytes())
    write_safetensors(tuned / "model.safetensors", tensors)
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog, and then it sleeps. " * 40)
    base: Path = BASE
    if mode == "codes":
        base = tmp_path / "base.tenpak"
        tenpak.compress(BASE, base, "int4_g32_fp16_v1")
    more = ("--mode", mode, "--text", text, "--windows", "2", "--force", "-q")
    delta = ("delta", "-b", base, "-i", tuned, "-o", tmp_path / "d.tenpak")
    measured = tenpak_command(*delta, *more, "--json").json["perplexity"]
    assert all(np.isfinite(value) and value > 1 for value in measured.values())
    if mode == "exact":
        assert measured["fine-tune"] == measured["from the delta"]
    else:
        assert abs(measured["from the delta"] / measured["fine-tune"] - 1) < 0.1
    assert ("quantised afresh" in measured) == (mode == "codes")
    shown = tenpak_command(*delta, *more).out
    assert shown.count("perplexity, ") == len(measured)
    nothing = tenpak_command(*delta, "--text", tmp_path / "none.txt", "--force", code=2).err
    assert "there is no such file" in nothing
