"""What outputs may not be, and what is left of older files when a command fails."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
import tenpak
from gguf_files import write_gguf
from support import COMMAND, ROOT, files_in, gaussian, tenpak_command, write_bundle
from tenpak.errors import UsageError
from tenpak.outputs import put_back

QUICK = ("--windows", 2, "--context", 16, "--force")


@pytest.fixture
def copied(tmp_path: Path, llama: Path) -> Path:
    """A model that may be lost."""
    return Path(shutil.copytree(llama, tmp_path / "model"))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "book.txt"
    path.write_text((ROOT / "README.md").read_text())
    return path


def test_learning_never_replaces_what_it_reads(tmp_path, copied, text):
    packed = tmp_path / "packed.tenpak"
    tenpak.compress(copied, packed)
    beside = tmp_path / "linked.txt"
    beside.symlink_to(text)
    before = {path: path.read_bytes() for path in (*copied.iterdir(), packed, text)}
    for model, output in (
        (copied, copied / "model.safetensors"),
        (copied, copied / "config.json"),
        (copied / "model.safetensors", copied / "config.json"),
        (packed, packed),
        (copied, text),
        (copied, beside),
    ):
        error = tenpak_command("calibrate", model, "--text", text, "-o", output, *QUICK, code=2).err
        assert f"output {output} is the input" in error
    for output in (copied / "model.safetensors", copied / "tokenizer.json", text):
        arguments = ("tune", packed, "--against", copied, "--text", text, "-o", output, *QUICK)
        assert f"output {output} is the input" in tenpak_command(*arguments, code=2).err
    assert {path: path.read_bytes() for path in before} == before
    # What Tenpak itself has put into the model's folder may be replaced.
    for _ in range(2):
        statistics = copied / "statistics.safetensors"
        tenpak_command("calibrate", copied, "--text", text, "-o", statistics, "--inputs-only", *QUICK)
    shutil.move(statistics, tmp_path)
    for _ in range(2):
        tenpak_command("tune", packed, "-a", copied, "-t", text, "-o", copied / "t.tenpak", "--epochs", 1, *QUICK)


def test_statistics_are_no_output(tmp_path, llama):
    path = tmp_path / "statistics.safetensors"
    tenpak.calibrate(llama, path, np.arange(64), windows=2, context=16)
    before = path.read_bytes()
    error = tenpak_command("compress", "-i", llama, "-o", path, "--calibration", path, "--force", code=2).err
    assert "is the input" in error
    assert path.read_bytes() == before


def test_statistics_for_one_codec_serve_no_other(tmp_path, llama):
    path, output = tmp_path / "statistics.safetensors", tmp_path / "o.tenpak"
    tenpak.calibrate(llama, path, np.arange(64), windows=2, context=16, sequential="int4_g32_fp16_v1")
    arguments = ("compress", "-i", llama, "-o", output, "--calibration", path, "--codec")
    error = tenpak_command(*arguments, "int4_lut16_v1", code=2).err
    assert "were gathered for int4_g32_fp16_v1 alone" in error
    tenpak_command(*arguments, "int4_g32_fp16_v1")


@pytest.mark.parametrize("given", [b"\xff\xfe", b""])
@pytest.mark.parametrize("existed", [False, True])
def test_a_delta_whose_text_fails_leaves_what_was_there(tmp_path, llama, packed, given, existed):
    output, bad = tmp_path / "delta.tenpak", tmp_path / "bad.txt"
    bad.write_bytes(given)
    if existed:
        output.write_text("old")
    before = files_in(tmp_path)
    arguments = ("delta", "-b", packed, "-i", llama, "-o", output, "--mode", "codes", "--text", bad, "--force")
    assert tenpak_command(*arguments, code=3 if given == b"\xff\xfe" else 2).err
    assert files_in(tmp_path) == before
    assert not existed or output.read_text() == "old"
    assert "is the input" in tenpak_command(*arguments[:6], bad, *arguments[7:], code=2).err
    assert bad.read_bytes() == given


@pytest.mark.parametrize("existed", [False, True])
def test_what_a_link_points_to_is_put_back(tmp_path, existed):
    real, link = tmp_path / "real", tmp_path / "link"
    link.symlink_to(real)
    if existed:
        real.write_text("old")

    def work() -> None:
        with put_back(link):
            # As writers do: a new file in place of what the link points to.
            (tmp_path / "new").write_text("new")
            os.replace(tmp_path / "new", os.path.realpath(link))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    assert link.is_symlink()
    assert real.exists() == existed
    assert not existed or real.read_text() == "old"
    assert files_in(tmp_path) == {"link", "real"} if existed else {"link"}


def test_statistics_go_where_a_link_points(tmp_path, llama):
    real, link = tmp_path / "real.safetensors", tmp_path / "link.safetensors"
    real.write_text("old")
    link.symlink_to(real)
    with pytest.raises(UsageError, match="exists"):
        tenpak.calibrate(llama, link, np.arange(64), windows=2, context=16)
    tenpak.calibrate(llama, link, np.arange(64), windows=2, context=16, force=True)
    assert link.is_symlink()
    assert real.stat().st_size > 100


def test_statistics_keep_the_permissions_of_what_they_replace(tmp_path, llama):
    statistics = tmp_path / "private.safetensors"
    statistics.touch(mode=0o600)
    statistics.chmod(0o600)
    tenpak.calibrate(llama, statistics, np.arange(64), windows=2, context=16, force=True)
    assert statistics.stat().st_mode & 0o777 == 0o600


def test_a_tensor_without_elements_is_kept_whatever_a_rule_asks(tmp_path):
    """However many rows it has: one scale for each would be no measure of the file."""
    model, packed, restored = (tmp_path / name for name in ("m.safetensors", "m.tenpak", "restored.safetensors"))
    header = json.dumps({"a.weight": {"dtype": "F32", "shape": [1 << 33, 0], "data_offsets": [0, 0]}}).encode()
    model.write_bytes(struct.pack("<Q", len(header)) + header)
    tenpak_command("compress", "-i", model, "-o", packed, "--rule", "a.weight=int8_sym_v1")
    assert packed.stat().st_size < 4096
    tenpak_command("decompress", "-i", packed, "-o", restored)
    assert json.loads(restored.read_bytes()[8:].split(b"}}")[0] + b"}}")["a.weight"]["shape"] == [1 << 33, 0]


def test_a_long_string_of_a_damaged_gguf_is_quoted_in_part(tmp_path):
    path = write_gguf(
        tmp_path / "m.gguf", {"token_embd.weight": gaussian(4000, 256)}, {"general.architecture": "llama"}
    )
    data = bytearray(path.read_bytes())
    assert data[24:32] == struct.pack("<Q", len("general.architecture"))
    data[27] ^= 1
    data[40] = 0xFF
    path.write_bytes(bytes(data) + bytes(1 << 24))
    error = tenpak_command("compress", "-i", path, "-o", tmp_path / "o.tenpak", code=3).err
    assert "is not UTF-8" in error
    assert len(error) < 1000


def test_a_device_is_no_text(llama):
    if not Path("/dev/zero").exists():
        pytest.skip("no /dev/zero here")
    assert "no regular file" in tenpak_command("eval", llama, "--text", "/dev/zero", code=3).err


def test_an_axis_beyond_every_number_is_a_usage_error(tmp_path, llama):
    arguments = ("compress", "-i", llama, "-o", tmp_path / "o.tenpak", "--input-axis", f"q_proj={10**30}")
    assert "is no dimension" in tenpak_command(*arguments, code=2).err
    with pytest.raises(UsageError, match="is no dimension"):
        tenpak.compress(llama, tmp_path / "o.tenpak", input_axes=[("q_proj", -1)])


def test_json_is_json_in_every_encoding_and_for_every_name(tmp_path):
    plain = tmp_path / "плain"
    tenpak.compress(write_bundle(tmp_path / "m.json", a=gaussian(4, 64)), plain)
    for encoding in ("utf-8", "ascii", "latin-1"):
        environment = {**os.environ, "PYTHONIOENCODING": encoding}
        done = tenpak_command("inspect", plain, "--json", env=environment)
        assert done.json["file"] == str(plain)
    broken = os.fsencode(tmp_path / "b") + b"\xff.tenpak"
    try:
        os.link(plain, broken)
    except OSError:
        pytest.skip("this file system has no names of any bytes")
    done = subprocess.run([*COMMAND, "inspect", broken, "--json"], capture_output=True, check=True)
    assert done.stdout.decode("utf-8")


@pytest.mark.parametrize("arguments", [["verify"], ["inspect", "--json"]])
def test_nobody_need_listen_to_messages(packed, arguments):
    command = [*COMMAND, *arguments, str(packed)]
    done = subprocess.run(["sh", "-c", 'exec "$@" 2>&-', "sh", *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "internal error" not in done.stdout
    missing = ["sh", "-c", 'exec "$@" 2>&-', "sh", *COMMAND, "verify", str(packed) + "x"]
    assert subprocess.run(missing, capture_output=True, check=False).returncode == 6


@pytest.mark.parametrize("template", ["", "{{ '' }}", "{{ '\\ud800' }}"])
def test_a_chat_template_that_makes_no_text_is_the_models_fault(copied, template):
    config = copied / "tokenizer_config.json"
    about = json.loads(config.read_text()) if config.exists() else {}
    config.write_text(json.dumps({**about, "chat_template": template, "add_bos_token": False}))
    done = tenpak_command("generate", copied, "-p", "hi", "-n", 2, code=3)
    assert "its chat template makes no text" in done.err


def test_names_may_be_as_long_as_the_file_system_lets_them(tmp_path, llama):
    name = "n" * 243
    tenpak.compress(llama, tmp_path / f"{name}.tenpak", "int4_g32_fp16_v1")
    tenpak.decompress(tmp_path / f"{name}.tenpak", tmp_path / (name + "n" * 12))
    statistics = tmp_path / ("s" * 243 + ".safetensors")
    tenpak.calibrate(llama, statistics, np.arange(64), windows=2, context=16)
    tenpak.compress(llama, tmp_path / f"{name}.tenpak", calibration=statistics, force=True)
    assert files_in(tmp_path) == {f"{name}.tenpak", name + "n" * 12, statistics.name}


def test_a_byte_order_mark_is_named(tmp_path):
    path = write_bundle(tmp_path / "m.json", a=gaussian(4, 64))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert "byte order mark" in tenpak_command("compress", "-i", path, "-o", tmp_path / "o.tenpak", code=3).err
