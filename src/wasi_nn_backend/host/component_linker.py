"""Gives a component its ``wasi:nn`` imports: resources, and functions that never raise.

The functions are registered through wasmtime's C API, below ``LinkerInstance.add_func``. That converts values one by
one (``component_values.py``), and keeps the exception of a host function in a module global, where another thread's
guest can pick it up.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from wasmtime import WasmtimeError
from wasmtime import _ffi as ffi
from wasmtime.component import Linker, LinkerInstance, ResourceType

from wasi_nn_backend.dialects.wit import WIT, WIT_PACKAGE, WIT_VERSIONS
from wasi_nn_backend.errors import WasiNNError
from wasi_nn_backend.host.component_abi import ComponentAbi
from wasi_nn_backend.host.component_values import (
    Arguments,
    Write,
    write_bytes,
    write_enum,
    write_named_resources,
    write_resource,
    write_result,
    write_string,
    write_u32_list,
)
from wasi_nn_backend.host.limits import HostLimits
from wasi_nn_backend.host.output import DescriptorWriter
from wasi_nn_backend.host.state import GuestState

if TYPE_CHECKING:
    from wasi_nn_backend.backend import Backend

__all__ = ["define_wasi_nn_component"]

_STDOUT_DESCRIPTOR = 1

# wasmtime tells the host's resource types apart by these numbers. Other hosts of the same store have their own.
_TENSOR, _ERROR, _CONTEXT, _GRAPH = 0x6E6E_0001, 0x6E6E_0002, 0x6E6E_0003, 0x6E6E_0004

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Resource:
    type_id: int
    drop: Callable[[int], None]


@dataclass(frozen=True, slots=True)
class _Function:
    """``read`` takes the arguments, ``act`` does the work, ``write`` takes its result.

    ``has_error``: the type is a ``result`` whose error is ours. Others trap where they fail.
    """

    read: tuple[Callable[[Arguments], Any], ...]
    act: Callable[..., Any]
    write: Write
    has_error: bool = False


_Item = _Resource | _Function


def define_wasi_nn_component(
    linker: Linker,
    backend: Backend,
    *,
    limits: HostLimits | None = None,
    write_stdout: Callable[[bytes], None] | None = None,
) -> GuestState:
    """Define ``wasi:nn`` in every version that is served; returns the state, which the caller closes after the guest.

    >>> with define_wasi_nn_component(linker, backend):
    ...     instance = linker.instantiate(store, component)

    Use a linker for each guest: the state, with its limits and what is open, is the linker's. Closing it frees what the
    guest never dropped. ``limits`` and ``write_stdout`` are those of ``define_wasi_nn``. Raises ``WasmtimeError`` where
    the linker has these interfaces already.
    """
    state = GuestState(
        backend, WIT, limits=limits or HostLimits(), write_stdout=write_stdout or DescriptorWriter(_STDOUT_DESCRIPTOR)
    )
    abi = ComponentAbi(state)
    interfaces = {
        "tensor": _tensor_interface(abi),
        "errors": _errors_interface(abi),
        "inference": _inference_interface(abi),
        "graph": _graph_interface(abi),
    }
    with linker.root() as root:
        for version in WIT_VERSIONS:
            for interface, items in interfaces.items():
                with root.add_instance(f"{WIT_PACKAGE}/{interface}@{version}") as instance:
                    _define_items(instance, items, abi, state)
    return state


def _tensor_interface(abi: ComponentAbi) -> Mapping[str, _Item]:
    borrowed = _resource(_TENSOR)
    return {
        "tensor": _Resource(_TENSOR, abi.drop_tensor),
        "[constructor]tensor": _Function(
            (lambda given: given.u32_list(0), lambda given: given.enum(1), lambda given: given.byte_list(2)),
            abi.new_tensor,
            write_resource(_TENSOR),
        ),
        "[method]tensor.dimensions": _Function((borrowed,), abi.tensor_dimensions, write_u32_list),
        "[method]tensor.ty": _Function((borrowed,), abi.tensor_type, write_enum),
        "[method]tensor.data": _Function((borrowed,), abi.tensor_data, write_bytes),
    }


def _errors_interface(abi: ComponentAbi) -> Mapping[str, _Item]:
    borrowed = _resource(_ERROR)
    return {
        "error": _Resource(_ERROR, abi.drop_error),
        "[constructor]error": _Function(
            (lambda given: given.enum(0), lambda given: given.string(1)), abi.new_error, write_resource(_ERROR)
        ),
        "[method]error.code": _Function((borrowed,), abi.error_code, write_enum),
        "[method]error.data": _Function((borrowed,), abi.error_text, write_string),
    }


def _inference_interface(abi: ComponentAbi) -> Mapping[str, _Item]:
    return {
        "graph-execution-context": _Resource(_CONTEXT, abi.drop_context),
        "[method]graph-execution-context.compute": _Function(
            (_resource(_CONTEXT), lambda given: given.named_resources(1, _TENSOR)),
            abi.compute,
            write_named_resources(_TENSOR),
            has_error=True,
        ),
    }


def _graph_interface(abi: ComponentAbi) -> Mapping[str, _Item]:
    return {
        "graph": _Resource(_GRAPH, abi.drop_graph),
        "[method]graph.init-execution-context": _Function(
            (_resource(_GRAPH),), abi.init_execution_context, write_resource(_CONTEXT), has_error=True
        ),
        "load": _Function(
            (lambda given: given.byte_lists(0), lambda given: given.enum(1), lambda given: given.enum(2)),
            abi.load,
            write_resource(_GRAPH),
            has_error=True,
        ),
        "load-by-name": _Function(
            (lambda given: given.string(0),), abi.load_by_name, write_resource(_GRAPH), has_error=True
        ),
    }


def _resource(type_id: int) -> Callable[[Arguments], int]:
    """The resource that a method belongs to. wasmtime lends it for the call, and wants it to be read."""
    return lambda given: given.resource(0, type_id)


# --- from wasmtime's C API to these, and back ---

#: What the C API calls: (context, arguments, number of arguments, results, number of results) -> error or None.
_HostCall = Callable[[Any, Any, int, Any, int], Any]


def _host_function(abi: ComponentAbi, state: GuestState, name: str, function: _Function) -> _HostCall:
    """Wrap one function so that it answers whatever happens: a result, an error resource, or a trap."""

    def act(context: Any, values: Any, results: Any) -> None:
        started_s = state.pacer.start()
        try:
            given = Arguments(context, values)
            arguments = [read(given) for read in function.read]
            if function.has_error:  # the others only look at what is there
                state.check_not_stopped()
            answer = function.act(*arguments)
            if not function.has_error:
                function.write(context, results[0], answer)
            else:
                write_result(context, results[0], function.write, answer, is_ok=True)
        finally:
            state.pacer.end(started_s)

    def call(context: Any, values: Any, n_values: int, results: Any, n_results: int) -> Any:
        if (n_values, n_results) != (len(function.read), 1):
            return _trap(f"{name} has other parameters in this component than in wasi:nn: build it with its WIT")
        try:
            try:
                act(context, values, results)
                return None
            except WasiNNError as error:
                if not function.has_error:
                    state.record_error(name, error)
                    return _trap(str(error))
                failure = abi.record_error(name, error)
            except BaseException as error:
                if not function.has_error:
                    state.record_fault(name, error)
                    return _trap("the host failed to carry out this call; its log says why")
                failure = abi.record_fault(name, error)
            write_result(context, results[0], _write_error, failure, is_ok=False)
            return None
        except BaseException:  # the second one, out of the recording itself: a signal, or no memory left
            _log.critical("recording an error of %s failed", name, exc_info=True)
            return _trap("the host failed to say why a call failed; its log says more")

    return call


_write_error = write_resource(_ERROR)


def _host_drop(state: GuestState, name: str, drop: Callable[[int], None]) -> Callable[[int], Any]:
    """Dropping cannot fail: what goes wrong is remembered, and the guest goes on."""

    def call(representation: int) -> Any:
        try:
            try:
                started_s = state.pacer.start()
                try:
                    drop(representation)
                finally:
                    state.pacer.end(started_s)
            except WasiNNError as error:
                state.record_error(f"dropping a {name}", error)
            except BaseException as error:
                state.record_fault(f"dropping a {name}", error)
        except BaseException:  # as above
            _log.critical("recording an error of dropping a %s failed", name, exc_info=True)

    return call


def _define_items(instance: LinkerInstance, items: Mapping[str, _Item], abi: ComponentAbi, state: GuestState) -> None:
    for name, item in items.items():
        encoded = ctypes.create_string_buffer(name.encode())
        n_bytes = len(name.encode())
        error: Any
        if isinstance(item, _Resource):
            data = _keep(_host_drop(state, name, item.drop))
            kind = ResourceType.host(item.type_id)
            error = ffi.wasmtime_component_linker_instance_add_resource(
                instance.ptr(), encoded, n_bytes, kind.ptr(), _DROP_RESOURCE, data, _RELEASE
            )
        else:
            data = _keep(_host_function(abi, state, name, item))
            error = ffi.wasmtime_component_linker_instance_add_func(
                instance.ptr(), encoded, n_bytes, _CALL_FUNCTION, data, _RELEASE
            )
        if error:
            raise WasmtimeError._from_ptr(error)


def _keep(function: Callable[..., Any]) -> int:
    """The address of a function, as wasmtime's user data. It lives until wasmtime releases it."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(function))
    return id(function)


def _kept(data: int) -> Any:
    return ctypes.cast(ctypes.c_void_p(data), ctypes.py_object).value


def _release(data: int) -> None:
    ctypes.pythonapi.Py_DecRef(ctypes.py_object(_kept(data)))


def _call_function(  # noqa: PLR0913, PLR0917 - the C API's signature
    data: int, context: Any, kind: Any, values: Any, n_values: int, results: Any, n_results: int
) -> int:
    return _address(_kept(data)(context, values, n_values, results, n_results))


def _drop_resource(data: int, context: Any, representation: int) -> int:
    _kept(data)(representation)
    return 0


_RELEASE = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(_release)
_CALL_FUNCTION = ffi.wasmtime_component_func_callback_t(_call_function)
_DROP_RESOURCE = ffi.wasmtime_component_resource_destructor_t(_drop_resource)


def _trap(text: str) -> Any:
    return ffi.wasmtime_error_new(text.encode(errors="replace").replace(b"\0", b""))


def _address(error: Any) -> int:
    """A pointer as the C API's callbacks return it; 0 for none."""
    return 0 if error is None else ctypes.cast(error, ctypes.c_void_p).value or 0
