"""What the tests share: running the console script, small models, and parts that a machine may lack."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tenpak
from tenpak import wgpu

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "tests" / "data"
REFERENCE = Path(os.environ.get("TENPAK_REFERENCE", ROOT.parent / "shared")) / "models"


def _missing(extra: str, *packages: str) -> str | None:
    absent = [package for package in packages if importlib.util.find_spec(package) is None]
    return f"{', '.join(absent)} not installed; pip install 'tenpak[{extra}]'" if absent else None


def _missing_cuda() -> str | None:
    if importlib.util.find_spec("cupy") is None:
        return _missing("cuda13", "cupy")
    import cupy

    try:
        return None if cupy.cuda.runtime.getDeviceCount() else "no CUDA device"
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"no CUDA device: {error}"


def _missing_nvrtc() -> str | None:
    from tenpak.cuda import compile as kernels

    try:
        kernels._compiler()
    except tenpak.UnsupportedError as error:
        return str(error)
    return None


def _missing_wgpu() -> str | None:
    try:
        return None if wgpu.adapters() else "no GPU for wgpu; Debian's mesa-vulkan-drivers has a software one"
    except tenpak.UnsupportedError as error:
        return str(error)


#: Parts that a machine may lack: each says what is absent, or None.
PARTS = {
    "torch": lambda: _missing("torch,hf", "torch", "transformers"),
    "c++": lambda: None if shutil.which("c++") or shutil.which("g++") else "no C++ compiler",
    "cuda": _missing_cuda,
    "nvrtc": _missing_nvrtc,
    "wgpu": _missing_wgpu,
    "text": lambda: _missing("text", "tokenizers"),
    "reference": lambda: (
        None if REFERENCE.is_dir() else f"no reference models at {REFERENCE}; TENPAK_REFERENCE says where they are"
    ),
}
REQUIRED = set(filter(None, os.environ.get("TENPAK_REQUIRE", "").split(",")))


def require(part: str) -> None:
    """Skips the test, saying why, where a part is absent; TENPAK_REQUIRE=part,part makes that a failure."""
    reason = PARTS[part]()
    if reason is None:
        return
    if part in REQUIRED:
        pytest.fail(f"TENPAK_REQUIRE asks for {part}: {reason}")
    pytest.skip(reason)


@dataclass
class Ran:
    """What a run of the console script left."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict:
        return json.loads(self.out)


COMMAND = [sys.executable, "-m", "tenpak"]


def tenpak_command(*arguments: object, code: int = 0, **options: object) -> Ran:
    """Runs the console script, which must end with `code` and without a traceback."""
    done = subprocess.run(
        [*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False, **options
    )
    assert "Traceback" not in done.stderr, done.stderr
    assert "panicked" not in done.stderr, done.stderr
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    if code:
        message = done.stderr.strip().splitlines()[-1]
        assert message.startswith(("tenpak: ", "tenpak ")), done.stderr
        assert not done.stdout, "data was printed although the command failed"
    return Ran(done.returncode, done.stdout, done.stderr)


def files_in(folder: Path) -> set[str]:
    """Names in a folder, hidden ones too: what a failed command has left behind."""
    return {path.name for path in folder.iterdir()}


def gaussian(*shape: int, seed: int = 0, dtype: object = np.float32, scale: float = 0.02) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(dtype)


def write_bundle(path: Path, **tensors: np.ndarray) -> Path:
    """A JSON bundle of FP32 arrays."""
    entries = {
        name: {"shape": list(array.shape), "data": array.astype(np.float32).ravel().tolist()}
        for name, array in tensors.items()
    }
    path.write_text(json.dumps({"tensors": entries}))
    return path


def relative_error(weights: np.ndarray, rebuilt: np.ndarray) -> float:
    """Σ(w - ŵ)² / Σw²."""
    weights, rebuilt = weights.astype(np.float64), rebuilt.astype(np.float64)
    norm = float(np.square(weights).sum())
    return float(np.square(weights - rebuilt).sum()) / norm if norm else 0.0
