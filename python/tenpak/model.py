"""A model that writes text: opened once, then asked as often as one likes.

model = tenpak.Model.open("model.tenpak")
print(model.generate("It was a dark and stormy", max_tokens=40).text)
for piece in model.stream("Why is the sky blue?"):
    print(piece, end="", flush=True)
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from tenpak import chat as _chat
from tenpak.chat import Message
from tenpak.decoder import Decoder
from tenpak.decoder.kv import KVType, checked_kv
from tenpak.detokenize import TextStream
from tenpak.errors import InputError, UsageError
from tenpak.evaluate import array_module, open_on
from tenpak.report import Report
from tenpak.sampling import Sampling, checked_count, choose

if TYPE_CHECKING:
    from tenpak.cuda.runner import Runner

#: Text, messages of a chat, or tokens.
Prompt = str | Sequence[Message] | Sequence[int]

#: Why a text ended: the model said so, a stop string came, or as many tokens as were asked for.
Finish = Literal["end", "stop", "length"]

#: Tokens of a prompt that are computed at once.
PROMPT_AT_ONCE = 512

#: Tokens to write where nobody says how many.
MAX_TOKENS = 256


@dataclass(frozen=True)
class Generation(Report):
    """What was written, and how fast."""

    text: str
    #: What was written, without a token that ended it.
    tokens: tuple[int, ...]
    finish: Finish
    prompt_tokens: int
    #: Time for the prompt, up to the first token; and for all further ones.
    prompt_seconds: float
    seconds: float

    @property
    def prompt_tokens_per_second(self) -> float:
        return self.prompt_tokens / self.prompt_seconds if self.prompt_seconds else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Of the tokens after the first."""
        return max(len(self.tokens) - 1, 0) / self.seconds if self.seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        """As plain dictionaries and lists, for JSON."""
        return {
            **super().to_dict(),
            "prompt_tokens_per_second": self.prompt_tokens_per_second,
            "tokens_per_second": self.tokens_per_second,
        }


