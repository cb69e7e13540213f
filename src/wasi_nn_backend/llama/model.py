"""A loaded model: weights, vocabulary, and what contexts and samplers are made from."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from wasi_nn_backend.errors import Cancelled, InvalidArgument, UnsupportedOperation
from wasi_nn_backend.llama import amx_probe, attention_choice, attention_probe, state
from wasi_nn_backend.llama.bindings import library_files, native
from wasi_nn_backend.llama.context import NativeContext
from wasi_nn_backend.llama.context_params import ModelFacts
from wasi_nn_backend.llama.embedding_context import NativeEmbeddingContext
from wasi_nn_backend.llama.gguf_file import GgufSummary, read_gguf_summary
from wasi_nn_backend.llama.interface import (
    AttentionChoice,
    ContextParams,
    KvLayout,
    ModelParams,
    ProgressCallback,
    SamplerStage,
    TwoStepSampler,
)
from wasi_nn_backend.llama.kv_shape import cache_type
from wasi_nn_backend.llama.links import LinkMaker
from wasi_nn_backend.llama.log_bridge import LogBridge
from wasi_nn_backend.llama.lora import LoraAdapters
from wasi_nn_backend.llama.owner import Owner, Resource
from wasi_nn_backend.llama.sampler import open_sampler
from wasi_nn_backend.llama.shared_cells import N_SPARE_SEQUENCES
from wasi_nn_backend.llama.vocab import NativeVocabulary

__all__ = ["NativeModel"]

_SPLIT_MODES = {"none": "LLAMA_SPLIT_MODE_NONE", "layer": "LLAMA_SPLIT_MODE_LAYER", "row": "LLAMA_SPLIT_MODE_ROW"}
_MAX_INT32 = 2**31 - 1


class NativeModel(Owner):
    """``Model`` over llama.cpp. What was read at load (counts, metadata, template) stays readable after ``close``."""

    def __init__(
        self,
        params: ModelParams,
        log: LogBridge,
        *,
        use_extra_buffers: bool = True,
        progress: ProgressCallback | None = None,
    ) -> None:
        """Raises ``ModelNotFound``, ``InvalidArgument`` (a bad file or value), ``Cancelled``."""
        summary = read_gguf_summary(params.path)
        pointer = _load(params, log, use_extra_buffers=use_extra_buffers, progress=progress)
        super().__init__(Resource(f"the model {summary.name} ({params.path.name})", pointer, native.llama_model_free))
        self._log = log
        self._summary = summary
        if native.llama_model_has_encoder(pointer) or not native.llama_model_has_decoder(pointer):
            self.close()
            raise UnsupportedOperation(f"{params.path} has an encoder beside its decoder; such models cannot be run")
        try:
            self._adapters = LoraAdapters(pointer, params.path, params.adapters, log)
        except BaseException:
            self.close()
            raise
        self._read_facts(pointer, params)

    def _read_facts(self, pointer: int, params: ModelParams) -> None:
        self._vocabulary = NativeVocabulary(self._resource, self._log)
        self._links = LinkMaker(self._resource, self._vocabulary.n_tokens)
        self._description = _text(lambda buffer, size: native.llama_model_desc(pointer, buffer, size))
        self._metadata = MappingProxyType(_read_metadata(pointer))
        self._n_ctx_train = int(native.llama_model_n_ctx_train(pointer))
        self._n_embd = int(native.llama_model_n_embd(pointer))
        self._n_params = int(native.llama_model_n_params(pointer))
        self._n_weight_bytes = int(native.llama_model_size(pointer))
        self._facts = ModelFacts(
            name=self._resource.name,
            n_vocab=self._vocabulary.n_tokens,
            n_embd=self._n_embd,
            n_swa=int(native.llama_model_n_swa(pointer)),
            n_ctx_short_rope=self._summary.n_ctx_short_rope,
            is_recurrent=bool(native.llama_model_is_recurrent(pointer) or native.llama_model_is_hybrid(pointer)),
            kv_shape=self._summary.kv_shape,
            on_gpu=params.n_gpu_layers != 0 and bool(native.llama_supports_gpu_offload()),
            fingerprint=state.fingerprint(
                (*self._metadata.items(), self._n_params, self._n_weight_bytes, *map(str, params.adapters))
            ),
        )

    @property
    def vocabulary(self) -> NativeVocabulary:
        return self._vocabulary

    @property
    def description(self) -> str:
        return self._description

    @property
    def metadata(self) -> Mapping[str, str]:
        return self._metadata

    @property
    def summary(self) -> GgufSummary:
        """What the file said before it was loaded."""
        return self._summary

    @property
    def chat_template(self) -> str | None:
        # From the file: llama.cpp's own function answers with a built-in template's name for some models.
        return self._summary.chat_template

    @property
    def n_ctx_train(self) -> int:
        return self._n_ctx_train

    @property
    def n_embd(self) -> int:
        return self._n_embd

    @property
    def n_params(self) -> int:
        return self._n_params

    @property
    def n_weight_bytes(self) -> int:
        return self._n_weight_bytes

    @property
    def can_generate(self) -> bool:
        return not self._summary.is_encoder

    def kv_bytes_per_token(self, cache_type_k: str, cache_type_v: str) -> int:
        """Raises ``InvalidArgument`` for a name that is no cache type."""
        types = cache_type(cache_type_k, "cache_type_k"), cache_type(cache_type_v, "cache_type_v")
        return self._facts.kv_shape.bytes_per_token(*types) if self.can_generate else 0

    def choose_attention(self, params: ContextParams, layouts: Sequence[KvLayout]) -> AttentionChoice:
        facts = self._facts
        n_cells_unified_max = 0 if facts.is_recurrent else facts.n_ctx_short_rope or _MAX_INT32
        return attention_choice.choose(
            attention_choice.AttentionFacts(
                architecture=self._summary.architecture,
                kv_shape=facts.kv_shape,
                n_swa=facts.n_swa,
                n_params=self._n_params,
                n_weight_bytes=self._n_weight_bytes,
                on_gpu=facts.on_gpu,
                n_sequences_unified_max=int(native.llama_max_parallel_sequences()) - N_SPARE_SEQUENCES,
                n_cells_unified_max=n_cells_unified_max,
            ),
            params,
            layouts,
            attention_choice.ProbeEnvironment(
                override=os.environ.get(attention_choice.OVERRIDE),
                cpu_name=amx_probe.read_cpu().name,
                library_hash=lambda: amx_probe.hash_files(library_files()),
                cache_path=amx_probe.default_cache_path(file_name="attention.json"),
                measure=self._measure_attention,
            ),
        )

    def _measure_attention(
        self,
        work: attention_probe.AttentionWork,
        options: Sequence[attention_probe.AttentionOption],
        budget_s: float,
    ) -> attention_probe.Samples:
        def load(path: Path) -> NativeModel:
            return NativeModel(ModelParams(path), self._log, use_extra_buffers=False)

        return attention_probe.measure(work, options, load, time.perf_counter, budget_s)

    @property
    def links(self) -> LinkMaker:
        """What sampler chains are made with, for those who compare with llama.cpp's own."""
        return self._links

    def create_context(self, params: ContextParams) -> NativeContext:
        with self._native():
            facts = self._facts
            if params.adapter_scales:  # cells computed with other weights are not this context's
                facts = replace(facts, fingerprint=state.fingerprint((facts.fingerprint, *params.adapter_scales)))
            context = NativeContext(self._resource, facts, params, self._log)
        try:
            with context.pointer() as pointer:
                self._adapters.set_scales(pointer, params.adapter_scales)
        except BaseException:
            context.close()
            raise
        return context

    def create_embedding_context(self, params: ContextParams) -> NativeEmbeddingContext:
        with self._native():
            return NativeEmbeddingContext(self._resource, self._facts, self._summary, params, self._log)

    def create_sampler(self, stages: Sequence[SamplerStage]) -> TwoStepSampler:
        with self._native():
            return open_sampler(self._links, stages)


