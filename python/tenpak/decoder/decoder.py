"""A whole decoder: text to tokens, tokens to hidden states, through its blocks, to logits."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from tenpak.decoder import gpt2, llama
from tenpak.decoder.block import Block
from tenpak.decoder.cache import Cache
from tenpak.decoder.config import Config
from tenpak.decoder.kv import QuantizedCache, checked_kv
from tenpak.decoder.layers import LayerNorm, RMSNorm, Rotary
from tenpak.decoder.linear import Linear
from tenpak.decoder.source import Source, open_source
from tenpak.decoder.weights import Weights
from tenpak.errors import InputError, UnsupportedError, UsageError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class Head:
    """The last norm and the output head."""

    def __init__(self, norm: LayerNorm | RMSNorm, linear: Linear) -> None:
        self.norm = norm
        #: Its name is the embedding's where that is the head; may be replaced.
        self.linear = linear

    def __call__(self, h: Any) -> Any:
        """[…, width] to logits, […, vocab]."""
        return self.linear(self.norm(h))


class Decoder:
    """A model of the GPT-2 or Llama family, in FP32 on an array module.

    Arrays are the module's own; tokens may come as any array or list of integers.
    """

    def __init__(self, source: Source, *, xp: Any = np) -> None:
        self.source = source
        #: The array module, NumPy or CuPy.
        self.xp = xp
        #: Where linear layers are computed: `cpu`, `cuda`, or what took them over.
        self.device = "cpu" if xp is np else "cuda"
        try:
            self.config = Config.parse(source.config)
        except (InputError, UnsupportedError) as error:
            raise type(error)(f"{source.path}: {error}") from None
        self._weights = Weights(source, self.config, xp=xp)
        rope = self.config.rope
        self._rotary = None if rope is None else Rotary(rope, self.config.head_dim, xp=xp)

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, xp: Any = np) -> Decoder:
        """Opens a `.tenpak`, a Hugging Face folder, a GGUF file, or a weight file with `config.json` beside it.

        Raises:
            StorageError: It cannot be read.
            InputError: It is no model, or its config is missing or makes no sense.
            ArtifactError: The artifact is damaged.
            UnsupportedError: A kind of model that cannot be run.
        """
        return cls(open_source(path), xp=xp)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer.

        Raises:
            UsageError: The package `tokenizers` is not installed.
            InputError: The model has no `tokenizer.json`, or it cannot be read.
        """
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise UsageError("text needs the package tokenizers; pip install 'tenpak[text]'") from None
        text = self.source.tokenizer_json
        if text is None:
            raise InputError(f"{self.source.path}: the model has no tokenizer.json; give tokens instead of text")
        try:
            tokenizer = Tokenizer.from_str(text.decode())
        except Exception as error:  # The package raises plain exceptions.
            raise InputError(f"{self.source.path}: tokenizer.json cannot be read: {error}") from error
        # What a model's makers cut or filled batches to says nothing of texts here.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    def encode_text(self, text: str) -> list[int]:
        """The text's tokens, and no special ones around them."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def embed(self, tokens: ArrayLike, start: int = 0) -> Any:
        """Tokens [batch, T] at positions `start …` as hidden states, [batch, T, width].

        Raises:
            UsageError: They are not two-dimensional, lie outside the vocabulary, or pass the last position that a
                GPT-2 has learnt.
        """
        checked = self._checked(tokens)
        h = self._embedding[checked]
        if self.config.family == "gpt2":
            end, limit = start + checked.shape[1], self.config.max_positions
            if end > limit:
                raise UsageError(f"{end} positions are too many: {self.source.path} has learnt {limit}")
            h += self.positions[start:end]
        return h

    def block(self, index: int, *, linears: bool = True) -> Block:
        """Loads one layer; it lives as long as the caller holds it.

        With `linears` False the weights of its linear layers are not read, and None: for callers that take them from
        the source, by their names, in another form.
        """
        if not 0 <= index < self.config.layers:
            raise UsageError(f"there is no layer {index}; {self.source.path} has {self.config.layers}")
        weights = self._weights if linears else self._without_linears
        if self._rotary is None:
            return gpt2.GPT2Block(weights, index)
        return llama.LlamaBlock(weights, index, self._rotary)

    @cached_property
    def head(self) -> Head:
        """The last norm and the output head: hidden states to logits."""
        return self._head(self._weights, self._embedding if self.config.tied else None)

    @cached_property
    def unread_head(self) -> Head:
        """The same, its linear layer's weight not being read, and None."""
        return self._head(self._without_linears, None)

    def _head(self, weights: Weights, embedding: Any) -> Head:
        width = self.config.width
        norm = gpt2.norm(weights, "ln_f") if self._rotary is None else llama.norm(weights, "norm", width)
        return Head(norm, Linear(self.embedding_name, embedding) if self.config.tied else weights.head())

    @cached_property
    def _without_linears(self) -> Weights:
        return Weights(self.source, self.config, xp=self.xp, linears=False)

    @cached_property
    def blocks(self) -> list[Block]:
        """All layers, loaded once and kept."""
        return [self.block(index) for index in range(self.config.layers)]

    def replace_linears(self, make: Callable[[Linear], Any]) -> int:
        """Puts what `make` returns in the place of every linear layer, the head's too; it may return what it got.

        Layer by layer, so that only one layer's weights need to be in memory as they were. Returns how many were
        replaced.
        """
        loaded: list[Block] | None = self.__dict__.get("blocks")
        blocks, count = [], 0
        for index in range(self.config.layers):
            block = self.block(index) if loaded is None else loaded[index]
            for name, linear in block.linears.items():
                block.linears[name] = make(linear)
                count += block.linears[name] is not linear
            blocks.append(block)
        self.blocks = blocks
        before = self.head.linear
        self.head.linear = make(before)
        return count + (self.head.linear is not before)

    def cache(self, kv: str | None = None, *, room: int = 0) -> Cache:
        """An empty cache for `hidden` and `logits`.

        Args:
            kv: "fp16", "int8" or "int4", to read what a `tenpak.cuda.KVCache` of that kind would hold; None for FP32.
            room: Positions that an FP32 one makes room for from the first; it grows beyond them.
        """
        if kv is None:
            return Cache(self.config.layers, xp=self.xp, room=room)
        return QuantizedCache(self.config.layers, checked_kv(kv), xp=self.xp)

    def hidden(self, tokens: ArrayLike, cache: Cache | None = None) -> Any:
        """What the head is given for tokens [batch, T] that follow those in the cache: [batch, T, width]."""
        start = 0 if cache is None else cache.length
        h = self.embed(tokens, start)
        for block in self.blocks:
            h = block(h, start, cache)
        return h

    def logits(self, tokens: ArrayLike, cache: Cache | None = None) -> Any:
        """Scores of each next token for tokens [batch, T] that follow those in the cache: [batch, T, vocab].

        All layers are loaded by the first call, and kept.
        """
        return self.head(self.hidden(tokens, cache))

    @property
    def embedding_name(self) -> str:
        """The name of the embedding's tensor, [vocab, width]."""
        return self._weights.prefix + self._embedding_tensor

    @property
    def _embedding_tensor(self) -> str:
        return gpt2.EMBEDDING if self._rotary is None else llama.EMBEDDING

    @cached_property
    def _embedding(self) -> Any:
        return self._weights.array(self._embedding_tensor, self.config.vocab, self.config.width)

    @cached_property
    def positions(self) -> Any:
        """What is added to the embeddings of each position where these are learnt: [max_positions, width]."""
        return self._weights.array(gpt2.POSITIONS, self.config.max_positions, self.config.width)

    def _checked(self, tokens: ArrayLike) -> Any:
        array: Any = np.asarray(tokens) if isinstance(tokens, list | tuple) else tokens
        if array.ndim != 2 or array.dtype.kind not in "iu" or array.size == 0:
            raise UsageError(
                f"tokens must be integers in two dimensions, [batch, positions]; these are {array.dtype} {array.shape}"
            )
        low, high = int(array.min()), int(array.max())
        if low < 0 or high >= self.config.vocab:
            wrong = low if low < 0 else high
            raise UsageError(f"token {wrong} is outside the vocabulary of {self.config.vocab} of {self.source.path}")
        return self.xp.asarray(array)
