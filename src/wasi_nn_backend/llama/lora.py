"""LoRA adapters of a model: checked before llama.cpp sees them, loaded with the model, weighed by each context.

They are loaded before the model's first context is created and freed with the model. llama.cpp keeps them in a set of
the model's that every context walks while it decodes, so adding one later would need all engines of the model to stand
still; a context also reserves its graph for the adapters that it finds when it is created.
"""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from gguf.constants import GGMLQuantizationType

from wasi_nn_backend.errors import InvalidArgument, RuntimeFailure, UnsupportedOperation
from wasi_nn_backend.llama.bindings import native
from wasi_nn_backend.llama.gguf_header import GgufHeader, TensorInfo, read_gguf_header
from wasi_nn_backend.llama.log_bridge import LogBridge

__all__ = ["LoraAdapters", "check_adapter"]

_FLOAT32_TYPE = 6  # gguf_type
_ALPHA: Final = "adapter.lora.alpha"
_INVOCATION_TOKENS: Final = "adapter.alora.invocation_tokens"

#: What llama.cpp's converter writes, and what its matrix products take on every back end.
_TENSOR_TYPES: Final = (
    GGMLQuantizationType.F32,
    GGMLQuantizationType.F16,
    GGMLQuantizationType.BF16,
    GGMLQuantizationType.Q8_0,
)


class LoraAdapters:
    """The adapters of one loaded model, in the order of their paths."""

    def __init__(self, model_pointer: int, model_path: Path, paths: Sequence[Path], log: LogBridge) -> None:
        """Raises ``ModelNotFound``, ``InvalidArgument`` (a bad file, or of another model), ``UnsupportedOperation``."""
        self._pointers: list[int] = []
        model_header = read_gguf_header(model_path) if paths else None
        for path in paths:
            check_adapter(path, model_header)
            with log.collector() as collector:
                pointer = native.llama_adapter_lora_init(model_pointer, os.fsencode(path))
            if not pointer:
                raise InvalidArgument(f"llama.cpp could not load the LoRA adapter {path}: {collector.reason()}")
            self._pointers.append(ctypes.cast(pointer, ctypes.c_void_p).value or 0)

    def set_scales(self, context_pointer: int, scales: Sequence[float]) -> None:
        """Weigh the adapters in one context; 0 leaves one out. Raises ``InvalidArgument`` unless there is one scale for
        each adapter."""
        n = len(self._pointers)
        if len(scales) != n:
            raise InvalidArgument(f"the model has {n} LoRA adapters, and {len(scales)} scales were given")
        if n == 0:
            return
        adapters: Any = (native.llama_adapter_lora_p_ctypes * n)(
            *(ctypes.cast(pointer, native.llama_adapter_lora_p_ctypes) for pointer in self._pointers)
        )
        if native.llama_set_adapters_lora(context_pointer, adapters, n, (ctypes.c_float * n)(*scales)) != 0:
            raise RuntimeFailure("llama.cpp could not use the LoRA adapters in this context")


def check_adapter(path: Path, model: GgufHeader | None) -> None:
    """Refuse what llama.cpp would abort on, and say which fault a file has that it would only call a failure.

    ``model`` is the header of the base model (its first part, if it is split). Raises ``ModelNotFound``,
    ``InvalidArgument``, ``UnsupportedOperation``.
    """
    header = read_gguf_header(path)
    fault = _fault_of_kind(header, model) or _fault_of_tensors(header, model)
    if fault is not None:
        raise InvalidArgument(f"{path} is no LoRA adapter for this model: {fault}; give one that was made for it")
    if _INVOCATION_TOKENS in header.array_lengths:
        raise UnsupportedOperation(
            f"{path} is an activated LoRA adapter, which counts from certain tokens of the prompt on; "
            "only adapters that always count can be used"
        )


def _fault_of_kind(header: GgufHeader, model: GgufHeader | None) -> str | None:
    for key, expected in (("general.type", "adapter"), ("adapter.type", "lora")):
        if header.text(key) != expected:
            return f"its {key} is {header.values.get(key, 'missing')!r}, not {expected!r}"
    architecture = header.text("general.architecture")
    if architecture is None or (model is not None and architecture != model.text("general.architecture")):
        return f"it is for the architecture {architecture!r}"
    alpha = header.values.get(_ALPHA, 0.0)
    is_float32 = header.value_types.get(_ALPHA, _FLOAT32_TYPE) == _FLOAT32_TYPE
    if not (is_float32 and isinstance(alpha, float) and math.isfinite(alpha)):
        return f"its {_ALPHA} is {alpha!r}"
    return None


def _fault_of_tensors(header: GgufHeader, model: GgufHeader | None) -> str | None:
    tensors = {tensor.name: tensor for tensor in header.tensors}
    base_tensors = {} if model is None else {tensor.name: tensor for tensor in model.tensors}
    names = sorted({name.rpartition(".")[0] for name in tensors if not name.endswith("_norm.weight")})
    if not names:
        return "it holds no weights"
    for name in names:
        fault = _fault_of_pair(name, tensors, base_tensors.get(name))
        if fault is not None:
            return fault
    return None


def _fault_of_pair(name: str, tensors: Mapping[str, TensorInfo], base: TensorInfo | None) -> str | None:
    """A factor pair: ``a`` has the rows of the base's input, ``b`` those of its output, and both the same rank."""
    a, b = tensors.get(f"{name}.lora_a"), tensors.get(f"{name}.lora_b")
    if a is None or b is None:
        return f"{name} is not there as a pair .lora_a and .lora_b"
    for tensor in (a, b):
        if tensor.type_number not in _TENSOR_TYPES:
            return f"{tensor.name} is of the type {_type_name(tensor)}, not one of {', '.join(_type_names())}"
    a_shape, b_shape = _padded(a), _padded(b)
    is_embedding = name.endswith("token_embd.weight")
    if (a_shape[0] if is_embedding else a_shape[1]) != b_shape[0]:
        return f"the ranks of {a.name} {a.shape} and {b.name} {b.shape} differ"
    if a_shape[2:] != b_shape[2:] or a_shape[2:] != (_padded(base)[2:] if base is not None else (1, 1)):
        return f"{a.name} and {b.name} have the shapes {a.shape} and {b.shape}"
    return None


def _padded(tensor: TensorInfo) -> tuple[int, ...]:
    return (*tensor.shape, 1, 1, 1, 1)[:4]


def _type_name(tensor: TensorInfo) -> str:
    try:
        return GGMLQuantizationType(tensor.type_number).name
    except ValueError:
        return str(tensor.type_number)


def _type_names() -> Iterator[str]:
    return (item.name for item in _TENSOR_TYPES)
