"""Whole models: what is quantised and what is kept, sizes, tied weights, formats, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time

import numpy as np
import pytest
import tenpak
from support import DATA, files_in, gaussian, relative_error, write_bundle

CODECS = [codec.name for codec in tenpak.codecs()]


def fate(report: tenpak.CompressReport) -> dict[str, str]:
    return {tensor.name: tensor.codec for tensor in report.tensors}


@pytest.mark.parametrize("codec", CODECS)
def test_reports_say_what_happened(tmp_path, model, codec):
    path = tmp_path / "m.tenpak"
    report = tenpak.compress(model, path, codec)
    with tenpak.open(path) as artifact:
        assert report.root == artifact.root
        assert report.file_bytes == artifact.nbytes == path.stat().st_size
        assert list(report.files) == artifact.files
        assert fate(report) == {info.name: info.codec for info in artifact.infos}
        quantised = [info for info in artifact.infos if info.codec != "keep"]
        bits = 8 * sum(i.nbytes for i in quantised) / sum(i.weights for i in quantised)
        assert report.quantised_bits_per_weight == pytest.approx(bits)
        state = {name: artifact.read(name, "F32") for name in artifact}
    numpy_files = pytest.importorskip("safetensors.numpy")
    source = numpy_files.load_file(model / "model.safetensors")
    for tensor in report.tensors:
        if tensor.codec == "keep":
            assert tensor.relative_error is None
            assert tensor.reason
        else:
            wanted = relative_error(source[tensor.name], state[tensor.name])
            assert tensor.relative_error == pytest.approx(wanted, rel=1e-4)
    assert report.weights == sum(array.size for array in source.values())
    assert report.compression_fp32 == pytest.approx(4 * report.weights / report.file_bytes)
    assert report.compression_fp16 == pytest.approx(2 * report.weights / report.file_bytes)
    assert sum(group.tensors for group in report.groups) == len(report.tensors) == len(source)
    assert sum(group.weights for group in report.groups) == report.weights
    assert json.loads(json.dumps(report.to_dict()))["root"] == report.root


def test_norms_and_biases_are_kept_and_embeddings_get_their_own_codec(tmp_path, model):
    report = tenpak.compress(model, tmp_path / "m.tenpak")
    for tensor in report.tensors:
        embedding = any(word in tensor.name for word in ("wte", "wpe", "embed_tokens", "lm_head"))
        linear = len(tensor.shape) == 2 and not embedding
        assert tensor.codec == ("int4_opt_v1" if linear else "int8_sym_v1" if embedding else "keep"), tensor
    kept = tenpak.compress(model, tmp_path / "k.tenpak", embeddings="keep")
    assert {t.codec for t in kept.tensors} == {"int4_opt_v1", "keep"}


def test_conv1d_weights_are_grouped_along_their_inputs(tmp_path, gpt2):
    report = tenpak.compress(gpt2, tmp_path / "m.tenpak")
    axes = {t.name.rsplit(".", 2)[1]: t.axis for t in report.tensors if t.codec == "int4_opt_v1"}
    assert axes == {"c_attn": 0, "c_proj": 0, "c_fc": 0}
    # The same without a config: biases tell which dimension is the output.
    bare = tenpak.compress(gpt2 / "model.safetensors", tmp_path / "bare.tenpak")
    assert [(t.name, t.axis) for t in bare.tensors] == [(t.name, t.axis) for t in report.tensors]
    turned = tenpak.compress(gpt2, tmp_path / "t.tenpak", input_axes=[("c_fc", 1)])
    assert {t.axis for t in turned.tensors if "c_fc.weight" in t.name} == {1}
    assert turned.relative_error != report.relative_error


def test_the_first_rule_that_matches_decides(tmp_path, llama):
    rules = [(r"layers\.0\.", "keep"), ("down_proj", "int8_sym_v1"), ("proj", "int4_lut16_v1")]
    codecs = fate(tenpak.compress(llama, tmp_path / "m.tenpak", rules=rules))
    assert codecs["model.layers.0.mlp.down_proj.weight"] == "keep"
    assert codecs["model.layers.1.mlp.down_proj.weight"] == "int8_sym_v1"
    assert codecs["model.layers.1.mlp.up_proj.weight"] == "int4_lut16_v1"
    assert codecs["model.norm.weight"] == "keep"
    # A rule may ask for what is otherwise kept.
    norms = fate(tenpak.compress(llama, tmp_path / "n.tenpak", rules=[("norm", "int8_sym_v1")]))
    assert norms["model.norm.weight"] == "int8_sym_v1"


@pytest.mark.parametrize("codec", CODECS)
def test_the_bytes_do_not_depend_on_threads(tmp_path, model, codec):
    files = []
    for threads in (1, 2, 7):
        path = tmp_path / f"{threads}.tenpak"
        tenpak.compress(model, path, codec, threads=threads)
        files.append(path.read_bytes())
    assert files[0] == files[1] == files[2]


@pytest.mark.parametrize("codec", CODECS)
def test_a_dry_run_writes_nothing_and_knows_the_size_to_the_byte(tmp_path, model, codec):
    path = tmp_path / "m.tenpak"
    dry = tenpak.compress(model, path, codec, dry_run=True)
    assert files_in(tmp_path) == set()
    report = tenpak.compress(model, path, codec)
    assert dry.dry_run
    assert not report.dry_run
    assert dry.file_bytes == report.file_bytes == path.stat().st_size
    assert fate(dry) == fate(report)
    assert dry.relative_error is None


def test_a_dry_run_knows_which_tensors_need_an_exponent(tmp_path):
    arrays = {"huge": gaussian(8, 64, scale=1e30), "tiny": gaussian(8, 64, scale=1e-30), "plain": gaussian(8, 64)}
    dry = tenpak.compress(arrays, tmp_path / "m.tenpak", dry_run=True)
    assert dry.file_bytes == tenpak.compress(arrays, tmp_path / "m.tenpak").file_bytes
    with tenpak.open(tmp_path / "m.tenpak") as artifact:
        assert artifact.info("huge").exponent > 0 > artifact.info("tiny").exponent
        assert artifact.info("plain").exponent == 0
        for name, weights in arrays.items():
            assert relative_error(weights, artifact.read(name)) < 4e-3


def test_strict_names_what_would_be_left_out_before_any_work(tmp_path, llama):
    tenpak.compress(llama, tmp_path / "fine.tenpak", strict=True)
    arrays = {"linear": gaussian(32, 64), "conv.weight": gaussian(8, 4, 3, 3)}
    with pytest.raises(tenpak.UsageError, match=r"conv\.weight") as raised:
        tenpak.compress(arrays, tmp_path / "m.tenpak", strict=True)
    assert "linear" not in str(raised.value)
    assert files_in(tmp_path) == {"fine.tenpak"}
    for rule in ("keep", "int8_sym_v1"):
        tenpak.compress(arrays, tmp_path / "m.tenpak", strict=True, rules=[("conv", rule)], force=True)


def test_an_encoder_must_be_known_even_where_nothing_is_calibrated(tmp_path):
    with pytest.raises(tenpak.UsageError, match="unknown encoder 'best'; choose gptq or diag"):
        tenpak.compress({"linear.weight": gaussian(32, 64)}, tmp_path / "m.tenpak", encoder="best")


def test_options_for_names_that_no_tensor_has_are_noted(tmp_path):
    arrays = {"linear.weight": gaussian(32, 64)}
    options = {"rules": [("liner", "keep"), ("linear", "int8_sym_v1")], "input_axes": [("nowhere", 0)]}
    for dry_run in (True, False):
        notes = tenpak.compress(arrays, tmp_path / "m.tenpak", dry_run=dry_run, **options).notes
        assert [note.split("; ")[0] for note in notes] == [
            'the rule for "liner" matches no tensor',
            'the input axis for "nowhere" matches no tensor',
        ]


def test_thousands_of_matrices_of_one_shape_take_no_time_to_tell_apart(tmp_path):
    """As in models of many experts; comparing each with each took half a minute."""
    arrays = {f"experts.{i}.weight": np.full((2, 16), i, np.float32) for i in range(15_000)}
    arrays["again.weight"] = arrays["experts.7.weight"]
    began = time.process_time()
    report = tenpak.compress(arrays, tmp_path / "m.tenpak", dry_run=True)
    assert time.process_time() - began < 8
    assert [t.name for t in report.tensors if t.codec == "alias"] == ["again.weight"]


def test_tied_weights_are_stored_once(tmp_path):
    table = gaussian(100, 64)
    arrays = {"embed_tokens.weight": table, "lm_head.weight": table.copy(), "other.weight": gaussian(100, 64, seed=1)}
    path = tmp_path / "tied.tenpak"
    report = tenpak.compress(arrays, path)
    assert fate(report)["lm_head.weight"] == "alias"
    with tenpak.open(path) as artifact:
        assert artifact.aliases == {"lm_head.weight": "embed_tokens.weight"}
        assert np.array_equal(artifact.read("lm_head.weight"), artifact.read("embed_tokens.weight"))
        assert artifact.info("lm_head.weight").name == "embed_tokens.weight"
    state = tenpak.load_state_dict(path)
    assert state["lm_head.weight"] is state["embed_tokens.weight"]
    # Different treatment means that they are no longer the same.
    apart = tenpak.compress(arrays, path, rules=[("lm_head", "keep")], force=True)
    assert "alias" not in fate(apart).values()
    # Restored files hold both names.
    report = tenpak.decompress(path, tmp_path / "restored.safetensors")
    assert report.tensors == 3


def test_odd_tensors_are_kept_with_a_reason(tmp_path):
    arrays = {
        "mask": np.tril(np.ones((1, 1, 8, 8), np.uint8)),
        "positions": np.arange(64),
        "layers.0.mlp.gate.weight": gaussian(4, 64),
        "patch.weight": gaussian(8, 3, 4, 4),
        "flags": np.array([True, False]),
        "double": gaussian(4, 64, dtype=np.float64),
    }
    path = tmp_path / "m.tenpak"
    report = tenpak.compress(arrays, path)
    assert set(fate(report).values()) == {"keep"}
    assert all(tensor.reason for tensor in report.tensors)
    assert next(t.reason for t in report.tensors if "gate" in t.name) == "router"
    state = tenpak.load_state_dict(path)
    for name, array in arrays.items():
        assert state[name].dtype == array.dtype, name
        assert np.array_equal(state[name], array), name


def test_experts_in_three_dimensions(tmp_path):
    experts = gaussian(3, 20, 48)
    tenpak.compress({"experts.weight": experts}, tmp_path / "m.tenpak")
    with tenpak.open(tmp_path / "m.tenpak") as artifact:
        info = artifact.info("experts.weight")
        assert (info.axis, info.codec) == (2, "int4_opt_v1")
        assert info.parts[0].shape == (60, 24)
        assert relative_error(experts, artifact.read("experts.weight")) < 4e-3


@pytest.mark.parametrize("target", ["m.safetensors", "m.json", "folder"])
@pytest.mark.parametrize("dtype", [None, "F32", "F16", "BF16"])
def test_every_output_holds_the_same_weights(tmp_path, packed, target, dtype):
    report = tenpak.decompress(packed, tmp_path / target, dtype=dtype)
    assert report.tensors == 57
    assert report.files == (("config.json", "tokenizer.json") if target == "folder" else ())
    # Kept as they are, the weights come back to the last bit.
    again = tmp_path / "again.tenpak"
    tenpak.compress(tmp_path / target, again, rules=[("", "keep")])
    with tenpak.open(packed) as first, tenpak.open(again) as second:
        assert set(first.names) == set(second.names)
        for name in first:
            wanted = first.read(name, "F32")
            if dtype == "BF16":
                bits = wanted.view(np.uint32)
                wanted = ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).view(np.float32)
            elif dtype != "F32":
                wanted = first.read(name, "F16").astype(np.float32)
            assert np.array_equal(second.read(name, "F32"), wanted), name


def test_the_safetensors_package_reads_what_is_restored(tmp_path, packed):
    numpy_files = pytest.importorskip("safetensors.numpy")
    tenpak.decompress(packed, tmp_path / "m.safetensors")
    loaded = numpy_files.load_file(tmp_path / "m.safetensors")
    state = tenpak.load_state_dict(packed)
    assert set(loaded) == set(state)
    assert all(np.array_equal(loaded[name], state[name]) for name in state)


def test_tenpak_reads_what_the_safetensors_package_writes(tmp_path):
    numpy_files = pytest.importorskip("safetensors.numpy")
    arrays = {"a": gaussian(5, 64), "b": gaussian(7, dtype=np.float16), "c": np.arange(6).reshape(2, 3)}
    numpy_files.save_file(arrays, tmp_path / "m.safetensors", metadata={"format": "pt"})
    tenpak.compress(tmp_path / "m.safetensors", tmp_path / "m.tenpak", rules=[("", "keep")])
    state = tenpak.load_state_dict(tmp_path / "m.tenpak")
    assert all(np.array_equal(state[name], array) for name, array in arrays.items())


def test_bfloat16_models(tmp_path):
    values = (gaussian(16, 64).view(np.uint32) & 0xFFFF0000).view(np.float32)
    header = {"w": {"dtype": "BF16", "shape": [16, 64], "data_offsets": [0, 2048]}}
    text = json.dumps(header).encode()
    data = (values.view(np.uint32) >> 16).astype("<u2").tobytes()
    (tmp_path / "m.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    tenpak.compress(tmp_path / "m.safetensors", tmp_path / "kept.tenpak", rules=[("", "keep")])
    with tenpak.open(tmp_path / "kept.tenpak") as artifact:
        assert artifact.info("w").dtype == "BF16"
        assert np.array_equal(artifact.read("w"), values)
        assert artifact.parts("w")["data"].dtype == np.uint16
    tenpak.compress(tmp_path / "m.safetensors", tmp_path / "m.tenpak", "int8_sym_v1")
    assert relative_error(values, tenpak.load_state_dict(tmp_path / "m.tenpak")["w"]) < 1e-4
    # The restored file is BF16 again.
    tenpak.decompress(tmp_path / "kept.tenpak", tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes().endswith(data)


def test_a_mapping_of_arrays_is_a_model(tmp_path):
    arrays = {"w": gaussian(8, 64), "h": gaussian(8, 64, dtype=np.float16), "n": gaussian(64)}
    write_bundle(tmp_path / "m.json", w=arrays["w"])
    report = tenpak.compress(arrays, tmp_path / "arrays.tenpak")
    assert report.format == "arrays"
    assert [t.source for t in report.tensors] == ["F32", "F16", "F32"]
    tenpak.compress(tmp_path / "m.json", tmp_path / "json.tenpak")
    with tenpak.open(tmp_path / "arrays.tenpak") as a, tenpak.open(tmp_path / "json.tenpak") as b:
        assert np.array_equal(a.read("w"), b.read("w"))


@pytest.mark.parametrize("how", ["itself", "spelled differently", "symbolic link", "hard link", "a shard"])
def test_an_output_that_is_the_input_is_refused(tmp_path, how):
    folder = tmp_path / "model"
    shutil.copytree(DATA / "tiny-llama", folder)
    weights = folder / "model.safetensors"
    before = weights.read_bytes()
    source, target = weights, weights
    if how == "spelled differently":
        target = folder / ".." / "model" / "model.safetensors"
    elif how == "symbolic link":
        target = tmp_path / "link"
        target.symlink_to(weights)
    elif how == "hard link":
        target = tmp_path / "link"
        os.link(weights, target)
    elif how == "a shard":
        source = folder
    with pytest.raises(tenpak.UsageError, match="is the input"):
        tenpak.compress(source, target, force=True)
    assert weights.read_bytes() == before


def test_a_restored_model_may_not_replace_its_artifact(tmp_path, packed):
    before = packed.read_bytes()
    with pytest.raises(tenpak.UsageError):
        tenpak.decompress(packed, packed, format="safetensors", force=True)
    with pytest.raises(tenpak.UsageError):
        tenpak.decompress(packed, tmp_path, force=True)
    assert packed.read_bytes() == before


def test_an_existing_output_needs_force(tmp_path, packed, llama):
    before = packed.read_bytes()
    with pytest.raises(tenpak.UsageError, match="exists"):
        tenpak.compress(llama, packed, "int8_sym_v1")
    assert packed.read_bytes() == before
    tenpak.compress(llama, packed, "int8_sym_v1", force=True)
    assert packed.read_bytes() != before
    (tmp_path / "m.json").write_text("mine")
    with pytest.raises(tenpak.UsageError, match="exists"):
        tenpak.decompress(packed, tmp_path / "m.json")
    assert (tmp_path / "m.json").read_text() == "mine"


def test_a_weight_that_is_no_number_is_named(tmp_path):
    weights = gaussian(8, 64)
    weights[3, 7] = np.nan
    with pytest.raises(tenpak.InputError, match=r"layer\.weight.*\[3, 7\]"):
        tenpak.compress({"layer.weight": weights}, tmp_path / "m.tenpak")
    assert files_in(tmp_path) == set()
    # It can still be kept.
    tenpak.compress({"layer.weight": weights}, tmp_path / "m.tenpak", rules=[("layer", "keep")])
    assert np.array_equal(tenpak.load_state_dict(tmp_path / "m.tenpak")["layer.weight"], weights, equal_nan=True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"codec": "int4"}, "unknown codec"),
        ({"embeddings": "int4"}, "unknown codec"),
        ({"rules": [("(", "keep")]}, "regular expression"),
        ({"rules": [("w", "int4")]}, "unknown codec"),
        ({"input_axes": [("w", 5)]}, "axis 5"),
    ],
)
def test_wrong_options_are_refused_in_one_sentence(tmp_path, options, words):
    with pytest.raises(tenpak.UsageError) as raised:
        tenpak.compress({"w": gaussian(4, 64)}, tmp_path / "m.tenpak", **options)
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)
    assert files_in(tmp_path) == set()


def test_a_callback_may_end_the_work(tmp_path, llama):
    class Enough(Exception):
        pass

    def stop(done: int, total: int) -> None:
        raise Enough

    with pytest.raises(Enough):
        tenpak.compress(llama, tmp_path / "m.tenpak", progress=stop)
    assert files_in(tmp_path) == set()
    seen = []
    report = tenpak.compress(llama, tmp_path / "m.tenpak", progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (report.weights, report.weights)


def test_a_signal_ends_the_work_as_python_code_expects(tmp_path):
    arrays = {f"layers.{i}.weight": gaussian(2048, 2048, seed=i) for i in range(4)}

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(KeyboardInterrupt):
            tenpak.compress(arrays, tmp_path / "m.tenpak", "int4_lut16_v1", threads=1)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert files_in(tmp_path) == set()


def test_models_that_cannot_be_read(tmp_path, packed):
    with pytest.raises(tenpak.StorageError):
        tenpak.compress(tmp_path / "absent", tmp_path / "m.tenpak")
    (tmp_path / "m.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(tenpak.InputError, match=r"m\.safetensors"):
        tenpak.compress(tmp_path / "m.safetensors", tmp_path / "m.tenpak")
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(tenpak.UnsupportedError, match="pickle"):
        tenpak.compress(tmp_path / "pytorch_model.bin", tmp_path / "m.tenpak")
    with pytest.raises(tenpak.UsageError, match="already compressed"):
        tenpak.compress(packed, tmp_path / "m.tenpak")


def test_a_state_dict_has_the_dtype_that_is_asked_for(tmp_path):
    arrays = {"w": gaussian(8, 64, dtype=np.float16), "norm": gaussian(64), "positions": np.arange(5)}
    tenpak.compress(arrays, tmp_path / "m.tenpak")
    own = tenpak.load_state_dict(tmp_path / "m.tenpak")
    assert {name: value.dtype for name, value in own.items()} == {name: a.dtype for name, a in arrays.items()}
    wide = tenpak.load_state_dict(tmp_path / "m.tenpak", np.float32)
    assert [wide[name].dtype for name in ("w", "norm", "positions")] == [np.float32, np.float32, np.int64]
    assert np.array_equal(wide["w"].astype(np.float16), own["w"])
    with pytest.raises(tenpak.UsageError, match="jax"):
        tenpak.load_state_dict(tmp_path / "m.tenpak", framework="jax")
