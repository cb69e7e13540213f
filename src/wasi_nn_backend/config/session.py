"""``session``: what one execution context does with its prompt and its text. The keys also stand at the top level."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, Field

from wasi_nn_backend.config.section import Section, text_of_at_most
from wasi_nn_backend.config.tools import as_tool_definitions
from wasi_nn_backend.types import PromptMode

__all__ = ["SessionSettings"]

#: As much as a whole document; a mapping from Python could hold more.
_N_TEXT_BYTES_MAX: Final = 2**20

_N_NAME_BYTES_MAX: Final = 256

_Text = Annotated[str, text_of_at_most(_N_TEXT_BYTES_MAX)]
_Name = Annotated[str, text_of_at_most(_N_NAME_BYTES_MAX)]


class SessionSettings(Section):
    """``None`` leaves the choice to others: ``prompt_mode`` to the door, ``chat_template`` to the model.

    ``stream_stdout`` writes text to the guest's standard output as it is generated. ``special`` keeps the text of
    control tokens in the output. ``cache_salt`` keeps tenants apart: cached prefixes are shared among equal salts only.
    ``reasoning`` says what happens to text that the model marks as its reasoning: it stays where it is, it is left out,
    or it is left out and shown in the metadata. ``enable_thinking`` is a variable of the templates of such models.
    ``tools`` are definitions as the template wants them.
    """

    session_id: Annotated[_Name, Field(description="contexts of equal ids are one session; empty: each its own")] = ""
    prompt_mode: Annotated[
        PromptMode | None,
        Field(
            description="`chat` puts the model's template around the prompt and remembers the conversation, `raw` does "
            "neither; `null` is `chat` in Python and on the command line, `raw` for guests"
        ),
    ] = None
    system_prompt: Annotated[_Text | None, Field(description="the message that begins a chat")] = None
    chat_template: Annotated[
        _Text | None,
        Field(
            description="a Jinja template instead of the model's, or the name of a built-in one: `chatml`, `gemma`, "
            "`llama3`, `phi3`, `zephyr`, `mistral`, `plain`; without either, the one that suits the model's vocabulary"
        ),
    ] = None
    reasoning: Annotated[
        Literal["keep", "hide", "separate"],
        Field(
            description="text that the model marks as its reasoning: `keep` it, `hide` it, or move it to the metadata "
            "(`separate`)"
        ),
    ] = "keep"
    enable_thinking: Annotated[
        bool | None,
        Field(
            description="asks a reasoning model's template for reasoning or for an answer without; `null` is the "
            "template's own default"
        ),
    ] = None
    tools: Annotated[
        tuple[dict[str, Any], ...],
        BeforeValidator(as_tool_definitions, json_schema_input_type=list[dict[str, Any]] | str),
        Field(
            description="definitions of tools for the template, as a JSON array or as a string that holds one; the "
            "model's calls of them are in the metadata as `tool_calls`"
        ),
    ] = ()
    stream_stdout: Annotated[
        bool, Field(description="a guest's text also goes to its standard output while it is made")
    ] = False
    keep_control_text: Annotated[
        bool,
        Field(
            description="the text of control tokens is output, but for that which ends the generation; modules that "
            "look for `[TOOL_CALLS]` and the like need it, and theirs is `true` unless set"
        ),
    ] = False
    special: Annotated[
        bool, Field(description="the text of all control tokens is output, that which ends the generation included")
    ] = False
    cache_salt: Annotated[
        _Name, Field(description="cached prompts are shared between contexts of equal salts only; at most 256 bytes")
    ] = ""
