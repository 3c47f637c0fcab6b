"""Every kernel compiles for every architecture with no GPU; machine code is kept and found again."""

from __future__ import annotations

import re

import pytest
import tenpak
from support import ROOT, require
from tenpak import _core
from tenpak.cuda import compile as kernels
from tenpak.cuda import layouts

ARCHITECTURES = ["sm_80", "sm_90", "sm_90a", "sm_120"]
LAYOUTS = list(layouts.LAYOUTS)
#: A configuration of each product kernel that `matmul` may choose, for each kernel's templates.
SKINNY = [{"WARPS": 8, "DEPTH": 2, "COLUMNS": 1, "BLOCKS": 2}, {"WARPS": 12, "DEPTH": 3, "COLUMNS": 8, "BLOCKS": 1}]
INTEGER = [{"WARPS": 8, "DEPTH": 2, "COLUMNS": 1, "BLOCKS": 2, "INTEGER": tokens} for tokens in (1, 2)]
PREFILL = [{"GROUPS": 4, "BLOCKS": 1, "TOKENS": 16, "DEPTH": 3, "STAGES": 3}]
WIDE = [
    {"GROUPS": 2, "BLOCKS": 1, "TOKENS": 256, "STEP": 1, "STAGES": 4},
    {"GROUPS": 4, "BLOCKS": 1, "TOKENS": 64, "STEP": 2, "STAGES": 3},
]


@pytest.fixture(autouse=True)
def no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    require("nvrtc")
    monkeypatch.setenv("TENPAK_CACHE_DIR", "")


def defines_of(name: str, layout: str) -> list[dict[str, object]]:
    if name == "pack.cu":
        return [{"LAYOUT": layout}]
    if name == "decode.cu":
        return [{"LAYOUT": layout, "OUT": out} for out in (32, 16, 116)]
    if name == "dense.cu":
        return [{"LAYOUT": layout, "BF16": bf16} for bf16 in (0, 1)]
    if name == "skinny.cu":
        configurations = SKINNY + INTEGER if layout == "int4_lut16" else SKINNY
        return [{"LAYOUT": layout, "BF16": i % 2, **defines} for i, defines in enumerate(configurations)]
    configurations = WIDE if name == "wide.cu" else PREFILL
    return [{"LAYOUT": layout, "BF16": bf16, **defines} for bf16 in (0, 1) for defines in configurations]


#: `prefill` and `wide` have Hopper's own instructions.
BUILDS = [(name, arch) for name in ("pack.cu", "decode.cu", "dense.cu", "skinny.cu") for arch in ARCHITECTURES]
BUILDS += [("prefill.cu", "sm_90a"), ("wide.cu", "sm_90a")]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("name", "arch"), BUILDS)
def test_every_kernel_compiles_for_every_layout(name, arch, layout):
    for defines in defines_of(name, layout):
        assert kernels.compile_to_cubin(name, defines, arch).startswith(b"\x7fELF")


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_encoder_compiles_for_every_group(arch):
    for width in (8, 16, 32, 64, 128):
        # The widest take seconds each.
        for kind in (32, 16, 116) if width <= 16 else (32,):
            cubin = kernels.compile_to_cubin("encode.cu", {"WIDTH": width, "IN": kind}, arch)
            assert cubin.startswith(b"\x7fELF")


def test_tables_can_be_looked_up_in_halves():
    """What cuda/layouts.cuh asks of them: entries at the same place of both halves have the same sign, none is -1."""
    for table in _core.lut16_tables():
        assert all(entry < -1 for entry in table[:8])
        assert all(entry >= 0 for entry in table[8:])


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
def test_the_cache_and_attention_compile_for_every_head(arch, dim):
    prefill = kernels.compile_to_cubin("attention_prefill.cu", {"DIM": dim, "BF16": 1}, arch)
    assert prefill.startswith(b"\x7fELF")
    for bits, warps in ((4, 16 if dim <= 128 else 8), (8, 8), (16, 4)):
        defines = {"BITS": bits, "DIM": dim, "RECENT": 64, "BF16": int(bits == 8)}
        assert kernels.compile_to_cubin("append.cu", defines, arch).startswith(b"\x7fELF")
        defines |= {"WARPS": warps, "STAGES": 3, "BLOCKS": 1}
        assert kernels.compile_to_cubin("attention.cu", defines, arch).startswith(b"\x7fELF")


