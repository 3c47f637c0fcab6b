"""Products through wgpu from Python; those of every shape and layout are tested in tests/rust/wgpu.rs."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import tenpak
from support import DATA, gaussian, require, tenpak_command
from tenpak import wgpu
from tenpak.decoder import Decoder


@pytest.fixture(scope="module")
def context() -> wgpu.Context:
    require("wgpu")
    return wgpu.Context()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("wgpu") / "tiny.tenpak"
    tenpak.compress(DATA / "tiny-llama", path)
    return path


#: One codec of each layout.
CODECS = list({codec.layout: codec.name for codec in reversed(tenpak.codecs())}.values())


def relative(y: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(y - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("axis", [0, 1])
def test_products_are_those_of_the_decoded_weight(context: wgpu.Context, codec: str, axis: int) -> None:
    shape = (75, 130) if axis == 1 else (130, 75)
    encoded = tenpak.encode(gaussian(*shape), codec, axis)
    weight = wgpu.QuantizedWeight.from_parts(
        codec, encoded.parts, encoded.shape, axis, encoded.exponent, context=context
    )
    dense = tenpak.decode(encoded, np.float32).astype(np.float64)
    dense = dense if axis == 1 else dense.T
    assert weight.shape == (75, 130)
    for lead in [(), (1,), (3,), (2, 20)]:
        x = gaussian(*lead, 130, seed=5)
        y = wgpu.matmul(x, weight)
        assert y.shape == (*lead, 75)
        assert y.dtype == np.float32
        assert relative(y, x.astype(np.float64) @ dense.T) < 1e-3
    assert wgpu.matmul(np.zeros((0, 130)), weight).shape == (0, 75)


def test_full_precision_is_float32(context: wgpu.Context) -> None:
    full = wgpu.Context(context.adapter.name, precision="full")
    weight = wgpu.QuantizedWeight.from_array(gaussian(64, 512), "int4_g32_fp16_v1", context=full)
    dense = tenpak.decode(tenpak.encode(gaussian(64, 512), "int4_g32_fp16_v1"), np.float32).astype(np.float64)
    x = gaussian(70, 512, seed=6)
    assert relative(wgpu.matmul(x, weight), x.astype(np.float64) @ dense.T) < 1e-6


def test_slabs_give_the_same_products(context: wgpu.Context) -> None:
    weights = gaussian(300, 64)
    small = wgpu.Context(context.adapter.name, binding_bytes=4096)
    whole = wgpu.QuantizedWeight.from_array(weights, "int8_sym_v1", context=context)
    cut = wgpu.QuantizedWeight.from_array(weights, "int8_sym_v1", context=small)
    assert whole.slabs == 1
    assert cut.slabs >= 5
    x = gaussian(33, 64, seed=7)
    # Fewer tokens at once, too, so that another kernel may be taken.
    assert relative(wgpu.matmul(x, cut), wgpu.matmul(x, whole)) < 1e-3


def test_many_products_in_one_submission(context: wgpu.Context) -> None:
    weights = [
        wgpu.QuantizedWeight.from_array(gaussian(20, 40, seed=i), "int4_opt_v1", context=context) for i in range(3)
    ]
    inputs = [gaussian(i + 1, 40, seed=9 + i) for i in range(3)]
    together = context.matmul(list(zip(inputs, weights, strict=True)))
    for y, x, weight in zip(together, inputs, weights, strict=True):
        np.testing.assert_array_equal(y, wgpu.matmul(x, weight))


def test_threads_share_a_context(context: wgpu.Context) -> None:
    weight = wgpu.QuantizedWeight.from_array(gaussian(64, 64), "int4_opt_v1", context=context)
    x = gaussian(5, 64, seed=3)
    wanted = wgpu.matmul(x, weight)
    results: list[np.ndarray] = []

    def work() -> None:
        results.extend(wgpu.matmul(x, weight) for _ in range(5))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 20
    for y in results:
        np.testing.assert_array_equal(y, wanted)


def test_wrong_requests_are_usage_errors(context: wgpu.Context, model: Path) -> None:
    weight = wgpu.QuantizedWeight.from_array(gaussian(8, 16), "int4_opt_v1", context=context)
    with pytest.raises(tenpak.UsageError, match="must be"):
        wgpu.matmul(np.zeros((2, 15)), weight)
    with pytest.raises(tenpak.UsageError, match="another context"):
        wgpu.Context().matmul([(np.zeros(16), weight)])
    with pytest.raises(tenpak.UsageError, match="no linear layer"):
        wgpu.QuantizedWeight.from_array(gaussian(2, 8, 16), "int4_opt_v1", context=context)
    with pytest.raises(tenpak.UsageError, match="lack scales, offsets"):
        wgpu.QuantizedWeight.from_parts("int4_opt_v1", {"codes": np.zeros((8, 8), np.uint8)}, (8, 16), context=context)
    with pytest.raises(tenpak.UsageError, match="precision"):
        wgpu.Context(precision="half")  # type: ignore[arg-type]
    with pytest.raises(tenpak.UnsupportedError, match="no such GPU"):
        wgpu.Context("no such GPU")
    with pytest.raises(tenpak.UsageError, match="kept"):
        wgpu.QuantizedWeight.from_artifact(tenpak.open(model), "model.norm.weight", context)


def test_a_decoder_runs_its_linear_layers_there(context: wgpu.Context, model: Path) -> None:
    on_cpu, on_gpu = Decoder.open(model), Decoder.open(model)
    assert wgpu.place(on_gpu, context) == 44 - 1  # All quantised tensors but the embedding.
    assert all(isinstance(linear, wgpu.QuantizedLinear) for linear in on_gpu.blocks[0].linears.values())
    tokens = np.arange(24).reshape(2, 12)
    assert relative(on_gpu.logits(tokens), on_cpu.logits(tokens)) < 2e-3
    # Again, with nothing left to move.
    assert wgpu.place(on_gpu, context) == 0


def test_only_quantised_models_on_numpy_can_be_placed() -> None:
    with pytest.raises(tenpak.UsageError, match="not quantised"):
        wgpu.place(Decoder.open(DATA / "tiny-llama"))


def test_eval_runs_there(context: wgpu.Context, model: Path, tmp_path: Path) -> None:
    require("text")
    text = tmp_path / "text.txt"
    text.write_text("It was a dark and stormy night; the rain fell in torrents. " * 20)
    arguments = ["eval", str(model), "--text", str(text), "--context", "64", "--windows", "2", "--json"]
    reports = [tenpak_command(*arguments, "--device", device).json for device in ("cpu", "wgpu")]
    assert [report["device"] for report in reports] == ["cpu", "wgpu"]
    there, here = (report["perplexity"]["value"] for report in reports)
    assert abs(there / here - 1) < 1e-3


def test_generation_writes_there_what_it_writes_on_the_cpu(context: wgpu.Context, model: Path) -> None:
    require("text")
    arguments = ["generate", str(model), "--prompt", "It was", "--no-chat", "--max-tokens", "8", "--json"]
    here, there = (tenpak_command(*arguments, "--device", device).json for device in ("cpu", "wgpu"))
    assert there["device"] == "wgpu"
    assert there["text"] == here["text"]


def test_doctor_lists_adapters(context: wgpu.Context) -> None:
    listed = tenpak_command("doctor", "--json").json
    assert context.adapter.name in [gpu["name"] for gpu in listed["wgpu"]]
    assert listed["wgpu_missing"] is None
    assert context.adapter.name in tenpak_command("doctor").out


def test_wheels_without_kernels_say_what_to_do() -> None:
    try:
        wgpu.adapters()
    except tenpak.UnsupportedError as error:
        assert "--features python,gpu" in str(error)  # noqa: PT017
        with pytest.raises(tenpak.UnsupportedError, match="--features python,gpu"):
            wgpu.Context()
        assert "--features python,gpu" in tenpak_command("doctor").out
    else:
        assert isinstance(wgpu.adapters(), list)
