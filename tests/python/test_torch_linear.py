"""`G8Linear` and `quantize_model`: on the CPU everywhere, on a GPU where there is one."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import warnings

import numpy as np
import pytest
import tenpak
from support import DATA, gaussian, require
from tenpak.cuda import layouts

torch = pytest.importorskip("torch")

from tenpak.cuda import G8Linear, ops  # noqa: E402
from tenpak.torch import quantize_model  # noqa: E402

CODECS = [codec.name for codec in tenpak.codecs()]
every_codec = pytest.mark.parametrize("codec", CODECS)
pytestmark = pytest.mark.filterwarnings("ignore:on cpu PyTorch computes")


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda":
        require("cuda")
    return request.param


def linear(out: int, width: int, *, bias: bool = True, dtype: torch.dtype = torch.float32) -> torch.nn.Linear:
    layer = torch.nn.Linear(width, out, bias=bias)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(gaussian(out, width, seed=out)))
    return layer.to(dtype)


def rebuilt(layer: torch.nn.Linear, codec: str) -> torch.Tensor:
    """The weight that the core makes of a layer's."""
    return torch.from_numpy(tenpak.decode(tenpak.encode(layer.weight.detach().cpu().float().numpy(), codec)))


def error(ours: torch.Tensor, wanted: torch.Tensor) -> float:
    """‖ours − wanted‖ / ‖wanted‖."""
    ours, wanted = ours.detach().double().cpu(), wanted.detach().double().cpu()
    return float((ours - wanted).norm() / wanted.norm())


@every_codec
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_multiplies_with_the_cores_weights(device, codec, bias):
    for out, width in ((37, 200), (130, 19), (64, 512), (1, 1)):
        layer = linear(out, width, bias=bias)
        weight = rebuilt(layer, codec)
        ours = G8Linear.from_linear(layer.to(device), codec)
        assert torch.equal(ours.dequantise().cpu(), weight)
        assert torch.equal(ours.dequantise(torch.bfloat16).cpu(), weight.to(torch.bfloat16))
        for shape in ((5, width), (2, 3, width), (width,), (0, width)):
            x = torch.randn(*shape, device=device)
            y = ours(x)
            assert (y.shape, y.dtype, y.device) == ((*shape[:-1], out), x.dtype, x.device)
            if y.numel():
                wanted = torch.nn.functional.linear(x.double().cpu(), weight.double(), None)
                wanted = wanted if layer.bias is None else wanted + layer.bias.double().cpu()
                assert error(y, wanted) < (1e-6 if device == "cpu" else 3e-3), shape


