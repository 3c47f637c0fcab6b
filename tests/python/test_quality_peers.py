"""The other tools' formats of tests/bench/quality_peers.py: their errors, their bits, and what importance does."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from support import ROOT, gaussian, relative_error

sys.path.insert(0, str(ROOT / "tests" / "bench"))
import quality_peers

#: Bits per weight, and the relative error on a Gaussian of the tools themselves, measured on 4096 x 4096 weights:
#: ggml of llama.cpp, with an importance matrix of ones where it says imatrix, hqq 0.2.8, bitsandbytes 0.50.2.
MEASURED = {
    "Q4_0": (4.5, 7.382e-3),
    "Q4_1": (5.0, 6.118e-3),
    "Q4_K": (4.5, 5.091e-3),
    "Q5_K": (5.5, 1.304e-3),
    "Q6_K": (6.5625, 0.315e-3),
    "IQ4_NL": (4.5, 5.797e-3),
    "IQ4_XS": (4.25, 5.888e-3),
    "Q4_0, imatrix": (4.5, 6.664e-3),
    "Q4_1, imatrix": (5.0, 4.885e-3),
    "Q4_K, imatrix": (4.5, 5.004e-3),
    "Q5_K, imatrix": (5.5, 1.251e-3),
    "Q6_K, imatrix": (6.5625, 0.300e-3),
    "HQQ g16": (6.0, 3.623e-3),
    "HQQ g32": (5.0, 5.466e-3),
    "HQQ g64": (4.5, 7.406e-3),
    "NF4 g64": (4.25, 8.454e-3),
}
#: No one measured these two with an importance matrix of ones.
UNMEASURED = {"IQ4_NL, imatrix", "IQ4_XS, imatrix"}
GGML = [name for name in MEASURED if name[0] in "QI"]
PLAIN_GGML = [name for name in GGML if "imatrix" not in name]


@pytest.fixture(scope="module")
def weight() -> np.ndarray:
    return gaussian(128, 2048)


def peer(name: str) -> quality_peers.Peer:
    """The peer, or a skip that says why this machine has none of that name."""
    found = {each.name: each for each in quality_peers.peers()}
    if name not in found and (reasons := quality_peers.missing()):
        pytest.skip("; ".join(reasons))
    return found[name]


@pytest.mark.parametrize("name", MEASURED)
def test_errors_are_those_of_the_tool_itself(name: str, weight: np.ndarray) -> None:
    rebuilt = peer(name).rebuild(weight, np.ones(weight.shape[1], np.float32))
    assert rebuilt.dtype == np.float32
    assert rebuilt.shape == weight.shape
    assert relative_error(weight, rebuilt) == pytest.approx(MEASURED[name][1], rel=0.02)


@pytest.mark.parametrize("name", MEASURED)
def test_bits_count_codes_scales_and_offsets(name: str) -> None:
    assert peer(name).bits_per_weight(128, 2048) == MEASURED[name][0]


def test_the_table_is_whole() -> None:
    peer("Q4_0")
    assert {each.name for each in quality_peers.peers()} == MEASURED.keys() | UNMEASURED
    assert not quality_peers.missing()
    assert quality_peers.packages() == ["libgguf"]
    assert all(each.uses_importance == ("imatrix" in each.name) for each in quality_peers.peers())


@pytest.mark.parametrize("name", PLAIN_GGML)
def test_importance_lowers_the_error_that_it_weighs(name: str, weight: np.ndarray) -> None:
    importance = np.random.default_rng(2).lognormal(0, 2, weight.shape[1]).astype(np.float32)
    weighted = np.sqrt(importance)
    without = relative_error(weight * weighted, peer(name).rebuild(weight, importance) * weighted)
    heeded = relative_error(weight * weighted, peer(f"{name}, imatrix").rebuild(weight, importance) * weighted)
    assert heeded < 0.9 * without


@pytest.mark.parametrize(
    ("name", "bits", "substitute"),
    [("Q4_K", 5.5, "Q5_0"), ("Q5_K", 6.0, "Q5_1"), ("Q6_K", 8.5, "Q8_0"), ("IQ4_XS", 4.5, "IQ4_NL")],
)
@pytest.mark.parametrize("imatrix", [False, True])
def test_rows_that_are_no_multiple_of_256_get_the_substitute(
    name: str, bits: float, substitute: str, imatrix: bool
) -> None:
    chosen = peer(f"{name}, imatrix" if imatrix else name)
    libgguf = pytest.importorskip("libgguf")
    number = libgguf.GGMLQuantizationType[substitute]
    weight, importance = gaussian(4, 1408), np.linspace(0.1, 2, 1408, dtype=np.float32)
    encoded = libgguf.quantize_rows(weight, number, importance if imatrix else None)
    assert chosen.bits_per_weight(4, 1408) == bits == 8 * encoded.nbytes / weight.size
    np.testing.assert_array_equal(chosen.rebuild(weight, importance), libgguf.dequantize_rows(encoded, number))


@pytest.mark.parametrize("name", ["Q4_0", "Q6_K", "IQ4_XS, imatrix"])
def test_rows_that_no_block_divides_stay_in_half_precision(name: str) -> None:
    weight = gaussian(3, 100)
    assert peer(name).bits_per_weight(3, 100) == 16
    rebuilt = peer(name).rebuild(weight, np.ones(100, np.float32))
    np.testing.assert_array_equal(rebuilt, weight.astype(np.float16))


@pytest.mark.parametrize("importance", [None, np.ones(3, np.float32)])
def test_an_importance_of_another_width_is_refused(importance: np.ndarray | None) -> None:
    with pytest.raises(ValueError, match=r"Q4_0, imatrix: importance must be FP32 \[256\]"):
        peer("Q4_0, imatrix").rebuild(gaussian(2, 256), importance)


@pytest.mark.parametrize("scale", [0.02, 1, 5])
def test_hqq_is_the_published_iteration(scale: float) -> None:
    # Errors beyond 0.17 are shrunk rather than dropped: none at a scale of 0.02, nearly all of the large ones at 5.
    weight = gaussian(16, 64, scale=scale)
    np.testing.assert_allclose(
        peer("HQQ g16").rebuild(weight, None), published_hqq(weight, 16), rtol=0, atol=0.01 * scale
    )


@pytest.mark.parametrize("seed", range(12))
def test_hqq_ends_when_the_error_no_longer_falls(seed: int) -> None:
    # Some of these single groups would go on to other zero points.
    weight = gaussian(1, 16, seed=seed, scale=5)
    np.testing.assert_allclose(peer("HQQ g16").rebuild(weight, None), published_hqq(weight, 16), rtol=0, atol=0.05)


def published_hqq(weight: np.ndarray, group: int) -> np.ndarray:
    """The equations of the HQQ paper's section 2, term by term, in FP64 and with nothing rounded to FP16."""
    w = weight.astype(np.float64).reshape(-1, group)
    s = (w.max(1, keepdims=True) - w.min(1, keepdims=True)) / 15
    z, beta, p, best = -w.min(1, keepdims=True) / s, 10.0, 0.7, np.inf
    for _ in range(20):
        rebuilt = (np.clip(np.rint(w / s + z), 0, 15) - z) * s
        x = w - rebuilt
        with np.errstate(divide="ignore"):
            e = np.sign(x) * np.maximum(0, np.abs(x) - np.abs(x) ** (p - 1) / beta)
        z = (np.clip(np.rint(w / s + z), 0, 15) - (w - e) / s).mean(1, keepdims=True)
        beta *= 1.01
        if np.abs(x).mean() >= best:
            break
        best = np.abs(x).mean()
    return ((np.clip(np.rint(w / s + z), 0, 15) - z) * s).reshape(weight.shape)


