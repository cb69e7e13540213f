"""``session``: what one execution context does with its prompt and its text. The keys also stand at the top level."""

from __future__ import annotations

from typing import Annotated, Final

from wasi_nn_backend.config.section import Section, text_of_at_most
from wasi_nn_backend.types import PromptMode

__all__ = ["SessionSettings"]

#: As much as a whole document; a mapping from Python could hold more.
_N_TEXT_BYTES_MAX: Final = 2**20

_N_SALT_BYTES_MAX: Final = 256

_Text = Annotated[str, text_of_at_most(_N_TEXT_BYTES_MAX)]


class SessionSettings(Section):
    """``None`` leaves the choice to others: ``prompt_mode`` to the door, ``chat_template`` to the model.

    ``stream_stdout`` writes text to the guest's standard output as it is generated. ``special`` keeps the text of
    control tokens in the output. ``cache_salt`` keeps tenants apart: cached prefixes are shared among equal salts only.
    """

    prompt_mode: PromptMode | None = None
    system_prompt: _Text | None = None
    chat_template: _Text | None = None
    stream_stdout: bool = False
    special: bool = False
    cache_salt: Annotated[str, text_of_at_most(_N_SALT_BYTES_MAX)] = ""
