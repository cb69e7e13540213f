"""The nouns of WASI-NN, free of any dialect's numbers."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

from wasi_nn_backend.errors import InvalidArgument

__all__ = [
    "CONFIG_INDEX",
    "METADATA_INDEX",
    "PROMPT_INDEX",
    "PYTHON_DOOR",
    "TEXT_INDEX",
    "Door",
    "ExecutionTarget",
    "GraphEncoding",
    "OwnedDoor",
    "PromptMode",
    "Tensor",
    "TensorType",
    "input_bytes",
]

PromptMode = Literal["chat", "raw"]
_Owner = TypeVar("_Owner")

#: Tensor indices, the same at every door: input 0 is the prompt and 1 configuration JSON, output 0 is the text and
#: 1 metadata JSON.
PROMPT_INDEX = 0
CONFIG_INDEX = 1
TEXT_INDEX = 0
METADATA_INDEX = 1


class TensorType(enum.Enum):
    """Element types of all dialects together. For text they mean nothing: prompts are bytes of any type."""

    FP16 = "fp16"
    FP32 = "fp32"
    FP64 = "fp64"
    BF16 = "bf16"
    U8 = "u8"
    I32 = "i32"
    I64 = "i64"


class GraphEncoding(enum.Enum):
    """Model formats of all dialects together, of which this backend runs ggml."""

    OPENVINO = "openvino"
    ONNX = "onnx"
    TENSORFLOW = "tensorflow"
    PYTORCH = "pytorch"
    TENSORFLOWLITE = "tensorflowlite"
    GGML = "ggml"
    AUTODETECT = "autodetect"


class ExecutionTarget(enum.Enum):
    """Where a caller would like a graph to run; ``model.n_gpu_layers`` decides."""

    CPU = "cpu"
    GPU = "gpu"
    TPU = "tpu"


@dataclass(frozen=True, slots=True)
class Tensor:
    """Bytes with a shape that nobody here relies on: guests in the field send ``dimensions = (1,)`` for any length."""

    data: bytes
    dimensions: tuple[int, ...] = ()
    type: TensorType = TensorType.U8


@dataclass(frozen=True, slots=True)
class Door:
    """How one way into the backend differs from the others.

    ``defaults`` is a configuration layer (nested shape) between the built-in defaults and the backend's own
    configuration. ``is_trusted`` callers are the program that embeds the backend or its operator: ``load_by_name``
    takes file paths from them, and they may set what is the host's (limits, chat templates); guests may not.
    ``unknown_keys`` says what happens to configuration keys that nobody knows. Where a value out of range becomes
    the default, that is the one of ``defaults``. ``raised_keys`` are (section, key) pairs: a value that is too small
    becomes the smallest there is.
    """

    name: str
    prompt_mode: PromptMode
    is_trusted: bool
    defaults: Mapping[str, Any] = field(default_factory=dict)
    unknown_keys: Literal["warn", "ignore", "error"] = "warn"
    raised_keys: frozenset[tuple[str, str]] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnedDoor(Door, Generic[_Owner]):
    """One caller's own door. ``owner`` stands between its graphs and the backend, and may allow less
    (``owning_backend.py``)."""

    owner: _Owner


PYTHON_DOOR = Door(name="python", prompt_mode="chat", is_trusted=True)


def input_bytes(value: Tensor | bytes | str) -> bytes:
    """The data of an input. Raises ``InvalidArgument`` for what is none."""
    if isinstance(value, Tensor):
        if not isinstance(value.data, bytes | bytearray | memoryview):
            raise InvalidArgument(f"a Tensor's data is bytes, got {type(value.data).__name__}")
        return bytes(value.data)
    if isinstance(value, str):
        return value.encode(errors="replace")
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    raise InvalidArgument(f"an input is a Tensor, bytes or str, got {type(value).__name__}")
