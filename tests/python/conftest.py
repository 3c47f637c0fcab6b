"""Fixtures: the two small models, and artifacts of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import tenpak
from support import DATA, PARTS, REQUIRED


def pytest_configure() -> None:
    if unknown := REQUIRED - set(PARTS):
        # A part that is spelled wrong would never be missed.
        raise pytest.UsageError(f"TENPAK_REQUIRE: no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")


@pytest.fixture(params=["tiny-llama", "tiny-gpt2"])
def model(request: pytest.FixtureRequest) -> Path:
    """The folder of each small model."""
    return DATA / request.param


@pytest.fixture
def llama() -> Path:
    return DATA / "tiny-llama"


@pytest.fixture
def gpt2() -> Path:
    return DATA / "tiny-gpt2"


@pytest.fixture
def packed(tmp_path: Path, llama: Path) -> Path:
    """tiny-llama under the default codec."""
    path = tmp_path / "llama.tenpak"
    tenpak.compress(llama, path)
    return path
