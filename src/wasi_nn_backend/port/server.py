"""Many calls at once over one channel: each on a thread of its own, answered in the order in which they end."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from wasi_nn_backend.errors import Busy, Cancelled, ErrorCode, InvalidArgument, InvalidEncoding, WasiNNError
from wasi_nn_backend.port import requests
from wasi_nn_backend.port.calls import Call, Calls
from wasi_nn_backend.port.channel import PacketChannel
from wasi_nn_backend.port.requests import CallRequest, CancelRequest, parse_request
from wasi_nn_backend.port.terms import Term, decode

__all__ = ["N_CALLS_MAX", "PortServer"]

_log = logging.getLogger(__name__)

#: More than may wait in a backend's queue by default, so that the queue's own limit is what callers meet.
N_CALLS_MAX = 1024
#: A call that somebody cancelled is no failure of anything. No dialect has a number for it, Erlang has a name.
_CANCELLED = "cancelled"


class PortServer:
    """Serves one node until its end of the channel is closed, or ``stop``. ``on_end`` is called before the calls under
    way are ended."""

    def __init__(
        self,
        channel: PacketChannel,
        version: str,
        calls: Calls | None = None,
        on_end: Callable[[], None] = lambda: None,
    ) -> None:
        self._on_end = on_end
        self._channel = channel
        self._version = version
        self._calls = calls or Calls()
        self._lock = threading.Lock()
        self._under_way: dict[int, Call] = {}

    def run(self) -> None:
        """Returns when the node has closed the channel: everything is cancelled and closed then.

        Raises ``TooLarge`` or ``InvalidEncoding`` when the channel carries something else than packets, after the same.
        """
        threads = ThreadPoolExecutor(N_CALLS_MAX, thread_name_prefix="wasi-nn-call")
        self._channel.send(requests.ready(self._version))
        try:
            while (packet := self._channel.receive()) is not None:
                self._take(packet, threads)
        finally:
            self._close(threads)

    def stop(self) -> None:
        """Let ``run`` return. Any thread, and more than once."""
        self._channel.stop()

    def _close(self, threads: ThreadPoolExecutor) -> None:
        self._on_end()
        with self._lock:
            under_way = list(self._under_way.values())
        for call in under_way:
            call.cancel()
        self._calls.close()
        threads.shutdown(wait=True, cancel_futures=True)

    def _take(self, packet: bytes, threads: ThreadPoolExecutor) -> None:
        try:
            request = parse_request(decode(packet))
        except (InvalidEncoding, InvalidArgument) as error:
            _log.warning("a packet of %d bytes is no request: %s", len(packet), error)
            self._channel.send(requests.fault(str(error)))
            return
        if isinstance(request, CancelRequest):
            call = self._under_way.get(request.id)
            if call is not None:
                call.cancel()
            return
        self._begin(request, threads.submit)

    def _begin(self, request: CallRequest, submit: Callable[..., object]) -> None:
        call = Call(request, lambda text: self._channel.send(requests.token(request.id, text)))
        with self._lock:
            n_calls, is_taken = len(self._under_way), request.id in self._under_way
            if not is_taken and n_calls < N_CALLS_MAX:
                self._under_way[request.id] = call
        if is_taken:
            self._refuse(request, InvalidArgument(f"a call with the number {request.id} is under way: choose another"))
        elif n_calls >= N_CALLS_MAX:
            self._refuse(request, Busy(f"{n_calls} calls are under way, which is the limit: try again later"))
        elif request.operation == "ping":  # says that this thread is alive, so it is not left to others
            self._perform(call)
        else:
            submit(self._perform, call)

    def _refuse(self, request: CallRequest, error: WasiNNError) -> None:
        self._channel.send(requests.reply_error(request.id, error.code, str(error)))

    def _perform(self, call: Call) -> None:
        reply = self._reply(call)
        with self._lock:
            del self._under_way[call.request.id]
        self._channel.send(reply)

    def _reply(self, call: Call) -> bytes:
        number = call.request.id
        try:
            result: Term = self._calls.perform(call)
            return requests.reply_ok(number, result)
        except Cancelled as error:
            return requests.reply_error(number, _CANCELLED, str(error))
        except WasiNNError as error:
            return requests.reply_error(number, error.code, str(error))
        except MemoryError:
            return requests.reply_error(
                number, ErrorCode.RUNTIME_ERROR, "out of memory: close contexts or unload graphs"
            )
        except Exception as error:  # one call's defect must not end the others
            _log.error("a call failed", exc_info=True)
            message = f"{type(error).__name__}: {error} (a defect in wasi-nn-backend; standard error has more)"
            return requests.reply_error(number, ErrorCode.RUNTIME_ERROR, message)
