"""The options that ``run`` and ``map`` share: which models a guest may load, what of the host it sees, what it may
take."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

import typer

from wasi_nn_backend.cli.graph_options import (
    DirectoryMapping,
    GraphOption,
    parse_directory_option,
    parse_environment_option,
    parse_graph_option,
    parse_preload_option,
    read_config_option,
    unique_graphs,
)
from wasi_nn_backend.cli.model_options import parse_config_options
from wasi_nn_backend.errors import WasiNNError

if TYPE_CHECKING:
    from wasi_nn_backend.backend import Backend
    from wasi_nn_backend.config import Layer
    from wasi_nn_backend.dialects import Dialect
    from wasi_nn_backend.host import HostLimits, RunConfig

__all__ = [
    "WORLD",
    "AllowLoadBytesOption",
    "ConfigOption",
    "DialectOption",
    "DirectoryOption",
    "EnvironmentOption",
    "FuelOption",
    "GraphOptions",
    "GuestLimits",
    "LimitOption",
    "MaxMemoryOption",
    "NamedGraph",
    "NnGraphOption",
    "PreloadOption",
    "TimeoutOption",
    "UnsizedOutputOption",
    "World",
    "guest_config",
    "share_the_interpreter",
]

WORLD = "The guest's world"
_GRAPHS = "Models"
_LIMITS = "Limits"
_MIB = 1 << 20

_log = logging.getLogger(__name__)

NnGraphOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=MODEL[,K=V...]",
        rich_help_panel=_GRAPHS,
        help="A model and the name by which the guest loads it: a GGUF file or smollm2. K=V are settings under"
        " what the guest sends. A comma begins one when K= follows, and a plain comma is written \\,.",
    ),
]
PreloadOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME:GGML:AUTO:PATH",
        rich_help_panel=_GRAPHS,
        help="The same as WasmEdge spells it, NAME:ENCODING:TARGET:PATH.",
    ),
]
ConfigOption = Annotated[
    str | None,
    typer.Option(
        metavar="JSON|FILE",
        rich_help_panel=_GRAPHS,
        help="Configuration for all models, under their own settings and what the guest sends.",
    ),
]
AllowLoadBytesOption = Annotated[
    bool,
    typer.Option("--allow-load-bytes", rich_help_panel=_GRAPHS, help="Let the guest load models out of its memory."),
]
DirectoryOption = Annotated[
    list[str] | None,
    typer.Option(
        "--dir",
        metavar="HOST[::GUEST]",
        rich_help_panel=WORLD,
        help="A directory that the guest may use; also GUEST:HOST as WasmEdge spells it. With :readonly behind the"
        " two it can only read there.",
    ),
]
EnvironmentOption = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=VALUE", rich_help_panel=WORLD, help="An environment variable for the guest."),
]
DialectOption = Annotated[
    str | None,
    typer.Option(
        metavar="witx|wasmedge|wamr|wamr-legacy|hyperbeam",
        rich_help_panel=WORLD,
        help="The ABI, where its imports do not tell it.",
    ),
]
TimeoutOption = Annotated[
    float | None,
    typer.Option(metavar="SECONDS", min=0.0, rich_help_panel=_LIMITS, help="Stop the guest after this time."),
]
FuelOption = Annotated[
    int | None,
    typer.Option(metavar="N", min=1, rich_help_panel=_LIMITS, help="Trap after about N instructions."),
]
MaxMemoryOption = Annotated[
    int | None,
    typer.Option(metavar="MIB", min=1, rich_help_panel=_LIMITS, help="The most memory the guest may have."),
]
LimitOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=N",
        rich_help_panel=_LIMITS,
        help="One of the limits in docs/strangers.md, such as max_contexts=16 or max_prompt_bytes=65536.",
    ),
]
UnsizedOutputOption = Annotated[
    int,
    typer.Option(
        metavar="N",
        min=0,
        rich_help_panel=WORLD,
        help="WasmEdge's dialect: buffers for output that are passed with the length 0 have N bytes. Programs built"
        " with llama-core need 245888.",
    ),
]


@dataclass(frozen=True, slots=True)
class NamedGraph:
    """A graph to register, its settings checked."""

    option: GraphOption
    layer: Layer

    def register(self, backend: Backend) -> None:
        """A name without its file is no reason not to run: the guest may never load it, or handle the error."""
        from wasi_nn_backend.registry import model_path

        option = self.option
        backend.register(option.name, option.model, self.layer)
        path = model_path(option.model)
        try:
            path.stat()
        except FileNotFoundError:
            _log.warning("%s %s: there is no file %s; loading it will fail", option.option, option.name, path)
        except OSError as error:
            _log.warning("%s %s: %s: %s; loading it will fail", option.option, option.name, path, error.strerror)


@dataclass(frozen=True, slots=True)
class GraphOptions:
    """The models, and the configuration under all of them."""

    named: Sequence[NamedGraph]
    backend_layer: Layer

    @classmethod
    def parse(
        cls,
        graphs: Sequence[str] | None,
        preloads: Sequence[str] | None,
        config: str | None,
        backend_defaults: Mapping[str, Any],
    ) -> Self:
        """``backend_defaults`` is what the command wants of the section ``backend``, under ``config``."""
        options = [*map(parse_graph_option, graphs or []), *map(parse_preload_option, preloads or [])]
        named = [
            NamedGraph(option, parse_config_options(option.assignments, option=f"{option.option} {option.name}"))
            for option in unique_graphs(options)
        ]
        return cls(named, _backend_layer(config, backend_defaults))


@dataclass(frozen=True, slots=True)
class World:
    """What a guest sees of the host."""

    directories: Sequence[DirectoryMapping]
    environment: Mapping[str, str]
    dialect: Dialect | None

    @classmethod
    def parse(cls, directories: Sequence[str] | None, environment: Sequence[str] | None, dialect: str | None) -> Self:
        return cls(
            [*map(parse_directory_option, directories or [])],
            dict(map(parse_environment_option, environment or [])),
            None if dialect is None else _dialect(dialect),
        )


@dataclass(frozen=True, slots=True)
class GuestLimits:
    """What a guest may take."""

    timeout_s: float | None
    fuel: int | None
    max_memory_bytes: int | None
    host: HostLimits

    @classmethod
    def parse(
        cls,
        timeout_s: float | None,
        fuel: int | None,
        max_memory_mib: int | None,
        limits: Sequence[str] | None,
        base: HostLimits,
    ) -> Self:
        """``base`` is what the command itself has set, under ``limits``."""
        names = [
            field.name for field in fields(base) if field.name.startswith("max_") and field.name != "max_host_share"
        ]
        values: dict[str, Any] = dict(_parse_limit(text, names) for text in limits or [])
        max_memory_bytes = None if max_memory_mib is None else max_memory_mib * _MIB
        return cls(timeout_s, fuel, max_memory_bytes, replace(base, **values))


def guest_config(module: str | Path | bytes, world: World, limits: GuestLimits) -> RunConfig:
    """A run of a module without arguments."""
    from wasi_nn_backend.host import RunConfig

    return RunConfig(
        module=module,
        env=world.environment,
        dirs=[(mapping.host, mapping.guest) for mapping in world.directories if not mapping.is_read_only],
        read_only_dirs=[(mapping.host, mapping.guest) for mapping in world.directories if mapping.is_read_only],
        timeout_s=limits.timeout_s,
        fuel=limits.fuel,
        max_memory_bytes=limits.max_memory_bytes,
        dialect=world.dialect,
        limits=limits.host,
    )


def share_the_interpreter() -> None:
    """Let threads wait for each other 0.5 ms at most instead of 5, for the life of the process.

    The engine's thread comes back from llama.cpp many times a token, and beside a guest that calls without end it would
    wait that long each time.
    """
    sys.setswitchinterval(0.0005)


def _backend_layer(text: str | None, backend_defaults: Mapping[str, Any]) -> Layer:
    from wasi_nn_backend.config import parse_layer
    from wasi_nn_backend.config.layers import merge

    defaults = parse_layer({"backend": dict(backend_defaults)}, name="the command")
    if text is None:
        return defaults
    try:
        name, content = read_config_option(text)
        return merge((defaults, parse_layer(content, name=name)), name=name)
    except WasiNNError as error:
        raise typer.BadParameter(str(error)) from None


def _dialect(name: str) -> Dialect:
    from wasi_nn_backend.dialects import CORE_DIALECTS

    known = {dialect.name: dialect for dialect in CORE_DIALECTS}
    if name.lower() not in known:
        raise typer.BadParameter(f"{name!r} is none of {', '.join(known)}", param_hint="--dialect")
    return known[name.lower()]


def _parse_limit(text: str, names: Sequence[str]) -> tuple[str, int]:
    name, _, number = text.partition("=")
    if name not in names:
        raise typer.BadParameter(f"{name!r} is none of {', '.join(names)}", param_hint="--limit")
    try:
        value = int(number)
    except ValueError:
        value = 0
    if value < 1:
        raise typer.BadParameter(f"{text!r}: give a whole number of 1 or more after '='", param_hint="--limit")
    return name, value
