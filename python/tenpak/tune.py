"""Tunes an artifact as a whole: scales, offsets and norms' gains move until it is nearer to its original; codes stay.

Encoders choose a layer's codes by what that layer's outputs lose. What all layers lose together is the divergence
KL(original ‖ artifact), and its gradient says how the numbers that codes are rebuilt with should move: the original
teaches the artifact (training of quantisation parameters alone: EfficientQAT, Chen et al. 2024; of norms: Norm
Tweaking, Li et al. 2023), with Adam (Kingma and Ba 2015). Every eighth window is not learned from but says whether it
has helped.
"""

from __future__ import annotations

import copy
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tenpak import _core
from tenpak.artifact import ArtifactFile
from tenpak.calibrate import TOKENS_AT_ONCE, windows_to_learn
from tenpak.decoder import Block, Decoder, Head, Linear
from tenpak.decoder.block import NORMS
from tenpak.decoder.gradients import gain_backward, norm_backward
from tenpak.errors import UsageError
from tenpak.evaluate import POSITIONS, Device, array_module
from tenpak.movable import Gain, Movable, MovableWeight, gain_of, of_linear, open_artifact, parts_of
from tenpak.outputs import refuse_existing
from tenpak.progress import StageProgress
from tenpak.report import Report
from tenpak.sampling import checked_seed

#: How often every window is learned from.
EPOCHS = 4
#: Of so many windows one is kept for the comparison.
HELD_OUT = 8
#: Bytes of FP32 weights that are kept; further layers are read again whenever they are needed.
KEPT = 4 << 30
#: Steps in which the rate rises.
_WARM_UP = 4
#: Adam's decays of the mean and of the mean square, and what keeps it from dividing by zero.
_DECAYS = 0.9, 0.999
_TINY = 1e-8


@dataclass(frozen=True)
class TuneReport(Report):
    """What tuning did."""

    artifact: str
    original: str
    #: `sampled`, `given`, or the text's file.
    text: str
    device: str
    #: Windows learned from, and tokens in each.
    windows: int
    context: int
    epochs: int
    #: Numbers that were free to move.
    moved: int
    #: KL(original ‖ artifact) in nats per position, over the windows that were not learned from.
    divergence_before: float
    divergence: float
    #: False where it would not have become less: then the output is what the artifact was.
    better: bool
    #: The output's identity.
    root: str
    file_bytes: int
    seconds: float


def tune(
    artifact: str | os.PathLike[str],
    output: str | os.PathLike[str],
    original: str | os.PathLike[str] | Decoder,
    text: str | Path | NDArray[Any] | list[int] | None = None,
    *,
    windows: int | None = None,
    context: int | None = None,
    epochs: int = EPOCHS,
    seed: int = 0,
    device: Device = "cpu",
    force: bool = False,
    progress: StageProgress | None = None,
) -> TuneReport:
    """Writes an artifact again, its scales, offsets and norms' gains moved so that the model loses less.

    Sizes, codes and layouts stay. Scales and offsets are those of the layouts `int4_gN_fp16` and super-scales those of
    `int4_lutN`; of other layouts norms alone move. Of either model one layer's FP32 weights are in memory at a time,
    and of the artifact's first layers up to `KEPT` bytes, beside four numbers for each that moves.

    Args:
        artifact: The `.tenpak`, of a model of the GPT-2 or Llama family.
        output: The `.tenpak` to write; may be `artifact`, with `force`.
        original: What it was made from: a Hugging Face folder, a weight file with `config.json` beside it, or an open
            decoder on the same device.
        text: The text itself as a `str`, a UTF-8 file as a `Path`, or tokens; None lets the original sample text.
        windows: How many windows of the text to use, spread over all of it, or to sample, of which every eighth is
            kept for the comparison; None for 128 of a text, or 64 samples.
        context: Tokens in a window; None for 1024, or as many as the model was made for.
        epochs: How often each window is learned from.
        seed: For sampling, and for the order of windows.
        device: Where to compute; `cuda` needs CuPy.
        force: Replace an existing output.
        progress: Called with steps done and in all, and what they are.

    Raises:
        UsageError: A wrong option, too little text, an original of another shape, or a package that is missing.
        InputError, ArtifactError, UnsupportedError, StorageError: As for `Decoder.open`.
    """
    for name, value, least in (("windows", windows, 2), ("context", context, 2), ("epochs", epochs, 1)):
        if value is not None and value < least:
            raise UsageError(f"{name} {value} is too small; give at least {least}")
    refuse_existing(output, force, original, text if isinstance(text, Path) else None)
    start = time.perf_counter()
    xp = array_module(device)
    student, stored = open_artifact(artifact, xp)
    teacher = original if isinstance(original, Decoder) else Decoder.open(original, xp=xp)
    if teacher.xp is not xp:
        raise UsageError("artifact and original must be on the same device")
    if teacher.config != student.config:
        raise UsageError(f"{student.source.path} was not made from {teacher.source.path}: their configs differ")
    tokens = windows_to_learn(teacher, text, windows, context, seed, progress)
    if len(tokens) < 2:
        raise UsageError("the text has less than two windows; give more of it, or a smaller context")
    tuner = _Tuner(student, stored, teacher, tokens, epochs, progress)
    before, after = tuner.run(np.random.default_rng(checked_seed(seed)))
    better = after < before
    parts = tuner.parts() if better else []
    root, file_bytes = _core.replace_parts(os.fspath(artifact), os.fspath(output), parts, force)
    return TuneReport(
        artifact=os.fspath(artifact),
        original=teacher.source.path,
        text="sampled" if text is None else str(text) if isinstance(text, Path) else "given",
        device=device,
        windows=len(tuner.learned),
        context=tokens.shape[1],
        epochs=epochs,
        moved=sum(int(m.moves.size) for m in tuner.movables.values()),
        divergence_before=before,
        divergence=after if better else before,
        better=better,
        root=root,
        file_bytes=file_bytes,
        seconds=time.perf_counter() - start,
    )


