"""The type of ``model.lora``: LoRA adapters by path, each with the weight that it has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from wasi_nn_backend.config.section import Section, text_of_at_most

__all__ = ["LoraAdapter", "lora_adapters"]

_N_ADAPTERS_MAX: Final = 16
_N_PATH_BYTES_MAX: Final = 4096
_SCALE_MAX: Final = 1000.0


class LoraAdapter(Section):
    """``path`` names a GGUF file, relative to the current directory. ``scale`` 0 switches the adapter off."""

    path: Annotated[str, Field(min_length=1), text_of_at_most(_N_PATH_BYTES_MAX)]
    scale: Annotated[float, Field(ge=-_SCALE_MAX, le=_SCALE_MAX)] = 1.0


def _as_adapters(value: Any) -> Any:
    """A path, paths with commas between them, one object, or an array of paths and objects."""
    if isinstance(value, str):
        value = [path.strip() for path in value.split(",") if path.strip()]
    elif isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, (list, tuple)):
        raise PydanticCustomError(
            "lora", 'Input should be a path or an array of adapters, as in [{{"path": "style.gguf", "scale": 0.5}}]'
        )
    return tuple({"path": item} if isinstance(item, str) else item for item in value)


def _check_adapters(value: tuple[LoraAdapter, ...]) -> tuple[LoraAdapter, ...]:
    if len(value) > _N_ADAPTERS_MAX:
        raise PydanticCustomError("too_many", "Input should be at most {n_max} adapters", {"n_max": _N_ADAPTERS_MAX})
    paths = [adapter.path for adapter in value]
    if len(set(paths)) < len(paths):
        raise PydanticCustomError("lora", "Input should name each adapter once")
    return value


def lora_adapters() -> tuple[BeforeValidator, AfterValidator]:
    """What makes a tuple of ``LoraAdapter`` out of the ways in which users write one."""
    shape = BeforeValidator(_as_adapters, json_schema_input_type=str | LoraAdapter | list[str | LoraAdapter])
    return shape, AfterValidator(_check_adapters)