@every_codec
def test_gpt2s_transposed_layer_and_batches_of_tokens(device, codec):
    require("torch")
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(96, 40)
    weight = torch.from_numpy(tenpak.decode(tenpak.encode(layer.weight.detach().numpy(), codec, 0)))
    ours = G8Linear.from_linear(layer.to(device), codec)
    assert (ours.in_features, ours.out_features) == (40, 96)
    assert torch.equal(ours.dequantise().cpu(), weight.T)
    for tokens in (1, 9, 40, 200, 1000):
        x = torch.randn(tokens, 40, device=device)
        wanted = torch.addmm(layer.bias.cpu(), x.cpu(), weight)
        assert error(ours(x), wanted) < (1e-6 if device == "cpu" else 3e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_floats_stay_half_floats(device, dtype):
    layer = linear(48, 100, dtype=dtype)
    ours = G8Linear.from_linear(layer.to(device), "int4_g16_v1")
    x = torch.randn(7, 100, device=device, dtype=dtype)
    y = ours(x)
    assert y.dtype == dtype
    wanted = torch.nn.functional.linear(
        x.double().cpu(), rebuilt(layer, "int4_g16_v1").double(), layer.bias.double().cpu()
    )
    assert error(y, wanted) < (2e-3 if dtype == torch.float16 else 1e-2)
    # Every other row, and a transposed array: neither lies row after row.
    x = torch.randn(14, 100, device=device, dtype=dtype)
    assert torch.allclose(ours(x[::2]), ours(x[::2].contiguous()), atol=1e-2)
    x = torch.randn(100, 9, device=device, dtype=dtype)
    assert torch.allclose(ours(x.T), ours(x.T.contiguous()), atol=1e-2)


def test_autocast_chooses_the_type(device):
    ours = G8Linear.from_linear(linear(16, 32).to(device))
    with torch.autocast(device, dtype=torch.bfloat16):
        assert ours(torch.randn(2, 32, device=device)).dtype == torch.bfloat16


@every_codec
def test_state_dicts_go_round(device, codec):
    ours = G8Linear.from_linear(linear(40, 70).to(device), codec)
    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    fresh = G8Linear(70, 40, codec=codec)
    fresh.load_state_dict(state)
    empty = G8Linear(70, 40, codec=codec, device="meta")
    empty.load_state_dict(state, assign=True)
    x = torch.randn(3, 70, device=device)
    for other in (fresh.to(device), empty, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(other(x), ours(x))
        assert torch.equal(other.dequantise(), ours.dequantise())
    with pytest.raises(RuntimeError, match="size mismatch"):
        G8Linear(70, 48, codec=codec).load_state_dict(state)


@pytest.mark.parametrize("codec", ["int4_g8_fp16_v1", "int4_g16_v1", "int4_g8_v1", "int5_g32_v1"])
def test_state_dicts_with_an_artifacts_own_scales_are_scaled_when_they_are_loaded(device, codec, monkeypatch):
    layer = linear(40, 70).to(device)
    ours = G8Linear.from_linear(layer, codec)
    with monkeypatch.context() as patched:
        patched.setattr(layouts, "power_of", lambda *_: 0)
        state = G8Linear.from_linear(layer, codec).state_dict()
    assert state["exponent"] > ours.exponent
    fresh = G8Linear(70, 40, codec=codec)
    fresh.load_state_dict(state)
    empty = G8Linear(70, 40, codec=codec, device="meta")
    empty.load_state_dict(state, assign=True)
    for other in (fresh.to(device), empty):
        assert torch.equal(other.dequantise(), ours.dequantise())
        for key, value in ours.state_dict().items():
            assert torch.equal(other.state_dict()[key].to(device), value)


def test_a_layers_bits_survive_a_change_of_type_and_device(device):
    ours = G8Linear.from_linear(linear(40, 70), "int4_g8_v1")
    before = ours.dequantise()
    moved = ours.half().to(device).bfloat16()
    assert moved.bias.dtype == torch.bfloat16
    assert torch.equal(moved.dequantise().cpu(), before)


@every_codec
def test_an_artifacts_weight_becomes_a_layer(device, codec, tmp_path):
    path = tmp_path / "a.tenpak"
    array = gaussian(64, 96)
    tenpak.compress({"layer.weight": array}, path, codec=codec)
    with tenpak.open(path) as artifact:
        ours = G8Linear.from_artifact(artifact, "layer.weight", bias=torch.ones(64), device=device)
        assert np.array_equal(ours.dequantise().cpu().numpy(), artifact.read("layer.weight"))
    zero = ours(torch.zeros(1, 96, device=device))
    assert torch.equal(zero, torch.ones(1, 64, device=device))


def test_large_weights_are_unpacked_in_parts(monkeypatch):
    from tenpak.cuda import fallback

    ours = G8Linear.from_linear(linear(100, 70), "int4_g16_v1")
    whole = ours.dequantise()
    monkeypatch.setattr(fallback, "AT_ONCE", 16 * 70)
    assert torch.equal(ours.dequantise(), whole)


def test_gradients_of_inputs_and_bias(device):
    ours = G8Linear.from_linear(linear(24, 40).to(device))
    ours.bias.requires_grad_(True)
    x = torch.randn(2, 5, 40, device=device, requires_grad=True)
    grad = torch.randn(2, 5, 24, device=device)
    ours(x).backward(grad)
    assert error(x.grad, grad.cpu() @ ours.dequantise().cpu()) < 1e-4
    assert error(ours.bias.grad, grad.sum((0, 1))) < 1e-4


def test_torch_compile_keeps_one_graph(device):
    model = torch.nn.Sequential(linear(48, 32), torch.nn.GELU(), linear(32, 48)).to(device).eval()
    quantize_model(model, "int4_g16_v1")
    explained = torch._dynamo.explain(model)(torch.randn(4, 32, device=device))
    assert explained.graph_break_count == 0
    # Whatever compiles the rest, ours goes through: no C++ compiler is asked for.
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens in (1, 4, 9):
        x = torch.randn(tokens, 32, device=device)
        with torch.no_grad():
            assert torch.allclose(compiled(x), model(x), atol=1e-5)


@pytest.mark.parametrize("grad", [False, True])
def test_the_operators_keep_pytorchs_rules(device, grad):
    ours = G8Linear.from_linear(linear(24, 40).to(device), "int4_lut16_v1")
    weight = (ours.codes, ours.params, ours.row_params, ours.layout, 24, 40, ours._scale)
    x = torch.randn(3, 40, device=device, requires_grad=grad)
    # Gradients are checked in double elsewhere: the weight is rounded to x's type.
    utilities = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic") if not grad else ("test_schema",)
    torch.library.opcheck(torch.ops.tenpak.matmul.default, (x, *weight, ours.bias), test_utils=utilities)
    torch.library.opcheck(torch.ops.tenpak.dequantise.default, (*weight, torch.float32), test_utils=utilities)


def test_the_fallback_is_said_once(monkeypatch):
    monkeypatch.setattr(ops, "_said", False)
    ours = G8Linear.from_linear(linear(16, 32))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            ours(torch.randn(1, 32))
    assert [str(w.message) for w in caught] == [
        "on cpu PyTorch computes with quantised weights, which it unpacks for every product: slowly"
    ]


def test_what_is_no_layer_is_refused():
    with pytest.raises(tenpak.UsageError, match="Embedding is no linear layer"):
        G8Linear.from_linear(torch.nn.Embedding(4, 8))
    with pytest.raises(tenpak.UsageError, match="unknown codec"):
        G8Linear.from_linear(linear(8, 8), "int3_v1")
    with pytest.raises(tenpak.UsageError, match="on the meta device"):
        G8Linear.from_linear(torch.nn.Linear(8, 8, device="meta"))
    broken = linear(8, 8)
    with torch.no_grad():
        broken.weight[2, 3] = float("nan")
    with pytest.raises(tenpak.InputError, match=r"\[2, 3\]"):
        G8Linear.from_linear(broken)
    with pytest.raises(tenpak.InputError, match=r"^1: .*\[2, 3\]"):
        quantize_model(torch.nn.Sequential(linear(8, 8), broken))


class Model(torch.nn.Module):
    """Layers of each kind that `quantize_model` must tell apart."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(50, 32)
        self.up, self.down = linear(64, 32), linear(32, 64)
        self.again = self.up
        self.attention = torch.nn.MultiheadAttention(32, 4, batch_first=True)
        self.tied = torch.nn.Linear(32, 50, bias=False)
        self.tied.weight = self.embedding.weight
        self.lm_head = linear(50, 32)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        x = x + self.attention(x, x, x)[0]
        x = x + self.down(torch.relu(self.up(x) + self.again(x)))
        return self.lm_head(x) + self.tied(x)


def test_a_models_layers_are_replaced(device):
    model = Model().to(device).eval()
    tokens = torch.arange(12, device=device).view(2, 6)
    with torch.no_grad():
        before = model(tokens)
        report = quantize_model(model, "int4_opt_llama_v1")
        after = model(tokens)
    assert {layer.name for layer in report.quantized} == {"up", "down"}
    assert [layer.action for layer in report.layers if layer.name == "again"] == ["alias: up"]
    assert {layer.name: layer.action for layer in report.kept} == {
        "attention.out_proj": "keep: its parent reads the weight",
        "tied": "keep: its weight is shared",
        "lm_head": "keep: skipped",
    }
    assert isinstance(model.up, G8Linear)
    assert model.up is model.again
    assert model.tied.weight is model.embedding.weight
    assert report.bytes_before == 2 * 64 * 32 * 4
    # Inputs are padded to 64.
    assert report.bytes_after == 64 * 64 + 32 * 64
    assert report.to_dict()["layers"][0]["shape"] == (64, 32)
    assert 0 < error(after, before) < 0.1


def test_a_block_under_two_names_is_replaced_once():
    block = torch.nn.Sequential(linear(32, 32))
    model = torch.nn.ModuleDict({"a": block, "b": block})
    report = quantize_model(model)
    assert [(layer.name, layer.action) for layer in report.layers] == [("a.0", report.codec), ("b.0", "alias: a.0")]


def test_skip_takes_patterns():
    model = Model()
    report = quantize_model(model, skip=["^up$", "again", "head", "attention"])
    assert {layer.name for layer in report.quantized} == {"down"}
    assert quantize_model(Model(), skip=()).quantized[-1].name == "lm_head"
    assert {layer.name for layer in quantize_model(Model(), skip="down|lm_head").quantized} == {"up"}
    with pytest.raises(tenpak.UsageError, match="no regular expression"):
        quantize_model(Model(), skip="(")
    with pytest.raises(tenpak.UsageError, match="no linear layers"):
        quantize_model(torch.nn.Sequential(torch.nn.ReLU()))


@pytest.mark.parametrize("folder", ["tiny-gpt2", "tiny-llama"])
def test_models_of_transformers_run(device, folder):
    require("torch")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(DATA / folder).float().to(device).eval()
    tokens = torch.arange(3, 40, device=device)[None]
    with torch.no_grad():
        before = model(tokens).logits
        if folder == "tiny-gpt2":
            # As the README has it.
            for block in model.transformer.h:
                block.mlp.c_fc = G8Linear.from_linear(block.mlp.c_fc)
            assert 0 < error(model(tokens).logits, before) < 0.1
        report = quantize_model(model, "int4_opt_llama_v1")
        assert report.quantized
        assert 0 < error(model(tokens).logits, before) < 0.15
    generated = model.generate(tokens, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert generated.shape == (1, 41)


def test_cuda_graphs_replay_the_product():
    require("cuda")
    for codec, tokens in (("int4_g32_fp16_v1", 1), ("int4_g16_v1", 16), ("int4_opt_v1", 64), ("int4_lut16_v1", 700)):
        ours = G8Linear.from_linear(linear(200, 1024, dtype=torch.float16).cuda(), codec)
        x = torch.randn(tokens, 1024, device="cuda", dtype=torch.float16)
        side = torch.cuda.Stream()
        with torch.no_grad(), torch.cuda.stream(side):
            ours(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # A stream of its own, on which nothing has run before.
        with torch.no_grad(), torch.cuda.graph(graph):
            y = ours(x)
        for _ in range(3):
            x.copy_(torch.randn_like(x))
            y.fill_(float("nan"))
            graph.replay()
            assert error(y, ours(x)) < 1e-3
        # What a capture has used is not what others use.
        assert error(ours(x), y) < 1e-3


def test_streams_and_memory_are_shared_with_cupy():
    require("cuda")
    from tenpak.cuda import matmul

    ours = G8Linear.from_linear(linear(200, 1024, dtype=torch.float16).cuda(), "int4_opt_v1")
    weight = ours.quantized_weight()
    assert weight.codes.data.ptr == ours.codes.data_ptr()
    x = torch.randn(8, 1024, device="cuda", dtype=torch.float16)
    import cupy

    torch.cuda.synchronize()
    y = matmul(cupy.asarray(x), weight, cupy.asarray(ours.bias.detach()))
    cupy.cuda.get_current_stream().synchronize()
    assert torch.equal(torch.as_tensor(y, device="cuda"), ours(x))
    # Products of two streams at once do not mix.
    streams, results = [torch.cuda.Stream() for _ in range(4)], []
    torch.cuda.synchronize()
    for stream in streams * 8:
        with torch.cuda.stream(stream), torch.no_grad():
            results.append(ours(x))
    torch.cuda.synchronize()
    assert all(error(result, ours(x)) < 1e-3 for result in results)


@pytest.mark.parametrize("missing", ["cupy", "torch"])
def test_a_missing_package_is_said_in_one_sentence(missing):
    name, extra = ("QuantizedWeight", "cuda13") if missing == "cupy" else ("G8Linear", "torch")
    code = f"""
import sys
sys.modules[{missing!r}] = None
import tenpak.cuda
try:
    tenpak.cuda.{name}
except tenpak.UnsupportedError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"tenpak.cuda.{name}: ")
    assert f"tenpak[{extra}]" in done.stdout
    assert done.stdout.count("\n") == 1


def test_importing_the_package_loads_neither_torch_nor_cupy():
    code = "import sys, tenpak, tenpak.cuda; print([name for name in ('torch', 'cupy') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
