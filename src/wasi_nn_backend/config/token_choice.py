"""Types of the ``sampling`` keys that name samplers or tokens: the samplers' order, and biases of single tokens."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, Final

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from wasi_nn_backend.config.section import INT32_MAX, Key

__all__ = ["SAMPLER_NAMES", "LogitBiases", "SamplerOrder"]

#: llama.cpp's samplers by their names and letters (``common_sampler_types_from_names`` and ``..._from_chars``), in the
#: order in which its own programs run them.
_SAMPLER_LETTERS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "e": "penalties",
        "d": "dry",
        "s": "top_n_sigma",
        "k": "top_k",
        "y": "typ_p",
        "p": "top_p",
        "m": "min_p",
        "x": "xtc",
        "t": "temperature",
    }
)
SAMPLER_NAMES: Final = tuple(_SAMPLER_LETTERS.values())

#: Further names that llama.cpp takes, and the names of this configuration's keys.
_OTHER_SAMPLER_NAMES: Final[Mapping[str, str]] = MappingProxyType(
    {"typical_p": "typ_p", "typical": "typ_p", "nucleus": "top_p", "temp": "temperature"}
)

#: More than any caller has a use for; each costs time on every token.
_N_BIASES_MAX: Final = 2**16

_BIAS_MAX: Final = 1e6


def _as_sampler_order(value: Any) -> Any:
    """A list of names, names with semicolons between them, or llama.cpp's letters, as in ``"edkypmxt"``."""
    if isinstance(value, str):
        is_letters = value not in SAMPLER_NAMES and all(letter in _SAMPLER_LETTERS for letter in value)
        value = [_SAMPLER_LETTERS[letter] for letter in value] if is_letters else value.split(";")
    if not isinstance(value, (list, tuple)):
        raise PydanticCustomError("samplers", "Input should be an array of sampler names or a string of their letters")
    return tuple(_as_sampler_name(name) if isinstance(name, str) else name for name in value)


def _as_sampler_name(name: str) -> str:
    plain = name.strip().replace("-", "_")
    return _OTHER_SAMPLER_NAMES.get(plain, plain)


def _check_sampler_order(names: tuple[str, ...]) -> tuple[str, ...]:
    for index, name in enumerate(names):
        if name not in SAMPLER_NAMES:
            raise PydanticCustomError(
                "samplers", "Input should name only the samplers {names}", {"names": ", ".join(SAMPLER_NAMES)}
            )
        if name in names[:index]:
            raise PydanticCustomError(
                "samplers", "Input should name each sampler once; {name} is twice in it", {"name": name}
            )
    return names


def _as_biases(value: Any) -> Any:
    """``[[198, -1.0]]``, or ``{"198": -1.0}`` as other servers have it."""
    if isinstance(value, Mapping):
        return tuple((_as_token(token), bias) for token, bias in value.items())
    if isinstance(value, (list, tuple)) and all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in value):
        return tuple(map(tuple, value))
    raise PydanticCustomError("logit_bias", "Input should be an array of pairs [token, bias]")


def _as_token(text: Any) -> Any:
    return int(text) if isinstance(text, str) and text.isdecimal() and len(text) < len(str(INT32_MAX)) + 1 else text


def _check_biases(value: tuple[tuple[int, float], ...]) -> tuple[tuple[int, float], ...]:
    if len(value) > _N_BIASES_MAX:
        raise PydanticCustomError("too_many", "Input should be at most {n_max} pairs", {"n_max": _N_BIASES_MAX})
    return value


#: Names of ``SAMPLER_NAMES``, each at most once.
SamplerOrder = Annotated[
    tuple[str, ...],
    BeforeValidator(_as_sampler_order, json_schema_input_type=str | list[str]),
    AfterValidator(_check_sampler_order),
    Key(outside="error"),
]

#: (token, bias) pairs. Whether the model has such tokens is found out when it runs.
LogitBiases = Annotated[
    tuple[
        tuple[
            Annotated[int, Field(ge=0, le=INT32_MAX)],
            Annotated[float, Field(ge=-_BIAS_MAX, le=_BIAS_MAX)],
        ],
        ...,
    ],
    BeforeValidator(_as_biases, json_schema_input_type=list[tuple[int, float]] | dict[str, float]),
    AfterValidator(_check_biases),
    Key(outside="error"),
]
