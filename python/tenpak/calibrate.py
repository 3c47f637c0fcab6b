"""Gathers what a model's linear layers read: the statistics that calibrated encoders heed.

A model is gone through layer by layer, all windows of the text through one layer before the next, so that the
statistics and weights of one layer are in memory at a time, beside the windows' hidden states. Where gradients are
wanted, some windows then go backwards, for which what all layers were given is set aside, in a file if it is much.

Gradients are those of the loss that the model expects of itself, at tokens that it samples, so that their second
moments are its Fisher information: as far as that is a Kronecker product, a layer's weights [out, in] that are off by E
add tr(G E H Eᵀ) to the divergence, with H = E[|g|² x xᵀ] over inputs x and G = E[|x|² g gᵀ] over gradients g at the
outputs (Tseng et al. 2025, "Model-preserving adaptive rounding"). Few tokens have most of those weights, so that H is
better off with windows that count all tokens alike beside those.
"""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tenpak import arrays
from tenpak.decoder import Block, Decoder, Head, Linear
from tenpak.decoder.gradients import norm_backward
from tenpak.errors import UsageError
from tenpak.evaluate import POSITIONS, Device, array_module, tokens_of, windows_of
from tenpak.outputs import refuse_existing
from tenpak.progress import StageProgress
from tenpak.report import Report
from tenpak.sampling import checked_seed
from tenpak.shrink import TOKENS
from tenpak.statistics import StatisticsWriter

#: Windows of a text that statistics are gathered from, and windows that are sampled, which costs more: twice as many
#: lowered the KL divergence of llama-books under int4_opt_v1 by half a per cent.
WINDOWS = 128
SAMPLED_WINDOWS = 64

#: Tokens that are computed at once.
TOKENS_AT_ONCE = 4096
#: Of so many batches one goes backwards, which takes three times as long.
BACKWARD_EVERY = 2
#: Choices at most that are summed up before one of them is drawn.
_RUN = 256
#: Bytes of what is set aside in memory.
MEMORY = 4 << 30
#: Outputs of a layer above which no second moment of their gradients is gathered: it would be more than 1 GiB.
MOST_OUTPUTS = 1 << 14


@dataclass(frozen=True)
class CalibrationReport(Report):
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


