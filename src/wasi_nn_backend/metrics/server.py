"""A small HTTP server: ``/metrics`` for Prometheus, ``/status.json`` for ``wasi-nn top`` and scripts.

``prometheus_client.start_http_server`` serves metrics at every path and nothing else.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import os
import socket
import threading
from collections.abc import Callable, Iterable, Mapping
from socketserver import TCPServer, ThreadingMixIn
from types import TracebackType
from typing import Any, Final, Self
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, make_wsgi_app

from wasi_nn_backend.backend import Backend
from wasi_nn_backend.errors import InvalidArgument, RuntimeFailure
from wasi_nn_backend.metrics.collector import MetricsCollector, as_named

__all__ = ["MetricsServer", "serve_metrics"]

_log = logging.getLogger(__name__)

_WsgiApp = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]

#: A client that sends nothing for so long is cut off.
_CLIENT_TIMEOUT_S: Final = 10.0
#: How often the server looks whether it has been closed.
_POLL_INTERVAL_S: Final = 0.05
_PORT_MAX: Final = 65535


def serve_metrics(backend: Backend | Mapping[str, Backend], port: int, address: str = "127.0.0.1") -> MetricsServer:
    """Serve a backend's figures over HTTP until the returned server is closed. ``port`` 0 takes any that is free.

    Several backends are given by name, and each series gets a label ``backend``. Whoever can reach ``address`` can read
    all of it: names of models, sessions and users' activity, no texts. Raises ``InvalidArgument`` (no such address or
    port) and ``RuntimeFailure`` (the port is in use).
    """
    return MetricsServer(backend, port, address)


class MetricsServer:
    """Made by ``serve_metrics``. A context manager that closes; the backends are not closed."""

    def __init__(self, backends: Backend | Mapping[str, Backend], port: int, address: str) -> None:
        named = as_named(backends)
        self._server = _listen(address, port)
        self._collector = MetricsCollector(backends)
        registry = CollectorRegistry()
        registry.register(self._collector)
        self._server.set_app(_App(named, make_wsgi_app(registry)))
        self._closing = threading.Lock()
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(_POLL_INTERVAL_S,), name="wasi-nn-metrics", daemon=True
        )
        self._thread.start()

    @property
    def port(self) -> int:
        """The one that was chosen where 0 was asked for."""
        return int(self._server.server_address[1])

    @property
    def url(self) -> str:
        """Without a path: ``http://127.0.0.1:9100``."""
        host = str(self._server.server_address[0])
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"

    def close(self) -> None:
        """Stop listening. A request that is being answered is not waited for. Idempotent."""
        with self._closing:
            if not self._thread.is_alive():
                return
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()
            self._collector.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class _App:
    """Which path gives what."""

    def __init__(self, backends: Mapping[str, Backend], metrics: _WsgiApp) -> None:
        self._backends = backends
        self._metrics = metrics

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "")
        try:
            if path == "/metrics":
                return self._metrics(environ, start_response)
            if path == "/status.json":
                return _answer(start_response, "200 OK", "application/json", self._status())
        except Exception:
            _log.exception("a request for %s failed", path)
            return _answer(start_response, "500 Internal Server Error", "text/plain", b"failed; the log says why\n")
        if path == "/":
            return _answer(start_response, "200 OK", "text/plain", b"/metrics\n/status.json\n")
        return _answer(start_response, "404 Not Found", "text/plain", b"there are /metrics and /status.json\n")

    def _status(self) -> bytes:
        rows = [{"name": name, **dataclasses.asdict(each.status())} for name, each in self._backends.items()]
        text = json.dumps({"pid": os.getpid(), "backends": rows}, ensure_ascii=False)
        return text.encode(errors="replace")  # names of files need not be UTF-8


def _answer(start_response: Callable[..., Any], status: str, content_type: str, body: bytes) -> list[bytes]:
    start_response(status, [("Content-Type", f"{content_type}; charset=utf-8"), ("Content-Length", str(len(body)))])
    return [body]


class _Server(ThreadingMixIn, WSGIServer):
    """One thread a request, of which none keeps the process or ``close`` waiting."""

    daemon_threads = True
    block_on_close = False

    def server_bind(self) -> None:
        """Without the look-up of the machine's name that ``HTTPServer`` makes, which can take seconds."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away or send nothing are no fault of this program."""
        _log.debug("a request from %s was not answered", client_address, exc_info=True)


class _Server6(_Server):
    address_family = socket.AF_INET6


class _Handler(WSGIRequestHandler):
    timeout = _CLIENT_TIMEOUT_S

    def log_message(self, format: str, *args: Any) -> None:
        """Scrapes come every few seconds: they are no news."""


def _listen(address: str, port: int) -> _Server:
    if type(port) is not int or not 0 <= port <= _PORT_MAX:
        raise InvalidArgument(f"a metrics port is a number from 0 (any that is free) to {_PORT_MAX}; got {port!r}")
    try:
        family, _, _, _, place = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
        server = _Server6 if family == socket.AF_INET6 else _Server
        return server((str(place[0]), port), _Handler)
    except (OSError, UnicodeError) as error:  # UnicodeError: a name that no host can have
        where = f"metrics cannot be served at {address}, port {port}"
        if isinstance(error, OSError) and error.errno in (errno.EADDRINUSE, errno.EACCES):
            reason = error.strerror
            raise RuntimeFailure(f"{where}: {reason}; choose another port, or 0 for any that is free") from error
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise InvalidArgument(f"{where}: {reason}; give an address of this machine, such as 127.0.0.1") from error
