"""The values of ``--nn-graph``, ``--nn-preload``, ``--nn-config``, ``--dir`` and ``--env``, parsed and checked.

Pure functions over strings; what they reject is a usage error that names the option.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import typer

from wasi_nn_backend.errors import WasiNNError

__all__ = [
    "DirectoryMapping",
    "GraphOption",
    "parse_directory_option",
    "parse_environment_option",
    "parse_graph_option",
    "parse_preload_option",
    "read_config_option",
    "unique_graphs",
]

_CONFIG = "--nn-config"

_log = logging.getLogger(__name__)

#: A comma that begins a setting: a key and an equals sign follow, no backslash comes before.
_SETTING_COMMA = re.compile(r"(?<!\\),(?=[A-Za-z_][\w.-]*=)")

# The names that WasmEdge knows in --nn-preload; the first set is what this backend serves.
_SERVED_ENCODINGS = frozenset({"ggml", "autodetect"})
_FOREIGN_ENCODINGS = frozenset(
    {"openvino", "onnx", "tensorflow", "pytorch", "pytorchaoti", "tensorflowlite", "neuralspeed", "whisper", "mlx"}
    | {"piper", "chattts", "openvinogenai", "bitnet"}
)
_READ_ONLY = ":readonly"
_TARGETS = frozenset({"cpu", "gpu", "tpu", "auto"})


@dataclass(frozen=True, slots=True)
class GraphOption:
    """A graph that the command line names. ``model`` is a path or a built-in model's name, ``assignments`` are
    ``key=value`` texts, ``option`` the one that it came from."""

    name: str
    model: str
    assignments: tuple[str, ...]
    option: str


@dataclass(frozen=True, slots=True)
class DirectoryMapping:
    host: Path
    guest: str
    is_read_only: bool = False


def parse_graph_option(text: str) -> GraphOption:
    """``NAME=MODEL[,key=value...]``.

    A comma begins a setting when ``key=`` follows it; any other comma, and one written ``\\,``, is a plain character. A
    MODEL that as a whole names a file is taken as that file, so paths that the shell completes need no escapes.
    """
    name, separator, value = text.partition("=")
    if not separator or not name or not value:
        raise typer.BadParameter(
            f"{text!r} is not NAME=MODEL[,key=value...]; write for example default=model.gguf or default=smollm2",
            param_hint="--nn-graph",
        )
    if os.path.isfile(value):
        return GraphOption(name, value, (), "--nn-graph")
    model, *assignments = (part.replace("\\,", ",") for part in _SETTING_COMMA.split(value))
    if not model:
        raise typer.BadParameter(f"{text!r} has no model between '=' and ','", param_hint="--nn-graph")
    return GraphOption(name, model, tuple(assignments), "--nn-graph")


def parse_preload_option(text: str) -> GraphOption | None:
    """``NAME:ENCODING:TARGET:PATH`` as WasmEdge reads it; the path is all that follows the third colon.

    None for an encoding or target that is not served: an error is logged and the guest's ``load_by_name`` gives
    not_found, as in WasmEdge, so that command lines with several entries still run.
    """
    parts = text.split(":", 3)
    if len(parts) != 4 or not parts[0] or not parts[3]:
        raise typer.BadParameter(
            f"{text!r} is not NAME:ENCODING:TARGET:PATH; write for example default:GGML:AUTO:model.gguf",
            param_hint="--nn-preload",
        )
    name, encoding, target, path = parts
    if encoding.lower() in _FOREIGN_ENCODINGS:
        _log.error("--nn-preload %s: encoding %s is not served here, only GGML; entry skipped", text, encoding)
        return None
    if encoding.lower() not in _SERVED_ENCODINGS:
        _log.error("--nn-preload %s: unknown encoding %s, use GGML; entry skipped", text, encoding)
        return None
    if target.lower() not in _TARGETS:
        _log.error("--nn-preload %s: unknown target %s, use CPU, GPU, TPU or AUTO; entry skipped", text, target)
        return None
    return GraphOption(name, path, (), "--nn-preload")


def unique_graphs(graphs: Iterable[GraphOption | None]) -> list[GraphOption]:
    """The graphs in their order; of equal names the first, with a warning. None (a skipped entry) is left out."""
    first_of_name: dict[str, GraphOption] = {}
    for graph in graphs:
        if graph is None:
            continue
        kept = first_of_name.setdefault(graph.name, graph)
        if kept is not graph:
            _log.warning(
                "%s: the name %r is already taken by %s; %s is ignored",
                graph.option,
                graph.name,
                kept.model,
                graph.model,
            )
    return list(first_of_name.values())


def read_config_option(text: str) -> tuple[str, bytes]:
    """The JSON of ``--nn-config``, and before it what messages call it: the text itself when it begins with ``{``, else
    the content of the file it names, with or without an ``@`` before the name."""
    from wasi_nn_backend.config.describe import shown
    from wasi_nn_backend.config.files import read_file

    if text.lstrip().startswith("{"):
        return _CONFIG, os.fsencode(text)
    file = text.removeprefix("@")
    if not file:
        raise typer.BadParameter("it is empty; give JSON in braces or the name of a file", param_hint=_CONFIG)
    try:
        # A shell's <(...) is a pipe, and whoever writes it can press Ctrl-C.
        return f"{_CONFIG} {shown(file)}", read_file(Path(file), may_wait=True)
    except WasiNNError as error:
        raise typer.BadParameter(f"{error}, or give JSON in braces", param_hint=_CONFIG) from None


def parse_directory_option(text: str) -> DirectoryMapping:
    """``HOST``, ``HOST::GUEST``, or WasmEdge's ``GUEST:HOST`` where no directory has that whole name. ``:readonly`` may
    follow the two, as in WasmEdge; ``a:readonly`` alone is the directory ``readonly`` of the host."""
    pair = text.removesuffix(_READ_ONLY)
    is_read_only = pair != text and ":" in pair and not os.path.isdir(text)
    if is_read_only:
        text = pair
    host, separator, guest = text.partition("::")
    if not separator:
        guest = host
        if ":" in text and not os.path.isdir(text):
            guest, _, host = text.partition(":")
    if not host or not guest:
        raise typer.BadParameter(
            f"{text!r} is not HOST, HOST::GUEST or GUEST:HOST, with :readonly behind the two if you like",
            param_hint="--dir",
        )
    if not os.path.isdir(host):
        raise typer.BadParameter(f"{host!r} is not a directory on this machine", param_hint="--dir")
    return DirectoryMapping(Path(host), guest, is_read_only)


def parse_environment_option(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not separator or not name:
        raise typer.BadParameter(f"{text!r} is not NAME=VALUE", param_hint="--env")
    return name, value
