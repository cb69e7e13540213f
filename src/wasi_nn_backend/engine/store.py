"""Models and engines in use, shared by everyone who asks for the same.

Two graphs of one file under equal settings share one engine; under settings that differ only in the context they share
the weights. What the last user gives back is freed. Embedders are shared more widely, since they only depend on the
section ``model``, and exist from the first use on.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable, Container, Hashable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Generic, TypeVar

from wasi_nn_backend.config import Settings
from wasi_nn_backend.engine.embedding import Embedder
from wasi_nn_backend.engine.loop import Engine
from wasi_nn_backend.engine.options import EngineOptions
from wasi_nn_backend.engine.sizing import (
    adapter_paths,
    adapter_scales,
    context_params,
    embedder_key,
    embedding_context,
    engine_key,
    kv_layouts,
    model_params,
    n_threads_max,
    n_tokens_step_max,
    pool_limits,
    resolved_n_ctx,
    wanted_context,
)
from wasi_nn_backend.engine.statistics import EngineStatistics, SessionStatistics
from wasi_nn_backend.engine.thread_starter import ThreadStarter
from wasi_nn_backend.errors import InvalidArgument, ModelNotFound, RuntimeFailure, UnsupportedOperation, WasiNNError
from wasi_nn_backend.llama.interface import ContextParams, Llama, Model, ProgressCallback

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

    def values(self) -> list[_V]:
        """Those that exist now."""
        with self._lock:
            return [entry.value for entry in self._entries.values() if entry.value is not None]


@dataclass(slots=True)
class _Serving:
    """What leases of one key share. ``engine`` is None where only vectors are wanted, or possible."""

    model: Model
    settings: Settings
    embedder_key: Hashable
    engine: Engine | None
    embedder: Embedder | None = None
    closed: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)


class EngineLease:
    """The right to use an engine until ``release``. ``retain`` makes a second lease on the same engine."""

    def __init__(self, store: EngineStore, key: Hashable, model_key: Hashable, serving: _Serving) -> None:
        self.model = serving.model
        self.key = key
        self._serving = serving
        self._model_key = model_key
        self._store = store
        self._lock = threading.Lock()
        self._released = False

    @property
    def engine(self) -> Engine:
        """What generates text. Raises ``UnsupportedOperation`` in embedding mode and for models that cannot."""
        engine = self._serving.engine
        if engine is not None:
            return engine
        if not self.model.can_generate:
            raise UnsupportedOperation(
                f"the model ({self.model.description}) is an encoder, which gives embeddings and does not continue a "
                "text: switch model.embedding on or load a model that generates"
            )
        raise UnsupportedOperation("model.embedding is on, so there are vectors and no text: switch it off for this")

    def embedder(self) -> Embedder:
        """What gives vectors, created at the first call and kept until the last lease of this engine is released.

        Raises ``InvalidArgument`` where it does not fit the memory, ``UnsupportedOperation`` (no embeddings).
        """
        return self._store.embedder_of(self._serving)

    # What a session tells its engine, where there is one: embeddings keep nothing of a session.

    def expect(self, session_id: int) -> None:
        if self._serving.engine is not None:
            self._serving.engine.expect(session_id)

    def dismiss(self, session_id: int) -> None:
        if self._serving.engine is not None:
            self._serving.engine.dismiss(session_id)

    def forget_session(self, session_id: int, *, wait: bool) -> None:
        if self._serving.engine is not None:
            self._serving.engine.forget_session(session_id, wait=wait)

    def statistics(self) -> EngineStatistics:
        engine = self._serving.engine
        return EngineStatistics() if engine is None else engine.statistics()

    def session_statistics(self, session_id: int) -> SessionStatistics:
        engine = self._serving.engine
        return SessionStatistics() if engine is None else engine.session_statistics(session_id)

    def n_tokens_cached(self, session_ids: Sequence[int]) -> dict[int, int]:
        """By session. Raises ``RuntimeFailure`` when the engine is closed."""
        engine = self._serving.engine
        return dict.fromkeys(session_ids, 0) if engine is None else engine.n_tokens_cached(session_ids)

    def retain(self) -> EngineLease:
        """Raises ``InvalidArgument`` when this lease was released, by another thread perhaps."""
        with self._lock:
            if self._released:
                raise InvalidArgument("the graph was unloaded meanwhile: load it again")
            return self._store.share(self.key, self._model_key, self._serving)

    def release(self) -> None:
        """Idempotent. The last release of an engine stops its threads and frees its contexts."""
        with self._lock:
            already_released, self._released = self._released, True
        if not already_released:
            self._store.give_back(self.key, self._model_key)


class EngineStore:
    """Thread-safe."""

    def __init__(self, llama: Llama, clock: Callable[[], float]) -> None:
        self._llama = llama
        self._clock = clock
        self._threads = ThreadStarter()
        self._has_warned_of_gpu = False
        self._embeds = True
        self._ids = itertools.count(1)
        self._sizing = threading.Lock()
        self._n_kv_bytes = 0  # of all engines' contexts
        self._models: _Shared[Model] = _Shared(lambda model: model.close())
        self._servings: _Shared[_Serving] = _Shared(self._close_serving)
        self._embedders: _Shared[Embedder] = _Shared(self._close_embedder)

    def acquire(
        self, path: Path, settings: Settings, progress: ProgressCallback | None = None, adapters: Sequence[str] = ()
    ) -> EngineLease:
        """Load the model and create the context that generates, unless somebody uses the same already.

        ``adapters`` are LoRA adapters to load beside those of the settings, with no weight here: whoever uses the same
        weights with other scales then needs no second copy of them.

        Raises ``ModelNotFound`` (no such file), ``InvalidArgument`` (bad file, settings that llama.cpp refuses or that
        do not fit the memory), ``Cancelled`` (``progress`` returned False).
        """
        settings = self._without_gpu(settings)
        paths = adapter_paths(settings, adapters)
        params = model_params(path, settings, paths)
        model_key = (params, *(_file_stamp(file) for file in (path, *params.adapters)))
        if settings.model.numa != "disabled":
            self._llama.set_numa(settings.model.numa)
        model = self._models.acquire(model_key, lambda: self._llama.load_model(params, progress))
        key = (model_key, resolved_n_ctx(model, settings), engine_key(settings))
        try:
            scales = adapter_scales(settings, paths)
            serving = self._servings.acquire(key, lambda: self._open_serving(path, model_key, model, settings, scales))
        except BaseException:
            self._models.release(model_key)
            raise
        return EngineLease(self, key, model_key, serving)

    def embedder_of(self, serving: _Serving) -> Embedder:
        with serving.lock:
            if serving.closed:
                raise InvalidArgument("the graph was unloaded meanwhile: load it again")
            if serving.embedder is None:
                serving.embedder = self._embedders.acquire(
                    serving.embedder_key, lambda: self._open_embedder(serving.model, serving.settings)
                )
            if not self._embeds:
                raise RuntimeFailure("the backend is closed: make a new one")
            return serving.embedder

    def statistics(self, besides: Container[int] = ()) -> list[EngineStatistics]:
        """Of every engine that exists, also of those that only some contexts use; not of the ids ``besides``."""
        engines = [serving.engine for serving in self._servings.values()]
        rows = []
        for engine in engines:
            if engine is not None and engine.id not in besides:
                try:
                    rows.append(engine.statistics())
                except WasiNNError:  # closed meanwhile
                    continue
        return rows

    def stop_embedders(self) -> None:
        """End what is being embedded, and refuse more: the backend closes."""
        self._embeds = False
        for embedder in self._embedders.values():
            embedder.close()

    def close(self) -> None:
        """End the thread that starts others. Idempotent; leases and what they use are not touched."""
        self._threads.close()

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

    def _open_serving(
        self, path: Path, model_key: Hashable, model: Model, settings: Settings, scales: tuple[float, ...]
    ) -> _Serving:
        generates = model.can_generate and not settings.model.embedding
        engine = self._open_engine(path, model, settings, scales) if generates else None
        return _Serving(model, settings, (model_key, embedder_key(model, settings)), engine)

    def _close_serving(self, serving: _Serving) -> None:
        with serving.lock:
            serving.closed = True
        if serving.embedder is not None:
            self._embedders.release(serving.embedder_key)
        if serving.engine is not None:
            self._close_engine(serving.engine)

    def _open_engine(self, path: Path, model: Model, settings: Settings, scales: tuple[float, ...]) -> Engine:
        cache_types = settings.model.cache_type_k, settings.model.cache_type_v
        queue = settings.backend
        with self._sizing:  # what is free must still be free when it is taken
            sizes = replace(self._choose_sizes(model, settings), adapter_scales=scales)
            context = model.create_context(sizes)
            try:
                kv_bytes = sizes.n_cells_total * model.kv_bytes_per_token(*cache_types)
                engine = Engine(
                    context,
                    model.vocabulary,
                    self._clock,
                    EngineOptions(
                        id=next(self._ids),
                        model=str(path),
                        n_ctx=sizes.n_ctx,
                        kv_bytes=kv_bytes,
                        n_cells=sizes.n_cells,
                        kv_layout=sizes.kv_layout,
                        flash_attention=sizes.flash_attention,
                        limits=pool_limits(settings, self._n_kv_bytes + kv_bytes),
                        n_tokens_step_max=n_tokens_step_max(settings),
                        n_running_max=None if settings.performance.batch_processing else 1,
                        company_wait_s=settings.performance.batch_timeout_ms / 1000,
                        n_threads_max=n_threads_max(settings),
                        n_waiting_max=min(queue.queue_size, queue.queue_reject_threshold),
                        n_waiting_warning=min(queue.queue_size, queue.queue_warning_threshold),
                        uses_priorities=queue.priority_scheduling_enabled,
                        shares_fairly=queue.fair_scheduling_enabled,
                        drops_late_waiting=queue.auto_queue_cleanup,
                    ),
                    start_thread=self._threads.start,
                )
            except BaseException:
                context.close()
                raise
            self._n_kv_bytes += kv_bytes
            return engine

    def _choose_sizes(self, model: Model, settings: Settings) -> ContextParams:
        wanted = wanted_context(model, settings, self._n_kv_bytes)
        choice = model.choose_attention(wanted, kv_layouts(settings))
        sizes = context_params(wanted, choice)
        _log.info(
            "%s: KV layout %s of %d sequences and %d cells, flash attention %s: %s",
            model.description,
            choice.kv_layout,
            sizes.n_sequences,
            sizes.n_cells_total,
            choice.flash_attention,
            choice.reason,
        )
        return sizes

    def _close_engine(self, engine: Engine) -> None:
        engine.close()
        with self._sizing:
            self._n_kv_bytes -= engine.kv_bytes

    def _open_embedder(self, model: Model, settings: Settings) -> Embedder:
        section = settings.model
        with self._sizing:
            sizes = embedding_context(model, settings, self._n_kv_bytes)
            kv_bytes = sizes.n_cells_total * model.kv_bytes_per_token(section.cache_type_k, section.cache_type_v)
            context = model.create_embedding_context(sizes)
            try:
                embedder = Embedder(context, self._clock, kv_bytes=kv_bytes, start_thread=self._threads.start)
            except BaseException:
                context.close()
                raise
            self._n_kv_bytes += kv_bytes
            return embedder

    def _close_embedder(self, embedder: Embedder) -> None:
        embedder.close()
        with self._sizing:
            self._n_kv_bytes -= embedder.kv_bytes

    def share(self, key: Hashable, model_key: Hashable, serving: _Serving) -> EngineLease:
        self._models.retain(model_key)
        self._servings.retain(key)
        return EngineLease(self, key, model_key, serving)

    def give_back(self, key: Hashable, model_key: Hashable) -> None:
        self._servings.release(key)
        self._models.release(model_key)


def _file_stamp(path: Path) -> tuple[int, int]:
    """Changes when the file is replaced, so that a new file under an old name is not served from the old weights."""
    try:
        status = path.stat()
    except (OSError, ValueError) as error:  # ValueError: a NUL, or half a surrogate pair, in the path
        reason = error.strerror if isinstance(error, OSError) else error
        raise ModelNotFound(f"{str(path)!r}: {reason}; give the path of a GGUF file") from error
    return status.st_mtime_ns, status.st_size
