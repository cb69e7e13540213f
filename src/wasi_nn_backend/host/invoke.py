"""Calls an export by its name, with the words of a command line: numbers by the function's types, texts copied in.

HyperBEAM calls its modules like this: no ``_start``, an export that takes NUL-terminated texts and returns one. A text
goes into a block of the guest's ``malloc``, and its address is the argument. Where an integer is expected, what reads
as a number is one and anything else is a text; ``text:`` in front makes a text of anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from wasmtime import Func, FuncType, Instance, MemoryType, Module, Store

from wasi_nn_backend.errors import InvalidArgument, MissingMemory, RuntimeFailure, UnsupportedOperation
from wasi_nn_backend.host.layouts import MEMORY32, MEMORY64
from wasi_nn_backend.host.memory import GuestMemory

__all__ = ["InvokeReturns", "InvokeValue", "Invoker"]

#: What an invoked export returned: numbers as they are, or a text.
InvokeValue = int | float | str
#: How to take an integer that an export returns.
InvokeReturns = Literal["number", "text"]

_TEXT_PREFIX = "text:"


class Invoker:
    """The exports of one instance, to be called on its thread. ``max_text_bytes`` bounds a text that comes back."""

    def __init__(self, store: Store, instance: Instance, module: Module, *, max_text_bytes: int) -> None:
        self._store = store
        self._exports = instance.exports(store)
        self._module = module
        self._max_text_bytes = max_text_bytes

    def has(self, name: str) -> bool:
        return isinstance(self._exports.get(name), Func)

    def find(self, name: str) -> Func:
        """Raises ``InvalidArgument`` with the names that there are."""
        found = self._exports.get(name)
        if isinstance(found, Func):
            return found
        names = ", ".join(item.name for item in self._module.exports if isinstance(item.type, FuncType)) or "none"
        raise InvalidArgument(f"the module exports no function {name!r}; to invoke there are: {names}")

    def call(
        self, function: Func, args: Sequence[str] = (), returns: InvokeReturns = "number"
    ) -> tuple[InvokeValue, ...]:
        """Call with one word for each parameter. ``returns`` "text": integers are addresses of NUL-terminated texts.

        Raises ``InvalidArgument`` (wrong words, a text for a module without ``malloc``), ``RuntimeFailure`` (no memory
        for it, NULL instead of a text), and wasmtime's exceptions for traps and exits.
        """
        kinds = [str(kind) for kind in function.type(self._store).params]
        if len(kinds) != len(args):
            raise InvalidArgument(f"the function takes {len(kinds)} arguments ({', '.join(kinds)}), not {len(args)}")
        # All are checked before the guest's malloc runs for the first.
        parsed = [_parse(kind, word) for kind, word in zip(kinds, args, strict=True)]
        values = [
            self._place(value, kind) if isinstance(value, str) else value
            for value, kind in zip(parsed, kinds, strict=True)
        ]
        results = function(self._store, *values)
        listed = results if isinstance(results, list) else [] if results is None else [results]
        if returns == "number":
            return tuple(listed)
        return tuple(self._read_text(value) if isinstance(value, int) else value for value in listed)

    def _place(self, text: str, kind: str) -> int:
        data = text.encode(errors="surrogateescape")  # the bytes of the command line, whatever they are
        if b"\0" in data:
            raise InvalidArgument(f"the text {text[:64]!r} has a NUL in it, which ends a text: leave it out")
        try:
            memory = self._memory()
            malloc = memory.allocator()
        except (MissingMemory, UnsupportedOperation) as error:
            raise InvalidArgument(f"{text[:64]!r} is no {kind}, and cannot be passed as a text: {error}") from None
        if kind != memory.layout.pointer_type:
            raise InvalidArgument(f"{text[:64]!r} is no {kind}: pass a number")
        return memory.place_text(malloc, data)

    def _read_text(self, address: int) -> str:
        if not address:
            raise RuntimeFailure("the export returned NULL instead of a text")
        text = self._memory().read_text(address, "the text returned", max_bytes=self._max_text_bytes)
        return text.decode(errors="replace")

    def _memory(self) -> GuestMemory:
        types = {item.name: item.type for item in self._module.exports}
        kind = types.get("memory")
        is_wide = isinstance(kind, MemoryType) and kind.is_64
        return GuestMemory(self._store, MEMORY64 if is_wide else MEMORY32, find=self._exports.get)


def _parse(kind: str, word: str) -> int | float | str:
    """A word as a value of a WebAssembly type; integers may be 0x-prefixed. A str is a text for an integer."""
    if kind not in ("i32", "i64", "f32", "f64"):
        raise InvalidArgument(f"a function with a parameter of type {kind} cannot be invoked from outside")
    is_integer = kind.startswith("i")
    if is_integer and word.startswith(_TEXT_PREFIX):
        return word.removeprefix(_TEXT_PREFIX)
    try:
        number = int(word, 0) if is_integer else float(word)
    except ValueError:
        if is_integer:
            return word
        raise InvalidArgument(f"{word!r} is no {kind}: pass a number") from None
    if isinstance(number, int) and not -(1 << (int(kind[1:]) - 1)) <= number < 1 << int(kind[1:]):
        raise InvalidArgument(f"{word} does not fit an {kind}: pass a smaller number, or text:{word} for a text")
    return number
