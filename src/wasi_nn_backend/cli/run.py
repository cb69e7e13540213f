"""``wasi-nn run``: run a WebAssembly module whose WASI-NN calls this program answers."""

from __future__ import annotations

import logging
import select
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from wasi_nn_backend.cli.exit_codes import ExitCode, exits_cleanly, print_error
from wasi_nn_backend.cli.graph_options import (
    GraphOption,
    parse_directory_option,
    parse_environment_option,
    parse_graph_option,
    parse_preload_option,
    read_config_option,
    unique_graphs,
)
from wasi_nn_backend.cli.interrupts import Cancellation, run_interruptibly
from wasi_nn_backend.cli.metrics_options import (
    MetricsAddressOption,
    MetricsPlace,
    MetricsPortOption,
    metrics_place,
    serving_metrics,
)
from wasi_nn_backend.cli.model_options import parse_config_options
from wasi_nn_backend.errors import WasiNNError

if TYPE_CHECKING:
    from wasi_nn_backend.config import Layer
    from wasi_nn_backend.dialects import Dialect
    from wasi_nn_backend.host import GuestResult, RunConfig

__all__ = ["register"]

_MIB = 1 << 20
_GRAPHS = "Models"
_LIMITS = "Limits"
_WORLD = "The guest's world"

#: One guest has the backend for itself and may wait for its user as long as it likes. A day is the longest there is.
_IDLE_TIMEOUT_MS = 86_400_000

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class NamedGraph:
    """A graph to register, its settings checked."""

    option: GraphOption
    layer: Layer


def register(app: typer.Typer) -> None:
    # Options end at the module: what follows belongs to the guest, whatever it looks like.
    app.command("run", context_settings={"allow_interspersed_args": False})(exits_cleanly(run))


# A command's parameters are its options: typer reads them from the signature, so they cannot be fewer.
def run(  # noqa: PLR0913, PLR0917
    module: Annotated[str, typer.Argument(help="The .wasm or .wat file. Options end here.")],
    args: Annotated[list[str] | None, typer.Argument(help="The guest's own arguments.")] = None,
    nn_graph: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=MODEL[,K=V...]",
            rich_help_panel=_GRAPHS,
            help="A model and the name by which the guest loads it: a GGUF file or smollm2. K=V are settings under"
            " what the guest sends. A comma begins one when K= follows, and a plain comma is written \\,.",
        ),
    ] = None,
    nn_preload: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME:GGML:AUTO:PATH",
            rich_help_panel=_GRAPHS,
            help="The same as WasmEdge spells it, NAME:ENCODING:TARGET:PATH.",
        ),
    ] = None,
    nn_config: Annotated[
        str | None,
        typer.Option(
            metavar="JSON|FILE",
            rich_help_panel=_GRAPHS,
            help="Configuration for all models, under their own settings and what the guest sends.",
        ),
    ] = None,
    allow_load_bytes: Annotated[
        bool,
        typer.Option(
            "--allow-load-bytes", rich_help_panel=_GRAPHS, help="Let the guest load models out of its memory."
        ),
    ] = False,
    directory: Annotated[
        list[str] | None,
        typer.Option(
            "--dir",
            metavar="HOST[::GUEST]",
            rich_help_panel=_WORLD,
            help="A directory that the guest may use; also GUEST:HOST as WasmEdge spells it.",
        ),
    ] = None,
    env: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", rich_help_panel=_WORLD, help="An environment variable for the guest."),
    ] = None,
    invoke: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            rich_help_panel=_WORLD,
            help="Call this export instead of _start, and print what it returns. ARGS are numbers, or texts, which"
            " are copied in with the guest's malloc; text:ARG is a text in any case.",
        ),
    ] = None,
    returns: Annotated[
        Literal["number", "text"] | None,
        typer.Option(
            rich_help_panel=_WORLD,
            help="What an integer is that --invoke returns: itself, or the address of a text. HyperBEAM: text.",
        ),
    ] = None,
    dialect: Annotated[
        str | None,
        typer.Option(
            metavar="witx|wasmedge|wamr|wamr-legacy|hyperbeam",
            rich_help_panel=_WORLD,
            help="The ABI, where its imports do not tell it.",
        ),
    ] = None,
    timeout: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", min=0.0, rich_help_panel=_LIMITS, help="Stop the guest after this time."),
    ] = None,
    fuel: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, rich_help_panel=_LIMITS, help="Trap after about N instructions."),
    ] = None,
    max_memory: Annotated[
        int | None,
        typer.Option(metavar="MIB", min=1, rich_help_panel=_LIMITS, help="The most memory the guest may have."),
    ] = None,
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
    from wasi_nn_backend.host import HostLimits, RunConfig

    graphs = _named_graphs(nn_graph or [], nn_preload or [])
    config = RunConfig(
        module=module,
        args=args or [],
        env=dict(map(parse_environment_option, env or [])),
        dirs=[(mapping.host, mapping.guest) for mapping in map(parse_directory_option, directory or [])],
        invoke=invoke,
        invoke_returns=returns,
        timeout_s=timeout,
        fuel=fuel,
        max_memory_bytes=None if max_memory is None else max_memory * _MIB,
        dialect=None if dialect is None else _dialect(dialect),
        limits=HostLimits(allow_load_bytes=allow_load_bytes),
    )
    backend_layer = _backend_layer(nn_config)
    metrics = metrics_place(metrics_port, metrics_address)
    result = run_interruptibly(lambda cancellation: _run_guest(config, backend_layer, graphs, metrics, cancellation))
    _finish(result)