class Model:
    """A decoder with its tokenizer."""

    def __init__(self, decoder: Decoder, *, kv: KVType | None = None, runner: Runner | None = None) -> None:
        self.decoder = decoder
        #: What keys and values are kept as; None for FP32, or with a runner FP16.
        self.kv = kv
        #: What writes in the decoder's place, from weights that stay quantised on an NVIDIA GPU.
        self.runner = runner

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        device: Literal["auto", "cpu", "cuda", "wgpu"] = "auto",
        kv: KVType | None = None,
    ) -> Model:
        """Opens a `.tenpak`, a Hugging Face folder, a GGUF file, or a weight file with `config.json` beside it.

        Args:
            path: The model.
            device: `cpu` computes in FP32 with NumPy; `cuda` keeps a `.tenpak`'s weights quantised in the memory of
                an NVIDIA GPU, each step being one CUDA graph, and needs CuPy; `wgpu` runs a `.tenpak`'s quantised
                layers on any GPU, in wheels that have `tenpak.wgpu`; `auto` takes an NVIDIA GPU where there is one.
            kv: Read keys and values from a cache of that kind; None for exact ones.

        Raises:
            UsageError: A wrong option, or a package that is missing.
            StorageError, InputError, ArtifactError, UnsupportedError: As for `Decoder.open`.
        """
        if device not in ("auto", "cpu", "cuda", "wgpu"):
            raise UsageError(f"unknown device {device!r}; choose auto, cpu, cuda or wgpu")
        if kv is not None:
            kv = checked_kv(kv)
        if device == "auto":
            device = "cuda" if _has_gpu() else "cpu"
        if device == "cuda":
            decoder = Decoder.open(path, xp=array_module(device))
            from tenpak.cuda.runner import Runner, why_not

            if why_not(decoder) is None:
                return cls(decoder, kv=kv, runner=Runner(decoder, kv))
        return cls(open_on(path, device), kv=kv)

    @property
    def device(self) -> str:
        """Where the decoder computes: `cpu`, `cuda` or `wgpu`."""
        return self.decoder.device

    @property
    def gpu_bytes(self) -> dict[str, int]:
        """Bytes of GPU memory that weights and cache take, where a runner holds them; else nothing."""
        if self.runner is None:
            return {}
        cache = self.runner.cache
        return {"weights": self.runner.weight_bytes, "cache": 0 if cache is None else cache.nbytes}

    @cached_property
    def has_chat(self) -> bool:
        """Whether the model was taught to chat: it has a template for it."""
        return _chat.template(self.decoder.source) is not None

    def generate(
        self,
        prompt: Prompt,
        *,
        max_tokens: int = MAX_TOKENS,
        temperature: float = 0.8,
        top_k: int = 0,
        top_p: float = 0.95,
        seed: int = 0,
        stop: str | Sequence[str] = (),
        chat: bool | None = None,
        system: str | None = None,
    ) -> Generation:
        """Writes what follows a prompt.

        Args:
            prompt: Text, messages of a chat (dictionaries with `role` and `content`), or tokens, taken as they are.
            max_tokens: The most tokens to write.
            temperature: Scores are divided by this; 0 always takes the likeliest token.
            top_k: Only so many of the likeliest tokens are considered; 0 for all.
            top_p: Only the likeliest tokens that together hold this part of the probability are considered.
            seed: The same seed writes the same text.
            stop: Strings that end the text, which does not hold them.
            chat: Whether a text is a user's message, to be answered, or a beginning, to be continued; None for a
                message where the model has a chat template.
            system: What a chat begins with.

        Raises:
            UsageError: A wrong option, an empty prompt or one that is too long, or a package that is missing.
            InputError: The model has no tokenizer, a broken template, or scores that are no numbers.
        """
        stream = self.stream(
            prompt,
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            stop=stop,
            chat=chat,
            system=system,
        )
        for _ in stream:
            pass
        return stream.result

    def stream(
        self,
        prompt: Prompt,
        *,
        max_tokens: int = MAX_TOKENS,
        temperature: float = 0.8,
        top_k: int = 0,
        top_p: float = 0.95,
        seed: int = 0,
        stop: str | Sequence[str] = (),
        chat: bool | None = None,
        system: str | None = None,
    ) -> Stream:
        """As `generate`, but returns an iterator of pieces of text as they come; its `result` is there at the end."""
        sampling = Sampling(temperature, top_k, top_p, seed)
        max_tokens, stops = checked_count("max_tokens", max_tokens), _stops(stop)
        tokens = self.prompt_tokens(prompt, chat=chat, system=system)
        limit = self.decoder.config.max_positions
        if len(tokens) >= limit:
            raise UsageError(
                f"the prompt has {len(tokens)} tokens, which leaves none of the {limit} positions that "
                f"{self.decoder.source.path} was made for; give a shorter one"
            )
        return Stream(self, tokens, min(max_tokens, limit - len(tokens)), sampling, stops)

    def prompt_tokens(self, prompt: Prompt, *, chat: bool | None = None, system: str | None = None) -> list[int]:
        """The tokens that a prompt becomes; arguments and errors as for `generate`."""
        if not isinstance(prompt, str | Sequence | np.ndarray) or isinstance(prompt, bytes):
            raise UsageError(f"a prompt is a text, messages or tokens, not {type(prompt).__name__}")
        if not isinstance(prompt, str) and len(prompt) and not isinstance(prompt[0], Mapping):
            if system is not None or chat:
                raise UsageError("tokens are taken as they are; a chat needs text or messages")
            given = np.asarray(prompt)
            if given.ndim != 1 or given.dtype.kind not in "iu":
                raise UsageError("tokens must be whole numbers in one dimension")
            return [int(token) for token in given]
        for text in (prompt, system):
            if isinstance(text, str) and _has_surrogate(text):
                raise UsageError(
                    "the prompt holds half a surrogate pair, which is no character; decode it as UTF-8 first"
                )
        if isinstance(prompt, str):
            chat = (self.has_chat if chat is None else chat) or system is not None
            if not chat:
                tokens = self._with_bos(prompt)
                if not tokens:
                    raise UsageError("the prompt is empty; give at least one word")
                return tokens
            messages: list[Message] = [{"role": "user", "content": prompt}]
        else:
            messages = list(prompt)  # type: ignore[arg-type]
            if not messages:
                raise UsageError("the prompt is empty; give at least one message")
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        rendered = _chat.render(self.decoder.source, messages)
        tokens = [] if _has_surrogate(rendered) else self.decoder.encode_text(rendered)
        if not tokens:
            raise InputError(f"{self.decoder.source.path}: its chat template makes no text of the messages")
        return tokens

    def tokens(self, prompt: Sequence[int], sampling: Sampling, most: int) -> Iterator[int]:
        """Up to `most` tokens after a prompt's, one by one; the caller says which of them ends a text.

        Raises:
            InputError: The model's scores are no numbers.
            UsageError: On a GPU: another text was begun before this one ended, or there is too little memory.
        """
        if self.runner is not None:
            yield from self.runner.tokens(prompt, sampling, most)
            return
        decoder = self.decoder
        cache = decoder.cache(self.kv)
        # Only the last position's scores are asked for.
        for first in range(0, len(prompt), PROMPT_AT_ONCE):
            hidden = decoder.hidden([prompt[first : first + PROMPT_AT_ONCE]], cache)
        for i in range(most):
            logits = decoder.head(hidden[:, -1])[0]
            token = choose(logits if decoder.xp is np else logits.get(), sampling, len(prompt) + i)
            yield token
            if i + 1 < most:
                hidden = decoder.hidden([[token]], cache)

    def _with_bos(self, text: str) -> list[int]:
        """A text's tokens after those that the model's tokenizer begins a text with."""
        ids: list[int] = list(self.decoder.tokenizer.encode(text, add_special_tokens=True).ids)
        bos, eos = self.decoder.config.bos, self.ends
        # Some tokenizers end a text too; here it shall go on.
        while len(ids) > 1 and ids[-1] in eos and ids[-1] != bos:
            ids.pop()
        return ids

    @cached_property
    def ends(self) -> frozenset[int]:
        """Tokens that end a text: those of config.json, generation_config.json and tokenizer_config.json."""
        found = set(self.decoder.config.eos)
        text = self.decoder.source.file("generation_config.json")
        if text is not None:
            try:
                given = json.loads(text)
            except ValueError as error:
                path = self.decoder.source.path
                raise InputError(f"{path}: generation_config.json is no JSON: {error}") from error
            more = given.get("eos_token_id") if isinstance(given, dict) else None
            found.update(t for t in (more if isinstance(more, list) else [more]) if isinstance(t, int))
        name = _chat.end_token(self.decoder.source)
        token = None if name is None else self.decoder.tokenizer.token_to_id(name)
        return frozenset(found if token is None else found | {token})