def test_architectures():
    assert kernels.architecture("skinny.cu", "90") == "sm_90"
    assert kernels.architecture("prefill.cu", "90") == "sm_90a"
    assert kernels.architecture("prefill.cu", "120") == "sm_120"
    with pytest.raises(tenpak.UnsupportedError, match=r"compute capability 7\.5 is too old; the kernels need 8\.0"):
        kernels.architecture("skinny.cu", "75")


def test_machine_code_is_kept_by_what_it_is_made_of(tmp_path, monkeypatch):
    monkeypatch.setenv("TENPAK_CACHE_DIR", str(tmp_path / "cache"))
    calls = []
    compiler = kernels._compiler()

    class Counting:
        version = compiler.version

        def compile(self, *arguments: object) -> bytes:
            calls.append(arguments)
            return compiler.compile(*arguments)

    monkeypatch.setattr(kernels, "_compiler", Counting)

    def cubin(layout: str = "int4_g8_fp16", arch: str = "sm_80") -> bytes:
        return kernels.compile_to_cubin("pack.cu", {"LAYOUT": layout}, arch)

    first = cubin()
    assert (cubin(), len(calls)) == (first, 1)
    cubin(arch="sm_90")
    cubin("int4_g16_fp16")
    assert len(calls) == 3
    assert len(list((tmp_path / "cache").iterdir())) == 3

    # A header that a header includes counts, too.
    sources = tmp_path / "cuda"
    sources.mkdir()
    for name in ("pack.cu", "weights.cuh", "floats.cuh"):
        (sources / name).write_text(kernels.source(name))
    monkeypatch.setenv("TENPAK_CUDA_DIR", str(sources))
    assert (cubin(), len(calls)) == (first, 3)
    (sources / "floats.cuh").write_text(kernels.source("floats.cuh") + "// edited\n")
    cubin()
    assert len(calls) == 4

    # A damaged file is made again.
    monkeypatch.delenv("TENPAK_CUDA_DIR")
    for file in (tmp_path / "cache").iterdir():
        file.write_bytes(file.read_bytes()[:-1])
    assert (cubin(), len(calls)) == (first, 5)

    # One that cannot be kept is not an error.
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TENPAK_CACHE_DIR", str(tmp_path / "file" / "below"))
    assert cubin() == first


def test_what_fails_to_compile_is_said_with_the_log(tmp_path, monkeypatch):
    (tmp_path / "pack.cu").write_text("this is no C++")
    monkeypatch.setenv("TENPAK_CUDA_DIR", str(tmp_path))
    with pytest.raises(tenpak.TenpakError, match=r"cuda/pack\.cu does not compile with .*-arch=sm_80.*(?s:.*)error"):
        kernels.compile_to_cubin("pack.cu", {}, "sm_80")
    with pytest.raises(tenpak.StorageError, match="TENPAK_CUDA_DIR"):
        kernels.compile_to_cubin("decode.cu", {}, "sm_80")
    monkeypatch.delenv("TENPAK_CUDA_DIR")
    with pytest.raises(tenpak.UnsupportedError, match="does not know sm_1"):
        kernels.compile_to_cubin("pack.cu", {"LAYOUT": "int4_g8_fp16"}, "sm_1")


def test_the_extension_has_every_source():
    for path in sorted((ROOT / "cuda").glob("*.cu*")):
        assert _core.cuda_source(path.name) == path.read_text(), (
            f"{path.name} is older in the extension: build it again"
        )
    with pytest.raises(tenpak.UsageError, match=r"no CUDA source \"x\.cu\"; there are append\.cu, "):
        _core.cuda_source("x.cu")


def test_layouts_have_one_list():
    """The names in cuda/ and in layouts.py are the same, and the codec table's layouts are among them."""
    for header in ("layouts.cuh", "weights.cuh"):
        assert re.findall(r"^using (int\w+) =", (ROOT / "cuda" / header).read_text(), re.MULTILINE) == LAYOUTS
    four_and_eight_bits = {c.layout for c in tenpak.codecs() if c.code_bits in (4, 8)}
    assert four_and_eight_bits <= set(LAYOUTS)
    for codec in tenpak.codecs():
        if codec.layout in LAYOUTS:
            layout = layouts.find(codec.layout)
            assert (layout.group or None, layout.code_bits) == (codec.group, codec.code_bits)
