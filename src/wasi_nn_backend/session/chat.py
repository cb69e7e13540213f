"""Messages to a prompt, through a chat template.

Templates differ in which messages they take. What a template does with a message is found by trying it once, since
nothing in it says so: whether a system message arrives in the prompt, and whether text has to come in parts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from wasi_nn_backend.errors import InvalidArgument
from wasi_nn_backend.session.template_budget import TemplateBudget, TemplateLimitError
from wasi_nn_backend.session.template_environment import TemplateEnvironment, TemplateRefusal
from wasi_nn_backend.session.template_guard import BUDGET

__all__ = ["ChatTemplate", "Message"]

#: Four times as long as any known template. Compiling so much takes about two seconds.
_N_SOURCE_CHARS_MAX = 64 << 10
_N_REASON_CHARS_MAX = 300

#: A word that no template adds by itself.
_PROBE = "Quizzaciously"


@dataclass(frozen=True, slots=True)
class Message:
    role: Literal["system", "user", "assistant"]
    content: str


class ChatTemplate:
    """A compiled template. ``bos_text`` and ``eos_text`` are the model's first and last token, as templates write them;
    ``stops`` are byte strings that end an answer in this format. ``clock`` gives seconds of processor time.

    Raises ``InvalidArgument`` for a template that does not compile.
    """

    def __init__(
        self,
        source: str,
        *,
        bos_text: str = "",
        eos_text: str = "",
        stops: tuple[bytes, ...] = (),
        clock: Callable[[], float] = time.thread_time,
    ) -> None:
        self.stops = stops
        self._variables: dict[str, Any] = {"bos_token": bos_text, "eos_token": eos_text, "add_generation_prompt": True}
        self._clock = clock
        if len(source) > _N_SOURCE_CHARS_MAX:
            raise InvalidArgument(
                f"the chat template has {len(source)} characters, and {_N_SOURCE_CHARS_MAX} are the most that are "
                "read; set session.chat_template"
            )
        try:
            self._template = TemplateEnvironment().from_source(source)
        except Exception as error:  # not only TemplateError: deep nesting and long numbers fail in Python's own ways
            raise InvalidArgument(
                f"the chat template is not valid: {_reason(error)}; set session.chat_template"
            ) from error

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        enable_thinking: bool | None = None,
    ) -> str:
        """The prompt that asks for the assistant's next message. A system message that the template does not take is
        put in front of the first user message. Raises ``InvalidArgument`` when the template fails.

        ``tools`` are definitions as the template wants them; ``enable_thinking`` None leaves the template its default.
        """
        if messages and messages[0].role == "system" and not self._takes_system_role:
            messages = _with_merged_system(messages)
        rows = _rows_of(messages, typed=self._takes_typed_content_only)
        # What is not there is left undefined, not None: templates ask whether it is defined.
        variables: dict[str, Any] = {"tools": list(tools)} if tools else {}
        if enable_thinking is not None:
            variables["enable_thinking"] = enable_thinking
        return self._render(rows, variables)

    @cached_property
    def shows_tools(self) -> bool:
        """Whether the model learns of tools from this template."""
        tool = {"type": "function", "function": {"name": _PROBE, "description": _PROBE, "parameters": {}}}
        rows = _rows_of([Message("user", "-")], typed=self._takes_typed_content_only)
        return self._shows_probe(rows, {"tools": [tool]})

    @cached_property
    def _takes_system_role(self) -> bool:
        messages = [Message("system", _PROBE), Message("user", "-")]
        return self._shows_probe(_rows_of(messages, typed=self._takes_typed_content_only), {})

    @cached_property
    def _takes_typed_content_only(self) -> bool:
        """Templates of models that also see images may go through a list of parts and find none in a text."""
        message = [Message("user", _PROBE)]
        if self._shows_probe(_rows_of(message, typed=False), {}):
            return False
        return self._shows_probe(_rows_of(message, typed=True), {})

    def _shows_probe(self, rows: list[dict[str, Any]], variables: Mapping[str, Any]) -> bool:
        try:
            return _PROBE in self._render(rows, variables)
        except InvalidArgument as error:
            if isinstance(error.__cause__, TemplateLimitError):
                raise  # trying on would cost as much again
            return False

    def _render(self, rows: list[dict[str, Any]], variables: Mapping[str, Any]) -> str:
        n_characters = len(str(rows)) + len(str(variables))
        budget = TemplateBudget(n_characters, len(rows), self._clock)
        try:
            return self._template.render({**self._variables, **variables, "messages": rows, BUDGET: budget})
        except TemplateRefusal as refusal:
            raise InvalidArgument(f"the chat template does not take these messages: {refusal}") from refusal
        except TemplateLimitError as limit:
            raise InvalidArgument(f"the chat template was stopped: {limit}; set session.chat_template") from limit
        except Exception as error:  # a template is a program from outside: it may fail in any way
            raise InvalidArgument(
                f'the chat template failed: {_reason(error)}; set session.chat_template or session.prompt_mode to "raw"'
            ) from error


def _rows_of(messages: Sequence[Message], *, typed: bool) -> list[dict[str, Any]]:
    return [
        {"role": message.role, "content": [{"type": "text", "text": message.content}] if typed else message.content}
        for message in messages
    ]


def _with_merged_system(messages: Sequence[Message]) -> list[Message]:
    system, *others = messages
    if not others or others[0].role != "user":
        return [Message("user", system.content), *others]
    return [Message("user", f"{system.content}\n\n{others[0].content}"), *others[1:]]


def _reason(error: Exception) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= _N_REASON_CHARS_MAX else text[:_N_REASON_CHARS_MAX] + "..."
