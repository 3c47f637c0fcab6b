"""Every kernel compiles for every architecture with no GPU; machine code is kept and found again."""

from __future__ import annotations

import re
import shutil
import struct

import pytest
import tenpak
from support import DATA, ROOT, require
from tenpak import _core
from tenpak.cuda import ahead, layouts, plans
from tenpak.cuda import compile as kernels

ARCHITECTURES = ["sm_80", "sm_90", "sm_90a", "sm_120"]
LAYOUTS = list(layouts.LAYOUTS)
#: A configuration of each product kernel that `matmul` may choose, for each kernel's templates.
SKINNY = [
    {"WARPS": 8, "DEPTH": 2, "COLUMNS": 1, "BLOCKS": 2},
    {"WARPS": 12, "DEPTH": 3, "COLUMNS": 2, "BLOCKS": 1, "GROUPED": 1},
]
INTEGER = [{**SKINNY[0], "INTEGER": tokens} for tokens in (1, 2)]
#: With Hopper's copy engine.
ENGINE = [
    {**SKINNY[0], "ENGINE": 1},
    {"WARPS": 8, "DEPTH": 3, "COLUMNS": 2, "BLOCKS": 1, "STRIPS": 2, "ENGINE": 1, "COPIERS": 4},
    {"WARPS": 8, "DEPTH": 3, "COLUMNS": 1, "BLOCKS": 1, "STRIPS": 2, "ENGINE": 1, "COPIERS": 2, "GROUPED": 1},
]
ROWS = [
    {"WARPS": 14, "SHARERS": 2, "STRIPS": 2, "DEPTH": 3, "COLUMNS": 2, "COPIERS": 2},
    {"WARPS": 8, "SHARERS": 8, "STRIPS": 2, "DEPTH": 3, "COLUMNS": 1, "COPIERS": 4},
]
TILED = [
    {"WARPS": 8, "STRIPS": 2, "TOKENS": 128, "STEP": 1, "STAGES": 4, "GROUPED": 0},
    {"WARPS": 4, "STRIPS": 4, "TOKENS": 64, "STEP": 2, "STAGES": 3, "GROUPED": 1},
]
WIDE = [
    {"GROUPS": 2, "TOKENS": 256, "STEP": 1, "STAGES": 4},
    {"GROUPS": 2, "TOKENS": 256, "STEP": 1, "STAGES": 4, "NARROW": 176},
    {"GROUPS": 4, "TOKENS": 32, "STEP": 4, "STAGES": 3},
    {"GROUPS": 3, "TOKENS": 128, "STEP": 2, "STAGES": 3, "CLUSTER": 3},
    {"GROUPS": 2, "TOKENS": 192, "STEP": 1, "STAGES": 4, "GROUPED": 1},
]


@pytest.fixture(autouse=True)
def no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    require("nvrtc")
    monkeypatch.setenv("TENPAK_CACHE_DIR", "")


def defines_of(name: str, layout: str, arch: str) -> list[dict[str, object]]:
    if name == "pack.cu":
        return [{"LAYOUT": layout}]
    if name == "decode.cu":
        return [{"LAYOUT": layout, "OUT": out} for out in (32, 16, 116)]
    if name == "dense.cu":
        return [{"LAYOUT": layout, "BF16": bf16} for bf16 in (0, 1)]
    if name == "skinny.cu":
        integer = INTEGER[: 2 if layout in plans.TABLES else int(layout in plans.INTEGER)]
        configurations = [*SKINNY, *integer]
        if arch != "sm_80":
            engine = [*ENGINE, *({**defines, "ENGINE": 1} for defines in integer)]
            configurations += [*engine, {**engine[len(ENGINE) if integer else 0], "DEPTH": 4, "SHARERS": 4, "HEAD": 1}]
        return [{"LAYOUT": layout, "BF16": i % 2, **defines} for i, defines in enumerate(configurations)]
    if name == "tiled.cu":
        return [{"LAYOUT": layout, "BF16": bf16, **defines} for bf16, defines in enumerate(TILED)]
    configurations = {"wide.cu": WIDE, "rows.cu": ROWS}[name]
    return [{"LAYOUT": layout, "BF16": bf16, **defines} for bf16 in (0, 1) for defines in configurations]


#: An H200 and an A100, as plans see them.
H200, A100 = plans.Device(132, 225 << 10, 228 << 10, 90), plans.Device(108, 161 << 10, 164 << 10, 80)

