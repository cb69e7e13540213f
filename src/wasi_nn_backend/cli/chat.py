"""``wasi-nn chat``: a conversation that the model remembers."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING

import typer

from wasi_nn_backend.cli.conversation import Conversation, converse
from wasi_nn_backend.cli.exit_codes import ExitCode, exits_cleanly
from wasi_nn_backend.cli.generate import PROMPT_BYTES_MAX
from wasi_nn_backend.cli.interrupts import Cancellation, run_interruptibly
from wasi_nn_backend.cli.metrics_options import (
    MetricsAddressOption,
    MetricsPlace,
    MetricsPortOption,
    metrics_place,
    serving_metrics,
)
from wasi_nn_backend.cli.model_options import (
    ONE_AT_A_TIME,
    ConfigOption,
    MaxTokensOption,
    MinPOption,
    ModelOption,
    SamplingOptions,
    SeedOption,
    StatsOption,
    SystemOption,
    TemperatureOption,
    TopKOption,
    TopPOption,
    option_layer,
    parse_config_options,
)
from wasi_nn_backend.cli.terminal import load_progress
from wasi_nn_backend.errors import TooLarge

if TYPE_CHECKING:
    from wasi_nn_backend.config import Layer

__all__ = ["register"]

_PROMPT_MARK = "> "


def register(app: typer.Typer) -> None:
    app.command("chat")(exits_cleanly(chat))


# A command's parameters are its options: typer reads them from the signature, so they cannot be fewer.
def chat(  # noqa: PLR0913, PLR0917
    model: ModelOption,
    system: SystemOption = None,
    temperature: TemperatureOption = None,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    min_p: MinPOption = None,
    seed: SeedOption = None,
    max_tokens: MaxTokensOption = None,
    config: ConfigOption = None,
    stats: StatsOption = False,
    metrics_port: MetricsPortOption = None,
    metrics_address: MetricsAddressOption = None,
) -> None:
    """Talk with a model, one message a line; it remembers what was said.

    Example: [bold]wasi-nn chat --model smollm2 --system "You answer in one sentence."[/]

    At the prompt: /reset forgets the conversation, /stats shows numbers,
    /help lists these, /exit or Ctrl-D ends. Ctrl-C stops an answer.

    With messages from a file or pipe, only answers appear on stdout.

    Exit status: 0 ended, 1 an error, 2 a wrong command line, 130 Ctrl-C.
    """
    sampling = SamplingOptions(temperature, top_k, top_p, min_p, seed)
    graph_config = parse_config_options(config or [], option="--config")
    context_config = option_layer(
        sampling=sampling.section(),
        stopping={"max_tokens": max_tokens},
        session={"prompt_mode": "chat", "system_prompt": system},
    )
    metrics = metrics_place(metrics_port, metrics_address)
    interactive = sys.stdin.isatty()
    with ExitStack() as stack:
        conversation = run_interruptibly(
            lambda cancellation: _open(stack, model, graph_config, context_config, metrics, cancellation)
        )
        if interactive:
            print(f"Chat with {os.path.basename(model)}. /help lists the commands, Ctrl-D ends.", file=sys.stderr)
        messages = _typed_messages() if interactive else _piped_messages()
        converse(conversation, messages, interactive=interactive, stats=stats)


def _open(
    stack: ExitStack,
    model: str,
    graph_config: Layer,
    context_config: Layer,
    metrics: MetricsPlace,
    cancellation: Cancellation,
) -> Conversation:
    from wasi_nn_backend import Backend

    backend = stack.enter_context(Backend(ONE_AT_A_TIME))
    stack.enter_context(serving_metrics(backend, metrics))
    with load_progress(f"Loading {os.path.basename(model)}", cancellation) as progress:
        graph = stack.enter_context(backend.load_by_name_with_config(model, graph_config, progress=progress))
    return Conversation(stack.enter_context(graph.init_execution_context(context_config)))


def _typed_messages() -> Iterator[str]:
    """Lines from the terminal, with editing and history where Python has readline. Ends at Ctrl-D."""
    try:
        import readline  # noqa: F401  (the import gives input() its line editing)
    except ImportError:
        print("Python was built without readline: arrow keys will not work here.", file=sys.stderr)
    while True:
        try:
            yield _read_line()
        except EOFError:
            print(file=sys.stderr)
            return
        except KeyboardInterrupt:
            print(file=sys.stderr)
            raise typer.Exit(ExitCode.INTERRUPTED) from None


def _read_line() -> str:
    if sys.stdout.isatty():
        return input(_PROMPT_MARK)
    # With stdout in a file, input() would write its prompt there, among the answers.
    print(_PROMPT_MARK, end="", file=sys.stderr, flush=True)
    return input()


def _piped_messages() -> Iterator[str]:
    """Lines of stdin; bytes that are not UTF-8 become replacement characters, as at a terminal."""
    while line := sys.stdin.buffer.readline(PROMPT_BYTES_MAX + 1):
        if len(line) > PROMPT_BYTES_MAX:
            raise TooLarge(f"a line of stdin has more than {PROMPT_BYTES_MAX} bytes; give one shorter message a line")
        yield line.decode("utf-8", errors="replace").rstrip("\r\n")
