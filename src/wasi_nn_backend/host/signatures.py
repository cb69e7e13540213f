"""The WebAssembly types of the host's functions: one form for 32-bit memories, two for 64-bit ones.

Headers differ in how they declare a length, ``uint32_t`` or ``size_t``, which is the same in a 32-bit memory only. So a
module with a 64-bit memory may import each function in either form, and gets it as it imports it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from wasmtime import FuncType, Module, ValType

from wasi_nn_backend.dialects import ArgumentKind, Dialect, argument_kind, frozen
from wasi_nn_backend.host.layouts import MEMORY32, MEMORY64, MemoryLayout

__all__ = ["CallSignature", "call_signature", "fit_to_module", "function_text", "signature_mismatch"]

#: The types of (word, length, pointer), the usual one first.
_FORMS = (("i32", "i32", "i32"), ("i32", "i32", "i64"), ("i32", "i64", "i64"))
_KINDS: tuple[ArgumentKind, ...] = ("word", "length", "pointer")


@dataclass(frozen=True, slots=True)
class CallSignature:
    """The types of one function's parameters and of its result."""

    parameters: tuple[str, ...]
    result: str

    def __str__(self) -> str:
        return f"({', '.join(self.parameters)}) -> ({self.result})"

    @property
    def layout(self) -> MemoryLayout:
        """That of the caller's memory: a pointer of 64 bits is one into a 64-bit memory."""
        return MEMORY64 if "i64" in self.parameters else MEMORY32

    @property
    def word_masks(self) -> tuple[int, ...]:
        """What makes each argument unsigned."""
        return tuple(0xFFFF_FFFF_FFFF_FFFF if name == "i64" else 0xFFFF_FFFF for name in self.parameters)

    def signed_result(self, value: int) -> int:
        """An address as the signed number that wasmtime-py takes."""
        n_bits = int(self.result[1:])
        return value - (1 << n_bits) if value >> (n_bits - 1) else value

    def func_type(self) -> FuncType:
        return FuncType([_val_type(name) for name in self.parameters], [_val_type(self.result)])


def call_signature(dialect: Dialect, function: str) -> CallSignature:
    """As the dialect's modules import it; ``fit_to_module`` makes that one module."""
    return next(
        (form for form in _forms(dialect, function) if form.parameters == dialect.wide_types.get(function)),
        _forms(dialect, function)[0],
    )


def fit_to_module(dialect: Dialect, module: Module) -> Dialect:
    """The dialect with the types that ``module`` imports, where those are not the usual ones; else the dialect itself.

    Imports of types that this host does not have are left to ``signature_mismatch``.
    """
    wide = {}
    for item in module.imports:
        name = item.name or ""
        if item.module == dialect.import_module and name in dialect.functions and isinstance(item.type, FuncType):
            for form in _forms(dialect, name)[1:]:
                if str(form) == function_text(item.type):
                    wide[name] = form.parameters
    return replace(dialect, wide_types=frozen(wide)) if wide else dialect


def signature_mismatch(dialect: Dialect, function: str, imported: FuncType) -> str | None:
    """Why an import of a dialect's function cannot be satisfied; None if it can."""
    forms = [str(form) for form in _forms(dialect, function)]
    found = function_text(imported)
    if found in forms:
        return None
    wide = f", or with a 64-bit memory {' or '.join(forms[1:])}" if forms[1:] else ""
    return f"imported as {found}, this host has {forms[0]}{wide}"


def function_text(imported: FuncType) -> str:
    """A function's type as ``CallSignature`` writes it."""
    return f"({', '.join(map(str, imported.params))}) -> ({', '.join(map(str, imported.results))})"


def _forms(dialect: Dialect, function: str) -> list[CallSignature]:
    kinds = [argument_kind(parameter) for parameter in dialect.functions[function]]
    signatures = []
    for types in _FORMS:
        type_of = dict(zip(_KINDS, types, strict=True))
        result = type_of["pointer"] if function in dialect.pointer_results else "i32"
        signatures.append(CallSignature(tuple(type_of[kind] for kind in kinds), result))
    return list(dict.fromkeys(signatures))


def _val_type(name: str) -> ValType:
    return ValType.i64() if name == "i64" else ValType.i32()
