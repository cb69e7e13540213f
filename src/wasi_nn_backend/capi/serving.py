"""What the library's own threads run: take a call, do it, put its code and the reason of a failure into it."""

from __future__ import annotations

import atexit
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from wasi_nn_backend.errors import ErrorCode, RuntimeFailure, WasiNNError

__all__ = ["bind", "prepare"]

_log = logging.getLogger(__name__)


def prepare(is_own_interpreter: bool) -> None:
    """Import everything, before cffi starts: what fails here is reported as one line.

    In an interpreter that the library started itself nobody else sets up logging: warnings go to standard error, while
    no configuration says where they are to go.
    """
    with _without_blas_threads():
        import wasi_nn_backend.capi.calls  # noqa: F401
        from wasi_nn_backend.llama import load_llama
        from wasi_nn_backend.logs import LIBRARY_LOGGER, has_outputs

        load_llama()
    if is_own_interpreter:
        handler = logging.StreamHandler(sys.stderr)
        handler.setLevel(logging.WARNING)  # a configuration that wants more sets the level of the logger
        handler.addFilter(lambda record: not has_outputs())
        handler.setFormatter(logging.Formatter("wasi-nn: %(levelname)s: %(message)s"))
        logging.getLogger(LIBRARY_LOGGER).addHandler(handler)
        _close_null_files()


def _close_null_files() -> None:
    """llama-cpp-python opens /dev/null twice at its import, for a class that is not used here."""
    module = sys.modules.get("llama_cpp._utils")
    for name in ("outnull_file", "errnull_file"):
        file = getattr(module, name, None)
        if file is not None:
            file.close()


@contextmanager
def _without_blas_threads() -> Iterator[None]:
    """numpy's linear algebra, which nothing here uses, starts a thread for every core when it is loaded."""
    name = "OPENBLAS_NUM_THREADS"
    if "numpy" in sys.modules or name in os.environ:
        yield
        return
    os.environ[name] = "1"
    try:
        yield
    finally:
        del os.environ[name]


def bind(ffi: Any, lib: Any, dialect: str, version: str) -> None:
    """Called by cffi's start-up code: connect the C side, built as ``version``, with this package.

    Raises ``RuntimeFailure`` where the library is another version's: its calls may have another shape.
    """
    import wasi_nn_backend
    from wasi_nn_backend import dialects
    from wasi_nn_backend.capi.calls import Calls

    if wasi_nn_backend.__version__ != version:
        raise RuntimeFailure(
            f"the library is of version {version} and the package of {wasi_nn_backend.__version__}: "
            "build it again with wasi-nn capi --build DIR"
        )
    calls = Calls(ffi, lib, dialects.CAPI if dialect == dialects.CAPI.name else dialects.WAMR)
    server = _Server(ffi, lib, calls)
    ffi.def_extern(name="wasi_nn_serve")(server.serve)
    atexit.register(server.end)


class _Server:
    def __init__(self, ffi: Any, lib: Any, calls: Any) -> None:
        self._ffi = ffi
        self._lib = lib
        self._calls = calls
        self._operations = calls.operations()

    def serve(self) -> int:
        """Work until there is no backend left. Many threads are in here at once."""
        call = self._lib.wasi_nn_next_call(self._ffi.NULL)
        while call:
            self._run(call)
            call = self._lib.wasi_nn_next_call(call)
        return 1

    def end(self) -> None:
        """The interpreter ends, which only happens in a host that is a Python program: refuse all further calls."""
        try:
            self._calls.close_all()
        finally:  # else a thread would wait for an interpreter that is no more
            self._lib.wasi_nn_python_ends()

    def _run(self, call: Any) -> None:
        errnos = self._calls.dialect.errnos
        try:
            self._operations[call.operation](call)
        except WasiNNError as error:
            call.code = errnos[error.code]
            self._explain(call, str(error))
        except MemoryError:
            call.code = errnos[ErrorCode.RUNTIME_ERROR]
            self._explain(call, "out of memory: close contexts or unload graphs")
        except BaseException as error:  # a foreign process must not end by a defect of ours
            _log.error("a call failed", exc_info=True)
            call.code = errnos[ErrorCode.RUNTIME_ERROR]
            self._explain(
                call, f"{type(error).__name__}: {error} (a defect in wasi-nn-backend; standard error has more)"
            )

    def _explain(self, call: Any, message: str) -> None:
        room = call.n_message_bytes_max
        data = message.encode(errors="replace").replace(b"\0", b" ")[: room - 1].decode(errors="ignore").encode()
        self._ffi.memmove(call.message, data + b"\0", len(data) + 1)
