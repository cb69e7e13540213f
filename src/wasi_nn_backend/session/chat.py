"""Messages to a prompt, through the model's own chat template.

Templates come out of model files, which are untrusted input: they run in Jinja's sandbox, which keeps them from
Python's internals, and every failure of theirs is an error of ours with a reason.
"""

from __future__ import annotations

import datetime
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from wasi_nn_backend.errors import InvalidArgument

__all__ = ["CHATML", "ChatTemplate", "Message"]

_log = logging.getLogger(__name__)

#: What models without a template get: the most common of the formats, and the one llama.cpp falls back to.
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True, slots=True)
class Message:
    role: Literal["system", "user", "assistant"]
    content: str


class _TemplateRefusal(Exception):
    """Raised by ``raise_exception`` inside a template: its own words for messages it does not take."""


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, except that reaching for Python's internals is an error: Jinja lets it pass as an empty text."""

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        raise SecurityError(f"{attribute!r} of a {type(obj).__name__} is not for templates")


class ChatTemplate:
    """A compiled template. ``source`` None means the model has none, and ChatML is used."""

    def __init__(self, source: str | None, *, bos_text: str = "", eos_text: str = "") -> None:
        if source is None:
            _log.info("the model has no chat template: using ChatML")
        self._variables: dict[str, Any] = {"bos_token": bos_text, "eos_token": eos_text}
        # The options and the extension (break, continue) under which templates are written, those of transformers.
        environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        environment.globals.update(raise_exception=_refuse, strftime_now=_strftime_now)
        environment.filters["tojson"] = _to_json  # Jinja's own escapes for HTML, which models have never seen
        try:
            self._template = environment.from_string(CHATML if source is None else source)
        except Exception as error:  # not only TemplateError: deep nesting and long numbers fail in Python's own ways
            raise InvalidArgument(
                f"the chat template is not valid: {type(error).__name__}: {error}; set session.chat_template"
            ) from error

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt that asks for the assistant's next message. Raises ``InvalidArgument`` when the template fails."""
        rows = [{"role": message.role, "content": message.content} for message in messages]
        try:
            return self._template.render(messages=rows, add_generation_prompt=True, **self._variables)
        except _TemplateRefusal as refusal:
            raise InvalidArgument(f"the chat template does not take these messages: {refusal}") from refusal
        except Exception as error:  # a template is a program from outside: it may fail in any way
            raise InvalidArgument(
                f"the chat template failed: {type(error).__name__}: {error}; set session.chat_template or "
                f'session.prompt_mode to "raw"'
            ) from error


def _refuse(message: str) -> None:
    raise _TemplateRefusal(message)


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)


def _to_json(
    value: Any,
    indent: int | None = None,
    *,
    ensure_ascii: bool = False,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
