"""Statistics of linear layers' inputs from a PyTorch model of any architecture, by hooks."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch

from tenpak.cuda.linear import is_linear
from tenpak.errors import UsageError
from tenpak.statistics import StatisticsWriter

#: Bytes of second moments that are in memory at once; what does not fit is gathered in another pass.
MEMORY = 4 << 30


@dataclass(frozen=True)
class StatisticsReport:
    """What was gathered."""

    #: Distinct inputs, and weights that read them.
    inputs: int
    weights: int
    #: Tokens that the input of most tokens saw.
    tokens: int
    #: How often the model went over the batches.
    passes: int
    file_bytes: int
    seconds: float


def collect_statistics(
    model: torch.nn.Module,
    batches: Iterable[Any],
    output: str | os.PathLike[str],
    *,
    diagonal: bool = False,
    memory: int = MEMORY,
    force: bool = False,
) -> StatisticsReport:
    """Writes E[x xᵀ] of what each linear layer reads, for `tenpak.compress(…, calibration=output)`.

    Layers that are given the very same tensor share its statistics. Sums are FP32, on the layer's own device. The
    model's gradients and training mode are left as they were.

    Args:
        model: Its `nn.Linear` layers, and `Conv1D` of transformers, are looked at; names of weights are those of its
            state dict, as in the model's files.
        batches: What the model is called with: a tensor, a mapping (as keywords) or a tuple (as arguments) each. A
            list, or anything else that can be gone over again, if one pass does not do.
        output: The `.safetensors` file.
        diagonal: Only E[x_j²], which takes little memory and suits the encoder `diag`.
        memory: Bytes for second moments; more of them means more passes over the batches.
        force: Replace an existing output.

    Raises:
        UsageError: The model has no linear layers, or calls none; `batches` is empty, or cannot be gone over twice.
        StorageError: The file system refused.
    """
    layers = {module: f"{name}.weight" for name, module in model.named_modules() if is_linear(module)}
    if not layers:
        raise UsageError("the model has no linear layers")
    start = time.perf_counter()
    was_training = model.training
    model.eval()
    try:
        with StatisticsWriter(output, force=force) as writer, torch.inference_mode():
            leaders = _leaders(model, layers, batches)
            passes = list(_passes(leaders, diagonal, memory))
            if len(passes) > 1 and isinstance(batches, Iterator):
                raise UsageError(
                    f"{len(passes)} passes over the batches are needed, but they can be gone over once; "
                    "give a list, or more memory"
                )
            tokens = 0
            for chosen in passes:
                for module, sums in _gather(model, chosen, batches, diagonal).items():
                    mean = (sums.total / sums.tokens).cpu().numpy()
                    names = [layers[follower] for follower in leaders[module]]
                    if diagonal:
                        writer.add(names, sums.tokens, mean, None)
                    else:
                        writer.add(names, sums.tokens, np.diagonal(mean).copy(), mean)
                    tokens = max(tokens, sums.tokens)
            # The model in memory need not be any file's, so no digest is claimed.
            writer.finish({"model": "", "text": "", "origin": "torch", "sequential": None})
    finally:
        model.train(was_training)
    return StatisticsReport(
        inputs=len(leaders),
        weights=sum(map(len, leaders.values())),
        tokens=tokens,
        passes=len(passes),
        file_bytes=os.path.getsize(output),
        seconds=time.perf_counter() - start,
    )


@dataclass
class _Sums:
    total: torch.Tensor
    tokens: int


#: Each layer that is the first to read an input, with all that read it.
_Leaders = dict[torch.nn.Module, list[torch.nn.Module]]


def _leaders(model: torch.nn.Module, layers: Mapping[torch.nn.Module, str], batches: Iterable[Any]) -> _Leaders:
    """Finds in one call which layers are given the same tensor."""
    if isinstance(batches, Iterator):
        # What an iterator has given is gone; without a first call every layer is its own leader.
        return {module: [module] for module in layers}
    leaders: _Leaders = {}
    seen: list[tuple[Any, torch.nn.Module]] = []
    called: set[torch.nn.Module] = set()

    def look(module: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
        if module in called:
            return
        called.add(module)
        for tensor, leader in seen:
            if tensor is arguments[0]:
                leaders[leader].append(module)
                return
        # The tensors are held, so that no other takes their place meanwhile; layers share the latest ones.
        seen[:] = [*seen[-3:], (arguments[0], module)]
        leaders[module] = [module]

    with _Hooked(layers, look):
        for batch in batches:
            _call(model, batch)
            break
        else:
            raise UsageError("there are no batches to gather statistics from")
    if not leaders:
        raise UsageError("the model called none of its linear layers")
    # Layers that the first batch did not reach, experts for example, are watched on their own.
    return leaders | {module: [module] for module in layers if module not in called}


def _passes(leaders: _Leaders, diagonal: bool, memory: int) -> Iterator[list[torch.nn.Module]]:
    chosen: list[torch.nn.Module] = []
    used = 0
    for module in leaders:
        width = _width(module)
        size = 4 * width * (1 if diagonal else width)
        if chosen and used + size > memory:
            yield chosen
            chosen, used = [], 0
        chosen.append(module)
        used += size
    yield chosen


def _gather(
    model: torch.nn.Module, chosen: list[torch.nn.Module], batches: Iterable[Any], diagonal: bool
) -> dict[torch.nn.Module, _Sums]:
    sums: dict[torch.nn.Module, _Sums] = {}

    def add(module: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
        x = arguments[0].reshape(-1, arguments[0].shape[-1]).float()
        if module not in sums:
            shape = (x.shape[1],) if diagonal else (x.shape[1], x.shape[1])
            sums[module] = _Sums(torch.zeros(shape, dtype=torch.float32, device=x.device), 0)
        total = sums[module]
        if diagonal:
            total.total += x.square().sum(dim=0)
        else:
            total.total.addmm_(x.T, x)
        total.tokens += len(x)

    with _Hooked(chosen, add):
        for batch in batches:
            _call(model, batch)
    return {module: sums[module] for module in chosen if module in sums and sums[module].tokens}


class _Hooked:
    """Calls a function before each of some layers, for as long as the block lasts."""

    def __init__(self, modules: Iterable[torch.nn.Module], call: Any) -> None:
        self._handles = [module.register_forward_pre_hook(call) for module in modules]

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()


def _call(model: torch.nn.Module, batch: Any) -> None:
    if isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, tuple):
        model(*batch)
    else:
        model(batch)


def _width(module: torch.nn.Module) -> int:
    rows, columns = cast(torch.Tensor, module.weight).shape
    return int(columns if isinstance(module, torch.nn.Linear) else rows)