def calibrate(
    model: str | os.PathLike[str] | Decoder,
    output: str | os.PathLike[str],
    text: str | Path | Sequence[int] | NDArray[Any] | None = None,
    *,
    windows: int | None = None,
    context: int | None = None,
    seed: int = 0,
    diagonal: bool = False,
    gradients: bool = True,
    sequential: str | None = None,
    encoder: str = "gptq",
    device: Device = "cpu",
    force: bool = False,
    progress: StageProgress | None = None,
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
        diagonal: Only E[x_j²], which takes little space and suits the encoder `diag`; no gradients.
        gradients: Let some windows go backwards too, and weigh tokens and outputs by how much they matter. It takes
            twice as long, and room for what all layers were given in those windows.
        sequential: A codec: each layer's statistics are gathered with all layers before it quantised under it, and
            without gradients.
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
    refuse_existing(output, force, model, text if isinstance(text, Path) else None)
    start = time.perf_counter()
    with StatisticsWriter(output, force=force) as writer:
        decoder = model if isinstance(model, Decoder) else Decoder.open(model, xp=array_module(device))
        tokens = windows_to_learn(decoder, text, windows, context, seed, progress)
        weights = inputs = 0
        if gradients and not diagonal and sequential is None:
            walk = _walk_backward(decoder, tokens, seed, Path(output).parent, progress)
        else:
            walk = _walk(decoder, tokens, diagonal, sequential, encoder, progress)
        for gathered in walk:
            writer.add(*gathered)
            inputs += 1
            weights += len(gathered[0])
        writer.add_tokens(_spread(tokens, max(1, TOKENS // tokens.shape[1])))
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
    decoder: Decoder, windows: int, context: int, seed: int = 0, progress: StageProgress | None = None
) -> NDArray[np.int64]:
    """Text that the model writes itself at temperature 1, [windows, context].

    Each window starts with the model's first token (`bos_token_id`), or a random one where it has none.
    """
    xp, random = decoder.xp, np.random.default_rng(checked_seed(seed))
    first = decoder.config.bos
    tokens = np.empty((windows, context), np.int64)
    tokens[:, 0] = random.integers(0, decoder.config.vocab, windows) if first is None else first
    cache = decoder.cache(room=context)
    for step in range(1, context):
        logits = decoder.logits(tokens[:, step - 1 : step], cache)[:, -1]
        logits -= logits.max(axis=-1, keepdims=True)
        chosen = _drawn(xp.exp(logits, out=logits), random, xp)
        tokens[:, step] = chosen if xp is np else xp.asnumpy(chosen)
        if progress is not None:
            progress(step, context - 1, "sampling text")
    return tokens


def _drawn(weights: Any, random: np.random.Generator, xp: Any) -> Any:
    """One index for each row of weights [n, choices], drawn with their probabilities."""
    # The inverse of the distribution function, at one uniform number a row: first the run of choices, then in there.
    count, choices = weights.shape
    run = max(size for size in range(1, _RUN + 1) if choices % size == 0)
    runs, rows = weights.reshape(count, -1, run), xp.arange(count)
    sums = xp.cumsum(runs.sum(axis=-1, dtype=np.float64), axis=-1)
    wanted = xp.asarray(random.random(count))[:, None] * sums[:, -1:]
    chosen = (sums < wanted).sum(axis=-1)
    before = xp.where(chosen > 0, sums[rows, chosen - 1], 0.0)
    sums = before[:, None] + xp.cumsum(runs[rows, chosen], axis=-1, dtype=np.float64)
    return chosen * run + xp.minimum((sums < wanted).sum(axis=-1), run - 1)


#: Names of the weights that read an input, tokens seen, E[x_j²], and E[x xᵀ].
_Gathered = tuple[tuple[str, ...], int, NDArray[np.float32], NDArray[np.float32] | None]


def _walk(
    decoder: Decoder,
    tokens: NDArray[np.int64],
    diagonal: bool,
    sequential: str | None,
    encoder: str,
    progress: StageProgress | None,
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


def _walk_backward(
    decoder: Decoder, tokens: NDArray[np.int64], seed: int, folder: Path, progress: StageProgress | None
) -> Any:
    """Yields the statistics of one input after another, and of the outputs of what reads it, the last layer's first."""
    xp, layers, at_once = decoder.xp, decoder.config.layers, max(1, TOKENS_AT_ONCE // tokens.shape[1])
    hidden = [decoder.embed(tokens[i : i + at_once]) for i in range(0, len(tokens), at_once)]
    total, done = (layers + 1) * len(hidden) + 2 * layers * len(hidden[::BACKWARD_EVERY]), 0

    def step(steps: int = 1) -> None:
        nonlocal done
        done += steps
        if progress is not None:
            progress(done, total, "gathering statistics")

    with _Shelf(folder, xp) as shelf:
        given: list[list[Any]] = []
        moments: list[_Moments] = []
        for index in range(layers):
            block = decoder.block(index)
            given.append([shelf.put(h) for h in hidden[::BACKWARD_EVERY]])
            moments.append(_Moments(xp))
            for i, h in enumerate(hidden):
                hidden[i] = block(h, observe=moments[-1].add if i % BACKWARD_EVERY else None)
                step()
            moments[-1].set_aside(shelf)
        del block
        head, random = decoder.head, np.random.default_rng(checked_seed(seed))
        if isinstance(head.linear, Linear):
            sums = _Sums(xp, diagonal=False)
            for h in hidden:
                sums.add((head.linear.name,), head.norm(h))
            yield from sums.means()
        gradients = []
        for i in range(len(hidden)):
            h, hidden[i] = hidden[i], None
            if i % BACKWARD_EVERY == 0:
                gradients.append(_loss_backward(head, h, random, xp))
            step()
        for index in reversed(range(layers)):
            block, here = decoder.block(index), moments.pop()
            here.take_back(shelf)
            for i, h in enumerate(given.pop()):
                gradients[i] = block.backward(shelf.get(h), gradients[i], here.add_backward)
                step(2)
            del block
            yield from here.means()


class _Shelf:
    """FP32 arrays set aside: in memory, and beyond `MEMORY` bytes in a file without a name."""

    def __init__(self, folder: Path, xp: Any) -> None:
        self._folder, self._xp = folder, xp
        self._room = MEMORY
        self._file: Any = None

    def put(self, array: Any) -> Any:
        """What `get` wants for it."""
        host = _on_host(array, self._xp)
        self._room -= host.nbytes
        if self._room >= 0:
            return host
        if self._file is None:
            # Closed by __exit__.
            self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115
        at = self._file.seek(0, os.SEEK_END)
        self._file.write(np.ascontiguousarray(host).data)
        return at, host.shape

    def get(self, kept: Any) -> Any:
        if not isinstance(kept, np.ndarray):
            at, shape = kept
            self._file.seek(at)
            kept = np.frombuffer(self._file.read(4 * math.prod(shape)), np.float32).reshape(shape)
        return self._xp.asarray(kept)

    def __enter__(self) -> _Shelf:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()


def _on_host(array: Any, xp: Any) -> NDArray[np.float32]:
    host: NDArray[np.float32] = array if xp is np else xp.asnumpy(array)
    return host


def _loss_backward(head: Head, h: Any, random: np.random.Generator, xp: Any) -> Any:
    """The gradient at hidden states [batch, T, width] of the loss at a token that is sampled for each of them."""
    flat = h.reshape(-1, h.shape[-1])
    d = xp.empty_like(flat)
    for first in range(0, len(flat), POSITIONS):
        here = flat[first : first + POSITIONS]
        p = head(here)
        p -= p.max(axis=-1, keepdims=True)
        xp.exp(p, out=p)
        chosen = _drawn(p, random, xp)
        p /= p.sum(axis=-1, keepdims=True)
        p[xp.arange(len(p)), chosen] -= 1
        d[first : first + POSITIONS] = norm_backward(head.norm, here, p @ head.linear.weight, xp=xp)
    return d.reshape(h.shape)


class _Moments:
    """E[x xᵀ] of every distinct input and E[g gᵀ] of every weight's outputs, in FP32."""

    def __init__(self, xp: Any) -> None:
        self._xp = xp
        self._inputs: dict[tuple[str, ...], Any] = {}
        self._outputs: dict[str, Any] = {}
        #: Tokens that were seen, and those that went backwards.
        self._tokens: dict[tuple[str, ...], list[int]] = {}

    def add(self, names: tuple[str, ...], x: Any) -> None:
        """Every token as much as the others."""
        self._sum(self._inputs, names, x.reshape(-1, x.shape[-1]))
        self._count(names, x, backward=False)

    def add_backward(self, names: tuple[str, ...], x: Any, gradients: list[Any]) -> None:
        """Inputs by the squares of gradients, and gradients by those of inputs, each over their mean."""
        x, *gradients = (array.reshape(-1, array.shape[-1]) for array in (x, *gradients))
        self._sum(self._inputs, names, x, sum(map(self._squares, gradients)))
        squares = self._squares(x)
        for name, g in zip(names, gradients, strict=True):
            if g.shape[1] <= MOST_OUTPUTS:
                self._sum(self._outputs, name, g, squares)
        self._count(names, x, backward=True)

    def set_aside(self, shelf: _Shelf) -> None:
        """Until `take_back`."""
        self._inputs = {names: shelf.put(total) for names, total in self._inputs.items()}

    def take_back(self, shelf: _Shelf) -> None:
        self._inputs = {names: shelf.get(total) for names, total in self._inputs.items()}

    def means(self) -> Any:
        def mean(total: Any, tokens: int) -> NDArray[np.float32]:
            return _on_host(total / np.float32(tokens), self._xp)

        for names, total in self._inputs.items():
            seen, of_outputs = self._tokens[names]
            moment = mean(total, seen)
            outputs = {name: mean(self._outputs[name], of_outputs) for name in names if name in self._outputs}
            yield names, seen, np.diagonal(moment).copy(), moment, outputs, of_outputs

    def _squares(self, x: Any) -> Any:
        return self._xp.einsum("ij,ij->i", x, x)

    def _sum(self, sums: dict[Any, Any], key: Any, x: Any, squares: Any = None) -> None:
        """Adds Σ x xᵀ, each token by its part of `squares`."""
        if squares is not None:
            # Where nothing matters, nothing counts.
            mean = self._xp.maximum(squares.mean(), np.float32(np.finfo(np.float32).tiny))
            x = x * self._xp.sqrt(squares / mean)[:, None]
        new = x.T @ x
        sums[key] = sums[key] + new if key in sums else new

    def _count(self, names: tuple[str, ...], x: Any, backward: bool) -> None:
        tokens = self._tokens.setdefault(names, [0, 0])
        count = x.size // x.shape[-1]
        tokens[0] += count
        tokens[1] += count * backward


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
            array = _on_host(total / np.float32(self._tokens[names]), self._xp)
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


def windows_to_learn(
    decoder: Decoder,
    text: str | Path | Sequence[int] | NDArray[Any] | None,
    windows: int | None,
    context: int | None,
    seed: int,
    progress: StageProgress | None,
) -> NDArray[np.int64]:
    """Windows [count, context] of a text, or, for None, of text that the model samples; arguments as `calibrate`'s.

    Raises:
        UsageError: More context than the model has positions, too little text, or a package that is missing.
        InputError: The text cannot be read.
    """
    limit = decoder.config.max_positions
    if context is not None and context > limit:
        raise UsageError(f"context {context} is more than the {limit} positions that the model was made for")
    context = min(1024, limit) if context is None else context
    if text is None:
        return sample(decoder, windows or SAMPLED_WINDOWS, context, seed, progress)
    return _spread(windows_of(tokens_of(decoder, text), context, None), windows or WINDOWS)


def _spread(windows: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """That many windows, evenly from a text that has more."""
    if len(windows) <= count:
        return windows
    return windows[np.arange(count) * len(windows) // count]
