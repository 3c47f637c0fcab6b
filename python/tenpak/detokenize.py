"""Tokens to text as they come: no piece splits a character, none holds what may be the start of a stop text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

#: What decoders write for bytes that are no character, or not yet one.
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
#: A character's bytes at most: more tokens than that and the bytes are none.
_PATIENCE = 8


class Detokenizer:
    """Text of a growing sequence of tokens."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._tokens: list[int] = []
        # Text up to `_read` has been taken; it is decoded again from `_start`, for what a token says depends on those
        # before it.
        self._start = self._read = 0
        self._held = ""
        #: The stop text that was met.
        self.stopped: str | None = None

    def push(self, token: int) -> str:
        """The text that is certain now, which may be empty; a stop text and what follows it are left out."""
        self._tokens.append(token)
        return self._sift(self._fresh(last=False), last=False)

    def finish(self) -> str:
        """What was held back."""
        return self._sift(self._fresh(last=True), last=True)

    def _fresh(self, last: bool) -> str:
        before = self._tokenizer.decode(self._tokens[self._start : self._read])
        now = self._tokenizer.decode(self._tokens[self._start :])
        waiting = now.endswith(_INCOMPLETE) and len(self._tokens) - self._read < _PATIENCE
        if waiting and not last:
            return ""
        self._start, self._read = self._read, len(self._tokens)
        text: str = now[len(before) :]
        return text

    def _sift(self, fresh: str, last: bool) -> str:
        if self.stopped is not None:
            return ""
        text = self._held + fresh
        found = [(text.find(stop), stop) for stop in self._stop if stop in text]
        if found:
            at, self.stopped = min(found)
            self._held = ""
            return text[:at]
        keep = 0 if last else max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """How much of the text's end is a start of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
