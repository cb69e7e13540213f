"""Figures of a backend for Prometheus, and its status for ``wasi-nn top``.

>>> from wasi_nn_backend import Backend
>>> from wasi_nn_backend.metrics import serve_metrics
>>> with Backend() as backend, serve_metrics(backend, port=9100) as server:
...     print(server.url)
"""

from __future__ import annotations

from wasi_nn_backend.metrics.collector import MetricsCollector
from wasi_nn_backend.metrics.server import MetricsServer, serve_metrics

__all__ = ["MetricsCollector", "MetricsServer", "serve_metrics"]