def _named_graphs(graph_texts: Sequence[str], preload_texts: Sequence[str]) -> list[NamedGraph]:
    options = [*map(parse_graph_option, graph_texts), *map(parse_preload_option, preload_texts)]
    return [
        NamedGraph(option, parse_config_options(option.assignments, option=f"{option.option} {option.name}"))
        for option in unique_graphs(options)
    ]


def _backend_layer(text: str | None) -> Layer:
    from wasi_nn_backend.config import parse_layer
    from wasi_nn_backend.config.layers import merge

    defaults = parse_layer({"backend": {"idle_timeout_ms": _IDLE_TIMEOUT_MS}}, name="run")
    if text is None:
        return defaults
    try:
        return merge((defaults, parse_layer(read_config_option(text), name="--nn-config")), name="--nn-config")
    except WasiNNError as error:
        raise typer.BadParameter(str(error)) from None


def _dialect(name: str) -> Dialect:
    from wasi_nn_backend.dialects import CORE_DIALECTS

    known = {dialect.name: dialect for dialect in CORE_DIALECTS}
    if name.lower() not in known:
        raise typer.BadParameter(f"{name!r} is none of {', '.join(known)}", param_hint="--dialect")
    return known[name.lower()]


def _run_guest(
    config: RunConfig,
    backend_layer: Layer,
    graphs: Sequence[NamedGraph],
    metrics: MetricsPlace,
    cancellation: Cancellation,
) -> GuestResult:
    from wasi_nn_backend.cli.progress_backend import ProgressBackend
    from wasi_nn_backend.host import GuestRunner

    with ProgressBackend(backend_layer, cancellation) as backend, serving_metrics(backend, metrics):
        for graph in graphs:
            backend.register(graph.option.name, graph.option.model, graph.layer)
            _warn_if_missing(graph.option)
        runner = GuestRunner(config, backend)
        with cancellation.calling(lambda: runner.stop("interrupt")):
            return runner.run()


def _warn_if_missing(graph: GraphOption) -> None:
    """A name without its file is no reason not to run: the guest may never load it, or handle the error."""
    from wasi_nn_backend.registry import model_path

    path = model_path(graph.model)
    try:
        path.stat()
    except FileNotFoundError:
        _log.warning("%s %s: there is no file %s; loading it will fail", graph.option, graph.name, path)
    except OSError as error:
        _log.warning("%s %s: %s: %s; loading it will fail", graph.option, graph.name, path, error.strerror)


def _finish(result: GuestResult) -> None:
    """Say what the guest cannot say itself, and exit with its status."""
    for value in result.returned:
        print(value)
    if result.outcome == "trapped" and _stdout_reader_has_gone():
        # Rust guests panic when a write to stdout fails, and have said so.
        raise typer.Exit(ExitCode.CLOSED_OUTPUT)
    if result.outcome == "trapped":
        print_error(f"the guest trapped: {result.reason}{_limit_hint(result.reason or '')}")
    elif result.outcome != "exited":
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
