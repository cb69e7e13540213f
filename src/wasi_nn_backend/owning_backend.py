"""What a graph needs of its backend: the two know each other, and imports go one way only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from wasi_nn_backend.config import Settings
from wasi_nn_backend.engine import EngineLease
from wasi_nn_backend.llama.interface import Llama, ProgressCallback
from wasi_nn_backend.session import SessionFiles
from wasi_nn_backend.session_store import SessionPlaces
from wasi_nn_backend.tasks import TaskBook

__all__ = ["OwningBackend"]

_Graph_contra = TypeVar("_Graph_contra", contravariant=True)


class OwningBackend(Protocol[_Graph_contra]):
    """What a graph needs of its backend."""

    @property
    def llama(self) -> Llama: ...

    @property
    def sessions(self) -> SessionPlaces: ...

    @property
    def session_files(self) -> SessionFiles: ...

    @property
    def tasks(self) -> TaskBook: ...

    def next_id(self) -> int: ...

    def now_s(self) -> float: ...

    def check_takes_work(self) -> None:
        """Raise ``RuntimeFailure`` when the backend closes."""

    def acquire(
        self, path: Path, settings: Settings, progress: ProgressCallback | None = None, adapters: Sequence[str] = ()
    ) -> EngineLease: ...

    def forget(self, graph: _Graph_contra) -> None: ...
