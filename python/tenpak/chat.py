"""Chats as models were taught them: the template that comes with a tokenizer, rendered in a sandbox."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from types import FrameType
from typing import Any

from tenpak.decoder.source import Source
from tenpak.errors import InputError, UsageError

#: A message: its `role` ("system", "user" or "assistant") and `content`.
Message = Mapping[str, str]

#: The most lines of Python that rendering may take; templates of well-known models take a few hundred for a message.
_STEPS = 2_000_000


def template(source: Source) -> str | None:
    """The model's chat template, or None.

    Raises:
        InputError: `tokenizer_config.json` makes no sense.
    """
    text = source.file("chat_template.jinja")
    if text is not None:
        return text.decode(errors="replace")
    found = _config(source).get("chat_template")
    if isinstance(found, list):
        # Several by name; the default one is for chats.
        named = {t.get("name"): t.get("template") for t in found if isinstance(t, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


def render(source: Source, messages: Sequence[Message]) -> str:
    """The prompt for the assistant's next message, special tokens written out.

    Raises:
        UsageError: The model has no chat template, the package `jinja2` is not installed, or the template refuses the
            messages.
        InputError: The template is broken.
    """
    text = template(source)
    if text is None:
        raise UsageError(f"{source.path}: the model has no chat template; give the prompt as it is, without chat")
    try:
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise UsageError("chat templates need the package jinja2; pip install 'tenpak[text]'") from None
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)

    def refuse(message: str) -> None:
        raise _Refused(message)

    config = _config(source)
    try:
        compiled = environment.from_string(text)
        with _bounded():
            return compiled.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=True,
                raise_exception=refuse,
                strftime_now=lambda form: datetime.now().strftime(form),
                **{name: _token(config.get(name)) for name in ("bos_token", "eos_token", "unk_token", "pad_token")},
            )
    except _Refused as error:
        raise UsageError(f"{source.path}: its chat template refuses: {error}") from None
    except Exception as error:
        # A template is somebody else's program: it may fail in any way, deep recursion and lack of memory among them.
        reason = str(error) or type(error).__name__
        raise InputError(f"{source.path}: its chat template is broken: {reason}") from error


@contextmanager
def _bounded() -> Iterator[None]:
    """Stops a template that loops without end: the sandbox bounds single ranges, and not loops in loops."""
    steps = 0

    def step(_frame: FrameType, _event: str, _argument: object) -> Any:
        nonlocal steps
        steps += 1
        if steps > _STEPS:
            raise _Endless("it does not come to an end")
        return step

    before = sys.gettrace()
    sys.settrace(step)
    try:
        yield
    finally:
        sys.settrace(before)


class _Endless(Exception):
    """A template took more than `_STEPS`."""


class _Refused(Exception):
    """What a template raises by `raise_exception`."""


def end_token(source: Source) -> str | None:
    """The text of the token that ends a message, by the tokenizer's config; None where that names none."""
    return _token(_config(source).get("eos_token")) or None


def _token(value: Any) -> str:
    """A special token, which may be an object with its text in it."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else ""


def _config(source: Source) -> dict[str, Any]:
    text = source.file("tokenizer_config.json")
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except ValueError as error:
        raise InputError(f"{source.path}: tokenizer_config.json is no JSON: {error}") from error
    return value if isinstance(value, dict) else {}
