"""Definitions of tools, which go to the chat template as they are: all that is asked of them is to be JSON."""

from __future__ import annotations

import json
from typing import Any, Final

from pydantic_core import PydanticCustomError

from wasi_nn_backend.config import jsontext
from wasi_nn_backend.errors import WasiNNError

__all__ = ["as_tool_definitions"]

_N_TOOLS_MAX: Final = 256
_N_BYTES_MAX: Final = 2**20

_EXPECTED: Final = f"Input should be an array of at most {_N_TOOLS_MAX} objects, or a string that holds one in JSON"


def as_tool_definitions(value: Any) -> tuple[Any, ...]:
    """A deep copy out of JSON types, as a tuple. Raises ``PydanticCustomError`` for anything else."""
    if isinstance(value, str):
        try:
            value = jsontext.decode(jsontext.read_text(value) if value.strip() else "[]", on_repeated_key=_pass_over)
        except WasiNNError as error:
            raise PydanticCustomError("tools", "Input should be JSON: {reason}", {"reason": str(error)}) from None
    is_array = isinstance(value, list | tuple) and len(value) <= _N_TOOLS_MAX
    if not is_array or not all(isinstance(tool, dict) for tool in value):
        raise PydanticCustomError("tools", _EXPECTED)
    try:
        text = jsontext.read_text(json.dumps(value, allow_nan=False))
        return tuple(jsontext.decode(text, on_repeated_key=_pass_over))
    except (TypeError, ValueError, RecursionError, WasiNNError):
        raise PydanticCustomError(
            "tools", f"Input should hold JSON values only, not too deep, and at most {_N_BYTES_MAX} bytes of them"
        ) from None


def _pass_over(_key: str) -> None:
    """Of two members of one name the last one counts, as everywhere; a definition is nobody's configuration."""