def test_hqq_shrinks_large_errors() -> None:
    weight = gaussian(16, 64, scale=0.02)
    large = peer("HQQ g16").rebuild(256 * weight, None)
    assert np.abs(large - 256 * peer("HQQ g16").rebuild(weight, None)).max() > 0.1


@pytest.mark.parametrize("name", ["HQQ g16", "HQQ g64", "NF4 g64"])
@pytest.mark.parametrize("value", [0.0, 0.5, -3e-5])
def test_groups_of_one_value_come_back(name: str, value: float) -> None:
    weight = np.full((2, 64), value, np.float32)
    np.testing.assert_allclose(peer(name).rebuild(weight, None), weight, rtol=2e-3)


@pytest.mark.parametrize("name", ["HQQ g64", "NF4 g64"])
def test_rows_that_groups_do_not_divide_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="rows of 96 weights do not divide into groups of 64"):
        peer(name).bits_per_weight(2, 96)
    with pytest.raises(ValueError, match="leave this peer out"):
        peer(name).rebuild(gaussian(2, 96), None)


def test_rows_do_not_depend_on_their_neighbours() -> None:
    # Pieces of a matrix go to different threads; each row's result must be its own, in its own place.
    weight = gaussian(300, 512)
    for name in ("NF4 g64", "Q4_K"):
        whole = peer(name).rebuild(weight, None)
        np.testing.assert_array_equal(whole[130:140], peer(name).rebuild(weight[130:140], None))


def test_without_libgguf_the_rows_are_left_out_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality_peers, "libgguf", None)
    monkeypatch.setattr(quality_peers, "_LIBGGUF_ABSENT", "ggml's formats: absent", raising=False)
    assert [each.name for each in quality_peers.peers()] == ["HQQ g16", "HQQ g32", "HQQ g64", "NF4 g64"]
    assert quality_peers.missing() == ["ggml's formats: absent"]
    assert quality_peers.packages() == []
