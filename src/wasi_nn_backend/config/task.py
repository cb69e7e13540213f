"""``task``: how one call stands in the queue. The keys also stand at the top level."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, Field

from wasi_nn_backend.config.section import Section, text_of_at_most

__all__ = ["TaskSettings"]

_N_USER_ID_BYTES_MAX: Final = 256

#: llama.cpp's ``ggml_sched_priority``, which WasmEdge's modules send under the same name.
_PRIORITY_NAMES: Final[Mapping[int, str]] = MappingProxyType(
    {-1: "low", 0: "normal", 1: "high", 2: "high", 3: "urgent"}
)


def _as_priority(value: Any) -> Any:
    return _PRIORITY_NAMES.get(value, value) if type(value) is int else value


class TaskSettings(Section):
    """``user_id`` "" is the session itself. ``timeout_ms`` ``None`` is ``backend.default_task_timeout_ms``."""

    priority: Annotated[
        Literal["low", "normal", "high", "urgent"],
        BeforeValidator(
            _as_priority, json_schema_input_type=Literal["low", "normal", "high", "urgent", -1, 0, 1, 2, 3]
        ),
        Field(description="who goes first: `low`, `normal`, `high`, `urgent`"),
    ] = "normal"
    user_id: Annotated[
        str,
        Field(description="whose turn a task takes; empty: the session's own"),
        text_of_at_most(_N_USER_ID_BYTES_MAX),
    ] = ""
    timeout_ms: Annotated[
        Annotated[int, Field(ge=0, le=600_000)] | None,
        Field(description="end after this time, waiting included; 0: never, `null`: `backend.default_task_timeout_ms`"),
    ] = None