def _load(params: ModelParams, log: LogBridge, *, use_extra_buffers: bool, progress: ProgressCallback | None) -> int:
    """``llama_model_load_from_file`` with everything that may go wrong in it. Returns the native pointer."""
    native_params = _native_params(params, use_extra_buffers=use_extra_buffers)
    watcher = _ProgressWatcher(progress)
    native_params.progress_callback = watcher.callback
    pointer = None
    try:
        with log.collector() as collector:
            pointer = native.llama_model_load_from_file(os.fsencode(params.path), native_params)
    except BaseException as error:  # a signal arrived in the log callback; what was loaded is freed below
        watcher.error = watcher.error or error
    if watcher.error is not None:
        if pointer:
            native.llama_model_free(pointer)
        raise watcher.error
    if pointer:
        return int(pointer)
    if watcher.cancelled:
        raise Cancelled(f"loading {params.path} was cancelled")
    raise InvalidArgument(f"llama.cpp could not load {params.path}: {collector.reason()}")


class _ProgressWatcher:
    """llama.cpp's progress callback. Kept even when nobody asks for progress: it is where Ctrl-C stops a load."""

    def __init__(self, progress: ProgressCallback | None) -> None:
        self._progress = progress
        self.error: BaseException | None = None
        self.cancelled = False
        self.callback = native.llama_progress_callback(self._on_progress)

    def _on_progress(self, fraction: float, _user_data: object) -> bool:
        try:
            # Only False cancels: a callback that draws, and returns nothing, must not.
            go_on = self._progress is None or self._progress(fraction) is not False
        except BaseException as error:  # KeyboardInterrupt too: it may not pass through C, and is raised after the call
            self.error = error
            return False
        self.cancelled = self.cancelled or not go_on
        return go_on


