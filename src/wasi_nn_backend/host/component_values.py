"""The values of a component's calls, in the form that wasmtime's C API hands them over.

wasmtime-py converts each argument and result for itself: it asks wasmtime for the function's types at every call, and
makes a Python object of every element of a list, which costs two seconds per MiB of ``list<u8>``. Here the bytes are
gathered out of the array of values with one strided copy, and the types are known beforehand. What is left, some 0.1 to
0.2 s per MiB, is wasmtime's own: it keeps 32 bytes for each element (``python -m bench.components``).

A component's function may have another type than the host's, as wasmtime compares only resources where the host's side
is written without types. So each value's kind is looked at before a byte of it is read.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from wasmtime import _ffi as ffi

from wasi_nn_backend.errors import Busy, InvalidArgument

__all__ = [
    "Arguments",
    "Write",
    "write_bytes",
    "write_enum",
    "write_named_resources",
    "write_resource",
    "write_result",
    "write_string",
    "write_u32_list",
]

_Value = ffi.wasmtime_component_val_t
_N_VALUE_BYTES = ctypes.sizeof(_Value)
_KIND_OFFSET: int = _Value.kind.offset
_PAYLOAD_OFFSET: int = _Value.of.offset

_U8 = ffi.WASMTIME_COMPONENT_U8.value
_U32 = ffi.WASMTIME_COMPONENT_U32.value
_STRING = ffi.WASMTIME_COMPONENT_STRING.value
_ENUM = ffi.WASMTIME_COMPONENT_ENUM.value
_LIST = ffi.WASMTIME_COMPONENT_LIST.value
_TUPLE = ffi.WASMTIME_COMPONENT_TUPLE.value
_RESULT = ffi.WASMTIME_COMPONENT_RESULT.value
_RESOURCE = ffi.WASMTIME_COMPONENT_RESOURCE.value

#: Puts a Python object into a value: (context of the store, value, object).
Write = Callable[[Any, Any, Any], None]


class Arguments:
    """The arguments of one call, for the length of the call. Every reader raises ``InvalidArgument`` where the value is
    of another kind.

    wasmtime frees the values after the call. Resources are given as (their representation in the host); an owned one
    belongs to the host once it has been read.
    """

    __slots__ = ("_context", "_values")

    def __init__(self, context: Any, values: Any) -> None:
        self._context = context
        self._values = values

    def string(self, index: int) -> str:
        return _string(self._values[index], _STRING)

    def enum(self, index: int) -> str:
        return _string(self._values[index], _ENUM)

    def byte_list(self, index: int) -> bytes:
        return _bytes(self._values[index])

    def byte_lists(self, index: int) -> list[bytes]:
        return [_bytes(value) for value in _elements(self._values[index])]

    def u32_list(self, index: int) -> tuple[int, ...]:
        values = self._values[index]
        return tuple(int(_payload(value, _U32).u32) for value in _elements(values))

    def resource(self, index: int, type_id: int) -> int:
        """The representation of a resource of one type."""
        return self._resource(self._values[index], type_id)

    def named_resources(self, index: int, type_id: int) -> list[tuple[str, int]]:
        """A ``list<tuple<string, own>>``."""
        named = []
        for value in _elements(self._values[index]):
            pair = _payload(value, _TUPLE).tuple
            if pair.size != 2:
                raise _wrong_kind()
            named.append((_string(pair.data[0], _STRING), self._resource(pair.data[1], type_id)))
        return named

    def _resource(self, value: Any, type_id: int) -> int:
        resource = _payload(value, _RESOURCE).resource
        host = ctypes.POINTER(ffi.wasmtime_component_resource_host_t)()
        error: Any = ffi.wasmtime_component_resource_any_to_host(self._context, resource, ctypes.byref(host))
        if error:
            ffi.wasmtime_error_delete(error)
            raise _wrong_kind()
        try:
            if ffi.wasmtime_component_resource_host_type(host) != type_id:
                raise _wrong_kind()
            return int(ffi.wasmtime_component_resource_host_rep(host))
        finally:
            ffi.wasmtime_component_resource_host_delete(host)


# --- reading ---


def _payload(value: Any, kind: int) -> Any:
    if value.kind != kind:
        raise _wrong_kind()
    return value.of


def _string(value: Any, kind: int) -> str:
    text = _payload(value, kind)
    vector = text.string if kind == _STRING else text.enumeration
    return ctypes.string_at(vector.data, vector.size).decode() if vector.size else ""


def _elements(value: Any) -> Iterator[Any]:
    elements = _payload(value, _LIST).list
    return (elements.data[i] for i in range(elements.size))


def _bytes(value: Any) -> bytes:
    elements = _payload(value, _LIST).list
    if not elements.size:
        return b""
    _payload(elements.data[0], _U8)  # a list's elements are of one kind
    return bytes(_view(elements)[_PAYLOAD_OFFSET::_N_VALUE_BYTES])


def _view(elements: Any) -> memoryview:
    """The bytes of an array of values."""
    address = ctypes.addressof(elements.data.contents)
    return memoryview((ctypes.c_uint8 * (elements.size * _N_VALUE_BYTES)).from_address(address)).cast("B")


def _wrong_kind() -> InvalidArgument:
    return InvalidArgument("the component calls this function with other types than wasi:nn's: build it with its WIT")


# --- writing: wasmtime takes what it is given, and frees it ---


def write_string(context: Any, value: Any, text: str) -> None:
    value.kind = _STRING
    value.of.string = ffi.str_to_capi(text)


def write_enum(context: Any, value: Any, name: str) -> None:
    value.kind = _ENUM
    value.of.enumeration = ffi.str_to_capi(name)


def write_bytes(context: Any, value: Any, data: bytes) -> None:
    elements = _new_list(value, len(data))
    if data:
        view = _view(elements)
        view[_KIND_OFFSET::_N_VALUE_BYTES] = bytes((_U8,)) * len(data)
        view[_PAYLOAD_OFFSET::_N_VALUE_BYTES] = data


def write_u32_list(context: Any, value: Any, numbers: Sequence[int]) -> None:
    elements = _new_list(value, len(numbers))
    for i, number in enumerate(numbers):
        elements.data[i].kind = _U32
        elements.data[i].of.u32 = number


def write_resource(type_id: int) -> Write:
    """A writer of resources of one type, owned by the component from then on, from their representation."""

    def write(context: Any, value: Any, representation: int) -> None:
        _put_resource(value, _new_resource(context, representation, type_id))

    return write


def write_named_resources(type_id: int) -> Write:
    """A writer of ``list<tuple<string, own>>``."""

    def write(context: Any, value: Any, named: Sequence[tuple[str, int]]) -> None:
        # First what can fail: a list that is filled in part could not be freed.
        resources = [_new_resource(context, representation, type_id) for _, representation in named]
        elements = _new_list(value, len(named))
        for i, (name, _) in enumerate(named):
            pair = ffi.wasmtime_component_valtuple_t()
            ffi.wasmtime_component_valtuple_new_uninit(ctypes.byref(pair), 2)
            write_string(context, pair.data[0], name)
            _put_resource(pair.data[1], resources[i])
            elements.data[i].kind = _TUPLE
            elements.data[i].of.tuple = pair

    return write


def write_result(context: Any, value: Any, write: Write, payload: Any, *, is_ok: bool) -> None:
    """A ``result`` whose case has a payload."""
    inner = _Value()
    write(context, inner, payload)
    value.kind = _RESULT
    value.of.result.is_ok = is_ok
    value.of.result.val = ffi.wasmtime_component_val_new(ctypes.byref(inner))


def _new_resource(context: Any, representation: int, type_id: int) -> Any:
    host = ffi.wasmtime_component_resource_host_new(True, representation, type_id)
    resource = ctypes.POINTER(ffi.wasmtime_component_resource_any_t)()
    error: Any = ffi.wasmtime_component_resource_host_to_any(context, host, ctypes.byref(resource))
    ffi.wasmtime_component_resource_host_delete(host)
    if error:
        ffi.wasmtime_error_delete(error)
        raise Busy("the component holds as many resources as wasmtime allows: drop some")
    return resource


def _put_resource(value: Any, resource: Any) -> None:
    value.kind = _RESOURCE
    value.of.resource = resource


def _new_list(value: Any, n: int) -> Any:
    elements = ffi.wasmtime_component_vallist_t()
    ffi.wasmtime_component_vallist_new_uninit(ctypes.byref(elements), n)
    value.kind = _LIST
    value.of.list = elements
    return elements
