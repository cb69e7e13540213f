"""The backend as one guest sees it: the same models and engines, on an account of the guest's own.

Graphs that a guest loads belong to its tenant, which stands between them and the backend (``OwningBackend``): contexts
are counted as this guest's, its work is one user's in the queue, and an engine for other settings than the operator's
is made so often and no more. Other guests' handles cannot be named at all: those are per store (``state.py``).
"""

from __future__ import annotations

import uuid
from collections.abc import Hashable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wasi_nn_backend.errors import TooLarge
from wasi_nn_backend.host.limits import HostLimits
from wasi_nn_backend.types import Door, ExecutionTarget, GraphEncoding, OwnedDoor

if TYPE_CHECKING:
    from collections.abc import Callable

    from wasi_nn_backend.backend import Backend
    from wasi_nn_backend.config import ConfigSource, Settings
    from wasi_nn_backend.config.backend import BackendSettings
    from wasi_nn_backend.engine import EngineLease
    from wasi_nn_backend.graph import Graph
    from wasi_nn_backend.llama.interface import Llama, ProgressCallback
    from wasi_nn_backend.registry import Registry
    from wasi_nn_backend.session import SessionFiles
    from wasi_nn_backend.session_store import SessionPlaces, SessionStore, StoredContext
    from wasi_nn_backend.tasks import TaskBook

__all__ = ["Tenant"]


class Tenant:
    """One guest's account with a backend. ``load*`` are the backend's, for this guest. Thread-safe as the backend is,
    and used by one guest's thread."""

    def __init__(self, backend: Backend, limits: HostLimits) -> None:
        self._backend = backend
        self._limits = limits
        self._user = f"guest {uuid.uuid4().hex}"
        self._settings_of: dict[Path, set[Hashable]] = {}

    # For the guest's calls.

    @property
    def registry(self) -> Registry:
        return self._backend.registry

    def load(
        self,
        builders: Sequence[bytes],
        encoding: GraphEncoding,
        target: ExecutionTarget,
        *,
        door: Door,
        progress: ProgressCallback | None = None,
    ) -> Graph:
        return self._backend.load(builders, encoding, target, door=self._own(door), progress=progress)

    def load_by_name(self, name: str, *, door: Door, progress: ProgressCallback | None = None) -> Graph:
        return self._backend.load_by_name(name, door=self._own(door), progress=progress)

    def load_by_name_with_config(
        self, name: str, config: ConfigSource, *, door: Door, progress: ProgressCallback | None = None
    ) -> Graph:
        return self._backend.load_by_name_with_config(name, config, door=self._own(door), progress=progress)

    # For the graphs: ``OwningBackend``.

    @property
    def llama(self) -> Llama:
        return self._backend.llama

    @property
    def session_files(self) -> SessionFiles:
        return self._backend.session_files

    @property
    def sessions(self) -> SessionPlaces:
        return _OwnSessions(self._backend.sessions, self._user)

    @property
    def tasks(self) -> TaskBook:
        return self._backend.tasks

    def next_id(self) -> int:
        return self._backend.next_id()

    def now_s(self) -> float:
        return self._backend.now_s()

    def check_takes_work(self) -> None:
        self._backend.check_takes_work()

    def forget(self, graph: Graph) -> None:
        self._backend.forget(graph)

    def acquire(
        self, path: Path, settings: Settings, progress: ProgressCallback | None = None, adapters: Sequence[str] = ()
    ) -> EngineLease:
        """Raises ``TooLarge`` for a window beyond ``max_ctx_tokens`` and for one setting too many.

        Settings count for the guest's whole life: given back and asked for again under another number, they would cost
        an engine each time.
        """
        limits, n_ctx = self._limits, settings.model.n_ctx
        if limits.max_ctx_tokens is not None and not 0 < n_ctx <= limits.max_ctx_tokens:
            raise TooLarge(
                f"model.n_ctx (ctx-size) is {n_ctx or 'the longest'}, and this host gives a guest "
                f"{limits.max_ctx_tokens} tokens at most: ask for less"
            )
        # All else that makes an engine is the host's to set.
        known, key = self._settings_of.setdefault(path, set()), settings.model
        if key not in known and len(known) >= limits.max_engine_settings:
            raise TooLarge(
                f"{len(known)} settings of this model (ctx-size and other keys of the section model) were used by this "
                "guest, each of which is a context of its own, and that is this host's limit: use one of those"
            )
        lease = self._backend.acquire(path, settings, progress, adapters)
        known.add(key)
        return lease

    def _own(self, door: Door) -> Door:
        """The door for this guest: all that it runs is one user's, however many contexts it has."""
        task: Mapping[str, Any] = {**door.defaults.get("task", {}), "user_id": self._user}
        return OwnedDoor(
            name=door.name,
            prompt_mode=door.prompt_mode,
            is_trusted=door.is_trusted,
            defaults={**door.defaults, "task": task},
            unknown_keys=door.unknown_keys,
            raised_keys=door.raised_keys,
            owner=self,
        )


class _OwnSessions:
    """The backend's sessions, with the owner filled in."""

    def __init__(self, store: SessionStore, owner: Hashable) -> None:
        self._store = store
        self._owner = owner

    def place(self, limits: BackendSettings) -> AbstractContextManager[Callable[[StoredContext], None]]:
        return self._store.place(limits, self._owner)

    def discard(self, context: StoredContext) -> None:
        self._store.discard(context)

    def look(self) -> None:
        self._store.look()
