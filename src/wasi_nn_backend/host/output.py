"""Where a guest's standard output goes, and the host's ``stream-stdout`` text with it, in order.

A guest writes through WASI, the host function in the middle of a guest's call writes for it; both have to end up in
one stream. Inherited output is the process's own descriptor for both. Captured output is a pipe: wasmtime opens its
write end by name, the host function writes into the same pipe, a thread drains it into the embedder's callback.
wasmtime's own callback sinks (``stdout_custom``) were rejected: they leave a runtime thread that may panic while the
interpreter exits.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import tempfile
import threading
from collections.abc import Callable

from wasmtime import WasiConfig

__all__ = ["CapturedOutput", "DescriptorWriter", "OutputCallback", "configure_input", "configure_output"]

#: Receives bytes in the order in which they were written, on a thread of its own. It may block: the guest then waits.
OutputCallback = Callable[[bytes], None]

_PIPE_READ_BYTES = 1 << 16

_log = logging.getLogger(__name__)


class DescriptorWriter:
    """Writes all of some bytes to a file descriptor, on the caller's thread. Never raises for a reader that has gone.

    After a broken pipe it says so once in the log and swallows the rest, as the guest's own writes fail on their own.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._is_broken = False

    def __call__(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest and not self._is_broken:
            try:
                rest = rest[os.write(self._descriptor, rest) :]
            except BlockingIOError:
                # Somebody made the descriptor non-blocking; wait for room instead of losing text.
                select.select([], [self._descriptor], [])
            except OSError as error:
                self._is_broken = True
                if error.errno != errno.EPIPE:
                    _log.warning("cannot write streamed text to descriptor %d: %s", self._descriptor, error)
                else:
                    _log.info("the reader of descriptor %d has gone: streamed text is dropped", self._descriptor)


class CapturedOutput:
    """A pipe whose reading end calls ``callback``. ``write_path`` is what WASI opens as the guest's stdout or stderr.

    ``close`` returns once everything written has been delivered, provided that the guest's own end is closed (its
    store deleted). A callback that raises is called no more; ``error`` holds the first exception.
    """

    def __init__(self, callback: OutputCallback) -> None:
        self._callback = callback
        self._read_end, self._write_end = os.pipe()
        self.error: Exception | None = None
        self.write = DescriptorWriter(self._write_end)
        self._reader = threading.Thread(target=self._drain, name="wasi-nn-guest-output", daemon=True)
        self._reader.start()

    @property
    def write_path(self) -> str:
        return f"/dev/fd/{self._write_end}"

    def close(self, timeout_s: float | None = None) -> None:
        """Wait until the text is delivered; with ``timeout_s`` at most that long, for a guest that cannot be
        ended."""
        if self._write_end >= 0:
            os.close(self._write_end)
            self._write_end = -1
        self._reader.join(timeout_s)

    def _drain(self) -> None:
        try:
            while data := os.read(self._read_end, _PIPE_READ_BYTES):
                self._deliver(data)
        finally:
            os.close(self._read_end)

    def _deliver(self, data: bytes) -> None:
        if self.error is not None:
            return
        try:
            self._callback(data)
        except Exception as error:
            self.error = error
            _log.exception("the output callback %r raised: the rest of the guest's output is dropped", self._callback)


def configure_input(wasi: WasiConfig, data: bytes) -> None:
    """Let a guest read ``data`` on its standard input. A file without a name: a pipe would need a thread to fill it."""
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.flush()
        file.seek(0)
        wasi.stdin_file = f"/dev/fd/{file.fileno()}"  # opened at once, so that this one may be closed


def configure_output(wasi: WasiConfig, stream: str, capture: CapturedOutput | None) -> None:
    """Point a guest's ``stdout`` or ``stderr`` at the process's own, or at a capture."""
    if capture is not None:
        setattr(wasi, f"{stream}_file", capture.write_path)
    elif stream == "stdout":
        wasi.inherit_stdout()
    else:
        wasi.inherit_stderr()
