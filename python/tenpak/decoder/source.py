"""Where a decoder's weights come from: an artifact, or any model that Tenpak's core reads."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tenpak import _core
from tenpak import artifact as _artifact
from tenpak.errors import InputError, StorageError, UnsupportedError, UsageError

_MAGIC = b"\x89TPK"


class Source(Protocol):
    """Weights by name, and the small files that belong to them."""

    @property
    def path(self) -> str:
        """Where the model is."""

    @property
    def config(self) -> dict[str, Any]:
        """The object of `config.json`."""

    @property
    def tokenizer_json(self) -> bytes | None:
        """The file `tokenizer.json`, if there is one."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every name that can be read, aliases too, with its shape as it is stored."""

    def file(self, name: str) -> bytes | None:
        """A small file that belongs to the model, such as `tokenizer_config.json`, if there is one of that name."""

    def read(self, name: str) -> NDArray[np.float32]:
        """One tensor in the shape in which it is stored; each call reads it again."""

    def digest(self) -> str:
        """What the weights are, in hexadecimal: an artifact's root, or BLAKE3 of all tensors."""


def open_source(path: str | os.PathLike[str]) -> Source:
    """Opens a `.tenpak`, a Hugging Face folder, a GGUF file, or a weight file with `config.json` beside it.

    Raises:
        StorageError: It cannot be read.
        InputError: It is no model, or it has no `config.json`.
        ArtifactError: The artifact is damaged.
        UnsupportedError: A format whose models cannot be run.
        UsageError: A delta, which is a model only together with its base.
    """
    path = os.fspath(path)
    return ArtifactSource(path) if _is_artifact(path) else ModelSource(path)


class ArtifactSource:
    """An artifact, with config and tokenizer embedded."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.artifact = _artifact.open(path)
        if self.artifact.delta is not None:
            raise UsageError(
                f"{path}: this file is a delta; `tenpak materialize --base BASE --delta {path} --output MODEL` "
                "restores the model"
            )
        text = self.file("config.json")
        if text is None:
            if "gguf_metadata.json" in self.artifact.files:
                raise UnsupportedError(f"{path}: it comes from a GGUF file of a kind that cannot be run")
            raise InputError(f"{path}: no config.json is embedded; compress the model's folder, which has it")
        self.config: dict[str, Any] = _object(path, text)
        self.shapes = {name: self.artifact.info(name).shape for name in self.artifact}

    @property
    def tokenizer_json(self) -> bytes | None:
        return self.file("tokenizer.json")

    def read(self, name: str) -> NDArray[np.float32]:
        return self.artifact.read(name, np.float32)

    def digest(self) -> str:
        return self.artifact.root

    def file(self, name: str) -> bytes | None:
        return self.artifact.file(name) if name in self.artifact.files else None


class ModelSource:
    """A model as another tool wrote it."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._core = _core.Model(path)
        holds_all = os.path.isdir(path) or self._core.format() == "GGUF"
        self._beside = None if holds_all else Path(path).parent
        text = self.file("config.json")
        if text is None and self._core.format() == "GGUF":
            # The first note says why.
            raise UnsupportedError(next(iter(self._core.notes()), f"{path}: the model cannot be run"))
        if text is None:
            where = "in this folder" if self._beside is None else "beside this file"
            raise InputError(f"{path}: there is no config.json {where}, which says how to run the weights")
        self.config: dict[str, Any] = _object(path, text)
        self.shapes = {name: tuple(shape) for name, shape, _ in self._core.tensors()}

    @property
    def tokenizer_json(self) -> bytes | None:
        return self.file("tokenizer.json")

    def read(self, name: str) -> NDArray[np.float32]:
        out = np.empty(self.shapes[name], np.float32)
        self._core.read(name, 0, out.reshape(-1).view(np.uint8))
        return out

    def digest(self) -> str:
        return self._core.digest()

    def file(self, name: str) -> bytes | None:
        if self._beside is None:
            return self._core.sidecar(name)
        beside = self._beside / name
        try:
            return beside.read_bytes() if beside.is_file() else None
        except OSError as error:
            raise StorageError(f"cannot read {beside}: {error.strerror}") from error


def _is_artifact(path: str) -> bool:
    if path.endswith(".tenpak") and os.path.isfile(path):
        # Also where the first bytes are damaged, so that the message is about an artifact.
        return True
    try:
        with open(path, "rb") as file:
            return file.read(len(_MAGIC)) == _MAGIC
    except (OSError, ValueError):
        # A folder, or no path at all; or the core says in its own words what is wrong.
        return False


def _object(path: str, text: bytes) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise InputError(f"{path}: config.json is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: config.json holds no object")
    return value
