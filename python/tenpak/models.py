"""Whole models: compressing, restoring, and loading into memory."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from tenpak import _core, dtypes
from tenpak import artifact as _artifact
from tenpak.errors import InputError, UnsupportedError, UsageError
from tenpak.evaluate import Device, array_module
from tenpak.outputs import put_back, refuse_existing
from tenpak.progress import Progress, StageProgress
from tenpak.report import Report
from tenpak.statistics import sequential_of, tokens_of
from tenpak.threads import checked_threads

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class TensorReport:
    """What happened to one tensor."""

    name: str
    shape: tuple[int, ...]
    #: How the source spells its elements.
    source: str
    #: The codec's name, `keep`, or `alias`.
    codec: str
    #: Why it was kept, or which tensor it is an alias of.
    reason: str | None
    axis: int
    weights: int
    #: Bytes in the artifact.
    bytes: int
    #: Σ(w - ŵ)² / Σw²; None for what was kept, and in a dry run.
    relative_error: float | None
    #: How codes were chosen: `min/max`, `search`, `nearest`, `diag`, `gptq`; None for what was kept.
    encoder: str | None
    #: Why statistics were heeded less than was asked for, or not at all.
    uncalibrated: str | None
    #: tr(ΔHΔᵀ) / tr(WHWᵀ), the squared error of the layer's outputs, and the same without error feedback; None
    #: where there was none.
    output_error: float | None
    output_error_before: float | None


@dataclass(frozen=True)
class Group:
    """Tensors with the same fate."""

    codec: str
    reason: str | None
    tensors: int
    weights: int
    bytes: int
    bits_per_weight: float | None
    relative_error: float | None


@dataclass(frozen=True)
class CompressReport(Report):
    """What compressing did."""

    #: The input's format.
    format: str
    #: The codec that was asked for.
    codec: str
    dry_run: bool
    #: The artifact's identity; empty for a dry run.
    root: str
    tensors: tuple[TensorReport, ...]
    #: Totals: what was quantised, by codec; what was kept, by reason; aliases.
    groups: tuple[Group, ...]
    #: Names of embedded files.
    files: tuple[str, ...]
    #: Elements that are stored, aliases counted once.
    weights: int
    file_bytes: int
    quantised_bits_per_weight: float | None
    file_bits_per_weight: float | None
    #: How much smaller the file is than all weights in FP32, and in FP16.
    compression_fp32: float | None
    compression_fp16: float | None
    #: Σ(w - ŵ)² / Σw² of everything that was quantised.
    relative_error: float | None
    #: The mean of tr(ΔHΔᵀ) / tr(WHWᵀ) over tensors with error feedback, and the same before it.
    output_error: float | None
    output_error_before: float | None
    seconds: float
    #: FP32 bytes of the weights over seconds.
    gigabytes_per_second: float
    #: The instruction set in use.
    simd: str
    #: Advice, a sentence each.
    notes: tuple[str, ...]
    #: What norms' gains were multiplied by, on average; None where they stayed.
    norm_factor: float | None = None


@dataclass(frozen=True)
class DecompressReport(Report):
    """What restoring did."""

    #: The output's format: `json`, `safetensors` or `folder`.
    format: str
    #: Tensors written, aliases among them.
    tensors: int
    weights: int
    bytes: int
    #: Embedded files that were restored, and those that the output's format has no place for.
    files: tuple[str, ...]
    files_left_out: tuple[str, ...]
    seconds: float
    gigabytes_per_second: float


def compress(
    src: PathLike | Mapping[str, ArrayLike],
    dst: PathLike,
    codec: str = "int4_opt_v1",
    *,
    embeddings: str = "int8_sym_v1",
    rules: Iterable[tuple[str, str]] = (),
    input_axes: Iterable[tuple[str, int]] = (),
    threads: int | None = None,
    force: bool = False,
    strict: bool = False,
    dry_run: bool = False,
    calibration: PathLike | None = None,
    encoder: str = "gptq",
    device: Device = "cpu",
    progress: Progress | None = None,
    stages: StageProgress | None = None,
) -> CompressReport:
    """Compresses a model into one `.tenpak` file. The bytes do not depend on the number of threads.

    With statistics, norms are shrunk last (`tenpak.shrink`), where the statistics hold some of their text and the model
    can be run.

    Args:
        src: A Hugging Face folder, a `.safetensors`, `.gguf` or JSON bundle file, or a mapping of names to arrays.
        dst: The artifact. A failure leaves what was there before, or nothing.
        codec: For the weights of linear layers; a name from `tenpak.codecs()`.
        embeddings: For embeddings and output heads: a codec, or `keep`.
        rules: Pairs of a regular expression, searched in tensor names, and a codec or `keep`; the first that
            matches decides.
        input_axes: Pairs of a regular expression and the input dimension of the tensors it matches, where that is
            not what the model's kind says.
        threads: Threads that encode; None for one on each core.
        force: Replace an existing `dst`.
        strict: Refuse, before any work, to leave out a weight that no rule asks to keep.
        dry_run: Decide and measure sizes, exactly, but write nothing.
        calibration: Statistics of the layers' inputs, as `tenpak.calibrate` writes them; `self` gathers them from
            text that the model samples, with the defaults of `tenpak.calibrate`, and does not keep them. None lets
            encoders that search estimate E[x_j²] of some layers from the weights of a model of the GPT-2 or Llama
            family, in no time; `none` leaves that out.
        encoder: What to do with them: `diag` weights squared errors with E[x_j²], `gptq` also lets each column
            make good what those before it have lost.
        device: Where the model runs for `self`, and for the norms; `cuda` needs CuPy. Encoding is the CPU's.
        progress: Called with weights done and in all.
        stages: Called with steps done and in all, and what they are, while the model runs.

    Raises:
        UsageError: A wrong option, an existing output, or an output that is the input.
        InputError: The model is malformed, or holds NaN or infinity.
        UnsupportedError: A format or dtype that is not read.
        StorageError: The file system refused.
    """
    if encoder not in ("gptq", "diag"):
        raise UsageError(f"unknown encoder {encoder!r}; choose gptq or diag")
    # Before the minutes that encoding takes.
    array_module(device)
    if calibration == "self":
        return _compress_with_own_text(
            src,
            dst,
            codec,
            embeddings=embeddings,
            rules=rules,
            input_axes=input_axes,
            threads=threads,
            force=force,
            strict=strict,
            dry_run=dry_run,
            encoder=encoder,
            device=device,
            progress=progress,
            stages=stages,
        )
    statistics = None if calibration in (None, "none") else os.fspath(calibration)
    if statistics is not None:
        if not dry_run:
            refuse_existing(dst, force, statistics)
        if (made_for := sequential_of(statistics)) not in (None, codec):
            raise UsageError(
                f"statistics {statistics} were gathered for {made_for} alone (--sequential); choose that codec, or "
                "gather others"
            )
    axes = [(pattern, axis) for pattern, axis in input_axes]
    for pattern, axis in axes:
        if not 0 <= axis < 1 << 31:
            raise UsageError(f"input axis {axis} of {pattern!r} is no dimension; count from 0")
    # Norms shrink in what has been written.
    with put_back(dst) if statistics is not None and not dry_run else contextlib.nullcontext():
        report = json.loads(
            _core.compress(
                source_of(src),
                os.fspath(dst),
                codec,
                embeddings,
                [(pattern, choice) for pattern, choice in rules],
                axes,
                checked_threads(threads),
                force,
                strict,
                dry_run,
                None if statistics is None else (statistics, encoder),
                calibration is None,
                progress,
            )
        )
        report["tensors"] = tuple(TensorReport(**{**t, "shape": tuple(t["shape"])}) for t in report["tensors"])
        report["groups"] = tuple(Group(**g) for g in report["groups"])
        report["files"], report["notes"] = tuple(report["files"]), tuple(report["notes"])
        done = CompressReport(**report)
        if statistics is None or dry_run or isinstance(src, Mapping):
            return done
        return _with_shrunk_norms(done, src, dst, statistics, device, stages)


def checked_shard_bytes(count: int | None) -> int | None:
    """The most bytes of a shard; raises a UsageError where that is none."""
    if count is not None and not 1 <= count < 1 << 63:
        raise UsageError(f"shard_bytes {count} is no size of a file; give at least 1, or None for the default")
    return count


def source_of(src: PathLike | Mapping[str, ArrayLike]) -> Any:
    """A model as the core takes it: a path, or names, dtypes, shapes and bytes."""
    if not isinstance(src, Mapping):
        return os.fspath(src)
    source = []
    for name, value in src.items():
        if not isinstance(name, str) or name in ("", "__metadata__"):
            raise UsageError(f"{name!r} is no tensor's name; give a text that is not empty, nor `__metadata__`")
        array = np.asarray(value)
        data, dtype = dtypes.bytes_of(array)
        source.append((name, dtype, list(array.shape), data))
    return source


def _with_shrunk_norms(
    report: CompressReport,
    src: PathLike,
    dst: PathLike,
    statistics: str,
    device: Device,
    stages: StageProgress | None,
) -> CompressReport:
    """The norms of a new artifact shrunk, where the statistics hold some text and the model can be run."""
    from tenpak.shrink import shrink_norms

    start = time.perf_counter()
    if (tokens := tokens_of(statistics)) is None:
        return report
    try:
        shrunk = shrink_norms(dst, dst, src, tokens, device=device, force=True, progress=stages)
    except (InputError, UnsupportedError) as error:
        return replace(report, notes=(*report.notes, f"norms stay as they are: {error}"))
    seconds = report.seconds + time.perf_counter() - start
    return replace(
        report,
        root=shrunk.root,
        file_bytes=shrunk.file_bytes,
        norm_factor=float(np.mean(list(shrunk.factors.values()))) if shrunk.factors else None,
        seconds=seconds,
        gigabytes_per_second=report.gigabytes_per_second * report.seconds / seconds,
    )


def _compress_with_own_text(
    src: PathLike | Mapping[str, ArrayLike],
    dst: PathLike,
    codec: str,
    *,
    encoder: str,
    dry_run: bool,
    force: bool,
    device: Device,
    stages: StageProgress | None,
    **options: Any,
) -> CompressReport:
    checked_threads(options.get("threads"))
    if isinstance(src, Mapping):
        raise UsageError("calibration 'self' needs a model with config.json; give statistics, or a model's folder")
    # Before the minutes that sampling takes.
    refuse_existing(dst, force or dry_run)
    if dry_run:
        return compress(src, dst, codec, dry_run=True, force=force, **options)
    from tenpak.calibrate import calibrate

    with tempfile.TemporaryDirectory(prefix="tenpak-") as folder:
        statistics = os.path.join(folder, "statistics.safetensors")
        calibrate(src, statistics, diagonal=encoder == "diag", device=device, progress=stages)
        return compress(
            src,
            dst,
            codec,
            calibration=statistics,
            encoder=encoder,
            force=force,
            device=device,
            stages=stages,
            **options,
        )


def decompress(
    src: PathLike,
    dst: PathLike,
    *,
    format: Literal["json", "safetensors", "folder"] | None = None,
    dtype: str | None = None,
    threads: int | None = None,
    force: bool = False,
    shard_bytes: int | None = None,
    progress: Progress | None = None,
) -> DecompressReport:
    """Restores an artifact as a model that other tools read.

    Args:
        src: The artifact.
        dst: `….json` for a JSON bundle, `….safetensors` for one file, anything else for a Hugging Face folder
            with config and tokenizer.
        format: To say so where the name does not.
        dtype: `F32`, `F16` or `BF16` for all weights, finite ones staying finite; None for each tensor's own.
        threads: Threads that decode; None for one on each core.
        force: Replace an existing `dst`.
        shard_bytes: The most bytes of weights in one file of a folder.
        progress: Called with weights done and in all.

    Raises:
        UsageError: A wrong option, an existing output, or tensors that the format cannot hold.
        ArtifactError: The artifact is damaged.
        StorageError: The file system refused.
    """
    name = None if dtype is None else dtypes.name_of(dtype)
    if name is not None and name not in dtypes.WEIGHTS:
        raise UsageError(f"weights cannot be restored as {name}; use {', '.join(dtypes.WEIGHTS)}")
    report = json.loads(
        _core.decompress(
            os.fspath(src),
            os.fspath(dst),
            format,
            name,
            checked_threads(threads),
            force,
            checked_shard_bytes(shard_bytes),
            progress,
        )
    )
    report["files"], report["files_left_out"] = tuple(report["files"]), tuple(report["files_left_out"])
    return DecompressReport(**report)


def load_state_dict(
    path: PathLike,
    dtype: DTypeLike | None = None,
    *,
    framework: Literal["numpy", "torch"] = "numpy",
    threads: int | None = None,
) -> dict[str, Any]:
    """Rebuilds every tensor of an artifact, aliases among them.

    Args:
        path: The artifact.
        dtype: For weights; None for each tensor's own. With NumPy, bfloat16 becomes float32.
        framework: `torch` gives torch tensors, for `model.load_state_dict`.
        threads: Threads to use; None for one on each core.

    Returns:
        Arrays or tensors by name; an alias shares the memory of what it stands for.
    """
    if framework not in ("numpy", "torch"):
        raise UsageError(f"unknown framework {framework!r}; choose numpy or torch")
    with _artifact.open(path) as artifact:
        state = {}
        for name, info in artifact.tensors.items():
            wanted = dtype if info.dtype in dtypes.WEIGHTS else None
            value: Any = artifact.read(name, wanted, threads=threads)
            if framework == "torch":
                import torch

                value = torch.from_numpy(value)
                if info.dtype == "BF16" and dtype is None:
                    value = value.to(torch.bfloat16)
            state[name] = value
        return state | {alias: state[name] for alias, name in artifact.aliases.items()}
