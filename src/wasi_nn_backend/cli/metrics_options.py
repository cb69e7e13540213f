"""``--metrics-port`` and ``--metrics-address``, which ``run``, ``map``, ``generate`` and ``chat`` share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from wasi_nn_backend import Backend

__all__ = ["MetricsAddressOption", "MetricsPlace", "MetricsPortOption", "metrics_place", "serving_metrics"]

_MONITORING = "Monitoring"
_LOCAL = "127.0.0.1"

#: (address, port); None: no metrics were asked for.
MetricsPlace = tuple[str, int] | None

MetricsPortOption = Annotated[
    int | None,
    typer.Option(
        "--metrics-port",
        metavar="N",
        min=0,
        max=65535,
        rich_help_panel=_MONITORING,
        help="Serve figures for Prometheus and 'wasi-nn top' on this port; 0 is any that is free, see stderr.",
    ),
]
MetricsAddressOption = Annotated[
    str | None,
    typer.Option(
        "--metrics-address",
        metavar="IP",
        rich_help_panel=_MONITORING,
        help="Listen there instead of on 127.0.0.1, which is this machine only; 0.0.0.0 is for everyone.",
    ),
]


def metrics_place(port: int | None, address: str | None) -> MetricsPlace:
    """Raises ``typer.BadParameter`` for an address without a port."""
    if port is None:
        if address is not None:
            raise typer.BadParameter("goes with --metrics-port N; 0 is any free port", param_hint="--metrics-address")
        return None
    return address or _LOCAL, port


@contextmanager
def serving_metrics(backend: Backend, place: MetricsPlace) -> Iterator[None]:
    """Serve a backend's figures while the block runs, and say on stderr where."""
    if place is None:
        yield
        return
    from wasi_nn_backend.metrics import serve_metrics

    address, port = place
    with serve_metrics(backend, port, address) as server:
        print(f"metrics: {server.url}/metrics", file=sys.stderr, flush=True)
        yield
