"""Restored folders load in transformers and give nearly the original's predictions."""

from __future__ import annotations

import numpy as np
import tenpak
from support import require


def load(folder):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32, local_files_only=True)
    return model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)


def predictions(model, tokens) -> np.ndarray:
    import torch

    with torch.no_grad():
        return torch.log_softmax(model(tokens).logits, -1).double().numpy()


def divergence(wanted: np.ndarray, got: np.ndarray) -> float:
    """The mean Kullback-Leibler divergence of the predictions, in nats."""
    return float((np.exp(wanted) * (wanted - got)).sum(-1).mean())


def test_a_restored_folder_loads_and_predicts_nearly_the_same(tmp_path, model):
    require("torch")
    original, tokenizer = load(model)
    tokens = tokenizer("It was the best of times, it was the worst of times.", return_tensors="pt")["input_ids"]
    wanted = predictions(original, tokens)
    for codec, bound in (("int8_sym_v1", 1e-3), ("int4_opt_v1", 3e-2), ("int4_lut16_v1", 5e-2)):
        tenpak.compress(model, tmp_path / "m.tenpak", codec, force=True)
        tenpak.decompress(tmp_path / "m.tenpak", tmp_path / "restored", force=True)
        restored, again = load(tmp_path / "restored")
        assert again("the same tokens")["input_ids"] == tokenizer("the same tokens")["input_ids"]
        assert divergence(wanted, predictions(restored, tokens)) < bound, codec


def test_shards_load_too(tmp_path, model):
    require("torch")
    tenpak.compress(model, tmp_path / "m.tenpak", rules=[("", "keep")])
    report = tenpak.decompress(tmp_path / "m.tenpak", tmp_path / "restored", shard_bytes=1_000_000)
    assert len(list((tmp_path / "restored").glob("model-*.safetensors"))) > 1
    assert report.format == "folder"
    original, tokenizer = load(model)
    restored, _ = load(tmp_path / "restored")
    tokens = tokenizer("Kept as they are, the weights are the same.", return_tensors="pt")["input_ids"]
    assert np.array_equal(predictions(original, tokens), predictions(restored, tokens))


def test_a_state_dict_for_torch(tmp_path, model):
    require("torch")
    import torch

    tenpak.compress(model, tmp_path / "m.tenpak", "int8_sym_v1")
    state = tenpak.load_state_dict(tmp_path / "m.tenpak", framework="torch")
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    original, _ = load(model)
    wanted = {name: value.clone() for name, value in original.state_dict().items()}
    missing = original.load_state_dict({name: value.float() for name, value in state.items()}, strict=False)
    assert set(missing.missing_keys) <= {"lm_head.weight"}
    assert not missing.unexpected_keys
    for name, value in original.state_dict().items():
        error = (value - wanted[name]).square().sum() / wanted[name].square().sum().clamp(min=1e-30)
        assert error < 1e-3, name


def test_bfloat16_stays_bfloat16_in_torch(tmp_path):
    require("torch")
    import torch
    from safetensors.torch import save_file

    weights = {"layer.weight": torch.randn(32, 64).bfloat16(), "norm.weight": torch.randn(64).bfloat16()}
    save_file(weights, tmp_path / "m.safetensors")
    tenpak.compress(tmp_path / "m.safetensors", tmp_path / "m.tenpak", "int8_sym_v1")
    state = tenpak.load_state_dict(tmp_path / "m.tenpak", framework="torch")
    assert {value.dtype for value in state.values()} == {torch.bfloat16}
    assert torch.equal(state["norm.weight"], weights["norm.weight"])
