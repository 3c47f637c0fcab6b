"""PyTorch models: linear layers with quantised weights, in place.

from tenpak.torch import quantize_model

model = AutoModelForCausalLM.from_pretrained("gpt2", dtype="float16").cuda()
report = quantize_model(model, codec="int4_g16_v1")
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from tenpak.codecs import find as codec_named
from tenpak.cuda.layouts import find as layout_named
from tenpak.cuda.linear import G8Linear, is_linear
from tenpak.errors import UsageError
from tenpak.hooks import StatisticsReport, collect_statistics
from tenpak.report import Report

__all__ = [
    "G8Linear",
    "LayerReport",
    "QuantizeReport",
    "StatisticsReport",
    "collect_statistics",
    "quantize_model",
]

#: Names that are left alone unless asked otherwise: heads are few weights and lose most.
HEAD = "lm_head"


@dataclass(frozen=True)
class LayerReport:
    """One linear layer of the model."""

    name: str
    #: The weight as the model has it: [out, in], or [in, out] for `Conv1D`.
    shape: tuple[int, ...]
    #: The codec; `keep: …`, why the layer was left alone; or `alias: …`, another name of the same layer.
    action: str
    #: Bytes of the weight before and after; 0 for an alias.
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class QuantizeReport(Report):
    """What `quantize_model` did."""

    codec: str
    layers: tuple[LayerReport, ...]

    @property
    def quantized(self) -> tuple[LayerReport, ...]:
        """The layers that were replaced, each once."""
        return tuple(layer for layer in self.layers if layer.action == self.codec)

    @property
    def kept(self) -> tuple[LayerReport, ...]:
        """The linear layers that were left alone."""
        return tuple(layer for layer in self.layers if layer.action.startswith("keep: "))

    @property
    def bytes_before(self) -> int:
        """Bytes of the replaced weights before."""
        return sum(layer.bytes_before for layer in self.quantized)

    @property
    def bytes_after(self) -> int:
        """Bytes of the replaced weights now."""
        return sum(layer.bytes_after for layer in self.quantized)


def quantize_model(
    model: torch.nn.Module, codec: str = "int4_g8_fp16_v1", skip: str | Iterable[str] = (HEAD,)
) -> QuantizeReport:
    """Replaces a model's linear layers by `G8Linear`, one after another, where they are.

    A layer that is used under several names stays one layer. Layers inside `torch.nn.MultiheadAttention`, which reads
    their weights itself, and those whose weight another module shares (tied embeddings) are left alone.

    Args:
        model: Any module; layers inside are replaced, so it must not itself be one.
        codec: A name from `tenpak.codecs()`.
        skip: Regular expressions; layers in whose full name one is found are left alone. `()` skips none.

    Raises:
        UsageError: An unknown codec, a wrong pattern, or a model without linear layers.
        InputError: A weight is NaN or infinite; the text names the layer. Layers before it have been replaced.
    """
    layout_named(codec_named(codec).layout)
    patterns = _patterns(skip)
    if is_linear(model):
        raise UsageError("the model is itself a linear layer; use G8Linear.from_linear")
    shared = _shared_weights(model)
    # By id, so that a weight goes before the next layer's is encoded; every layer looked up was there from the start.
    made: dict[int, tuple[str, G8Linear]] = {}
    layers: list[LayerReport] = []
    for name, parent, child in list(_linears(model)):
        layer = getattr(parent, child)
        if isinstance(layer, G8Linear):  # its parent has several names
            first = next(first for first, replacement in made.values() if replacement is layer)
            layers.append(LayerReport(name, (layer.out_features, layer.in_features), f"alias: {first}", 0, 0))
            continue
        weight = layer.weight
        reason = None
        if any(pattern.search(name) for pattern in patterns):
            reason = "keep: skipped"
        elif isinstance(parent, torch.nn.MultiheadAttention):
            reason = "keep: its parent reads the weight"
        elif id(weight) in shared:
            reason = "keep: its weight is shared"
        elif not weight.is_floating_point():
            reason = f"keep: its weight is {str(weight.dtype).removeprefix('torch.')}"
        shape, before = tuple(weight.shape), weight.nbytes
        if reason is not None:
            layers.append(LayerReport(name, shape, reason, before, before))
        elif id(layer) in made:
            first, replacement = made[id(layer)]
            setattr(parent, child, replacement)
            layers.append(LayerReport(name, shape, f"alias: {first}", 0, 0))
        else:
            replacement = _replacement(name, layer, codec)
            setattr(parent, child, replacement)
            made[id(layer)] = name, replacement
            layers.append(LayerReport(name, shape, codec, before, replacement.nbytes))
    if not layers:
        raise UsageError(f"{type(model).__name__} has no linear layers")
    _release_memory()
    return QuantizeReport(codec, tuple(layers))


def _replacement(name: str, layer: torch.nn.Module, codec: str) -> G8Linear:
    try:
        return G8Linear.from_linear(layer, codec)
    except Exception as error:
        error.args = (f"{name}: {error}", *error.args[1:])
        raise


def _linears(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module, str]]:
    """Full name, parent and the parent's name of every linear layer, under each of its names."""
    for name, layer in model.named_modules(remove_duplicate=False):
        if name and is_linear(layer):
            parent, _, child = name.rpartition(".")
            yield name, model.get_submodule(parent), child


def _shared_weights(model: torch.nn.Module) -> set[int]:
    """Parameters that more than one module has, by id."""
    owners: dict[int, set[int]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), set()).add(id(module))
    return {parameter for parameter, modules in owners.items() if len(modules) > 1}


def _patterns(skip: str | Iterable[str]) -> list[re.Pattern[str]]:
    found = []
    for pattern in (skip,) if isinstance(skip, str) else skip:
        try:
            found.append(re.compile(pattern))
        except re.error as error:
            raise UsageError(f"skip: {pattern!r} is no regular expression: {error}") from error
    return found


def _release_memory() -> None:
    """Gives back what CuPy keeps for later, of which PyTorch knows nothing."""
    if "cupy" in sys.modules and torch.cuda.is_available():
        sys.modules["cupy"].get_default_memory_pool().free_all_blocks()
