"""Calibration: statistics are what their definition says, and compressing with them loses less."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import tenpak
from safetensors.numpy import load_file, safe_open
from support import ROOT, files_in, gaussian, require, tenpak_command
from tenpak.calibrate import sample
from tenpak.decoder import Decoder
from tenpak.errors import InputError, StorageError, UsageError

TEXT = ROOT / "README.md"
CONTEXT = 64


def about(path: Path) -> dict:
    with safe_open(path, "np") as file:
        return json.loads(file.metadata()["tenpak.calibration"])


@pytest.fixture
def statistics(tmp_path: Path, model: Path) -> Path:
    path = tmp_path / "statistics.safetensors"
    tenpak.calibrate(model, path, TEXT, windows=8, context=CONTEXT)
    return path


def test_statistics_are_the_moments_of_what_linear_layers_read(tmp_path, model):
    path = tmp_path / "s.safetensors"
    tokens = np.random.default_rng(0).integers(0, 2048, (3, 40))
    report = tenpak.calibrate(model, path, tokens.reshape(-1), windows=3, context=40, gradients=False)
    decoder, seen = Decoder.open(model), {}
    h = decoder.embed(tokens)
    for block in decoder.blocks:
        h = block(h, observe=lambda names, x: seen.update({names: x.reshape(-1, x.shape[-1])}))
    seen[(decoder.head.linear.name,)] = decoder.head.norm(h).reshape(-1, h.shape[-1])
    tensors, inputs = load_file(path), about(path)["inputs"]
    assert report.inputs == len(seen) == len(inputs)
    assert report.weights == sum(map(len, seen))
    assert len(tensors) == 2 * len(seen) + 1
    np.testing.assert_array_equal(tensors["tokens"], tokens)
    for names, x in seen.items():
        name = names[0].removesuffix(".weight")
        assert inputs[name] == {"tokens": 120, "weights": list(names)}
        wanted = x.astype(np.float64).T @ x / len(x)
        moment = tensors[f"{name}.second_moment"]
        np.testing.assert_allclose(moment, wanted, rtol=1e-3, atol=1e-5 * np.abs(wanted).max())
        np.testing.assert_array_equal(tensors[f"{name}.diagonal"], np.diagonal(moment))


def test_gradients_weigh_tokens_and_outputs(tmp_path, llama, monkeypatch):
    """Both moments by their definitions, from passes of its own over the same samples."""
    module, path = sys.modules["tenpak.calibrate"], tmp_path / "s.safetensors"
    tokens = np.random.default_rng(0).integers(0, 2048, (3, 40))
    monkeypatch.setattr(module, "TOKENS_AT_ONCE", 40)
    tenpak.calibrate(llama, path, tokens.reshape(-1), windows=3, context=40, seed=7)
    in_memory = path.read_bytes()
    monkeypatch.setattr(module, "MEMORY", 0)
    tenpak.calibrate(llama, path, tokens.reshape(-1), windows=3, context=40, seed=7, force=True)
    assert path.read_bytes() == in_memory
    assert files_in(tmp_path) == {"s.safetensors"}

    decoder, plain, seen = Decoder.open(llama), {}, {}
    random, flat = np.random.default_rng(7), lambda x: x.reshape(-1, x.shape[-1]).astype(np.float64)
    h = decoder.embed(tokens[1:2])
    for block in decoder.blocks:
        h = block(h, observe=lambda names, x: plain.update({names: flat(x)}))
    # Windows 0 and 2 go backwards.
    for window in (tokens[:1], tokens[2:]):
        hidden = [decoder.embed(window)]
        for block in decoder.blocks:
            hidden.append(block(hidden[-1]))
        d = module._loss_backward(decoder.head, hidden.pop(), random, np)
        for block in reversed(decoder.blocks):
            d = block.backward(
                hidden.pop(),
                d,
                lambda names, x, gs: seen.setdefault(names, []).append((flat(x), [flat(g) for g in gs])),
            )

    def close(found, wanted):
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-5 * np.abs(wanted).max())

    tensors, inputs = load_file(path), about(path)["inputs"]
    assert plain.keys() == seen.keys()
    for names, windows in seen.items():
        name = names[0].removesuffix(".weight")
        assert inputs[name] == {"tokens": 120, "weights": list(names), "output_tokens": 80}
        total = plain[names].T @ plain[names]
        for x, gradients in windows:
            squares = sum(np.square(g).sum(1) for g in gradients)
            total += (x * (squares / squares.mean())[:, None]).T @ x
        close(tensors[f"{name}.second_moment"], total / 120)
        for i, weight in enumerate(names):
            total = 0
            for x, gradients in windows:
                squares = np.square(x).sum(1)
                total += (gradients[i] * (squares / squares.mean())[:, None]).T @ gradients[i]
            close(tensors[f"{weight.removesuffix('.weight')}.output_moment"], total / 80)


def test_the_gradient_of_a_loss_is_that_of_differences(llama):
    """At the last hidden states, against a step along a direction in FP64."""
    module, decoder = sys.modules["tenpak.calibrate"], Decoder.open(llama)
    h = decoder.embed(np.random.default_rng(0).integers(0, 2048, (1, 6)))
    for block in decoder.blocks:
        h = block(h)
    d = module._loss_backward(decoder.head, h, np.random.default_rng(3), np)
    head, norm = decoder.head.linear.weight.astype(np.float64), decoder.head.norm
    logits = decoder.head(h)[0]
    logits -= logits.max(axis=-1, keepdims=True)
    chosen = module._drawn(np.exp(logits), np.random.default_rng(3), np)

    def loss(h):
        normed = h / np.sqrt(np.square(h).mean(-1, keepdims=True) + norm.eps) * norm.weight
        logits = normed[0] @ head.T
        return float((np.log(np.exp(logits).sum(-1)) - logits[np.arange(6), chosen]).sum())

    direction = np.random.default_rng(1).standard_normal(h.shape)
    step = 1e-4 * direction
    slope = (loss(h + step) - loss(h - step)) / 2e-4
    assert float((d * direction).sum()) == pytest.approx(slope, rel=1e-4)


@pytest.mark.parametrize("codec", [c.name for c in tenpak.codecs() if c.code_bits < 8])
def test_rows_make_good_what_others_have_lost(codec):
    """tr(G E H Eᵀ) falls, in both orientations, whatever the number of threads."""
    random = np.random.default_rng(0)

    def moment(width):
        x = random.standard_normal((900, 12)) @ random.standard_normal((12, width))
        x += random.standard_normal((900, width))
        return (x.T @ x / len(x)).astype(np.float32)

    g, h, weight = moment(200), moment(96), gaussian(200, 96)

    def loss(encoded: tenpak.Encoded) -> float:
        e = (weight - tenpak.decode(encoded)).astype(np.float64)
        return float(np.sum((g @ e) * (e @ h)))

    alone = tenpak.encode(weight, codec, second_moment=h)
    together = tenpak.encode(weight, codec, second_moment=h, output_moment=g, measure=True)
    assert loss(together) < 0.9 * loss(alone)
    delta = weight - tenpak.decode(together)
    assert together.relative_error == pytest.approx(float((delta**2).sum() / (weight**2).sum()), rel=1e-4)
    turned = tenpak.encode(weight.T.copy(), codec, axis=0, second_moment=h, output_moment=g, threads=1)
    for name, part in together.parts.items():
        np.testing.assert_array_equal(part, turned.parts[name])
    # Outputs that do not depend on each other have nothing to make good.
    diagonal = tenpak.encode(weight, codec, second_moment=h, output_moment=np.diag(np.linspace(2, 1, 200)))
    for name, part in alone.parts.items():
        np.testing.assert_array_equal(part, diagonal.parts[name])
    tiny = tenpak.encode(weight * 1e-6, codec, second_moment=h, output_moment=g)
    assert tiny.exponent < 0
    weight = weight * np.float32(1e-6)
    assert loss(tiny) < 0.9 * loss(tenpak.encode(weight, codec, second_moment=h))
    with pytest.raises(UsageError, match="beside a second_moment"):
        tenpak.encode(weight, codec, output_moment=g)
    with pytest.raises(UsageError, match="second moment of 40000 numbers"):
        tenpak.encode(weight[:40], codec, second_moment=h, output_moment=g)


def test_the_same_text_gives_the_same_bytes(tmp_path, llama):
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        tenpak.calibrate(llama, path, TEXT, windows=4, context=CONTEXT)
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_windows_are_spread_over_the_text(tmp_path, llama):
    tokens = np.arange(10 * 16) % 2048
    report = tenpak.calibrate(llama, tmp_path / "s", tokens, windows=5, context=16)
    assert (report.windows, report.context) == (5, 16)
    report = tenpak.calibrate(llama, tmp_path / "s", tokens, windows=50, context=16, force=True)
    assert report.windows == 10


@pytest.mark.parametrize("encoder", ["diag", "gptq"])
@pytest.mark.parametrize("codec", [c.name for c in tenpak.codecs() if c.code_bits < 8])
def test_outputs_lose_less_with_statistics(tmp_path, llama, codec, encoder):
    statistics = tmp_path / "s.safetensors"
    tenpak.calibrate(llama, statistics, TEXT, windows=8, context=CONTEXT, gradients=False)
    tensors, inputs = load_file(statistics), about(statistics)["inputs"]
    moments = {w: tensors[f"{name}.second_moment"] for name, i in inputs.items() for w in i["weights"]}

    original = Decoder.open(llama).source

    def losses(path: Path) -> dict[str, float]:
        with tenpak.open(path) as artifact:
            found = {}
            for info in artifact.infos:
                if info.codec != codec:
                    continue
                weight = original.read(info.name)
                delta = (weight - artifact.read(info.name, np.float32)).astype(np.float64)
                h = moments[info.name].astype(np.float64)
                found[info.name] = np.sum(delta @ h * delta) / np.sum(weight @ h * weight)
            return found

    plain = tenpak.compress(llama, tmp_path / "plain.tenpak", codec)
    done = tenpak.compress(llama, tmp_path / "c.tenpak", codec, calibration=statistics, encoder=encoder)
    assert done.file_bytes == plain.file_bytes
    before, after = losses(tmp_path / "plain.tenpak"), losses(tmp_path / "c.tenpak")
    assert len(before) == len(after) == 42
    assert np.mean(list(after.values())) < (0.9 if encoder == "gptq" else 1.0) * np.mean(list(before.values()))
    by_name = {t.name: t for t in done.tensors}
    for name, loss in after.items():
        assert by_name[name].encoder == encoder
        if encoder == "gptq":
            assert by_name[name].output_error == pytest.approx(loss, rel=1e-3)
            assert by_name[name].output_error <= by_name[name].output_error_before


def test_bytes_do_not_depend_on_threads(tmp_path, model, statistics):
    made = []
    for threads in (1, 2, 7):
        path = tmp_path / f"{threads}.tenpak"
        tenpak.compress(model, path, "int4_lut16_v1", calibration=statistics, threads=threads)
        made.append(path.read_bytes())
    assert made[0] == made[1] == made[2]


def test_few_tokens_and_missing_moments_fall_back_and_say_so(tmp_path, llama):
    few, diagonal = tmp_path / "few", tmp_path / "diagonal"
    tenpak.calibrate(llama, few, TEXT, windows=1, context=CONTEXT)
    report = tenpak.compress(llama, tmp_path / "a.tenpak", calibration=few)
    quantised = [t for t in report.tensors if t.codec == "int4_opt_v1"]
    assert {(t.encoder, t.uncalibrated) for t in quantised} == {("diag", "diag: fewer tokens than columns were seen")}
    assert any("give more text" in note for note in report.notes)
    tenpak.calibrate(llama, diagonal, TEXT, windows=8, context=CONTEXT, diagonal=True)
    assert not any(name.endswith("second_moment") for name in load_file(diagonal))
    report = tenpak.compress(llama, tmp_path / "b.tenpak", calibration=diagonal)
    assert {t.encoder for t in report.tensors if t.codec == "int4_opt_v1"} == {"diag"}


@pytest.mark.parametrize("choices", [1, 7, 251, 509, 512, 2048])
def test_draws_are_the_inverse_of_the_distribution_function(choices):
    weights = np.random.default_rng(1).random((300, choices), np.float32) ** 8
    weights[:, : choices // 2] = 0
    drawn = sys.modules["tenpak.calibrate"]._drawn(weights, np.random.default_rng(2), np)
    sums = np.cumsum(weights, axis=-1, dtype=np.float64)
    wanted = np.random.default_rng(2).random(300) * sums[:, -1]
    np.testing.assert_array_equal(drawn, [np.searchsorted(s, w) for s, w in zip(sums, wanted, strict=True)])


def test_a_model_samples_its_own_text(model):
    decoder = Decoder.open(model)
    tokens = sample(decoder, 3, 20, seed=1)
    assert tokens.shape == (3, 20)
    np.testing.assert_array_equal(tokens, sample(decoder, 3, 20, seed=1))
    assert (tokens[:, 1:] != sample(decoder, 3, 20, seed=2)[:, 1:]).any()
    assert (tokens[:, 0] == decoder.config.bos).all()
    # At temperature 1, text has about the model's own entropy: far less than that of random tokens.
    loss = np.log(tenpak.evaluate(decoder, sample(decoder, 8, 64).reshape(-1), context=64).perplexity.value)
    random = np.random.default_rng(0).integers(0, 2048, 8 * 64)
    assert loss < np.log(tenpak.evaluate(decoder, random, context=64).perplexity.value) - 2


def test_compress_with_own_text(tmp_path, llama, monkeypatch):
    tokens = sample(Decoder.open(llama), 64, 24)
    # The module, which the function of that name hides.
    monkeypatch.setattr(sys.modules["tenpak.calibrate"], "sample", lambda *_args, **_options: tokens)
    report = tenpak.compress(llama, tmp_path / "a.tenpak", "int4_lut16_v1", calibration="self")
    assert {t.encoder for t in report.tensors if t.codec == "int4_lut16_v1"} == {"gptq"}
    assert files_in(tmp_path) == {"a.tenpak"}
    with pytest.raises(UsageError, match="exists"):
        tenpak.compress(llama, tmp_path / "a.tenpak", calibration="self")
    with pytest.raises(UsageError, match=r"needs a model with config\.json"):
        tenpak.compress({"a": gaussian(16, 16)}, tmp_path / "b.tenpak", calibration="self")


def test_sequential_statistics_see_quantised_layers(tmp_path, llama, monkeypatch):
    plain, sequential = tmp_path / "plain", tmp_path / "sequential"
    tenpak.calibrate(llama, plain, TEXT, windows=8, context=CONTEXT, gradients=False)
    tenpak.calibrate(llama, sequential, TEXT, windows=8, context=CONTEXT, sequential="int4_lut16_v1")
    a, b = load_file(plain), load_file(sequential)
    assert a.keys() == b.keys()
    first = "model.layers.0.self_attn.q_proj.second_moment"
    np.testing.assert_array_equal(a[first], b[first])
    assert (
        a["model.layers.1.self_attn.q_proj.second_moment"] != b["model.layers.1.self_attn.q_proj.second_moment"]
    ).any()
    assert about(sequential)["sequential"] == "int4_lut16_v1"
    # What the layers before have become is what compressing with these statistics writes, before norms shrink.
    monkeypatch.setattr("tenpak.models.tokens_of", lambda _: None)
    tenpak.compress(llama, tmp_path / "m.tenpak", "int4_lut16_v1", embeddings="keep", calibration=sequential)
    decoder, seen = Decoder.open(tmp_path / "m.tenpak"), {}
    tokens = np.array(decoder.encode_text(TEXT.read_text()))
    windows = tokens[: len(tokens) // CONTEXT * CONTEXT].reshape(-1, CONTEXT)
    windows = windows[np.arange(8) * len(windows) // 8]
    h = decoder.embed(windows)
    for block in decoder.blocks[:2]:
        h = block(h, observe=lambda names, x: seen.update({names[0]: x.reshape(-1, x.shape[-1])}))
    x = seen["model.layers.1.self_attn.q_proj.weight"]
    np.testing.assert_allclose(
        b["model.layers.1.self_attn.q_proj.second_moment"], x.T @ x / len(x), rtol=1e-3, atol=1e-4
    )


def test_wrong_requests_are_refused(tmp_path, llama, gpt2):
    path = tmp_path / "s"
    with pytest.raises(UsageError, match="windows 0"):
        tenpak.calibrate(llama, path, TEXT, windows=0)
    with pytest.raises(UsageError, match="context 9999"):
        tenpak.calibrate(llama, path, TEXT, context=9999)
    with pytest.raises(UsageError, match="second moments"):
        tenpak.calibrate(llama, path, TEXT, diagonal=True, sequential="int4_opt_v1")
    with pytest.raises(StorageError):
        tenpak.calibrate(llama, tmp_path / "no" / "s", TEXT)
    with pytest.raises(StorageError):
        tenpak.calibrate(llama, path, tmp_path / "no.txt")
    assert files_in(tmp_path) == set()
    tenpak.calibrate(llama, path, TEXT, windows=2, context=CONTEXT)
    with pytest.raises(UsageError, match="exists"):
        tenpak.calibrate(llama, path, TEXT)
    with pytest.raises(UsageError, match="another model"):
        tenpak.compress(gpt2, tmp_path / "a.tenpak", calibration=path)
    with pytest.raises(UsageError, match="unknown encoder"):
        tenpak.compress(llama, tmp_path / "a.tenpak", calibration=path, encoder="best")
    with pytest.raises(InputError, match="no statistics"):
        tenpak.compress(llama, tmp_path / "a.tenpak", calibration=llama / "model.safetensors")
    (tmp_path / "cut").write_bytes(path.read_bytes()[:-4])
    with pytest.raises(InputError, match="cut"):
        tenpak.compress(llama, tmp_path / "a.tenpak", calibration=tmp_path / "cut")
    assert files_in(tmp_path) == {"s", "cut"}


def test_statistics_of_another_model_of_the_same_shape_are_noted(tmp_path, llama):
    statistics = tmp_path / "s"
    tenpak.calibrate(llama, statistics, TEXT, windows=8, context=CONTEXT)
    state = load_file(llama / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    state[name] = state[name] * np.float16(0.5)
    report = tenpak.compress(state, tmp_path / "a.tenpak", calibration=statistics)
    assert any("another model" in note for note in report.notes)
    same = tenpak.compress(llama, tmp_path / "b.tenpak", calibration=statistics)
    assert not same.notes


def test_encode_with_a_second_moment():
    random = np.random.default_rng(0)
    x = random.standard_normal((400, 24)) @ random.standard_normal((24, 96)) + random.standard_normal((400, 96))
    h = (x.T @ x / len(x)).astype(np.float32)
    weight = gaussian(40, 96)

    def loss(encoded: tenpak.Encoded) -> float:
        delta = (weight - tenpak.decode(encoded)).astype(np.float64)
        return float(np.sum(delta @ h * delta) / np.sum(weight @ h * weight))

    diag = tenpak.encode(weight, "int4_lut16_v1", importance=np.diagonal(h))
    gptq = tenpak.encode(weight, "int4_lut16_v1", second_moment=h)
    assert gptq.output_error == pytest.approx(loss(gptq), rel=1e-4)
    assert gptq.output_error_before == pytest.approx(loss(diag), rel=1e-4)
    assert loss(gptq) < 0.7 * loss(diag)
    turned = tenpak.encode(weight.T.copy(), "int4_lut16_v1", axis=0, second_moment=h)
    np.testing.assert_array_equal(turned.parts["codes"], gptq.parts["codes"])
    few = tenpak.encode(weight, "int4_lut16_v1", second_moment=h, tokens=100)
    assert loss(gptq) < loss(few) < loss(diag)
    with pytest.raises(UsageError, match="second moment"):
        tenpak.encode(weight, "int4_lut16_v1", second_moment=h[:95, :95])
    h[3, 4] = np.nan
    with pytest.raises(InputError, match=r"\[3, 4\]"):
        tenpak.encode(weight, "int4_lut16_v1", second_moment=h)


def test_the_commands(tmp_path, llama):
    statistics, packed = tmp_path / "s.safetensors", tmp_path / "m.tenpak"
    ran = tenpak_command(
        "calibrate", llama, "--text", TEXT, "--output", statistics, "--windows", 8, "--context", CONTEXT, "--progress"
    )
    assert "gathering statistics 100%" in ran.err
    assert "8 windows of 64 tokens" in ran.out
    ran = tenpak_command(
        "compress", "-i", llama, "-o", packed, "--codec", "int4_lut16_v1", "--calibration", statistics, "--tensors"
    )
    assert "before gptq" in ran.out
    assert "gptq" in ran.out
    ran = tenpak_command("compress", "-i", llama, "-o", packed, "-f", "--calibration", statistics, "--json").json
    assert ran["output_error"] < ran["output_error_before"]
    assert (
        tenpak_command(
            "calibrate", llama, "--self", "-o", tmp_path / "o", "--windows", 2, "--context", 8, "--json"
        ).json["text"]
        == "sampled"
    )
    tenpak_command("calibrate", llama, "--output", tmp_path / "p", code=2)
    tenpak_command("calibrate", llama, "--text", tmp_path / "none.txt", "--output", tmp_path / "p", code=6)


def test_searches_estimate_inputs_from_the_weights(tmp_path, model):
    estimated = tenpak.compress(model, tmp_path / "a.tenpak", "int4_lut16_v1")
    plain = tenpak.compress(model, tmp_path / "b.tenpak", "int4_lut16_v1", calibration="none")
    encoders = {t.name: t.encoder for t in estimated.tensors if t.codec == "int4_lut16_v1"}
    fed_by_norms = [n for n in encoders if any(k in n for k in ("q_proj", "up_proj", "c_attn", "c_fc"))]
    assert {encoders[n] for n in fed_by_norms} == {"search, inputs estimated"}
    assert {e for n, e in encoders.items() if "down_proj" in n or "c_proj" in n} == {"search"}
    assert {t.encoder for t in plain.tensors if t.codec == "int4_lut16_v1"} == {"search"}
    # The weights' own error grows a little, for a smaller error of what is done with them.
    assert plain.relative_error < estimated.relative_error < 1.2 * plain.relative_error
    minmax = tenpak.compress(model, tmp_path / "c.tenpak", "int4_g32_fp16_v1")
    assert {t.encoder for t in minmax.tensors if t.codec == "int4_g32_fp16_v1"} == {"min/max"}


def test_reference_models_lose_less(tmp_path):
    require("reference")
    from support import REFERENCE

    texts = REFERENCE.parent / "text"
    model = REFERENCE / "llama-books"
    statistics = tmp_path / "s.safetensors"
    tenpak.calibrate(model, statistics, texts / "calibration.txt", windows=6)

    def divergence(**options: object) -> float:
        path = tmp_path / "m.tenpak"
        tenpak.compress(model, path, "int4_lut16_v1", embeddings="keep", force=True, **options)
        report = tenpak.evaluate(path, texts / "dev.txt", against=model, windows=2)
        return report.comparison.divergence.value

    plain, estimated = divergence(calibration="none"), divergence()
    assert plain < 18e-3
    assert estimated < 0.97 * plain
    assert divergence(calibration=statistics) < 0.85 * plain
