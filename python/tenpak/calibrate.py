"""Gathers what a model's linear layers read: the statistics that calibrated encoders heed.

A model goes through layer by layer, all windows of the text through one layer before the next, so that the
statistics and weights of one layer are in memory at a time, beside the windows' hidden states.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tenpak import arrays
from tenpak.decoder import Block, Decoder, Linear
from tenpak.errors import UsageError
from tenpak.evaluate import Device, array_module, tokens_of, windows_of
from tenpak.sampling import checked_seed
from tenpak.statistics import StatisticsWriter

#: Called with steps of work done and in all, and what is being done.
Progress = Callable[[int, int, str], object]

#: Windows of a text that statistics are gathered from, and windows that are sampled, which costs more.
WINDOWS = 128
SAMPLED_WINDOWS = 64

#: Tokens that are computed at once.
TOKENS_AT_ONCE = 4096


@dataclass(frozen=True)
class CalibrationReport:
    """What was gathered."""

    model: str
    #: `sampled`, or the text's file.
    text: str
    device: str
    windows: int
    #: Tokens in a window.
    context: int
    #: Distinct inputs, and weights that read them.
    inputs: int
    weights: int
    #: The codec under which preceding layers were quantised; None where they were not.
    sequential: str | None
    file_bytes: int
    seconds: float
    tokens_per_second: float

    def to_dict(self) -> dict[str, Any]:
        """As plain dictionaries and lists, for JSON."""
        return asdict(self)


def calibrate(
    model: str | os.PathLike[str] | Decoder,
    output: str | os.PathLike[str],
    text: str | Path | Sequence[int] | NDArray[Any] | None = None,
    *,
    windows: int | None = None,
    context: int | None = None,
    seed: int = 0,
    diagonal: bool = False,
    sequential: str | None = None,
    encoder: str = "gptq",
    device: Device = "cpu",
    force: bool = False,
    progress: Progress | None = None,
) -> CalibrationReport:
    """Writes the statistics of every linear layer's input to a file, for `tenpak.compress(…, calibration=…)`.

    Args:
        model: The original: a Hugging Face folder, a weight file with `config.json` beside it, a `.tenpak`, or an
            open decoder.
        output: The `.safetensors` file of statistics.
        text: The text itself as a `str`, a UTF-8 file as a `Path`, or tokens; None lets the model sample text.
        windows: How many windows of the text to use, spread over all of it, or to sample; None for 128 of a text,
            or 64 samples.
        context: Tokens in a window; None for 1024, or as many as the model was made for.
        seed: For sampling.
        diagonal: Only E[x_j²], which takes little space and suits the encoder `diag`.
        sequential: A codec: each layer's statistics are gathered with all layers before it quantised under it.
        encoder: For `sequential`: `gptq` or `diag`.
        device: Where to compute, for a model that is not open yet; `cuda` needs CuPy.
        force: Replace an existing output.
        progress: Called with steps done and in all, and what they are.

    Raises:
        UsageError: A wrong option, too little text, or a package that is missing.
        InputError, ArtifactError, UnsupportedError: As for `Decoder.open`.
        StorageError: The file system refused.
    """
    for name, value, least in (("windows", windows, 1), ("context", context, 2)):
        if value is not None and value < least:
            raise UsageError(f"{name} {value} is too small; give at least {least}")
    if diagonal and sequential is not None and encoder == "gptq":
        raise UsageError("encoder gptq needs second moments; leave out --diagonal, or choose encoder diag")
    if windows is None:
        windows = SAMPLED_WINDOWS if text is None else WINDOWS
    start = time.perf_counter()
    with StatisticsWriter(output, force=force) as writer:
        decoder = model if isinstance(model, Decoder) else Decoder.open(model, xp=array_module(device))
        limit = decoder.config.max_positions
        if context is not None and context > limit:
            raise UsageError(f"context {context} is more than the {limit} positions that the model was made for")
        context = min(1024, limit) if context is None else context
        if text is None:
            tokens = sample(decoder, windows, context, seed, progress)
        else:
            tokens = _spread(windows_of(tokens_of(decoder, text), context, None), windows)
        weights = inputs = 0
        for gathered in _walk(decoder, tokens, diagonal, sequential, encoder, progress):
            writer.add(*gathered)
            inputs += 1
            weights += len(gathered[0])
        about = {
            "model": decoder.source.digest(),
            "text": hashlib.blake2b(np.ascontiguousarray(tokens, "<i8").tobytes(), digest_size=32).hexdigest(),
            "origin": "sampled" if text is None else "text",
            "sequential": sequential,
        }
        writer.finish(about)
    seconds = time.perf_counter() - start
    return CalibrationReport(
        model=decoder.source.path,
        text="sampled" if text is None else str(text) if isinstance(text, Path) else "given",
        device="cpu" if decoder.xp is np else "cuda",
        windows=len(tokens),
        context=tokens.shape[1],
        inputs=inputs,
        weights=weights,
        sequential=sequential,
        file_bytes=os.path.getsize(output),
        seconds=seconds,
        tokens_per_second=tokens.size / seconds,
    )


def sample(
    decoder: Decoder, windows: int, context: int, seed: int = 0, progress: Progress | None = None
) -> NDArray[np.int64]:
    """Text that the model writes itself at temperature 1, [windows, context].

    Each window starts with the model's first token (`bos_token_id`), or a random one where it has none.
    """
    xp, random = decoder.xp, np.random.default_rng(checked_seed(seed))
    first = decoder.config.bos
    tokens = np.empty((windows, context), np.int64)
    tokens[:, 0] = random.integers(0, decoder.config.vocab, windows) if first is None else first
    cache = decoder.cache()
    for step in range(1, context):
        logits = decoder.logits(tokens[:, step - 1 : step], cache)[:, -1]
        # The inverse of the distribution function, at one uniform number a window.
        logits -= logits.max(axis=-1, keepdims=True)
        sums = xp.cumsum(xp.exp(logits), axis=-1, dtype=np.float64)
        below = sums < xp.asarray(random.random(windows))[:, None] * sums[:, -1:]
        chosen = below.sum(axis=-1)
        tokens[:, step] = chosen if xp is np else xp.asnumpy(chosen)
        if progress is not None:
            progress(step, context - 1, "sampling text")
    return tokens


#: Names of the weights that read an input, tokens seen, E[x_j²], and E[x xᵀ].
_Gathered = tuple[tuple[str, ...], int, NDArray[np.float32], NDArray[np.float32] | None]


def _walk(
    decoder: Decoder,
    tokens: NDArray[np.int64],
    diagonal: bool,
    sequential: str | None,
    encoder: str,
    progress: Progress | None,
) -> Any:
    """Yields the statistics of one input after another."""
    layers, at_once = decoder.config.layers, max(1, TOKENS_AT_ONCE // tokens.shape[1])
    batches = [slice(i, i + at_once) for i in range(0, len(tokens), at_once)]
    passes = 1 if sequential is None else 2
    total, done = layers * passes * len(batches) + len(batches), 0

    def step() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total, "gathering statistics")

    hidden = [decoder.embed(tokens[batch]) for batch in batches]
    for index in range(layers):
        block = decoder.block(index)
        sums = _Sums(decoder.xp, diagonal)
        for i, h in enumerate(hidden):
            after = block(h, observe=sums.add)
            if sequential is None:
                hidden[i] = after
            step()
        gathered = list(sums.means())
        if sequential is not None:
            _quantise(block, gathered, sequential, encoder, decoder.xp)
            for i, h in enumerate(hidden):
                hidden[i] = block(h)
                step()
        del block
        yield from gathered
    head = decoder.head
    if isinstance(head.linear, Linear):
        sums = _Sums(decoder.xp, diagonal)
        for h in hidden:
            sums.add((head.linear.name,), head.norm(h))
            step()
        yield from sums.means()


class _Sums:
    """Σ x_j² or Σ x xᵀ of every distinct input, in FP32."""

    def __init__(self, xp: Any, diagonal: bool) -> None:
        self._xp, self._diagonal = xp, diagonal
        self._sums: dict[tuple[str, ...], Any] = {}
        self._tokens: dict[tuple[str, ...], int] = {}

    def add(self, names: tuple[str, ...], x: Any) -> None:
        x = x.reshape(-1, x.shape[-1])
        new = self._xp.einsum("ij,ij->j", x, x) if self._diagonal else x.T @ x
        if names in self._sums:
            self._sums[names] += new
        else:
            self._sums[names] = new
        self._tokens[names] = self._tokens.get(names, 0) + len(x)

    def means(self) -> Any:
        for names, total in self._sums.items():
            mean = total / np.float32(self._tokens[names])
            array = mean if self._xp is np else self._xp.asnumpy(mean)
            if self._diagonal:
                yield names, self._tokens[names], array, None
            else:
                yield names, self._tokens[names], np.diagonal(array).copy(), array


def _quantise(block: Block, gathered: list[_Gathered], codec: str, encoder: str, xp: Any) -> None:
    """Replaces a layer's weights by what compressing will make of them."""
    for names, tokens, diagonal, moment in gathered:
        for name in names:
            linear = block.linears[name]
            weight = linear.weight if xp is np else xp.asnumpy(linear.weight)
            # As the pipeline does where fewer tokens than columns were seen.
            full = encoder == "gptq" and tokens >= len(diagonal)
            encoded = arrays.encode(
                np.ascontiguousarray(weight),
                codec,
                importance=diagonal,
                second_moment=moment if full else None,
                tokens=tokens,
            )
            linear.weight = xp.asarray(arrays.decode(encoded))


def _spread(windows: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """That many windows, evenly from a text that has more."""
    if len(windows) <= count:
        return windows
    return windows[np.arange(count) * len(windows) // count]
