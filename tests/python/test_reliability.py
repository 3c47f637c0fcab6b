"""Runs that are killed, interrupted or out of space leave the old output, or none, and no half-written file."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tenpak
from support import COMMAND, DATA, files_in

TENSORS, ROWS, COLUMNS = 25, 1024, 2048
OLD = b"what was there before"


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A safetensors file of 200 MB, which the slowest codec takes long enough over to be caught at work."""
    path = tmp_path_factory.mktemp("large") / "large.safetensors"
    size = 4 * ROWS * COLUMNS
    header = json.dumps(
        {
            f"layers.{i}.up_proj.weight": {
                "dtype": "F32",
                "shape": [ROWS, COLUMNS],
                "data_offsets": [i * size, (i + 1) * size],
            }
            for i in range(TENSORS)
        }
    ).encode()
    weights = np.random.default_rng(0).standard_normal((ROWS, COLUMNS), np.float32)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for i in range(TENSORS):
            # All differ: equal tensors would be stored once.
            file.write(np.roll(weights, i, axis=1).tobytes())
    return path


@pytest.mark.skipif(sys.platform == "win32", reason="signals of Unix")
@pytest.mark.parametrize("name", ["SIGKILL", "SIGINT", "SIGTERM", "SIGHUP"])
@pytest.mark.parametrize("old", [OLD, None], ids=["replacing", "new"])
def test_a_run_that_is_stopped_leaves_the_old_output(tmp_path, large, name, old):
    number = getattr(signal, name)
    output = tmp_path / "m.tenpak"
    if old is not None:
        output.write_bytes(old)
    options = ["--codec", "int4_lut16_v1", "--force", "--threads", "1"]
    command = [*COMMAND, "compress", "-i", str(large), "-o", str(output), *options]

    def hear_interrupts() -> None:
        # Shells let what they run in the background ignore SIGINT, `nohup` SIGHUP, and children inherit that.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)

    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, preexec_fn=hear_interrupts, **pipes) as process:
        deadline = time.monotonic() + 30
        while not (writing := files_in(tmp_path) - {output.name}):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline, "no file was begun"
            time.sleep(0.01)
        # The whole run takes most of a second.
        time.sleep(0.05)
        sent = time.monotonic()
        process.send_signal(number)
        out, message = process.communicate(timeout=30)
    assert time.monotonic() - sent < 10, "the work went on"
    assert all(file.startswith(".") for file in writing), "a half-written file could be taken for a model"
    assert (output.read_bytes() if output.exists() else None) == old
    assert out == ""
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 130
        assert message == "tenpak: interrupted; nothing was left half-written\n"
        assert files_in(tmp_path) == ({output.name} if old is not None else set())


def limited(size: int) -> None:
    """In the child: no file may grow beyond `size`, which fails writes in the way a full disk does."""
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.skipif(sys.platform == "win32", reason="limits of Unix")
@pytest.mark.parametrize("size", [0, 4096, 100_000])
@pytest.mark.parametrize("target", ["m.tenpak", "m.safetensors", "m.json", "folder"])
def test_a_file_that_cannot_grow_is_one_sentence_and_leaves_nothing(tmp_path, packed, target, size):
    folder = tmp_path / "out"
    folder.mkdir()
    command, source = ("compress", DATA / "tiny-llama") if target == "m.tenpak" else ("decompress", packed)
    done = subprocess.run(
        [*COMMAND, command, "-i", str(source), "-o", str(folder / target)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        preexec_fn=lambda: limited(size),
    )
    assert done.returncode == 6, done.stderr
    # Where it would be in the end, not where it is meanwhile.
    assert done.stderr.startswith(f"tenpak: cannot write {folder / target}")
    assert len(done.stderr.splitlines()) == 1
    assert files_in(folder) == set()


@pytest.mark.skipif(sys.platform == "win32", reason="limits of Unix")
def test_a_file_that_cannot_grow_leaves_the_old_output(tmp_path, gpt2):
    output = tmp_path / "m.tenpak"
    output.write_bytes(OLD)
    done = subprocess.run(
        [*COMMAND, "compress", "-i", str(gpt2), "-o", str(output), "--force"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        preexec_fn=lambda: limited(100_000),
    )
    assert done.returncode == 6, done.stderr
    assert output.read_bytes() == OLD
    assert files_in(tmp_path) == {output.name}


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_is_read_only_is_named(tmp_path, llama):
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    with pytest.raises(tenpak.StorageError, match="locked"):
        tenpak.compress(llama, folder / "m.tenpak")


def test_an_input_that_is_cut_off_leaves_nothing(tmp_path, llama):
    data = (llama / "model.safetensors").read_bytes()
    source = tmp_path / "cut.safetensors"
    source.write_bytes(data[: len(data) // 2])
    with pytest.raises(tenpak.InputError, match=r"cut\.safetensors"):
        tenpak.compress(source, tmp_path / "m.tenpak")
    assert files_in(tmp_path) == {source.name}
