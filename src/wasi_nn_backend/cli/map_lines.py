"""``wasi-nn map``: run a WebAssembly module once for each line of the standard input."""

from __future__ import annotations

import json
import os
import select
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

import typer

from wasi_nn_backend.cli.exit_codes import ExitCode, exits_cleanly, print_error
from wasi_nn_backend.cli.guest_options import (
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
from wasi_nn_backend.errors import InvalidArgument, TooLarge, WasiNNError

if TYPE_CHECKING:
    from wasi_nn_backend.host import GuestOutput, RunConfig

__all__ = ["config_of_line", "read_lines", "register"]

_LINE_BYTES_MAX = 64 << 20
_READ_BYTES = 1 << 16
_N_SESSIONS_PER_JOB = 32
#: How long a reader that is to stop may sleep on.
_WAKE_UP_S = 0.25
_KEYS = ("args", "stdin", "env")


def register(app: typer.Typer) -> None:
    # Options end at the module: what follows belongs to the guest, whatever it looks like.
    app.command("map", context_settings={"allow_interspersed_args": False})(exits_cleanly(map_lines))


# A command's parameters are its options: typer reads them from the signature, so they cannot be fewer.
def map_lines(  # noqa: PLR0913, PLR0917
    module: Annotated[str, typer.Argument(help="The .wasm or .wat file. Options end here.")],
    args: Annotated[list[str] | None, typer.Argument(help="The guest's first arguments, the same each time.")] = None,
    jobs: Annotated[
        int, typer.Option("--jobs", "-j", metavar="N", min=1, max=256, help="Guests that run at the same time.")
    ] = 8,
    nn_graph: NnGraphOption = None,
    nn_preload: PreloadOption = None,
    nn_config: ConfigOption = None,
    allow_load_bytes: AllowLoadBytesOption = False,
    directory: DirectoryOption = None,
    env: EnvironmentOption = None,
    dialect: DialectOption = None,
    unsized_output_bytes: UnsizedOutputOption = 0,
    timeout: TimeoutOption = None,
    fuel: FuelOption = None,
    max_memory: MaxMemoryOption = None,
    limit: LimitOption = None,
    metrics_port: MetricsPortOption = None,
    metrics_address: MetricsAddressOption = None,
) -> None:
    """Run a module once for each line of stdin, many at a time, and write a line of JSON for each, in order.

    Example: [bold]wasi-nn map --nn-graph default=smollm2,prompt_mode=chat ask.wasm default < in.jsonl > out.jsonl[/]

    A line is a JSON string, which becomes the last argument, or an object of args, stdin and env. docs/map.md has more.
    Exit status:

      0  every guest exited with 0
      1  one or more failed; their lines have an error
      2  a wrong command line
    130  Ctrl-C
    """
    from wasi_nn_backend.host import HostLimits, read_binary

    # Nobody's context is to be closed for want of a place while its guest lives.
    backend_defaults = {"max_concurrent": jobs, "max_sessions": _N_SESSIONS_PER_JOB * jobs}
    graphs = GraphOptions.parse(nn_graph, nn_preload, nn_config, backend_defaults)
    world = World.parse(directory, env, dialect)
    own_limits = HostLimits(allow_load_bytes=allow_load_bytes, unsized_output_bytes=unsized_output_bytes)
    limits = GuestLimits.parse(timeout, fuel, max_memory, limit, own_limits)
    base = replace(guest_config(read_binary(module), world, limits), args=args or [], program_name=Path(module).name)
    job = _Job(base, graphs, jobs, metrics_place(metrics_port, metrics_address))
    share_the_interpreter()
    counts = run_interruptibly(lambda cancellation: _map(job, cancellation))
    if counts.n_failed:
        print_error(f"{counts.n_failed} of {counts.n_done} lines failed; their output lines say why")
        raise typer.Exit(ExitCode.ERROR)


@dataclass(frozen=True, slots=True)
class _Job:
    """What ``base`` runs with and how many at once."""

    base: RunConfig
    graphs: GraphOptions
    n_workers: int
    metrics: MetricsPlace


@dataclass(slots=True)
class _Counts:
    n_done: int = 0
    n_failed: int = 0
    n_bytes_read: int = 0


def _map(job: _Job, cancellation: Cancellation) -> _Counts:
    from wasi_nn_backend import Backend
    from wasi_nn_backend.host import GuestPool

    counts = _Counts()
    with (
        Backend(job.graphs.backend_layer) as backend,
        serving_metrics(backend, job.metrics),
        GuestPool(backend, job.n_workers) as pool,
        _progress(counts) as show,
    ):
        for graph in job.graphs.named:
            graph.register(backend)
        configs = (config_of_line(line, job.base) for line in _counted(counts, cancellation))
        with cancellation.calling(lambda: pool.stop("interrupt")), closing(pool.map(configs)) as outputs:
            for output in outputs:
                if cancellation.requested:
                    break
                counts.n_failed += output.error is not None
                _write(counts.n_done, output)
                counts.n_done += 1
                show()
    return counts


def _counted(counts: _Counts, cancellation: Cancellation) -> Iterator[bytes]:
    for line in read_lines(sys.stdin.buffer, lambda: cancellation.requested):
        counts.n_bytes_read += len(line) + 1
        yield line


def read_lines(stream: IO[bytes], is_over: Callable[[], bool]) -> Iterator[bytes]:
    """The lines of a stream without their ends, read as they are asked for, until ``is_over``.

    A line of more than 64 MiB comes cut to one byte more than that.
    """
    rest, may_grow = bytearray(), True
    read = _reader(stream, is_over)
    while data := read():
        *ends, last = data.split(b"\n")
        for end in ends:
            yield bytes(rest + end if may_grow else rest)
            rest, may_grow = bytearray(), True
        if may_grow:
            rest += last
            may_grow = len(rest) <= _LINE_BYTES_MAX
    if rest:
        yield bytes(rest)


def _reader(stream: IO[bytes], is_over: Callable[[], bool]) -> Callable[[], bytes]:
    """Reads what there is; nothing at the end. Past Python's buffer, whose lock a reader that waits would hold when the
    interpreter exits."""
    try:
        descriptor = stream.fileno()
    except OSError:  # a test's stand-in
        return lambda: b"" if is_over() else stream.read(_READ_BYTES)

    def read() -> bytes:
        while not is_over():
            if select.select([descriptor], [], [], _WAKE_UP_S)[0]:
                return os.read(descriptor, _READ_BYTES)
        return b""

    return read


def config_of_line(line: bytes, base: RunConfig) -> RunConfig | WasiNNError:
    """What a line of input asks to run, or what is wrong with it."""
    if len(line) > _LINE_BYTES_MAX:
        return TooLarge(f"the line is longer than {_LINE_BYTES_MAX >> 20} MiB: pass a file through --dir instead")
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        return InvalidArgument(f'the line is no JSON ({error}): write "text" or {{"args": [...], "stdin": "..."}}')
    if isinstance(value, str):
        value = {"args": [value]}
    problem = _problem_of(value)
    if problem is not None:
        return InvalidArgument(f"{problem}: a line is a string, or an object of args, stdin and env")
    return replace(
        base,
        args=[*base.args, *value.get("args", [])],
        stdin=value.get("stdin", "").encode(errors="replace"),
        env={**base.env, **value.get("env", {})},
    )


def _problem_of(value: Any) -> str | None:
    if not isinstance(value, dict):
        return f"the line is a JSON {type(value).__name__}"
    if unknown := sorted(value.keys() - set(_KEYS)):
        return f"the line has the unknown key {unknown[0]!r}"
    args, env = value.get("args", []), value.get("env", {})
    if not isinstance(args, list) or not _are_plain(args):
        return "args is no list of strings without NUL"
    if not isinstance(env, dict) or not _are_plain([*env.keys(), *env.values()]):
        return "env is no object of strings without NUL"
    return None if isinstance(value.get("stdin", ""), str) else "stdin is no string"


def _are_plain(texts: Sequence[Any]) -> bool:
    """Strings that a system's interfaces can take."""
    try:
        return b"\0" not in "".join(texts).encode()
    except (TypeError, UnicodeEncodeError):  # no string; half a surrogate pair
        return False


def _write(index: int, output: GuestOutput) -> None:
    line: dict[str, Any] = {"index": index, "stdout": output.stdout.decode(errors="replace")}
    if output.stderr:
        line["stderr"] = output.stderr.decode(errors="replace")
    line["exit_status"] = output.exit_status
    if output.error is not None:
        line["error"] = output.error
    sys.stdout.write(json.dumps(line, ensure_ascii=False) + "\n")
    sys.stdout.flush()


@contextmanager
def _progress(counts: _Counts) -> Iterator[Callable[[], None]]:
    """A bar on stderr, where that is a terminal and the results go elsewhere; yields what redraws it. How much there is
    to do is known of a file."""
    if sys.stdout.isatty() or not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        yield lambda: None
        return
    # Imported here: rich takes longer to import than most commands take to print their help.
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    # rich would take over stdout, too.
    with Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=False) as progress:
        task = progress.add_task("0 lines", total=_n_bytes_of_stdin())

        def show() -> None:
            failed = f", {counts.n_failed} failed" if counts.n_failed else ""
            progress.update(task, description=f"{counts.n_done} lines{failed}", completed=counts.n_bytes_read)

        yield show


def _n_bytes_of_stdin() -> int | None:
    try:
        return os.fstat(sys.stdin.fileno()).st_size or None  # pipes have no size
    except OSError:
        return None
