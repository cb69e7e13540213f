"""Models and engines in use, shared by everyone who asks for the same.

Two graphs of one file under equal settings share one engine; under settings that differ only in the context they share
the weights. What the last user gives back is freed.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

from wasi_nn_backend.config import Settings
from wasi_nn_backend.engine.loop import Engine, EngineOptions
from wasi_nn_backend.engine.sizing import (
    context_params,
    engine_key,
    model_params,
    n_threads_max,
    pool_limits,
    resolved_n_ctx,
)
from wasi_nn_backend.errors import InvalidArgument, ModelNotFound
from wasi_nn_backend.llama.interface import Llama, Model, ProgressCallback

__all__ = ["EngineLease", "EngineStore"]

_log = logging.getLogger(__name__)

_V = TypeVar("_V")


@dataclass(slots=True)
class _Entry(Generic[_V]):
    create_lock: threading.Lock = field(default_factory=threading.Lock)
    n_users: int = 0
    value: _V | None = None


class _Shared(Generic[_V]):
    """Values by key, created once, closed when their last user releases them.

    Creating takes seconds, so it happens under a lock of the key's own: other keys do not wait for it. When it fails,
    the next one who waits for the same key tries again and gets an error of its own.
    """

    def __init__(self, close: Callable[[_V], None]) -> None:
        self._close = close
        self._lock = threading.Lock()
        self._entries: dict[Hashable, _Entry[_V]] = {}

    def acquire(self, key: Hashable, create: Callable[[], _V]) -> _V:
        with self._lock:
            entry = self._entries.setdefault(key, _Entry())
            entry.n_users += 1
        try:
            with entry.create_lock:
                if entry.value is None:
                    entry.value = create()
                return entry.value
        except BaseException:
            self.release(key)
            raise

    def retain(self, key: Hashable) -> None:
        """One more user of a value that somebody holds."""
        with self._lock:
            self._entries[key].n_users += 1

    def release(self, key: Hashable) -> None:
        with self._lock:
            entry = self._entries[key]
            entry.n_users -= 1
            if entry.n_users:
                return
            del self._entries[key]
        if entry.value is not None:
            self._close(entry.value)


class EngineLease:
    """The right to use an engine until ``release``. ``retain`` makes a second lease on the same engine."""

    def __init__(self, store: EngineStore, key: Hashable, model_key: Hashable, engine: Engine, model: Model) -> None:
        self.engine = engine
        self.model = model
        self.key = key
        self._model_key = model_key
        self._store = store
        self._lock = threading.Lock()
        self._released = False

    def retain(self) -> EngineLease:
        """Raises ``InvalidArgument`` when this lease was released, by another thread perhaps."""
        with self._lock:
            if self._released:
                raise InvalidArgument("the graph was unloaded meanwhile: load it again")
            return self._store.share(self, self._model_key)

    def release(self) -> None:
        """Idempotent. The last release of an engine stops its thread and frees its context."""
        with self._lock:
            already_released, self._released = self._released, True
        if not already_released:
            self._store.give_back(self.key, self._model_key)


class EngineStore:
    """Thread-safe."""

    def __init__(self, llama: Llama, clock: Callable[[], float]) -> None:
        self._llama = llama
        self._clock = clock
        self._has_warned_of_gpu = False
        self._sizing = threading.Lock()
        self._n_kv_bytes = 0  # of all engines' contexts
        self._models: _Shared[Model] = _Shared(lambda model: model.close())
        self._engines: _Shared[Engine] = _Shared(self._close_engine)

    def acquire(self, path: Path, settings: Settings, progress: ProgressCallback | None = None) -> EngineLease:
        """Load the model and create the context unless somebody uses the same already.

        Raises ``ModelNotFound`` (no such file), ``InvalidArgument`` (bad file, settings that llama.cpp refuses or that
        do not fit the memory), ``Cancelled`` (``progress`` returned False).
        """
        settings = self._without_gpu(settings)
        params = model_params(path, settings)
        model_key = (params, _file_stamp(path))
        model = self._models.acquire(model_key, lambda: self._llama.load_model(params, progress))
        key = (model_key, resolved_n_ctx(model, settings), engine_key(settings))
        try:
            engine = self._engines.acquire(key, lambda: self._open_engine(model, settings))
        except BaseException:
            self._models.release(model_key)
            raise
        return EngineLease(self, key, model_key, engine, model)

    def _without_gpu(self, settings: Settings) -> Settings:
        """Where the build cannot offload, asking for it must not make a second copy of the weights."""
        if self._llama.supports_gpu_offload or not settings.model.n_gpu_layers:
            return settings
        if not self._has_warned_of_gpu:
            self._has_warned_of_gpu = True
            _log.warning(
                "model.n_gpu_layers is %d, but this llama.cpp was built without a GPU: computing on the CPU; "
                "reinstall llama-cpp-python with a GPU backend, for example CMAKE_ARGS=-DGGML_CUDA=on",
                settings.model.n_gpu_layers,
            )
        neutral = {"n_gpu_layers": 0, "main_gpu": 0, "split_mode": "layer", "tensor_split": ()}
        return settings.model_copy(update={"model": settings.model.model_copy(update=neutral)})

    def _open_engine(self, model: Model, settings: Settings) -> Engine:
        cache_types = settings.model.cache_type_k, settings.model.cache_type_v
        with self._sizing:  # what is free must still be free when it is taken
            sizes = context_params(model, settings, self._n_kv_bytes)
            context = model.create_context(sizes)
            try:
                kv_bytes = sizes.n_sequences * sizes.n_ctx * model.kv_bytes_per_token(*cache_types)
                engine = Engine(
                    context,
                    model.vocabulary,
                    self._clock,
                    EngineOptions(
                        n_ctx=sizes.n_ctx,
                        kv_bytes=kv_bytes,
                        limits=pool_limits(settings, self._n_kv_bytes + kv_bytes),
                        n_threads_max=n_threads_max(settings),
                    ),
                )
            except BaseException:
                context.close()
                raise
            self._n_kv_bytes += kv_bytes
            return engine

    def _close_engine(self, engine: Engine) -> None:
        engine.close()
        with self._sizing:
            self._n_kv_bytes -= engine.kv_bytes

    def share(self, lease: EngineLease, model_key: Hashable) -> EngineLease:
        self._models.retain(model_key)
        self._engines.retain(lease.key)
        return EngineLease(self, lease.key, model_key, lease.engine, lease.model)

    def give_back(self, key: Hashable, model_key: Hashable) -> None:
        self._engines.release(key)
        self._models.release(model_key)


def _file_stamp(path: Path) -> tuple[int, int]:
    """Changes when the file is replaced, so that a new file under an old name is not served from the old weights."""
    try:
        status = path.stat()
    except (OSError, ValueError) as error:  # ValueError: a NUL, or half a surrogate pair, in the path
        reason = error.strerror if isinstance(error, OSError) else error
        raise ModelNotFound(f"{str(path)!r}: {reason}; give the path of a GGUF file") from error
    return status.st_mtime_ns, status.st_size