class Stream:
    """Pieces of text as they come, and at the end `result`."""

    def __init__(
        self, model: Model, prompt: list[int], max_tokens: int, sampling: Sampling, stop: Sequence[str]
    ) -> None:
        self._pieces = self._run(model, prompt, max_tokens, sampling, stop)
        self._result: Generation | None = None

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    @property
    def result(self) -> Generation:
        """What was written; only after the last piece."""
        if self._result is None:
            raise UsageError("the text has not ended yet; take all pieces first")
        return self._result

    def _run(
        self, model: Model, prompt: list[int], max_tokens: int, sampling: Sampling, stop: Sequence[str]
    ) -> Iterator[str]:
        start = time.perf_counter()
        ends, text = model.ends, TextStream(model.decoder.tokenizer, prompt, stop)
        written: list[int] = []
        pieces: list[str] = []
        finish: Finish = "length"
        prompt_seconds = 0.0
        for token in model.tokens(prompt, sampling, max_tokens):
            if not prompt_seconds:
                prompt_seconds = time.perf_counter() - start
                start = time.perf_counter()
            if token in ends:
                finish = "end"
                break
            written.append(token)
            piece = text.push(token)
            if piece:
                pieces.append(piece)
                yield piece
            if text.stopped:
                finish = "stop"
                break
        rest = text.finish()
        if rest:
            pieces.append(rest)
        seconds = time.perf_counter() - start
        self._result = Generation("".join(pieces), tuple(written), finish, len(prompt), prompt_seconds, seconds)
        if rest:
            yield rest


def _stops(stop: str | Sequence[str]) -> list[str]:
    stops = [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, Sequence) or not all(isinstance(text, str) for text in stops):
        raise UsageError(f"stop {stop!r} is no text and no list of texts")
    return list(stops)


def _has_surrogate(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)


def _has_gpu() -> bool:
    """Whether CuPy is installed and sees a GPU."""
    try:
        import cupy

        return bool(cupy.cuda.runtime.getDeviceCount())
    except Exception:  # No driver, or one that does not fit, has many ways to say so.
        return False