#: What stands between a decoder's products, and what ends them there.
STEP: list[tuple[str, dict[str, object]]] = [
    *(("norm.cu", {**plans.norm_defines(768, centred), "BF16": int(centred)}) for centred in (False, True)),
    *(("gate.cu", {"ACTIVATION": i, "BF16": i % 2, "GATED": i % 3}) for i in range(5)),
    *(("embed.cu", {"LAYOUT": layout}) for layout in LAYOUTS),
    *(("embed.cu", {"IN": kind}) for kind in (16, 32)),
    *(("product.cu", {"IN": 16 << (i % 2), "BF16": 0, "OUTPUT": i}) for i in range(3)),
    ("sample.cu", {"THREADS": 1024, "CLUSTER": 1}),
    *(
        ("skinny.cu", {"LAYOUT": layout, "BF16": 0, **SKINNY[0], **fused.defines})
        for layout in ("int4_g32_fp16", "int8_sym")
        for fused in (
            plans.Fused(output="float32", overlaps=True),
            plans.Fused(output="added", overlaps=True),
            plans.Fused(activation="silu", gated=True, overlaps=True),
            plans.Fused(activation="gelu_tanh"),
        )
    ),
]


def products_of_a_step(device: plans.Device) -> list[tuple[str, dict[str, object]]]:
    """As a decoder's step has them, at its shapes."""
    return [
        (plan.source, dict(plan.defines))
        for layout in ("int4_g32_fp16", "int4_lut16", "int8_sym")
        for n, k in ((12288, 4096), (2304, 768), (100, 1000))
        for fused in (plans.Fused("rms", gated=True, overlaps=True), plans.Fused("layer", overlaps=True))
        for m in (1, 5)
        for plan in [plans.choose(device, layout, n, k, m, fused=fused)]
    ]


#: `wide` has Hopper's own instructions.
EVERYWHERE = ("pack.cu", "decode.cu", "dense.cu", "skinny.cu", "tiled.cu")
BUILDS = [(name, arch) for name in EVERYWHERE for arch in ARCHITECTURES]
BUILDS += [("rows.cu", "sm_90"), ("wide.cu", "sm_90a")]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("name", "arch"), BUILDS)
def test_every_kernel_compiles_for_every_layout(name, arch, layout):
    for defines in defines_of(name, layout, arch):
        assert kernels.compile_to_cubin(name, defines, arch).startswith(b"\x7fELF")


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_decoders_step_compiles(arch):
    for name, defines in [*STEP, *products_of_a_step(H200 if arch.startswith("sm_90") else A100)]:
        assert kernels.compile_to_cubin(name, defines, arch).startswith(b"\x7fELF")
    if arch != "sm_80":
        assert kernels.compile_to_cubin("sample.cu", plans.sample_defines(H200), arch).startswith(b"\x7fELF")


def test_tokens_are_sampled_in_clusters_where_there_are_any():
    newer = plans.Device(188, 99 << 10, 100 << 10, 120)
    assert [plans.sample_defines(device)["CLUSTER"] for device in (A100, H200, newer)] == [1, 8, 8]
    assert not newer.hopper


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_encoder_compiles_for_every_group(arch):
    for width in (8, 16, 32, 64, 128):
        # The widest take seconds each.
        for kind in (32, 16, 116) if width <= 16 else (32,):
            cubin = kernels.compile_to_cubin("encode.cu", {"WIDTH": width, "IN": kind}, arch)
            assert cubin.startswith(b"\x7fELF")


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dim", [32, 64, 80, 96, 128, 256])
def test_the_cache_and_attention_compile_for_every_head(arch, dim):
    prefill = kernels.compile_to_cubin("attention_prefill.cu", {"DIM": dim, "BF16": 1}, arch)
    assert prefill.startswith(b"\x7fELF")
    for bits in (4, 8, 16):
        bf16 = bits == 8
        cubin = kernels.compile_to_cubin("append.cu", plans.cache_defines(bits, dim, bf16), arch)
        assert cubin.startswith(b"\x7fELF")
        plan = plans.choose_attention(A100 if arch == "sm_80" else H200, bits, dim, bf16, 1, 1, 8, 8, 64)
        for defines in (plan.defines, plan.appending):
            assert kernels.compile_to_cubin("attention.cu", defines, arch).startswith(b"\x7fELF")


