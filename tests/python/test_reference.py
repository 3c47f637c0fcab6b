"""The reference models, which are too large for the repository."""

from __future__ import annotations

import pytest
import tenpak
from support import REFERENCE, require


@pytest.mark.parametrize("name", ["gpt2-books", "llama-books"])
def test_reference_models(tmp_path, name):
    require("reference")
    dry = tenpak.compress(REFERENCE / name, tmp_path / "m.tenpak", strict=True, dry_run=True)
    report = tenpak.compress(REFERENCE / name, tmp_path / "m.tenpak", strict=True, calibration="none")
    assert dry.file_bytes == report.file_bytes == (tmp_path / "m.tenpak").stat().st_size
    linear = next(group for group in report.groups if group.codec == "int4_opt_v1")
    assert linear.bits_per_weight == pytest.approx(6, abs=0.01)
    # Real weights are easier than Gaussian ones, whose bound is 2.98e-3, or at most as hard.
    assert linear.relative_error < 3.2e-3
    with tenpak.open(tmp_path / "m.tenpak") as artifact:
        assert artifact.verify() == report.file_bytes
