"""``stopping``: when a generation ends."""

from __future__ import annotations

from typing import Annotated, Final

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from wasi_nn_backend.config.section import INT32_MAX, OUT_OF_RANGE, Key, Section, text_of_at_most, texts_of_at_most

__all__ = ["UNBOUNDED", "StoppingSettings"]

#: ``max_tokens`` of a generation that only the context window ends.
UNBOUNDED: Final = -1

_N_STOP_STRINGS_MAX: Final = 64
_N_STOP_BYTES_MAX: Final = 4096


def _check_max_tokens(value: int) -> int:
    if value == 0:
        raise PydanticCustomError(OUT_OF_RANGE, "Input should be at least 1, or -1 for no limit but the context")
    # Guests in the field send any negative number for "no limit".
    return max(value, UNBOUNDED)


_StopString = Annotated[str, text_of_at_most(_N_STOP_BYTES_MAX)]


class StoppingSettings(Section):
    """``max_tokens`` -1 goes on until the window is full. ``reverse_prompt`` is one more stop string. Empty ones would
    end every text at once, so they are left out.

    ``max_time_ms`` 0 sets no limit; when the time is up, the text so far is the result.
    """

    max_tokens: Annotated[
        int,
        Field(le=INT32_MAX, description="1 or more; -1, or any other negative number: until the window is full"),
        AfterValidator(_check_max_tokens),
        Key(("n_predict",), outside="error"),
    ] = 512
    stop: Annotated[
        tuple[_StopString, ...],
        *texts_of_at_most(_N_STOP_STRINGS_MAX),
        Field(description="up to 64 strings; the text ends before the first that appears"),
        Key(("stop_sequences",), outside="error"),
    ] = ()
    reverse_prompt: Annotated[_StopString, Field(description="one more such string")] = ""
    max_time_ms: Annotated[
        int,
        Field(ge=0, le=INT32_MAX, description="end after this time, with the text so far; 0: no limit"),
        Key(("max_inference_time_ms",)),
    ] = 0