def shared_bytes(cubin: bytes) -> int:
    """Of a kernel's static arrays, behind which dynamic shared memory begins: sections .nv.shared.* of the ELF file."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names = struct.unpack_from("<HHH", cubin, 58)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(count)]
    texts = sections[names][4]
    return sum(s[5] for s in sections if cubin[texts + s[0] :].startswith(b".nv.shared."))


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_copies_of_the_cache_begin_on_a_line_of_shared_memory(arch):
    """Where they do not, each takes four times as long to write."""
    for bits in (4, 8, 16):
        plan = plans.choose_attention(A100 if arch == "sm_80" else H200, bits, 128, False, 1, 1, 8, 8, 64)
        for defines in (plan.defines, plan.appending):
            assert shared_bytes(kernels.compile_to_cubin("attention.cu", defines, arch)) % 128 == 0


def test_architectures():
    assert kernels.architecture("skinny.cu", "90") == "sm_90"
    assert kernels.architecture("wide.cu", "90") == "sm_90a"
    assert kernels.architecture("wide.cu", "120") == "sm_120"
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


def test_machine_code_made_ahead_of_time_is_taken(tmp_path, monkeypatch, capsys):
    model = tmp_path / "model.tenpak"
    tenpak.compress(DATA / "tiny-llama", model, codec="int4_g32_fp16_v1")
    assert ahead.main(["--list", str(model)]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert len(listed) == len(set(listed))
    assert "pack.cu -DLAYOUT=int4_g32_fp16" in listed
    assert "pack.cu -DLAYOUT=int8_sym" in listed  # embeddings
    assert not any("int4_lut16" in line or "DIM=64" in line for line in listed)
    # What a decoder's step asks for, of heads, gates and norms too.
    for part in (
        "skinny.cu",
        "-DGATED=1",
        "-DOUTPUT=2",
        "attention.cu -DBF16=0 -DBITS=8",
        "sample.cu",
        "norm.cu",
        "embed.cu",
    ):
        assert any(part in line for line in listed), part

    defines = {"LAYOUT": "int4_g32_fp16"}
    ahead.compile_with_nvrtc(("pack.cu", tuple(defines.items())), "sm_90", tmp_path)
    monkeypatch.setattr(kernels, "_compiler", lambda: pytest.fail("it was compiled"))
    monkeypatch.setenv("TENPAK_CUBIN_DIR", str(tmp_path))
    assert kernels.compile_to_cubin("pack.cu", defines, "sm_90").startswith(b"\x7fELF")
    with pytest.raises(pytest.fail.Exception):
        kernels.compile_to_cubin("pack.cu", defines, "sm_80")


def test_nvcc_compiles_what_nvrtc_does(tmp_path):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    for name in ("skinny.cu", "sample.cu"):
        (tmp_path / name).write_text(kernels.source(name))
        for header, text in kernels.headers(name).items():
            (tmp_path / header).write_text(text)
    skinny = {"LAYOUT": "int4_lut16", "BF16": 0, **INTEGER[0], "GATED": 1, "ACTIVATION": 1, "OVERLAP": 1}
    for name, defines in (("skinny.cu", skinny), ("sample.cu", plans.sample_defines(H200))):
        ahead.compile_with_nvcc(nvcc, (name, tuple(defines.items())), "sm_90", tmp_path, tmp_path)
        made = tmp_path / kernels.ahead_name(name, defines, "sm_90")
        assert made.read_bytes().startswith(b"\x7fELF")


def test_choices_made_ahead_are_those_of_products():
    """For any number of tokens, whatever the shape."""
    shapes = [(4096, 4096), (11008, 4096), (300, 8200)]
    for capability, gpus in ahead.DEVICES.items():
        made = set(ahead.builds(capability, shapes, ["int4_lut16"], [64]))
        for about in gpus:
            here = ahead.device(*about, capability)
            for n, k in shapes:
                for in_boxes, heads in [(False, True), (False, False), (True, True), (True, False)]:
                    last = min(plans.dense_from("int4_lut16", here.hopper, in_boxes), 2100)
                    for m in range(1, last):
                        plan = plans.choose(here, "int4_lut16", n, k, m, in_boxes=in_boxes, heads=heads)
                        chosen = (plan.source, tuple(sorted(plan.defines.items())))
                        assert chosen in made, (capability, n, k, m, in_boxes, heads)


def test_strips_are_cut_only_where_counters_are_at_zero():
    for layout in layouts.LAYOUTS:
        with_heads, without = (plans.choose(H200, layout, 11008, 4096, 1, heads=heads) for heads in (True, False))
        assert without.counters == without.partial_bytes == 0
        assert "HEAD" not in without.defines
        cut = layout in {*layouts.TABLES, "int4_g8_u8"}
        assert ("HEAD" in with_heads.defines, with_heads.counters > 0) == (cut, cut)


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
    with pytest.raises(tenpak.UsageError, match=r"no CUDA source \"x\.cu\"; there are activation\.cuh, "):
        _core.cuda_source("x.cu")


def test_layouts_have_one_list():
    """The names in cuda/ and in layouts.py are the same, and all of the codec table's layouts are among them."""
    for header in ("layouts.cuh", "weights.cuh"):
        assert re.findall(r"^using (int\w+) =", (ROOT / "cuda" / header).read_text(), re.MULTILINE) == LAYOUTS
    for codec in tenpak.codecs():
        layout = layouts.find(codec.layout)
        assert (layout.group * layout.repeat or None, layout.code_bits) == (codec.group, codec.code_bits)
    with pytest.raises(tenpak.UsageError, match="the layout int3 has no CUDA kernels; those with some: int4_g8_fp16, "):
        layouts.find("int3")
