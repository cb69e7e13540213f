"""``stopping``: when a generation ends."""

from __future__ import annotations

from typing import Annotated, Any, Final

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo
from pydantic_core import PydanticCustomError

from wasi_nn_backend.config.section import INT32_MAX, OUT_OF_RANGE, Key, Section, text_of_at_most

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


def _as_stop_strings(value: Any, info: ValidationInfo) -> Any:
    """A single string is a list of one. An empty stop string would end every text at once, so it is left out."""
    strings = [value] if isinstance(value, str) else value
    if not isinstance(strings, (list, tuple)):
        raise PydanticCustomError("stop_strings", "Input should be a string or an array of strings")
    kept = tuple(item for item in strings if not (isinstance(item, str) and not item))
    if len(kept) < len(strings) and info.context is not None:
        info.context.append("empty stop strings are left out")
    return kept


def _check_n_stop_strings(value: tuple[str, ...]) -> tuple[str, ...]:
    if len(value) > _N_STOP_STRINGS_MAX:
        raise PydanticCustomError("too_many", f"Input should be at most {_N_STOP_STRINGS_MAX} strings")
    return value


_StopString = Annotated[str, text_of_at_most(_N_STOP_BYTES_MAX)]


class StoppingSettings(Section):
    """``max_tokens`` -1 goes on until the window is full. ``reverse_prompt`` is one more stop string.

    ``max_time_ms`` 0 sets no limit; when the time is up, the text so far is the result.
    """

    max_tokens: Annotated[
        int, Field(le=INT32_MAX), AfterValidator(_check_max_tokens), Key(("n_predict",), outside="error")
    ] = 512
    stop: Annotated[
        tuple[_StopString, ...],
        BeforeValidator(_as_stop_strings),
        AfterValidator(_check_n_stop_strings),
        Key(("stop_sequences",), outside="error"),
    ] = ()
    reverse_prompt: _StopString = ""
    max_time_ms: Annotated[int, Field(ge=0, le=INT32_MAX), Key(("max_inference_time_ms",))] = 0
