"""``wasi-nn port``: what an Erlang node starts and talks to."""

from __future__ import annotations

import logging
import os
import sys
import threading
from pathlib import Path
from typing import Annotated

import typer

from wasi_nn_backend.cli.exit_codes import ExitCode, exits_cleanly, print_error
from wasi_nn_backend.cli.interrupts import Cancellation, run_interruptibly

__all__ = ["register"]

_log = logging.getLogger(__name__)

#: For what runs to end when the node is gone. A process that nobody reads from must not stay.
_SHUTDOWN_MAX_S = 10.0


def register(app: typer.Typer) -> None:
    app.command("port")(exits_cleanly(port))


def port(
    nice: Annotated[
        int,
        typer.Option(
            min=0, max=19, help="Leave this much precedence to other processes, such as the node's schedulers."
        ),
    ] = 0,
) -> None:
    """Serve an Erlang node: packets of external terms on stdin and stdout, until stdin ends.

    Example: [bold]open_port({spawn_executable, "wasi-nn"}, \\[{args, \\["port"]}, {packet, 4}, binary])[/]

    The OTP application in erlang/wasi_nn starts this itself; docs/erlang.md has more.

    Exit status: 0 stdin ended, 1 something else than packets came, 143 SIGTERM.
    """
    if sys.stdin.isatty() or sys.stdout.isatty():
        raise typer.BadParameter(
            "stdin and stdout carry packets: an Erlang node starts this command, see docs/erlang.md"
        )
    _give_way(nice)
    run_interruptibly(_serve)


def _give_way(nice: int) -> None:
    """Lower the precedence of the process and, where Linux groups processes by session, of its group: between groups,
    the nice values of processes do not count. A node makes the process the leader of a session of its own."""
    os.nice(nice)
    if nice and os.getsid(0) == os.getpid():
        try:
            Path("/proc/self/autogroup").write_text(str(nice), encoding="ascii")
        except OSError as error:
            _log.debug("the session's precedence stays as it is: %s", error.strerror)


def _serve(cancellation: Cancellation) -> None:
    from importlib.metadata import version

    from wasi_nn_backend.port import PacketChannel, PortServer, claimed_standard_streams

    with claimed_standard_streams() as (reading_fd, writing_fd):
        channel = PacketChannel(reading_fd, writing_fd)
        server = PortServer(channel, version("wasi-nn-backend"), on_end=_leave_later)
        with cancellation.calling(server.stop):
            server.run()
        channel.close()


def _leave_later() -> None:
    """End the process in any case: a native call that does not come back would keep it, and its memory, for ever."""
    timer = threading.Timer(_SHUTDOWN_MAX_S, _leave)
    timer.daemon = True
    timer.start()


def _leave() -> None:
    print_error(f"what runs does not end within {_SHUTDOWN_MAX_S:.0f} s: leaving without it")
    os._exit(ExitCode.ERROR)
