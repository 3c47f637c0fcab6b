"""The console script: every command, what it prints where, and its exit codes."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import reseal
import tenpak
from plain_reader import crc32c
from support import COMMAND, DATA, files_in, gaussian, tenpak_command, write_bundle
from tenpak import cli

COMMANDS = [module.__name__.rsplit(".", 1)[1] for module in cli._COMMANDS]
UP = "model.layers.0.mlp.up_proj.weight"


def test_version_and_help():
    assert tenpak_command("--version").out == f"tenpak {tenpak.__version__}\n"
    text = tenpak_command("--help").out
    for command in COMMANDS:
        assert command in text
    for code in ("0", "1", "2", "3", "4", "5", "6", "130"):
        assert f"  {code} " in text


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_examples(command):
    text = tenpak_command(command, "--help").out
    assert f"tenpak {command}" in text
    assert "examples:" in text
    assert "--json" in text


def test_the_console_script_is_installed():
    script = Path(sys.executable).with_name("tenpak")
    done = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"tenpak {tenpak.__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["frobnicate"], ["compress"], ["inspect"], ["codecs", "--unknown"]])
def test_wrong_command_lines_are_usage_errors(arguments):
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "usage: tenpak" in done.stderr
    assert "Traceback" not in done.stderr


def test_commands_and_their_summaries_stand_in_one_line():
    text = tenpak_command("--help").out
    assert "materialize  restore a fine-tune" in text


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_that_nobody_writes_to_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for command in (["inspect"], ["verify"], ["compress", "-o", tmp_path / "m.tenpak", "-i"]):
        done = subprocess.run([*COMMAND, *command, tmp_path / "pipe"], capture_output=True, check=False, timeout=30)
        assert done.returncode == 2


def test_closed_and_full_streams_are_no_internal_errors(tmp_path, llama):
    def shell(script: str) -> subprocess.CompletedProcess[str]:
        words = [*COMMAND, "generate", str(llama), "-n", "1", "-q"]
        return subprocess.run(["sh", "-c", script, *words], capture_output=True, text=True, check=False, timeout=60)

    assert shell('"$0" "$@" -p x >&-').returncode == 0
    closed = shell('"$0" "$@" -p - <&-')
    assert (closed.returncode, closed.stderr) == (3, "tenpak: the prompt cannot be read: standard input is closed\n")
    binary = shell('printf \'\\377\' | "$0" "$@" -p -')
    assert binary.returncode == 3, binary.stderr
    assert "no UTF-8" in binary.stderr
    odd = shell('"$0" "$@" -p "$(printf \'\\377\')"')
    assert odd.returncode == 2, odd.stderr
    assert "no Unicode" in odd.stderr
    if os.path.exists("/dev/full"):
        for unbuffered in ("", "1"):
            for words in (["generate", llama, "-n", "1", "-q", "-p", "x"], ["--help"], ["--version"], ["codecs"]):
                with open("/dev/full", "w") as output:
                    done = subprocess.run(
                        [*COMMAND, *map(str, words)],
                        stdout=output,
                        stderr=subprocess.PIPE,
                        text=True,
                        check=False,
                        timeout=60,
                        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
                    )
                told = "tenpak: cannot write standard output: No space left on device\n"
                assert (done.returncode, done.stderr) == (6, told), (words, unbuffered)


def test_names_that_the_terminal_lacks_are_escaped(tmp_path, llama):
    tenpak_command("compress", "-i", llama, "-o", tmp_path / "ünï.tenpak")
    environment = {**os.environ, "PYTHONIOENCODING": "ascii:strict"}
    done = subprocess.run(
        [*COMMAND, "inspect", tmp_path / "ünï.tenpak"], capture_output=True, text=True, check=True, env=environment
    )
    assert "\\xfcn\\xef.tenpak" in done.stdout


def test_a_session(tmp_path, llama):
    artifact, restored = tmp_path / "m.tenpak", tmp_path / "restored"
    report = tenpak_command("compress", "--input", llama, "--output", artifact, "--codec", "int4_opt_v1")
    for words in ("int4_opt_v1", "int8_sym_v1", "norm, bias or scalar", "bits/weight", "FP32", "FP16", "GB/s"):
        assert words in report.out, words
    assert report.err == "", "progress is for terminals"
    shown = tenpak_command("inspect", artifact)
    assert UP in shown.out
    assert "config.json" in shown.out
    assert UP not in tenpak_command("inspect", artifact, "--summary").out
    assert "sound" in tenpak_command("verify", artifact).out
    done = tenpak_command("decompress", "--input", artifact, "--output", restored)
    assert "57 tensors" in done.out
    assert files_in(restored) == {"config.json", "model.safetensors", "tokenizer.json"}
    assert (restored / "tokenizer.json").read_bytes() == (llama / "tokenizer.json").read_bytes()


def test_every_command_speaks_json(tmp_path, llama):
    artifact = tmp_path / "m.tenpak"
    packed = tenpak_command("compress", "--input", llama, "--output", artifact, "--json", "--quiet").json
    assert packed["file_bytes"] == artifact.stat().st_size
    assert {group["codec"] for group in packed["groups"]} == {"int4_opt_v1", "int8_sym_v1", "keep"}
    inspected = tenpak_command("inspect", artifact, "--json").json
    assert inspected["root"] == packed["root"]
    assert len(inspected["tensors"]) == 57
    one = tenpak_command("inspect", artifact, "--tensor", UP, "--json").json
    assert one in inspected["tensors"]
    assert [part["name"] for part in one["parts"]] == ["codes", "scales", "offsets"]
    verified = tenpak_command("verify", artifact, "--json").json
    assert verified["files"][0]["root"] == packed["root"]
    restored = tenpak_command("decompress", "--input", artifact, "--output", tmp_path / "r", "--json").json
    assert (restored["format"], restored["tensors"]) == ("folder", 57)
    listed = tenpak_command("codecs", "--json").json["codecs"]
    assert [codec["name"] for codec in listed] == [codec.name for codec in tenpak.codecs()]
    doctor = tenpak_command("doctor", "--json").json
    assert doctor["tenpak"] == tenpak.__version__
    assert doctor["simd"] in doctor["simd_available"]
    assert {"for", "installed", "install"} <= set(doctor["optional"][0])


def test_dry_run(tmp_path, llama):
    artifact = tmp_path / "m.tenpak"
    shown = tenpak_command("compress", "--input", llama, "--output", artifact, "--dry-run")
    dry = tenpak_command("compress", "--input", llama, "--output", artifact, "--dry-run", "--json").json
    assert files_in(tmp_path) == set()
    tenpak_command("compress", "--input", llama, "--output", artifact)
    assert dry["file_bytes"] == artifact.stat().st_size
    assert f"{artifact.stat().st_size:,}" in shown.out


def test_rules_threads_and_embeddings(tmp_path, llama):
    files = []
    for threads in (1, 2, 7):
        artifact = tmp_path / f"{threads}.tenpak"
        options = ["--rule", r"layers\.0\.=keep", "--rule", "down_proj=int4_lut16_v1", "--embeddings", "keep"]
        report = tenpak_command("compress", "-i", llama, "-o", artifact, *options, "--threads", threads, "--tensors")
        assert UP in report.out
        files.append(artifact.read_bytes())
    assert files[0] == files[1] == files[2]
    with tenpak.open(artifact) as opened:
        assert opened.info(UP).codec == "keep"
        assert opened.info("model.layers.1.mlp.down_proj.weight").codec == "int4_lut16_v1"
        assert opened.info("lm_head.weight").codec == "keep"


@pytest.mark.parametrize("codec", [codec.name for codec in tenpak.codecs()])
def test_every_codec_there_and_back(tmp_path, gpt2, codec):
    artifact = tmp_path / "m.tenpak"
    tenpak_command("compress", "--input", gpt2, "--output", artifact, "--codec", codec, "--strict")
    tenpak_command("verify", artifact)
    tenpak_command("decompress", "--input", artifact, "--output", tmp_path / "m.safetensors", "--dtype", "F16")
    assert codec in tenpak_command("inspect", artifact).out


def test_output_formats_and_options(tmp_path, packed):
    bundle = tmp_path / "out" / "m.json"
    bundle.parent.mkdir()
    done = tenpak_command("decompress", "-i", packed, "-o", bundle)
    assert "note: json has no place for config.json" in done.err
    assert tenpak_command("decompress", "-i", packed, "-o", bundle, "--force", "--quiet").err == ""
    shards = tmp_path / "shards"
    tenpak_command("decompress", "-i", packed, "-o", shards, "--max-shard-size", "1MB")
    assert "model.safetensors.index.json" in files_in(shards)
    again = tmp_path / "again.tenpak"
    tenpak_command("compress", "-i", shards, "-o", again)
    assert len(tenpak.open(again)) == 57
    tenpak_command("decompress", "-i", packed, "-o", tmp_path / "x", "--max-shard-size", "much", code=2)


def test_bench(tmp_path):
    shown = tenpak_command("bench", "--gaussian", "64x256", "--repeat", 2, "--threads", 1)
    assert all(codec.name in shown.out for codec in tenpak.codecs())
    report = tenpak_command(
        "bench",
        "--input",
        DATA / "tiny-gpt2",
        "--codec",
        "int4_opt_v1",
        "--codec",
        "int8_sym_v1",
        "--repeat",
        2,
        "--json",
    ).json
    assert [row["codec"] for row in report["codecs"]] == ["int4_opt_v1", "int8_sym_v1"]
    assert report["codecs"][0]["bits_per_weight"] == pytest.approx(6, abs=0.01)
    assert 0 < report["codecs"][0]["relative_error"] < 4e-3
    assert all(row["encode_mws"] > 0 and row["decode_mws"] > 0 for row in report["codecs"])
    bundle = write_bundle(tmp_path / "m.json", w=gaussian(64, 64))
    tenpak_command("bench", "--input", bundle, "--repeat", 1)
    for wrong in (
        ["--gaussian", "64"],
        ["--gaussian", "64x64", "--codec", "int5"],
        ["--gaussian", "64x64", "--repeat", 0],
    ):
        tenpak_command("bench", *wrong, code=2)
    only_norms = write_bundle(tmp_path / "n.json", norm=gaussian(64))
    tenpak_command("bench", "--input", only_norms, code=3)


def test_codecs_and_doctor():
    table = tenpak_command("codecs").out
    for codec in tenpak.codecs():
        assert codec.name in table
        assert codec.summary in table
    report = tenpak_command("doctor").out
    for words in ("simd", "numpy", "torch", "pip install 'tenpak[hf]'"):
        assert words in report


def failing(tmp_path: Path, packed: Path) -> dict[str, tuple[int, list[object], str]]:
    nan = gaussian(8, 64)
    nan[1, 2] = np.nan
    damaged = tmp_path / "damaged.tenpak"
    damaged.write_bytes(packed.read_bytes()[:-1])
    flipped = tmp_path / "flipped.tenpak"
    data = bytearray(packed.read_bytes())
    data[tenpak.open(packed).info(UP).parts[0].offset] ^= 1
    flipped.write_bytes(data)
    newer = tmp_path / "newer.tenpak"
    header = data[:8] + struct.pack("<I", 2) + data[12:60]
    newer.write_bytes(header + struct.pack("<I", crc32c(header)) + data[64:])
    pickle = tmp_path / "model.bin"
    pickle.write_bytes(b"PK\x03\x04" + bytes(200))
    malformed = tmp_path / "malformed.safetensors"
    malformed.write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    sound = write_bundle(tmp_path / "sound.json", w=gaussian(8, 64))
    link = tmp_path / "link.json"
    link.symlink_to(sound)
    (tmp_path / "broken.json").write_text('{"tensors":{"w":{"shape":[2],"data":[1]}}}')
    np.save(tmp_path / "a.npy", nan)
    llama, new = DATA / "tiny-llama", tmp_path / "new.tenpak"
    to_new = ["compress", "-i", llama, "-o", new]
    return {
        "codec": (2, [*to_new, "--codec", "int5"], "int4_opt_v1"),
        "codec of a rule": (2, [*to_new, "--rule", "x=int5"], "int5"),
        "no regular expression": (2, [*to_new, "--rule", "(=keep"], "regular expression"),
        "no rule": (2, [*to_new, "--rule", "keep"], "REGEX=CODEC"),
        "threads": (2, [*to_new, "--threads", 0], "threads 0: give a number from 1 to 1024"),
        "axis": (2, [*to_new, "--input-axis", "proj=7"], "axis"),
        "exists": (2, ["compress", "-i", llama, "-o", packed], "--force"),
        "the input": (2, ["compress", "-i", sound, "-o", sound, "--force"], "is the input"),
        "a link to the input": (2, ["compress", "-i", sound, "-o", link, "--force"], "is the input"),
        "no such tensor": (2, ["inspect", packed, "--tensor", UP[:-2]], UP),
        "json": (3, ["compress", "-i", tmp_path / "broken.json", "-o", new], "broken.json"),
        "safetensors": (3, ["compress", "-i", malformed, "-o", new], "malformed.safetensors"),
        "no model": (3, ["compress", "-i", Path(__file__), "-o", new], "test_cli.py"),
        "damaged": (4, ["verify", damaged], "damaged.tenpak"),
        "damaged too": (4, ["inspect", damaged], "damaged.tenpak"),
        "a flipped bit": (4, ["verify", flipped], UP),
        "a flipped bit too": (4, ["decompress", "-i", flipped, "-o", tmp_path / "x"], UP),
        "no artifact": (4, ["decompress", "-i", llama / "config.json", "-o", tmp_path / "x"], "config.json"),
        "newer": (5, ["inspect", newer], "version 2"),
        "pickle": (5, ["compress", "-i", pickle, "-o", new], "safetensors"),
        "numpy": (5, ["compress", "-i", tmp_path / "a.npy", "-o", new], "NumPy"),
        "absent": (6, ["compress", "-i", tmp_path / "absent", "-o", new], "absent"),
        "no folder": (6, ["compress", "-i", llama, "-o", tmp_path / "none" / "m.tenpak"], "none"),
        "absent too": (6, ["inspect", tmp_path / "absent"], "absent"),
    }


def test_failures_have_documented_exit_codes_and_leave_nothing(tmp_path, packed):
    cases = failing(tmp_path, packed)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for case, (code, arguments, words) in cases.items():
        message = tenpak_command(*arguments, code=code).err
        assert words in message, (case, message)
        assert len(message.strip().splitlines()) == 1, (case, message)
        assert len(message) < 700, (case, message)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before, case


def test_nan_is_an_input_error_that_names_its_place(tmp_path):
    numpy_files = pytest.importorskip("safetensors.numpy")
    weights = gaussian(8, 64)
    weights[1, 2] = np.nan
    numpy_files.save_file({"layer.weight": weights}, tmp_path / "m.safetensors")
    for options in ([], ["--dry-run"]):
        done = tenpak_command(
            "compress", "-i", tmp_path / "m.safetensors", "-o", tmp_path / "m.tenpak", *options, code=3
        )
        assert "layer.weight" in done.err
        assert "[1, 2]" in done.err
    assert files_in(tmp_path) == {"m.safetensors"}


def test_strict(tmp_path):
    bundle = write_bundle(tmp_path / "m.json", linear=gaussian(16, 64), patch=gaussian(4, 2, 3, 3))
    message = tenpak_command("compress", "-i", bundle, "-o", tmp_path / "m.tenpak", "--strict", code=2).err
    assert "patch" in message
    assert "--rule" in message
    tenpak_command("compress", "-i", bundle, "-o", tmp_path / "m.tenpak", "--strict", "--rule", "patch=keep")


def test_progress_off_a_terminal(tmp_path, llama, packed):
    done = tenpak_command("compress", "-i", llama, "-o", tmp_path / "m.tenpak", "--progress")
    assert "100%" in done.err
    assert "\r" not in done.err
    assert "100%" in tenpak_command("verify", packed, "--progress").err


def test_progress_on_a_terminal(tmp_path, llama):
    pty = pytest.importorskip("pty")
    main, terminal = pty.openpty()
    command = [*COMMAND, "compress", "-i", llama, "-o", tmp_path / "m.tenpak"]
    with subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=terminal) as process:
        os.close(terminal)
        output = process.stdout.read().decode()
        shown = b""
        # Linux reports the end of a terminal as an error.
        while True:
            try:
                block = os.read(main, 4096)
            except OSError:
                break
            if not block:
                break
            shown += block
    os.close(main)
    assert process.returncode == 0
    assert "\r" in shown.decode()
    assert "\r" not in output
    assert "int4_opt_v1" in output


def test_readers_that_stop_early_are_no_error(packed):
    command = [*map(str, [*COMMAND, "inspect", packed])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode in (0, -signal.SIGPIPE)


def test_unexpected_errors_have_no_traceback_unless_asked(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import tenpak.models\n"
        "def broken(*a, **k): raise RuntimeError('unforeseen')\n"
        "import tenpak; tenpak.compress = broken\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    arguments = ["compress", "-i", DATA / "tiny-llama", "-o", tmp_path / "m.tenpak"]
    done = tenpak_command(*arguments, code=1, env=environment)
    assert "unforeseen" in done.err
    assert "TENPAK_DEBUG" in done.err
    debug = subprocess.run(
        [*map(str, [*COMMAND, *arguments])],
        env={**environment, "TENPAK_DEBUG": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert debug.returncode == 1
    assert "Traceback" in debug.stderr


def test_artifacts_of_unknown_codecs_can_be_inspected_and_verified(tmp_path):
    path = tmp_path / "m.tenpak"
    tenpak.compress({"w": gaussian(8, 64)}, path)
    reseal.change(path, lambda index: index["tensors"][0].update(codec="int3_future_v9"))
    shown = tenpak_command("inspect", path).out
    assert "int3_future_v9 (unknown)" in shown
    assert tenpak_command("inspect", path, "--json").json["tensors"][0]["known"] is False
    tenpak_command("verify", path)
    message = tenpak_command("decompress", "-i", path, "-o", tmp_path / "m.safetensors", code=5).err
    assert "int3_future_v9" in message
    assert files_in(tmp_path) == {"m.tenpak"}


def test_the_generated_page_of_codecs_is_up_to_date():
    page = Path(__file__).resolve().parents[2] / "docs" / "codecs.md"
    assert page.read_text() == tenpak_command("codecs", "--markdown").out, "run `make docs`"


def test_importing_loads_no_optional_package():
    code = "import sys, tenpak.cli; print({'torch', 'cupy', 'transformers', 'safetensors'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
