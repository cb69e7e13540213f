"""``wasi-nn top``: what another process is doing, live."""

from __future__ import annotations

import json
import os
import sys
from time import sleep
from typing import TYPE_CHECKING, Annotated

import typer

from wasi_nn_backend.cli.exit_codes import exits_cleanly
from wasi_nn_backend.errors import RuntimeFailure, WasiNNError

if TYPE_CHECKING:
    from wasi_nn_backend.cli.load_table import Load

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    app.command("top")(exits_cleanly(top))


def top(
    place: Annotated[str, typer.Argument(metavar="URL|PORT", help="What --metrics-port of the other process printed.")],
    interval: Annotated[
        float, typer.Option(metavar="SECONDS", min=0.1, max=3600.0, help="Time between two looks; speeds are over it.")
    ] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Print one table, after one interval, and end.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The same as one JSON object.")] = False,
) -> None:
    """Show the sessions, queue, batch, KV cells and speed of another process, until Ctrl-C.

    Example: [bold]wasi-nn top 9100[/], beside [bold]wasi-nn chat --model smollm2 --metrics-port 9100[/]

    Batch is the mean number of sequences in a step, of the places there are.
    Tokens/s are generated, Prompt/s are tokens of prompts that were computed.

    Exit status: 0 ended, by Ctrl-C too, 1 nobody answers, 2 a wrong command line.
    """
    from wasi_nn_backend.cli.status_client import server_url

    try:
        url = server_url(place)
    except WasiNNError as error:
        raise typer.BadParameter(str(error), param_hint="URL|PORT") from None
    if as_json or once or not _is_live_terminal():
        _show_once(url, interval, as_json=as_json)
        return
    try:
        _watch(url, interval)
    except KeyboardInterrupt:
        return  # the way to end it


def _is_live_terminal() -> bool:
    """Whether a table can be drawn over: not in a file, a pipe or an editor's shell."""
    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


def _show_once(url: str, interval_s: float, *, as_json: bool) -> None:
    from rich.console import Console

    from wasi_nn_backend.cli.load_table import measure_load, render_load
    from wasi_nn_backend.cli.status_client import fetch_status

    before = fetch_status(url)
    sleep(interval_s)
    load = measure_load(fetch_status(url), before)
    if as_json:
        print(json.dumps({"url": url, **load.as_json()}, indent=2))
    else:
        Console().print(render_load(load, url))


def _watch(url: str, interval_s: float) -> None:
    """Until Ctrl-C. Who does not answer the first time is an error; later it is shown, and tried again."""
    from rich.console import Console
    from rich.live import Live

    from wasi_nn_backend.cli.load_table import measure_load, render_load
    from wasi_nn_backend.cli.status_client import fetch_status

    sample = fetch_status(url)
    load: Load = measure_load(sample, None)
    with Live(render_load(load, url), console=Console(), auto_refresh=False) as live:
        while True:
            live.refresh()
            sleep(interval_s)
            try:
                before, sample = sample, fetch_status(url)
            except RuntimeFailure as error:
                live.update(render_load(load, url, f"{error} Trying again."))
                continue
            load = measure_load(sample, before)
            live.update(render_load(load, url))
