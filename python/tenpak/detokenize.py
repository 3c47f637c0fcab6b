"""Turns tokens into text as they come, without splitting a character and up to a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

#: What a tokenizer shows for bytes that are no character, or not yet.
_UNFINISHED = "\ufffd"

#: A character of UTF-8 has four bytes, so that more unfinished tokens are not waited for.
_MOST_UNFINISHED = 4


class TextStream:
    """Text from tokens, piece by piece; all pieces together are what the tokenizer makes of all tokens at once.

    A piece is held back while its last character may be unfinished, or while it may be the start of a stop string.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = (), stop: Sequence[str] = ()) -> None:
        """Begins after the prompt's tokens, whose last ones decide whether the first word begins with a space."""
        self._tokenizer = tokenizer
        self._tokens = list(prompt)[-_MOST_UNFINISHED:]
        #: Where the tokens begin that are decoded together, and where those that were not returned yet.
        self._begin, self._done = 0, len(self._tokens)
        self._stop = [s for s in stop if s]
        self._held = ""
        #: Whether a stop string has come; what follows is dropped.
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that is certain now; often none."""
        self._tokens.append(token)
        return self._release(self._new_text(final=False), final=False)

    def finish(self) -> str:
        """What was held back."""
        return self._release(self._new_text(final=True), final=True)

    def _new_text(self, final: bool) -> str:
        before = self._decode(self._begin, self._done)
        text = self._decode(self._begin, len(self._tokens))
        waiting = len(self._tokens) - self._done
        if not final and text.endswith(_UNFINISHED) and waiting < _MOST_UNFINISHED:
            return ""
        if not text.startswith(before):
            # Joining changed what was returned already: only what is new by itself can be.
            before, text = "", self._decode(self._done, len(self._tokens))
        self._begin, self._done = self._done, len(self._tokens)
        return text[len(before) :]

    def _decode(self, begin: int, end: int) -> str:
        text: str = self._tokenizer.decode(self._tokens[begin:end], skip_special_tokens=True)
        return text

    def _release(self, text: str, final: bool) -> str:
        if self.stopped:
            return ""
        self._held += text
        found = [at for at in (self._held.find(s) for s in self._stop) if at >= 0]
        if found:
            self.stopped = True
            out, self._held = self._held[: min(found)], ""
            return out
        hold = 0 if final else max((_overlap(self._held, s) for s in self._stop), default=0)
        out, self._held = self._held[: len(self._held) - hold], self._held[len(self._held) - hold :]
        return out


def _overlap(text: str, stop: str) -> int:
    """How many of the text's last characters are the start of `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
