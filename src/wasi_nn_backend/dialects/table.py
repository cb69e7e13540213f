"""The shape of one dialect: what a guest's numbers mean. Data only, no behaviour beyond look-up.

A dialect is one import module name with its functions and numbers as one family of guests was built for. A door
translates through these tables and knows no number itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, TypeVar

from wasi_nn_backend.errors import ErrorCode, InvalidArgument, InvalidEncoding
from wasi_nn_backend.types import Door, ExecutionTarget, GraphEncoding, TensorType

__all__ = ["ArgumentKind", "Dialect", "StructForm", "argument_kind", "frozen"]

#: What an argument is. Modules with 32-bit memories pass all of them as i32; with 64-bit memories a pointer is an i64,
#: and so is a length where the guest's header declares it as ``size_t``.
ArgumentKind = Literal["word", "length", "pointer"]
#: How tensors and builders lie in memory: as in the witx, with lengths, or as in WAMR's older header.
StructForm = Literal["witx", "wamr-legacy"]

_WORDS = frozenset({"graph", "context", "index", "encoding", "target"})
_LENGTHS = frozenset({"n_builders", "n_name_bytes", "n_config_bytes", "n_buffer_bytes", "n_prompt_bytes"})

K = TypeVar("K")
V = TypeVar("V")


@dataclass(frozen=True, slots=True)
class Dialect:
    """The numbers of one family of guests.

    ``functions`` maps each import to the names of its parameters (``argument_kind`` says what each is). The one
    result is the error number, an i32; for those in ``pointer_results`` it is an address, 0 on failure.
    ``metadata_keys`` lists the keys that output 1 shows, in order; None shows all that the backend has.
    ``exports_return_text``: what such modules export, to be called by name, answers with the address of a
    NUL-terminated text. ``wide_types`` has the parameters' WebAssembly types of those functions that a module with a
    64-bit memory imports; elsewhere all are i32. ``leaves_buffers_unsized``: some such modules pass the length 0 with a
    buffer that has room.
    """

    name: str
    import_module: str
    door: Door
    functions: Mapping[str, tuple[str, ...]]
    errnos: Mapping[ErrorCode, int]
    tensor_types: Mapping[int, TensorType]
    encodings: Mapping[int, GraphEncoding]
    targets: Mapping[int, ExecutionTarget]
    metadata_keys: tuple[str, ...] | None
    struct_form: StructForm = "witx"
    pointer_results: frozenset[str] = frozenset()
    exports_return_text: bool = False
    leaves_buffers_unsized: bool = False
    wide_types: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def errno(self, code: ErrorCode) -> int:
        return self.errnos[code]

    def tensor_type(self, word: int) -> TensorType:
        """The type in a tensor's type word. Only its low byte counts: the other three are padding, left undefined."""
        try:
            return self.tensor_types[word & 0xFF]
        except KeyError:
            raise InvalidArgument(
                f"tensor type {word & 0xFF} is none of {self.name}'s {sorted(self.tensor_types)}: send text as u8"
            ) from None

    def encoding(self, word: int) -> GraphEncoding:
        """The graph encoding in an argument, narrowed to a byte as hosts of this family narrow it."""
        try:
            return self.encodings[word & 0xFF]
        except KeyError:
            raise InvalidEncoding(
                f"graph encoding {word & 0xFF} is none of {self.name}'s {sorted(self.encodings)}: pass ggml's"
            ) from None

    def target(self, word: int) -> ExecutionTarget:
        try:
            return self.targets[word]
        except KeyError:
            raise InvalidArgument(
                f"execution target {word} is none of {self.name}'s {sorted(self.targets)}: use 0 for the CPU"
            ) from None


def argument_kind(parameter: str) -> ArgumentKind:
    """By the name of the parameter, as the dialects' tables have it."""
    if parameter in _WORDS:
        return "word"
    return "length" if parameter in _LENGTHS else "pointer"


def frozen(table: Mapping[K, V]) -> Mapping[K, V]:
    """A read-only view, so that no door can change a dialect for all the others."""
    return MappingProxyType(dict(table))
