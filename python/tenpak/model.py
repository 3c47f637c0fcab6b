"""A model that writes: text in, text out, on a CPU or a GPU.

model = tenpak.Model.open("model.tenpak")
print(model.generate("The lighthouse keeper", max_tokens=40))
for piece in model.stream("The lighthouse keeper", temperature=0.8, seed=7):
    print(piece, end="", flush=True)
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from tenpak.chat import ChatTemplate, Message, token_text, tokenizer_config
from tenpak.decoder import Decoder
from tenpak.decoder.kv import KVType, checked_kv
from tenpak.detokenize import Detokenizer
from tenpak.errors import InputError, UsageError
from tenpak.evaluate import array_module, open_on
from tenpak.sampling import Sampling, choose

#: Tokens of a prompt that are computed at once.
CHUNK = 256

#: Why text ended: the model's end token, a stop text, or no more tokens were allowed or possible.
StopReason = Literal["end", "stop", "length"]


@dataclass(frozen=True)
class Generation:
    """A text that a model has written."""

    text: str
    #: Its tokens, the one that ended it included.
    tokens: tuple[int, ...]
    prompt_tokens: int
    stop_reason: StopReason
    #: Time until the first token.
    prompt_seconds: float
    #: Time for the others.
    decode_seconds: float

    @property
    def prompt_tokens_per_second(self) -> float:
        """How fast the prompt was read."""
        return self.prompt_tokens / self.prompt_seconds if self.prompt_seconds else 0.0

    @property
    def tokens_per_second(self) -> float:
        """How fast text was written, the first token left out, which the prompt's time has."""
        return (len(self.tokens) - 1) / self.decode_seconds if self.decode_seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        """As a plain dictionary, for JSON."""
        return {
            **asdict(self),
            "tokens": list(self.tokens),
            "prompt_tokens_per_second": self.prompt_tokens_per_second,
            "tokens_per_second": self.tokens_per_second,
        }

    def __str__(self) -> str:
        return self.text


class Stream(Iterator[str]):
    """Pieces of text as they are written; afterwards `result` has the whole."""

    def __init__(self, pieces: Iterator[str | Generation]) -> None:
        self._pieces = pieces
        self._result: Generation | None = None

    def __next__(self) -> str:
        if self._result is not None:
            raise StopIteration
        piece = next(self._pieces)
        if isinstance(piece, Generation):
            self._result = piece
            raise StopIteration
        return piece

    @property
    def result(self) -> Generation:
        """The whole text, with counts and times; what has not been written yet is written first."""
        for _ in self:
            pass
        if self._result is None:
            raise UsageError("the text was not finished: an error ended it")
        return self._result