class _Tuner:
    """One artifact on its way."""

    def __init__(
        self,
        student: Decoder,
        stored: ArtifactFile,
        teacher: Decoder,
        tokens: NDArray[np.int64],
        epochs: int,
        progress: StageProgress | None,
    ) -> None:
        self.student, self.tokens, self._epochs, self._progress = student, tokens, epochs, progress
        self._xp, self._head = student.xp, teacher.head
        #: Windows to compare with, and those that are learned from.
        self.compared = list(range(0, len(tokens), HELD_OUT))
        self.learned = [i for i in range(len(tokens)) if i % HELD_OUT]
        self._at_once = max(1, TOKENS_AT_ONCE // tokens.shape[1])
        self._done = 0
        passes = len(tokens) + 2 * len(self.compared) + epochs * len(self.learned)
        self._total = passes * student.config.layers
        #: By the tensor's name: of linear layers, and of norms.
        self.weights: dict[str, MovableWeight] = {}
        self.gains: dict[str, Gain] = {}
        #: Layers as they are stored.
        self._kept: list[Block] = []
        #: Whether what has moved is as it will be stored.
        self.rounded = False
        room = KEPT
        for index in range(student.config.layers):
            block = student.block(index)
            for name in block.linears:
                if (movable := of_linear(stored, name, self._xp)) is not None:
                    self.weights[name] = movable
            for norm in (getattr(block, which) for which in NORMS):
                self._add_gain(stored, norm)
            room -= sum(linear.weight.nbytes for linear in block.linears.values())
            if room >= 0:
                self._kept.append(block)
        self._add_gain(stored, student.head.norm)
        self._wanted = self._hidden(teacher)

    @property
    def movables(self) -> dict[str, Movable]:
        """All that moves, by the tensor's name."""
        return {**self.weights, **self.gains}

    def _add_gain(self, stored: ArtifactFile, norm: Any) -> None:
        if norm is not None and (gain := gain_of(stored, norm.name, norm.weight, self._xp)) is not None:
            self.gains[norm.name] = gain

    def run(self, random: np.random.Generator) -> tuple[float, float]:
        """Learns; the divergence before and after, of what will be stored."""
        before = self._divergence()
        order: list[int] = []
        for _ in range(self._epochs):
            order += [self.learned[i] for i in random.permutation(len(self.learned))]
        steps = math.ceil(len(order) / self._at_once)
        movables = self.movables
        moments = {name: (self._xp.zeros_like(m.moves), self._xp.zeros_like(m.moves)) for name, m in movables.items()}
        for step in range(steps):
            # It rises, then falls along a cosine.
            rate = min(1.0, (step + 1) / _WARM_UP) * (1 + math.cos(math.pi * step / steps)) / 2
            gradients = self._gradients(order[step * self._at_once : (step + 1) * self._at_once])
            for name, gradient in gradients.items():
                self._move(movables[name], gradient, moments[name], step + 1, rate)
        self.rounded = True
        return before, self._divergence()

    def parts(self) -> list[tuple[str, str, NDArray[Any]]]:
        """What is to be stored, by tensor and part."""
        return parts_of(self.movables)

    def _move(self, movable: Movable, gradient: Any, moments: tuple[Any, Any], step: int, rate: float) -> None:
        mean, square = moments
        first, second = _DECAYS
        mean *= np.float32(first)
        mean += np.float32(1 - first) * gradient
        square *= np.float32(second)
        square += np.float32(1 - second) * gradient * gradient
        down = self._xp.sqrt(square / np.float32(1 - second**step)) + np.float32(_TINY)
        movable.moves -= np.float32(rate * movable.rate / (1 - first**step)) * mean / down

    def block(self, index: int) -> tuple[Block, Block]:
        """A layer with all that has moved, and as it is stored."""
        stored = self._kept[index] if index < len(self._kept) else self.student.block(index)
        moved = copy.copy(stored)
        moved.linears = {name: self._moved_linear(linear) for name, linear in stored.linears.items()}
        for which in NORMS:
            setattr(moved, which, self._moved_norm(getattr(stored, which)))
        return moved, stored

    def head(self) -> Head:
        """The same of the head."""
        stored = self.student.head
        return Head(self._moved_norm(stored.norm), stored.linear)

    def _moved_linear(self, linear: Linear) -> Linear:
        movable = self.weights.get(linear.name)
        if movable is None:
            return linear
        return Linear(linear.name, movable.rebuilt(linear.weight, rounded=self.rounded), linear.bias)

    def _moved_norm(self, norm: Any) -> Any:
        if norm is None or norm.name not in self.gains:
            return norm
        moved = copy.copy(norm)
        moved.weight = self.gains[norm.name].rebuilt(rounded=self.rounded)
        return moved

    def _gradients(self, windows: list[int]) -> dict[str, Any]:
        """Of the mean divergence over some windows, at the moves."""
        layers, sums = range(self.student.config.layers), dict[str, Any]()

        def add_gain(norm: Any, gradient: Any) -> None:
            if norm.name in self.gains:
                sums[norm.name] = self.gains[norm.name].gradient(gradient)

        def add_norm(norm: Any, x: Any, d: Any) -> None:
            add_gain(norm, gain_backward(norm, x, d, xp=self._xp))

        hidden = [self.student.embed(self.tokens[windows])]
        for index in layers:
            hidden.append(self.block(index)[0](hidden[-1]))
        _, d, gain = self._loss(hidden.pop(), windows, backward=True)
        add_gain(self.student.head.norm, gain)
        for index in reversed(layers):
            block, stored = self.block(index)

            def add_weights(names: tuple[str, ...], x: Any, gradients: list[Any], stored: Block = stored) -> None:
                x = x.reshape(-1, x.shape[-1])
                for name, g in zip(names, gradients, strict=True):
                    if name in self.weights:
                        at_weight = g.reshape(-1, g.shape[-1]).T @ x
                        sums[name] = self.weights[name].gradient(at_weight, stored.linears[name].weight)

            d = block.backward(hidden.pop(), d, add_weights, add_norm)
            self._step(len(windows))
        return sums

    def _divergence(self) -> float:
        """Over the windows that are not learned from, in nats per position."""
        batches = [self.compared[i : i + self._at_once] for i in range(0, len(self.compared), self._at_once)]
        hidden = [self.student.embed(self.tokens[windows]) for windows in batches]
        for index in range(self.student.config.layers):
            block, _ = self.block(index)
            for i, h in enumerate(hidden):
                hidden[i] = block(h)
                self._step(len(h))
        losses = [self._loss(h, windows, backward=False)[0] for h, windows in zip(hidden, batches, strict=True)]
        return sum(loss * len(windows) for loss, windows in zip(losses, batches, strict=True)) / len(self.compared)

    def _loss(self, h: Any, windows: list[int], *, backward: bool) -> tuple[float, Any, Any]:
        """The mean divergence of hidden states [batch, T, width]; its gradients there and at the last norm's gain."""
        xp, head = self._xp, self.head()
        flat = h.reshape(-1, h.shape[-1])
        wanted = xp.asarray(np.concatenate([self._wanted[i] for i in windows]))
        loss, gain, d = 0.0, 0.0, xp.empty_like(flat) if backward else None
        for first in range(0, len(flat), POSITIONS):
            here = flat[first : first + POSITIONS]
            log_p, log_q = (_log_softmax(x, xp) for x in (self._head(wanted[first : first + POSITIONS]), head(here)))
            p = xp.exp(log_p)
            loss += float((p * (log_p - log_q)).sum(dtype=np.float64)) / len(flat)
            if d is not None:
                d_normed = (xp.exp(log_q) - p) @ head.linear.weight / np.float32(len(flat))
                gain = gain + gain_backward(head.norm, here, d_normed, xp=xp)
                d[first : first + POSITIONS] = norm_backward(head.norm, here, d_normed, xp=xp)
        return loss, None if d is None else d.reshape(h.shape), gain

    def _hidden(self, teacher: Decoder) -> list[NDArray[np.float32]]:
        """What the original's head is given, for each window [T, width]; of its weights one layer is in memory."""
        at = [slice(i, i + self._at_once) for i in range(0, len(self.tokens), self._at_once)]
        hidden = [teacher.embed(self.tokens[batch]) for batch in at]
        for index in range(teacher.config.layers):
            block = teacher.block(index)
            for i, h in enumerate(hidden):
                hidden[i] = block(h)
                self._step(len(h))
        return [window if self._xp is np else self._xp.asnumpy(window) for h in hidden for window in h]

    def _step(self, windows: int) -> None:
        self._done += windows
        if self._progress is not None:
            self._progress(self._done, self._total, "tuning")


def _log_softmax(x: Any, xp: Any) -> Any:
    x -= x.max(axis=-1, keepdims=True)
    x -= xp.log(xp.exp(x).sum(axis=-1, keepdims=True))
    return x
