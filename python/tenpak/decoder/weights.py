"""Weights of a source on an array module, with the names and shapes that its config asks for."""

from __future__ import annotations

from typing import Any

from tenpak.decoder.config import Config
from tenpak.decoder.linear import Linear
from tenpak.decoder.source import Source
from tenpak.errors import InputError

HEAD = "lm_head.weight"

#: What stands before a decoder's names where a model has an output head.
_PREFIXES = {"gpt2": "transformer.", "llama": "model."}


class Weights:
    """Reads arrays and linear layers; each call reads again, so that nothing is kept here.

    With `linears` False the weights of linear layers are checked but not read, and None in their place: for callers
    that take them from the source in another form.
    """

    def __init__(self, source: Source, config: Config, *, xp: Any, linears: bool = True) -> None:
        self.source, self.config, self.xp, self.linears = source, config, xp, linears
        prefix = _PREFIXES[config.family]
        # Models that were saved without their head lack it.
        self.prefix = prefix if any(name.startswith(prefix) for name in source.shapes) else ""

    def array(self, name: str, *shape: int) -> Any:
        """The tensor `<prefix><name>`."""
        return self._read(self.prefix + name, shape)

    def linear(self, name: str, out: int, width: int, bias: bool) -> Linear:
        """The layer with tensors `<prefix><name>.weight` and, if `bias`, `.bias`."""
        name = self.prefix + name
        stored = (width, out) if self.config.input_axis == 0 else (out, width)
        weight = self._matrix(name + ".weight", stored)
        return Linear(
            name + ".weight",
            weight.T if self.linears and self.config.input_axis == 0 else weight,
            self._read(name + ".bias", (out,)) if bias else None,
        )

    def head(self) -> Linear:
        """The output head of a model that has one beside its embedding."""
        return Linear(HEAD, self._matrix(HEAD, (self.config.vocab, self.config.width)))

    def _matrix(self, name: str, shape: tuple[int, ...]) -> Any:
        if self.linears:
            return self._read(name, shape)
        self._check(name, shape)
        return None

    def _read(self, name: str, shape: tuple[int, ...]) -> Any:
        self._check(name, shape)
        return self.xp.asarray(self.source.read(name))

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        stored = self.source.shapes.get(name)
        if stored is None:
            raise InputError(f"{self.source.path}: there is no tensor {name!r}, which its config.json asks for")
        if stored != shape:
            wanted = " x ".join(map(str, shape))
            raise InputError(
                f"{self.source.path}: {name!r} is {' x '.join(map(str, stored))}, its config.json asks for {wanted}"
            )