class Model:
    """A decoder with its tokenizer, its chat template and its end tokens."""

    def __init__(self, decoder: Decoder, kv: KVType = "fp16") -> None:
        self.decoder = decoder
        #: What keys and values are kept in.
        self.kv = checked_kv(kv)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        device: Literal["auto", "cpu", "cuda", "wgpu"] = "auto",
        kv: KVType = "fp16",
    ) -> Model:
        """Opens a `.tenpak`, a Hugging Face folder, a GGUF file, or a weight file with `config.json` beside it.

        Weights are computed in FP32, and take four bytes each in memory once text is written.

        Args:
            path: The model.
            device: Where to compute; `auto` takes a GPU where there is one that CuPy can use; `wgpu` runs the
                quantised layers of a `.tenpak` on the default GPU of `tenpak.wgpu`.
            kv: What keys and values are kept in: "fp16", "int8" or "int4".

        Raises:
            UsageError: There is no such device or kind of cache.
            StorageError, InputError, ArtifactError, UnsupportedError: As for `tenpak.decoder.Decoder.open`.
        """
        decoder = open_on(path, device) if device == "wgpu" else Decoder.open(path, xp=_module(device))
        return cls(decoder, checked_kv(kv))

    @property
    def device(self) -> str:
        """`cpu`, `cuda` or `wgpu`."""
        return self.decoder.device

    @cached_property
    def chat_template(self) -> ChatTemplate | None:
        """How the model expects a conversation, or None where it was made for plain text."""
        return ChatTemplate.of(self.decoder.source)

    @cached_property
    def end_tokens(self) -> frozenset[int]:
        """Tokens that end a text, by the model's config, its generation config and its tokenizer's config."""
        source = self.decoder.source
        found = set(self.decoder.config.eos)
        text = source.file("generation_config.json")
        try:
            given = {} if text is None else json.loads(text)
        except ValueError as error:
            raise InputError(f"{source.path}: generation_config.json is no JSON: {error}") from None
        eos = given.get("eos_token_id") if isinstance(given, dict) else None
        found.update(one for one in (eos if isinstance(eos, list) else [eos]) if isinstance(one, int))
        name = token_text(tokenizer_config(source).get("eos_token"))
        token = None if name is None else self.decoder.tokenizer.token_to_id(name)
        return frozenset(found if token is None else found | {token})

    def generate(
        self,
        prompt: str | Sequence[Message] | Sequence[int],
        *,
        max_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: Sequence[str] = (),
        chat: bool | None = None,
        system: str | None = None,
    ) -> Generation:
        """Writes what follows a prompt; `str()` of what it returns is the text. Arguments are those of `stream`."""
        return self.stream(
            prompt,
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            stop=stop,
            chat=chat,
            system=system,
        ).result

    def stream(
        self,
        prompt: str | Sequence[Message] | Sequence[int],
        *,
        max_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: Sequence[str] = (),
        chat: bool | None = None,
        system: str | None = None,
    ) -> Stream:
        """Writes what follows a prompt, piece by piece; a piece never splits a character.

        Args:
            prompt: A text, a conversation (`{"role": …, "content": …}`), or tokens.
            max_tokens: The most tokens to write; fewer where the model has no more positions.
            temperature: 0 takes the most likely token, always; 1 draws as likely as the model thinks.
            top_k: Draw from as many of the most likely tokens; 0 for all.
            top_p: Draw from the most likely tokens that together have this probability.
            seed: The same seed gives the same text.
            stop: Texts that end what is written, and are left out of it.
            chat: Whether a text is put into the chat template; None: if the model has one.
            system: What a conversation is told first.

        Raises:
            UsageError: An option makes no sense, the prompt has no tokens or more than the model has positions, chat
                is asked of a model without a template, or a package is missing.
            InputError: The model computes NaN or infinity, or one of its small files is damaged.
        """
        if max_tokens < 1:
            raise UsageError(f"max_tokens {max_tokens} is too small; give at least 1")
        stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if "" in stop:
            raise UsageError("an empty stop text would end every text; leave it out")
        sampling = Sampling(temperature, top_k, top_p, seed)
        tokens = self.prompt_tokens(prompt, chat, system)
        most = min(max_tokens, self.decoder.config.max_positions - len(tokens))
        if most < 1:
            raise UsageError(
                f"the prompt has {len(tokens)} tokens, which leaves none of the {self.decoder.config.max_positions} "
                f"positions of {self.decoder.source.path}; shorten it"
            )
        return Stream(self._pieces(tokens, most, sampling, stop))

    def prompt_tokens(
        self, prompt: str | Sequence[Message] | Sequence[int], chat: bool | None = None, system: str | None = None
    ) -> list[int]:
        """The tokens that the model is given for a prompt; arguments are those of `stream`."""
        tokens = self._prompt_tokens(prompt, chat, system)
        if not tokens:
            raise UsageError("the prompt has no tokens; give at least one")
        return tokens

    def _prompt_tokens(
        self, prompt: str | Sequence[Message] | Sequence[int], chat: bool | None, system: str | None
    ) -> list[int]:
        said = [] if isinstance(prompt, str) else list(prompt)
        messages = [dict(one) for one in said if isinstance(one, Mapping)]
        numbers = [int(one) for one in said if isinstance(one, int | np.integer)]
        if len(said) not in (len(messages), len(numbers)):
            raise UsageError("a prompt is a text, a list of messages or a list of tokens")
        template = self.chat_template
        if chat is None:
            chat = bool(messages) or (isinstance(prompt, str) and template is not None)
        if not chat:
            if system is not None or messages:
                raise UsageError("a conversation or a system text needs chat, which is off or not known to this model")
            # Special tokens here are those that the model's texts began with.
            ids: list[int] = self.decoder.tokenizer.encode(prompt).ids if isinstance(prompt, str) else numbers
            return ids
        if template is None:
            raise UsageError(f"{self.decoder.source.path}: there is no chat template; leave chat out")
        if numbers:
            raise UsageError("tokens cannot be put into a chat template; give a text, or leave chat out")
        if isinstance(prompt, str):
            messages = [{"role": "user", "content": prompt}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        return self.decoder.encode_text(template.render(messages))

    def _pieces(
        self, prompt: list[int], most: int, sampling: Sampling, stop: tuple[str, ...]
    ) -> Iterator[str | Generation]:
        detokenizer = Detokenizer(self.decoder.tokenizer, stop)
        written: list[int] = []
        pieces: list[str] = []
        reason: StopReason = "length"
        ends = self.end_tokens
        # Loading is no part of the times.
        _ = self.decoder.blocks, self.decoder.head
        start = first = time.perf_counter()
        for token in self._tokens(prompt, most, sampling):
            first = time.perf_counter() if not written else first
            written.append(token)
            if token in ends:
                reason = "end"
                break
            if piece := detokenizer.push(token):
                pieces.append(piece)
                yield piece
            if detokenizer.stopped is not None:
                reason = "stop"
                break
        end = time.perf_counter()
        if piece := detokenizer.finish():
            pieces.append(piece)
            yield piece
        if detokenizer.stopped is not None and reason == "length":
            reason = "stop"
        yield Generation("".join(pieces), tuple(written), len(prompt), reason, first - start, end - first)

    def _tokens(self, prompt: list[int], most: int, sampling: Sampling) -> Iterator[int]:
        """Tokens that follow a prompt, `most` of them."""
        decoder = self.decoder
        cache = decoder.cache(self.kv)
        h: Any = None
        for at in range(0, len(prompt), CHUNK):
            h = decoder.hidden([prompt[at : at + CHUNK]], cache)
        for position in range(len(prompt), len(prompt) + most):
            # Only the last position's logits: those of a long prompt would be gigabytes.
            logits = decoder.head(h[:, -1:])[0, -1]
            token = choose(logits if decoder.xp is np else decoder.xp.asnumpy(logits), sampling, position)
            yield token
            if position + 1 < len(prompt) + most:
                h = decoder.hidden([[token]], cache)


def _module(device: str) -> Any:
    if device not in ("auto", "cpu", "cuda"):
        raise UsageError(f"unknown device {device!r}; choose auto, cpu, cuda or wgpu")
    if device != "auto":
        return array_module(device)
    try:
        return array_module("cuda")
    except UsageError:
        return np
