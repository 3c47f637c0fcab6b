"""Statistics gathered from PyTorch models by hooks are those of Tenpak's own decoders."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tenpak
from safetensors.numpy import load_file, safe_open
from support import files_in, require
from tenpak.errors import UsageError


@pytest.fixture
def loaded(model: Path):
    require("torch")
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)


def tokens(windows: int = 6, context: int = 64) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 2048, (windows, context))


def inputs(path: Path) -> dict:
    with safe_open(path, "np") as file:
        return json.loads(file.metadata()["tenpak.calibration"])["inputs"]


@pytest.mark.parametrize("memory", [1 << 30, 1 << 18])
def test_statistics_are_those_of_the_decoder(tmp_path, model, loaded, memory):
    import torch
    from tenpak.torch import collect_statistics

    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    tenpak.calibrate(model, ours, tokens().reshape(-1), windows=6, context=64, gradients=False)
    batches = [{"input_ids": torch.from_numpy(two)} for two in np.split(tokens(), 3)]
    report = collect_statistics(loaded.train(), batches, theirs, memory=memory)
    assert loaded.training
    assert report.tokens == 6 * 64
    assert (report.passes == 1) == (memory == 1 << 30)
    wanted, found = inputs(ours), inputs(theirs)
    # A tied head is the embedding's weight here, and a layer of its own there.
    assert {w for i in wanted.values() for w in i["weights"]} - {"transformer.wte.weight"} == {
        w for i in found.values() for w in i["weights"]
    } - {"lm_head.weight"} | ({"lm_head.weight"} if "llama" in model.name else set())
    a, b = load_file(ours), load_file(theirs)
    shared = [name for name in a if name in b]
    assert len(shared) >= 24 * 2
    for name in shared:
        np.testing.assert_allclose(b[name], a[name], rtol=2e-3, atol=2e-4 * np.abs(a[name]).max())
    done = tenpak.compress(model, tmp_path / "m.tenpak", "int4_lut16_v1", calibration=theirs)
    # GPT-2's MLP is wider than there are tokens here.
    encoders = {t.name: t.encoder for t in done.tensors if t.codec == "int4_lut16_v1"}
    assert {e for name, e in encoders.items() if "mlp.c_proj" not in name} == {"gptq"}


def test_only_diagonals(tmp_path, loaded):
    import torch
    from tenpak.torch import collect_statistics

    collect_statistics(loaded, [torch.from_numpy(tokens())], tmp_path / "s", diagonal=True)
    assert all(name.endswith(".diagonal") for name in load_file(tmp_path / "s"))


def test_wrong_requests_are_refused(tmp_path):
    require("torch")
    import torch
    from tenpak.torch import collect_statistics

    linear = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    with pytest.raises(UsageError, match="no linear layers"):
        collect_statistics(torch.nn.ReLU(), [torch.zeros(1, 8)], tmp_path / "s")
    with pytest.raises(UsageError, match="no batches"):
        collect_statistics(linear, [], tmp_path / "s")
    with pytest.raises(UsageError, match="gone over once"):
        collect_statistics(linear, iter([torch.zeros(1, 8)]), tmp_path / "s", memory=100)
    assert files_in(tmp_path) == set()
    # Experts that no token reached are left out; one pass over an iterator is enough.
    report = collect_statistics(linear, iter([torch.ones(3, 8)]), tmp_path / "s")
    assert (report.inputs, report.tokens) == (2, 3)
