"""What the sections have in common: a strict, frozen model, and what a field says about how its key is written.

A section is a pydantic model whose fields are the canonical keys. Pydantic holds types and ranges; ``Key`` holds what
pydantic has no word for: other spellings, and what happens to a value that is out of range. One place a key, so that
adding one later is adding one field.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, ValidationInfo
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

__all__ = [
    "INT32_MAX",
    "OUT_OF_RANGE",
    "Key",
    "OutsidePolicy",
    "Section",
    "key_of",
    "text_of_at_most",
    "texts_of_at_most",
    "zero_or_at_least",
]

#: llama.cpp takes most counts as 32-bit signed integers; anything larger would wrap around on its way there.
INT32_MAX: Final = 2**31 - 1

#: The pydantic error type of ranges that are not one interval.
OUT_OF_RANGE: Final = "out_of_range"

#: ``clamp``: the nearest bound, with a warning. ``default``: the built-in default, with a warning. ``error``: refuse.
OutsidePolicy = Literal["clamp", "default", "error"]


class Section(BaseModel):
    """One section of the configuration. Strict: a bool is no int, 1.0 is no int, but an int is a float."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True, slots=True)
class Key:
    """How users write a key, put into the ``Annotated`` of its field.

    ``spellings`` are further names in snake_case (kebab-case is always accepted too). ``negations`` are names that
    mean the opposite of a boolean key. ``also_in`` are other sections in which the key may stand. ``nested_only`` keys
    are known in their section only: at the top level the name is another section's.
    """

    spellings: tuple[str, ...] = ()
    outside: OutsidePolicy = "clamp"
    negations: tuple[str, ...] = ()
    also_in: tuple[str, ...] = ()
    nested_only: bool = False


def key_of(field: FieldInfo) -> Key:
    """The field's ``Key``, or one with no special wishes."""
    return next((item for item in field.metadata if isinstance(item, Key)), Key())


def zero_or_at_least(minimum: int) -> AfterValidator:
    """A range with a hole: 0 has a meaning of its own, and 1 to ``minimum - 1`` make no sense."""

    def check(value: int) -> int:
        if value == 0 or value >= minimum:
            return value
        raise PydanticCustomError(OUT_OF_RANGE, "Input should be 0 or at least {minimum}", {"minimum": minimum})

    return AfterValidator(check)


def text_of_at_most(n_bytes_max: int) -> AfterValidator:
    """A bound on a string's length as UTF-8, which also keeps out what has no UTF-8 (half a surrogate pair)."""

    def check(value: str) -> str:
        try:
            n_bytes = len(value.encode())
        except UnicodeEncodeError:
            raise PydanticCustomError("not_unicode", "Input should be text without lone surrogates") from None
        if n_bytes > n_bytes_max:
            raise PydanticCustomError(
                "too_long", "Input should be at most {n_bytes_max} bytes of UTF-8", {"n_bytes_max": n_bytes_max}
            )
        return value

    return AfterValidator(check)


def texts_of_at_most(n_texts_max: int) -> tuple[BeforeValidator, AfterValidator]:
    """For lists of strings: a single string is a list of one, and empty strings are left out with a remark."""

    def as_texts(value: Any, info: ValidationInfo) -> Any:
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, (list, tuple)):
            raise PydanticCustomError("texts", "Input should be a string or an array of strings")
        kept = tuple(item for item in texts if not (isinstance(item, str) and not item))
        if len(kept) < len(texts) and info.context is not None:
            info.context.append("empty strings are left out")
        return kept

    def check_count(value: tuple[str, ...]) -> tuple[str, ...]:
        if len(value) > n_texts_max:
            raise PydanticCustomError(
                "too_many", "Input should be at most {n_texts_max} strings", {"n_texts_max": n_texts_max}
            )
        return value

    return BeforeValidator(as_texts, json_schema_input_type=str | list[str]), AfterValidator(check_count)
