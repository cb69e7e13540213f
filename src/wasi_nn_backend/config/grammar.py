"""Types of the ``sampling`` keys that hold output to a grammar, looked at as far as that needs no model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Final

from pydantic import AfterValidator, ValidationInfo
from pydantic_core import PydanticCustomError

from wasi_nn_backend.config.section import Key, text_of_at_most, texts_of_at_most
from wasi_nn_backend.errors import InvalidArgument
from wasi_nn_backend.grammar import check_gbnf, check_triggers, json_schema_to_gbnf

__all__ = ["GrammarTriggers", "as_schema_text", "check_grammar", "check_schema"]

_N_TRIGGERS_MAX: Final = 64
_N_TRIGGER_BYTES_MAX: Final = 1024


def as_schema_text(value: Any) -> Any:
    """A schema as JSON text: the string that holds one as it is, an object (or true, which allows all) written out."""
    if not isinstance(value, (Mapping, bool)):
        return value
    try:
        return json.dumps(value, default=_as_object, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        raise PydanticCustomError("json_schema", "Input should be a JSON schema, or a string that holds one") from None


def _as_object(value: Any) -> Any:
    """What ``json`` does not know: mappings of other kinds than dict."""
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(type(value).__name__)


def check_grammar(value: str) -> str:
    """An empty one is none."""
    if value:
        try:
            check_gbnf(value)
        except InvalidArgument as error:
            raise PydanticCustomError(
                "grammar", "Input should be a GBNF grammar: {reason}", {"reason": str(error)}
            ) from None
    return value


def check_schema(value: str, info: ValidationInfo) -> str:
    """An empty one is none. Keywords that are passed over become remarks."""
    if value:
        try:
            check_gbnf(json_schema_to_gbnf(value, info.context))
        except InvalidArgument as error:
            raise PydanticCustomError(
                "json_schema", "Input should be a JSON schema that a grammar can keep: {reason}", {"reason": str(error)}
            ) from None
    return value


def _check_triggers(value: tuple[str, ...]) -> tuple[str, ...]:
    try:
        check_triggers(value)
    except InvalidArgument as error:
        raise PydanticCustomError(
            "triggers", "Input should be grammar triggers: {reason}", {"reason": str(error)}
        ) from None
    return value


#: What switches a lazy grammar on: words, and regular expressions between slashes (``"/<tool_call>|<function=/"``).
GrammarTriggers = Annotated[
    tuple[Annotated[str, text_of_at_most(_N_TRIGGER_BYTES_MAX)], ...],
    *texts_of_at_most(_N_TRIGGERS_MAX),
    AfterValidator(_check_triggers),
    Key(outside="error"),
]
