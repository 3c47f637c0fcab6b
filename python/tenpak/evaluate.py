"""Measures how well a model predicts a text, and how far it has moved from the model it was made from.

Perplexity is exp of the mean negative log likelihood. The divergence is KL(original ‖ model) in nats, of the whole
distribution at every position; it shows damage that perplexity, which looks at one token a position, averages away.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tenpak.decoder import Decoder
from tenpak.decoder.kv import KVType, checked_kv
from tenpak.errors import InputError, StorageError, UsageError
from tenpak.progress import Progress
from tenpak.report import Report

#: Positions whose logits exist at once: with a vocabulary of 128k, 256 of them are 134 MB.
POSITIONS = 256

Device = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class Mean:
    """A mean over windows, and its standard error; None where there is but one window."""

    value: float
    error: float | None


@dataclass(frozen=True)
class Comparison:
    """The model beside the original."""

    #: Where the original is.
    original: str
    #: The original's kind of cache; None for FP32.
    kv: KVType | None
    #: The original's perplexity.
    perplexity: Mean
    #: By how many per cent the model's perplexity is higher; its error is of paired windows.
    change: Mean
    #: KL(original ‖ model), in nats per position.
    divergence: Mean
    #: The part of positions at which both think the same token most likely.
    top1: Mean


@dataclass(frozen=True)
class EvalReport(Report):
    """What an evaluation found."""

    model: str
    device: str
    #: Tokens in a window, and windows.
    context: int
    windows: int
    #: Tokens that were predicted: all but the first of each window.
    predicted: int
    perplexity: Mean
    #: What kind of cache keys and values were read from; None for FP32.
    kv: KVType | None
    #: None where neither an original nor a kind of cache was given.
    comparison: Comparison | None
    #: Time for all windows, without opening the models and reading the text.
    seconds: float
    #: Tokens of the text over seconds.
    tokens_per_second: float


def evaluate(
    model: str | os.PathLike[str] | Decoder,
    text: str | Path | Sequence[int] | NDArray[Any],
    *,
    against: str | os.PathLike[str] | Decoder | None = None,
    context: int | None = None,
    windows: int | None = None,
    device: Device | Literal["wgpu"] = "cpu",
    batch: int | None = None,
    kv: KVType | None = None,
    progress: Progress | None = None,
) -> EvalReport:
    """Predicts a text, window by window, and compares with the model it was made from.

    Windows do not overlap, and each is predicted without those before it; a last one that the text does not fill is
    left out, but a text shorter than one window is one.

    Args:
        model: A `.tenpak`, a Hugging Face folder, a weight file with `config.json` beside it, or an open decoder.
        text: The text itself as a `str`, a UTF-8 file as a `Path`, or tokens.
        against: The original, in any of the forms that `model` has.
        context: Tokens in a window; None for 1024, or as many as the models were made for.
        windows: The most windows to use, from the start; None for all.
        device: Where to compute, for models that are not open yet; `cuda` needs CuPy, `wgpu` a `.tenpak`, whose
            quantised layers it runs on the default GPU of `tenpak.wgpu` (the original stays on the CPU).
        batch: Windows that are computed at once; None for 1 on the CPU and 8 elsewhere.
        kv: Read keys and values from a cache of that kind at every position, "fp16", "int8" or "int4"; without
            `against`, the model is then compared with itself with an FP16 cache ("fp16": with FP32). None for FP32.
        progress: Called with tokens done and in all.

    Raises:
        UsageError: A wrong option, a text of fewer than two tokens, a context that a model was not made for, models
            with different vocabularies or tokenizers, or a package that is missing.
        InputError: A model that cannot be read or computes NaN or infinity, or a text that is no UTF-8.
        StorageError, ArtifactError, UnsupportedError: As for `Decoder.open`.
    """
    for name, value, least in (("context", context, 2), ("windows", windows, 1), ("batch", batch, 1)):
        if value is not None and value < least:
            raise UsageError(f"{name} {value} is too small; give at least {least}")
    kv = None if kv is None else checked_kv(kv)
    xp = array_module("cpu" if device == "wgpu" else device)
    decoder = model if isinstance(model, Decoder) else open_on(model, device)
    original = against if against is None or isinstance(against, Decoder) else Decoder.open(against, xp=xp)
    original_kv: KVType | None = None
    if original is None and kv is not None:
        original, original_kv = decoder, None if kv == "fp16" else "fp16"
    both = [decoder] if original is None else [decoder, original]
    if context is None:
        context = min(1024, *(one.config.max_positions for one in both))
    for one in both:
        if context > one.config.max_positions:
            raise UsageError(
                f"context {context} is more than the {one.config.max_positions} positions "
                f"that {one.source.path} was made for"
            )
    if original is not None and original is not decoder:
        _check_pair(decoder, original, tokens_given=not isinstance(text, str | Path))
    parts = windows_of(tokens_of(decoder, text), context, windows)
    if batch is None:
        batch = 1 if decoder.xp is np else 8

    for one in both:
        _ = one.blocks, one.head
    start = time.perf_counter()
    sums = []
    for first in range(0, len(parts), batch):
        # What overflows is found below, for all windows at once.
        with np.errstate(over="ignore", invalid="ignore"):
            sums.append(_measure(decoder, original, parts[first : first + batch], kv, original_kv))
        if progress is not None:
            progress(min(first + batch, len(parts)) * parts.shape[1], parts.size)
    seconds = time.perf_counter() - start
    by_window = np.concatenate(sums)
    if not np.isfinite(by_window).all():
        raise InputError(f"{' or '.join(one.source.path for one in both)} computes NaN or infinity on this text")

    loss, original_loss, divergence, agreed = by_window.T
    comparison = None
    if original is not None:
        change = _mean(loss - original_loss)
        ratio = _exp(change.value)
        comparison = Comparison(
            original=original.source.path,
            kv=original_kv,
            perplexity=_perplexity(original_loss),
            change=Mean(100 * (ratio - 1), None if change.error is None else 100 * ratio * change.error),
            divergence=_mean(divergence),
            top1=_mean(agreed),
        )
    return EvalReport(
        model=decoder.source.path,
        device=decoder.device,
        context=parts.shape[1],
        windows=len(parts),
        predicted=len(parts) * (parts.shape[1] - 1),
        kv=kv,
        perplexity=_perplexity(loss),
        comparison=comparison,
        seconds=seconds,
        tokens_per_second=parts.size / seconds,
    )


def open_on(model: str | os.PathLike[str], device: str) -> Decoder:
    """Opens a model on a device: `cpu`, `cuda`, or `wgpu`, which takes quantised layers alone.

    On GPUs the weights of a `.tenpak` stay quantised.
    """
    decoder = Decoder.open(model, xp=array_module("cpu" if device == "wgpu" else device))
    if device == "wgpu":
        from tenpak import wgpu

        wgpu.place(decoder)
    elif device == "cuda":
        from tenpak.cuda.place import place

        place(decoder)
    return decoder


def array_module(device: str) -> Any:
    """NumPy for `cpu`, CuPy for `cuda`."""
    if device == "cpu":
        return np
    if device != "cuda":
        raise UsageError(f"unknown device {device!r}; choose cpu or cuda")
    try:
        import cupy
    except ImportError:
        raise UsageError("device cuda needs CuPy; pip install 'tenpak[cuda13]', or 'tenpak[cuda12]'") from None
    try:
        cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise UsageError(f"device cuda: no GPU can be used ({error}); choose cpu") from None
    return cupy


def tokens_of(model: Decoder, text: str | Path | Sequence[int] | NDArray[Any]) -> NDArray[np.int64]:
    """The tokens of a text itself, of a UTF-8 file, or as they are."""
    if isinstance(text, Path):
        if text.exists() and not text.is_file():
            raise InputError(f"{text}: no regular file; give a text file")
        try:
            text = text.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{text}: byte {error.start} is no UTF-8; give a text file") from None
        except OSError as error:
            raise StorageError(f"cannot read {text}: {error.strerror}") from error
    tokens = np.asarray(model.encode_text(text) if isinstance(text, str) else text)
    if tokens.ndim != 1 or (tokens.size and tokens.dtype.kind not in "iu"):
        raise UsageError(f"tokens must be integers in one dimension; these are {tokens.dtype} {tokens.shape}")
    if len(tokens) < 2:
        raise UsageError(f"the text has {len(tokens)} tokens; two are the least that can be predicted")
    return tokens.astype(np.int64)


def windows_of(tokens: NDArray[np.int64], context: int, most: int | None) -> NDArray[np.int64]:
    """The first `most` windows of tokens, or all: [windows, context], or [1, all] of a shorter text."""
    context = min(context, len(tokens))
    count = len(tokens) // context
    count = count if most is None else min(count, most)
    return tokens[: count * context].reshape(count, context)


def _check_pair(model: Decoder, original: Decoder, tokens_given: bool) -> None:
    if model.xp is not original.xp:
        raise UsageError("model and original must be on the same device")
    paths = f"{model.source.path} and {original.source.path}"
    if model.config.vocab != original.config.vocab:
        raise UsageError(
            f"{paths} have vocabularies of {model.config.vocab} and {original.config.vocab} tokens; "
            "only models of one vocabulary can be compared"
        )
    if tokens_given:
        return
    mine, theirs = model.source.tokenizer_json, original.source.tokenizer_json
    # Bytes may differ in white space alone, which the package that reads them does not see.
    if mine is None or theirs is None or mine == theirs:
        return
    if model.tokenizer.to_str() != original.tokenizer.to_str():
        raise UsageError(f"{paths} have different tokenizers; only models of one tokenizer can be compared")


def _measure(
    model: Decoder, original: Decoder | None, windows: NDArray[np.int64], kv: KVType | None, original_kv: KVType | None
) -> NDArray[np.float64]:
    """For each window mean losses of model and original, mean divergence and agreement, [windows, 4]."""
    xp, (count, steps) = model.xp, windows.shape
    tokens = xp.asarray(windows)
    h = _hidden(model, tokens, kv)
    h_original = None if original is None else _hidden(original, tokens, original_kv)
    sums = xp.zeros((count, 4), np.float64)
    # Few enough positions of all windows that their logits stay within bounds.
    at_once = max(1, POSITIONS // count)
    for first in range(0, steps, at_once):
        end = min(first + at_once, steps)
        # The last position of a window predicts a token that is not in it.
        scored = min(end, steps - 1) - first
        targets = tokens[:, first + 1 : first + 1 + scored, None]
        x = model.head(h[:, first:end])
        top = None if original is None else x.argmax(axis=-1)
        log_sum, _ = _log_sum(x, xp)
        sums[:, 0] += _losses(x[:, :scored], log_sum[:, :scored], targets, xp)
        if original is None or h_original is None:
            continue
        y = original.head(h_original[:, first:end])
        sums[:, 3] += (y.argmax(axis=-1) == top).sum(axis=1)
        log_sum_original, (exponentials, total) = _log_sum(y, xp)
        sums[:, 1] += _losses(y[:, :scored], log_sum_original[:, :scored], targets, xp)
        # Σ p (log p - log q), where log p = y - log_sum_original and log q = x - log_sum.
        y -= x
        y *= exponentials
        sums[:, 2] += (y.sum(axis=-1, dtype=np.float64) / total + log_sum - log_sum_original).sum(axis=1)
    means = sums / xp.asarray([steps - 1, steps - 1, steps, steps], np.float64)
    result: NDArray[np.float64] = means if xp is np else xp.asnumpy(means)
    return result


def _hidden(model: Decoder, tokens: Any, kv: KVType | None) -> Any:
    return model.hidden(tokens, None if kv is None else model.cache(kv))


def _log_sum(logits: Any, xp: Any) -> tuple[Any, tuple[Any, Any]]:
    """Subtracts each row's maximum in place; log Σ exp of the rest in FP64, and its terms (FP32) and sum."""
    logits -= logits.max(axis=-1, keepdims=True)
    exponentials = xp.exp(logits)
    total = exponentials.sum(axis=-1, dtype=np.float64)
    return xp.log(total), (exponentials, total)


def _losses(logits: Any, log_sum: Any, targets: Any, xp: Any) -> Any:
    """The sum of negative log likelihoods of each window."""
    if targets.size == 0:
        return 0.0
    chosen = xp.take_along_axis(logits, targets, axis=-1)[..., 0]
    return (log_sum - chosen).sum(axis=1)


def _mean(values: NDArray[np.float64]) -> Mean:
    error = float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None
    return Mean(float(values.mean()), error)


def _perplexity(losses: NDArray[np.float64]) -> Mean:
    mean = _mean(losses)
    value = _exp(mean.value)
    return Mean(value, None if mean.error is None else value * mean.error)


def _exp(value: float) -> float:
    # A broken model may be off by more than a double can say.
    return math.exp(value) if value < 709 else math.inf