def _native_params(params: ModelParams, *, use_extra_buffers: bool) -> Any:
    n_devices = int(native.llama_max_devices())
    if not 0 <= params.n_gpu_layers <= _MAX_INT32:
        raise InvalidArgument(f"n_gpu_layers is {params.n_gpu_layers}; it must be 0 or more")
    if len(params.tensor_split) > n_devices:
        raise InvalidArgument(
            f"tensor_split has {len(params.tensor_split)} entries; this build knows {n_devices} devices"
        )
    if params.split_mode not in _SPLIT_MODES:
        raise InvalidArgument(f"split_mode is {params.split_mode!r}; it must be one of {', '.join(_SPLIT_MODES)}")
    result = native.llama_model_default_params()
    result.n_gpu_layers = params.n_gpu_layers
    result.main_gpu = params.main_gpu
    result.split_mode = int(getattr(native, _SPLIT_MODES[params.split_mode]))
    if params.tensor_split:
        # The array is referenced by the struct, so it lives as long; llama.cpp copies it while it loads.
        result.tensor_split = (ctypes.c_float * n_devices)(*params.tensor_split)
    result.load_mode = _load_mode(params)
    result.check_tensors = params.check_tensors
    result.use_extra_bufts = use_extra_buffers
    return result


def _load_mode(params: ModelParams) -> int:
    if params.use_mmap:
        return int(native.LLAMA_LOAD_MODE_MMAP_MLOCK if params.use_mlock else native.LLAMA_LOAD_MODE_MMAP)
    return int(native.LLAMA_LOAD_MODE_MLOCK if params.use_mlock else native.LLAMA_LOAD_MODE_NONE)


def _read_metadata(pointer: int) -> dict[str, str]:
    def key(index: int) -> str:
        return _text(lambda buffer, size: native.llama_model_meta_key_by_index(pointer, index, buffer, size))

    def value(index: int) -> str:
        return _text(lambda buffer, size: native.llama_model_meta_val_str_by_index(pointer, index, buffer, size))

    with_keys = range(int(native.llama_model_meta_count(pointer)))
    return {key(index): value(index) for index in with_keys}


def _text(write: Callable[[Any, int], int]) -> str:
    """Text from a function of snprintf's kind: it returns the length that the whole would have."""
    size = 256
    for _attempt in range(2):
        buffer = ctypes.create_string_buffer(size)
        n = int(write(buffer, size))
        if n < size:
            break
        size = n + 1
    return buffer.value.decode("utf-8", "replace")
