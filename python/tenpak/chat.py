"""Chat templates: turns what is said to a model into the text it was trained to answer.

The template is the model's own, a Jinja program in `tokenizer_config.json` or `chat_template.jinja`; it runs in
Jinja's sandbox, for it comes from whoever made the file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from tenpak.decoder import Source
from tenpak.errors import InputError, UsageError

#: One thing said: `{"role": "user", "content": "…"}`.
Message = Mapping[str, str]


class ChatTemplate:
    """A model's chat template, ready to be filled."""

    def __init__(self, path: str, text: str, special: Mapping[str, str]) -> None:
        self._path, self._text, self._special = path, text, dict(special)

    @classmethod
    def of(cls, source: Source) -> ChatTemplate | None:
        """The source's template, or None where it has none.

        Raises:
            InputError: `tokenizer_config.json` is no JSON object.
        """
        config = tokenizer_config(source)
        beside = source.file("chat_template.jinja")
        try:
            text = config.get("chat_template") if beside is None else beside.decode()
        except UnicodeDecodeError:
            raise InputError(f"{source.path}: chat_template.jinja is no UTF-8") from None
        if isinstance(text, list):
            # Several by name: the one for plain conversation is called default.
            named = {one.get("name"): one.get("template") for one in text if isinstance(one, dict)}
            text = named.get("default")
        if not isinstance(text, str):
            return None
        special = {key: token_text(config[key]) for key in config if key.endswith("_token")}
        return cls(source.path, text, {key: value for key, value in special.items() if value is not None})

    def render(self, messages: Sequence[Message]) -> str:
        """The text of a conversation, up to where the model's answer begins.

        Raises:
            UsageError: Jinja is not installed, or the template refuses the messages.
            InputError: The template is damaged.
        """
        try:
            from jinja2 import TemplateError, TemplateSyntaxError
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError:
            raise UsageError(
                "the model's chat template needs the package jinja2; pip install 'tenpak[text]', or pass --no-chat "
                "(chat=False) to continue the prompt as it is"
            ) from None
        # As transformers sets it up, which templates are written for.
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            template = environment.from_string(self._text)
            return template.render(messages=list(messages), add_generation_prompt=True, **self._special)
        except TemplateSyntaxError as error:
            raise InputError(f"{self._path}: the chat template, line {error.lineno}: {error.message}") from None
        except UsageError as error:
            raise UsageError(f"{self._path}: the chat template refuses the conversation: {error}") from None
        except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{self._path}: the chat template fails: {error}") from None


def tokenizer_config(source: Source) -> dict[str, Any]:
    """The object of `tokenizer_config.json`; empty where there is none."""
    text = source.file("tokenizer_config.json")
    if text is None:
        return {}
    try:
        config = json.loads(text)
    except ValueError as error:
        raise InputError(f"{source.path}: tokenizer_config.json is no JSON: {error}") from None
    if not isinstance(config, dict):
        raise InputError(f"{source.path}: tokenizer_config.json holds no object")
    return config


def token_text(value: Any) -> str | None:
    """A special token's text, which is written as itself or as an object with its properties."""
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else None


def _refuse(message: str) -> NoReturn:
    raise UsageError(message)


def _to_json(value: Any, indent: int | None = None) -> str:
    # Jinja's own escapes what HTML minds.
    return json.dumps(value, ensure_ascii=False, indent=indent)
