"""What an execution context needs of its graph: the two know each other, and imports go one way only."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol, TypeVar

from wasi_nn_backend.config import ConfigSource, Layer, Settings
from wasi_nn_backend.config.backend import BackendSettings
from wasi_nn_backend.doors import ConfigPlace
from wasi_nn_backend.engine import EngineLease
from wasi_nn_backend.llama.interface import Llama
from wasi_nn_backend.session import ChatTemplates, Session
from wasi_nn_backend.tasks import Task
from wasi_nn_backend.types import Door

__all__ = ["OwningGraph"]


_Context = TypeVar("_Context")


class OwningGraph(Protocol[_Context]):
    """What a context needs of its graph. Its path, settings and model change together with ``version``."""

    @property
    def name(self) -> str: ...

    @property
    def alive(self) -> bool: ...

    @property
    def door(self) -> Door: ...

    @property
    def llama(self) -> Llama: ...

    @property
    def chat_templates(self) -> ChatTemplates: ...

    def parse(self, config: ConfigSource, place: ConfigPlace) -> Layer:
        """What a caller configures at this place, checked as its door says."""

    def settings_with(self, *layers: Layer) -> Settings:
        """The settings in force under further layers."""

    @property
    def path(self) -> Path: ...

    @property
    def fingerprint(self) -> str:
        """Tells its model from others."""

    @property
    def version(self) -> int:
        """Counts up when the graph gets another model or configuration."""

    @property
    def limits(self) -> BackendSettings:
        """For contexts of this graph."""

    def new_task(self, context_id: int, settings: Settings) -> Task:
        """For a prompt that a context is about to run."""

    def now_s(self) -> float:
        """The backend's clock."""

    def check_takes_work(self) -> None:
        """Raise where nothing new is begun any more."""

    def lease(self, settings: Settings) -> EngineLease:
        """An engine for these settings: the graph's own where it serves them. Raises when the graph is unloaded."""

    def fork_context(self, layer: Layer, session: Session) -> _Context:
        """A new context that continues a copy of this session."""

    def init_execution_context(self, config: ConfigSource = None) -> _Context:
        """A context; with a ``session.session_id`` that is open, that one."""

    def configure(self, context: _Context, config: ConfigSource) -> _Context:
        """Give a context configuration; returns the one to go on with, another one where it names a session."""

    def forget(self, context: _Context) -> None:
        """The context is closed."""
