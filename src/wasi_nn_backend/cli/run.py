"""``wasi-nn run``: run a WebAssembly module whose WASI-NN calls this program answers."""

from __future__ import annotations

import select
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from wasi_nn_backend.cli.exit_codes import ExitCode, exits_cleanly, print_error
from wasi_nn_backend.cli.guest_options import (
    WORLD,
    AllowLoadBytesOption,
    ConfigOption,
    DialectOption,
    DirectoryOption,
    EnvironmentOption,
    FuelOption,
    GraphOptions,
    GuestLimits,
    LimitOption,
    MaxMemoryOption,
    NnGraphOption,
    PreloadOption,
    TimeoutOption,
    UnsizedOutputOption,
    World,
    guest_config,
    share_the_interpreter,
)
from wasi_nn_backend.cli.interrupts import Cancellation, run_interruptibly
from wasi_nn_backend.cli.metrics_options import (
    MetricsAddressOption,
    MetricsPlace,
    MetricsPortOption,
    metrics_place,
    serving_metrics,
)

if TYPE_CHECKING:
    from wasi_nn_backend.host import GuestResult, RunConfig

__all__ = ["register"]

#: One guest has the backend for itself: it may wait for its user as long as it likes (a day is the longest there is),
#: and no context of its own is closed for another (the most that there may be; max_contexts comes before).
_BACKEND_DEFAULTS = {"idle_timeout_ms": 86_400_000, "max_sessions": 10_000}
#: What protects guests from each other does not bind it. Runs that are begun and left wait in its own queue: as many as
#: there may be contexts.
_MAX_OPEN_RUNS = 4096
#: Most guests end far sooner, and nobody wonders before.
_TOLD_AFTER_S = 0.5


def register(app: typer.Typer) -> None:
    # Options end at the module: what follows belongs to the guest, whatever it looks like.
    app.command("run", context_settings={"allow_interspersed_args": False})(exits_cleanly(run))


# A command's parameters are its options: typer reads them from the signature, so they cannot be fewer.
def run(  # noqa: PLR0913, PLR0917
    module: Annotated[str, typer.Argument(help="The .wasm or .wat file. Options end here.")],
    args: Annotated[list[str] | None, typer.Argument(help="The guest's own arguments.")] = None,
    nn_graph: NnGraphOption = None,
    nn_preload: PreloadOption = None,
    nn_config: ConfigOption = None,
    allow_load_bytes: AllowLoadBytesOption = False,
    directory: DirectoryOption = None,
    env: EnvironmentOption = None,
    invoke: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            rich_help_panel=WORLD,
            help="Call this export instead of the entry point, and print what it returns. ARGS are numbers or texts;"
            " modules get texts copied in with their malloc, and for them text:ARG is a text in any case.",
        ),
    ] = None,
    returns: Annotated[
        Literal["number", "text"] | None,
        typer.Option(
            rich_help_panel=WORLD,
            help="What an integer is that --invoke returns: itself, or the address of a text. HyperBEAM: text.",
        ),
    ] = None,
    dialect: DialectOption = None,
    unsized_output_bytes: UnsizedOutputOption = 0,
    timeout: TimeoutOption = None,
    fuel: FuelOption = None,
    max_memory: MaxMemoryOption = None,
    limit: LimitOption = None,
    metrics_port: MetricsPortOption = None,
    metrics_address: MetricsAddressOption = None,
) -> None:
    """Run a WebAssembly module that uses WASI-NN. Only its own output appears on stdout.

    Example: [bold]wasi-nn run --nn-graph default=smollm2,temperature=0 ask.wasm default "Hello?"[/]

    Exit status: the guest's own, or

      1  it could not be started
      2  a wrong command line
    124  it ran into --timeout
    130  Ctrl-C
    134  it trapped; stderr says why
    141  it trapped because the reader of stdout went away
    """
    from wasi_nn_backend.host import HostLimits

    graphs = GraphOptions.parse(nn_graph, nn_preload, nn_config, _BACKEND_DEFAULTS)
    world = World.parse(directory, env, dialect)
    own_limits = HostLimits(
        max_open_runs=_MAX_OPEN_RUNS,
        max_host_share=1.0,
        allow_load_bytes=allow_load_bytes,
        unsized_output_bytes=unsized_output_bytes,
    )
    limits = GuestLimits.parse(timeout, fuel, max_memory, limit, own_limits)
    config = guest_config(module, world, limits)
    config = replace(config, args=args or [], invoke=invoke, invoke_returns=returns)
    metrics = metrics_place(metrics_port, metrics_address)
    share_the_interpreter()
    result = run_interruptibly(lambda cancellation: _run_guest(config, graphs, metrics, cancellation))
    _finish(result)


def _run_guest(
    config: RunConfig, graphs: GraphOptions, metrics: MetricsPlace, cancellation: Cancellation
) -> GuestResult:
    from wasi_nn_backend.cli.progress_backend import ProgressBackend
    from wasi_nn_backend.host import GuestRunner

    with ProgressBackend(graphs.backend_layer, cancellation) as backend, serving_metrics(backend, metrics):
        for graph in graphs.named:
            graph.register(backend)
        runner = GuestRunner(config, backend)
        with cancellation.calling(lambda: runner.stop("interrupt")), cancellation.calling(_Waiting().note):
            return runner.run()


class _Waiting:
    """For the person who pressed Ctrl-C at a guest that cannot be stopped, since it waits for its own input."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._since_s: float | None = None
        self._has_told = False

    def note(self) -> None:
        """Called again and again until the guest has ended; says once what else can be done."""
        now_s = self._clock()
        if self._since_s is None:
            self._since_s = now_s
        if not self._has_told and now_s - self._since_s >= _TOLD_AFTER_S and sys.stderr.isatty():
            self._has_told = True
            print("waiting for the guest, which does not react; Ctrl-C ends it at once", file=sys.stderr)


def _finish(result: GuestResult) -> None:
    """Say what the guest cannot say itself, and exit with its status."""
    for value in result.returned:
        print(value)
    if result.outcome == "trapped" and _stdout_reader_has_gone():
        # Rust guests panic when a write to stdout fails, and have said so.
        raise typer.Exit(ExitCode.CLOSED_OUTPUT)
    if result.outcome == "trapped":
        print_error(f"the guest trapped: {result.reason}{_limit_hint(result.reason or '')}")
    elif result.outcome != "exited" or result.reason is not None:
        print_error(result.reason or result.outcome)
    if result.exit_status != ExitCode.OK and result.last_error is not None:
        print(f"last WASI-NN error: {result.last_error}", file=sys.stderr)
    raise typer.Exit(result.exit_status)


def _limit_hint(reason: str) -> str:
    """Which option lifts the limit that a guest ran into, told from wasmtime's words."""
    if "all fuel consumed" in reason:
        return "; raise --fuel"
    return "; raise --max-memory" if "exceeds memory limits" in reason else ""


def _stdout_reader_has_gone() -> bool:
    try:
        stdout_fd = sys.stdout.fileno()
    except (OSError, ValueError):
        return False
    poll = select.poll()
    poll.register(stdout_fd, select.POLLERR)
    return any(events & select.POLLERR for _fd, events in poll.poll(0))
