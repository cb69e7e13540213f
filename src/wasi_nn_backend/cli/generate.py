"""``wasi-nn generate``: one prompt, one answer."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from wasi_nn_backend.cli.answer import Answer, AnsweringContext, stream_answer
from wasi_nn_backend.cli.exit_codes import exits_cleanly
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
    StopOption,
    SystemOption,
    TemperatureOption,
    TopKOption,
    TopPOption,
    option_layer,
    parse_config_options,
)
from wasi_nn_backend.cli.terminal import load_progress, waiting_line, write_answer

if TYPE_CHECKING:
    from wasi_nn_backend.config import Layer

__all__ = ["PROMPT_BYTES_MAX", "register"]

#: Far above what fits the longest windows. Without it, a wrong file in a pipe would fill the memory.
PROMPT_BYTES_MAX = 16 << 20


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """What the command line asks for. ``graph_config`` goes to the model's graph, ``context_config`` over it."""

    model: str
    prompt: bytes
    graph_config: Layer
    context_config: Layer
    metrics: MetricsPlace
    as_json: bool
    stats: bool


def register(app: typer.Typer) -> None:
    app.command("generate")(exits_cleanly(generate))


# A command's parameters are its options: typer reads them from the signature, so they cannot be fewer.
def generate(  # noqa: PLR0913, PLR0917
    prompt: Annotated[str, typer.Argument(help="The question or text; - reads it from stdin.")],
    model: ModelOption,
    temperature: TemperatureOption = None,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    min_p: MinPOption = None,
    seed: SeedOption = None,
    max_tokens: MaxTokensOption = None,
    stop: StopOption = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without a chat template.")] = False,
    system: SystemOption = None,
    config: ConfigOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object at the end instead.")] = False,
    stats: StatsOption = False,
    metrics_port: MetricsPortOption = None,
    metrics_address: MetricsAddressOption = None,
) -> None:
    """Answer one prompt; the answer appears on stdout while it is made.

    Example: [bold]wasi-nn generate --model smollm2 --temperature 0 "Name the capital city of France."[/]

    Exit status: 0 answered, 1 an error, 2 a wrong command line, 130 Ctrl-C.
    """
    if raw and system is not None:
        raise typer.BadParameter("a raw prompt has no system message; write it into the prompt", param_hint="--system")
    sampling = SamplingOptions(temperature, top_k, top_p, min_p, seed)
    stopping = {"max_tokens": max_tokens, "stop": stop or None}
    session = {"prompt_mode": "raw" if raw else None, "system_prompt": system}
    request = GenerateRequest(
        model=model,
        prompt=read_prompt(prompt, raw=raw),
        graph_config=parse_config_options(config or [], option="--config"),
        context_config=option_layer(sampling=sampling.section(), stopping=stopping, session=session),
        metrics=metrics_place(metrics_port, metrics_address),
        as_json=as_json,
        stats=stats,
    )
    run_interruptibly(lambda cancellation: _load_and_answer(request, cancellation))


def read_prompt(argument: str, *, raw: bool) -> bytes:
    """The prompt's bytes as the shell gave them, or stdin's for ``-``.

    Raises ``typer.BadParameter`` when it is empty. The newline with which most programs end their output is not part of
    a chat message, but it is part of a raw text.
    """
    if argument != "-":
        # Not os.fsencode: under a Latin-1 locale that would hand the model Latin-1.
        prompt = argument.encode("utf-8", errors="surrogateescape")
    else:
        prompt = read_stdin()
        if not raw:
            prompt = prompt.removesuffix(b"\n").removesuffix(b"\r")
    if not prompt:
        what = "stdin had no text" if argument == "-" else "write a text, or - to read it from stdin"
        raise typer.BadParameter(f"the prompt is empty: {what}", param_hint="PROMPT")
    return prompt


def read_stdin() -> bytes:
    try:
        text = sys.stdin.buffer.read(PROMPT_BYTES_MAX + 1)
    except OSError as error:
        raise typer.BadParameter(f"cannot read stdin: {error.strerror}", param_hint="PROMPT") from None
    if len(text) > PROMPT_BYTES_MAX:
        raise typer.BadParameter(
            f"stdin has more than {PROMPT_BYTES_MAX} bytes, which no model's window holds; give a shorter text",
            param_hint="PROMPT",
        )
    return text


def _load_and_answer(request: GenerateRequest, cancellation: Cancellation) -> None:
    from wasi_nn_backend import Backend

    with Backend(ONE_AT_A_TIME) as backend, serving_metrics(backend, request.metrics):
        with load_progress(f"Loading {os.path.basename(request.model)}", cancellation) as progress:
            graph = backend.load_by_name_with_config(request.model, request.graph_config, progress=progress)
        with graph, graph.init_execution_context(request.context_config) as context:
            answer = print_answer(context, request.prompt, cancellation, as_json=request.as_json)
    if request.stats:
        print(answer.summary(), file=sys.stderr)


def print_answer(context: AnsweringContext, prompt: bytes, cancellation: Cancellation, *, as_json: bool) -> Answer:
    """Stream the answer to stdout, or print it as one JSON object, with a newline at the end in either case.

    A terminal shows that it works until there is something to print.
    """
    last_piece = "\n"

    def write(piece: str) -> None:
        nonlocal last_piece
        last_piece = piece or last_piece
        end_waiting()
        write_answer(piece)

    def keep_silent(_piece: str) -> None:
        """The JSON object shows the text at the end."""

    try:
        with waiting_line("Answering" if as_json else "Reading the prompt") as end_waiting:
            answer = stream_answer(context, prompt, keep_silent if as_json else write, cancellation)
    finally:
        # Also when it ends with an error: the text so far stays, and the message begins a line of its own.
        if not last_piece.endswith("\n"):
            write_answer("\n")
    if as_json:
        write_answer(json.dumps(answer.as_json(), ensure_ascii=False, indent=2) + "\n")
    return answer
