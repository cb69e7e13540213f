"""How large a llama context to create: the numbers between the configuration and llama.cpp."""

from __future__ import annotations

import os
from collections.abc import Hashable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from wasi_nn_backend.config import Settings
from wasi_nn_backend.config.model import ModelSettings
from wasi_nn_backend.errors import InvalidArgument
from wasi_nn_backend.kvcache import PoolLimits
from wasi_nn_backend.llama.interface import AttentionChoice, ContextParams, KvLayout, ModelParams
from wasi_nn_backend.llama.kv_shape import N_CELLS_BLOCK

__all__ = [
    "N_CELLS_RESERVED",
    "ModelNumbers",
    "adapter_paths",
    "adapter_scales",
    "context_params",
    "embedder_key",
    "embedding_context",
    "engine_key",
    "kv_layouts",
    "model_params",
    "n_threads_max",
    "n_tokens_step_max",
    "n_usable_cores",
    "pool_limits",
    "resolved_n_ctx",
    "same_engine",
    "wanted_context",
]

#: A prompt must leave this many cells of its window, as WasmEdge has it: guests rely on the border.
N_CELLS_RESERVED = 4

_MIB = 1 << 20
#: Texts in one batch of embeddings. More would cost memory (llama.cpp keeps a row of logits for each) and save no time:
#: from 64 tokens on, longer batches are no faster.
_N_TEXTS_PER_BATCH = 32


class ModelNumbers(Protocol):
    """What the sizes depend on: a loaded model has it, and so has the header of its file."""

    @property
    def n_ctx_train(self) -> int: ...

    def kv_bytes_per_token(self, cache_type_k: str, cache_type_v: str) -> int: ...


def n_usable_cores() -> int:
    """Cores that this process may run on, which in a container is fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def n_threads_max(settings: Settings) -> int:
    """How many threads the engine may choose from for each decode; 1 where the configuration has fixed the number."""
    return n_usable_cores() if settings.model.threads is None else 1


def engine_key(settings: Settings) -> Hashable:
    """What in the settings makes an engine: equal keys, for one file, are served by one."""
    memory, backend = settings.memory, settings.backend
    return (
        settings.model,
        backend.max_concurrent,
        backend.queue_size,
        backend.queue_warning_threshold,
        backend.queue_reject_threshold,
        backend.priority_scheduling_enabled,
        backend.fair_scheduling_enabled,
        backend.auto_queue_cleanup,
        settings.performance,
        memory.kv_layout,
        memory.max_memory_mb,
        memory.memory_pressure_threshold,
        memory.max_cache_tokens,
        memory.cache_strategy,
        memory.cache_deletion_strategy,
        memory.enable_partial_cache_deletion,
        memory.enable_token_cache_reuse,
    )


def embedder_key(model: ModelNumbers, settings: Settings) -> Hashable:
    """What in the settings makes an embedder."""
    return settings.model.model_copy(update={"embedding": False}), resolved_n_ctx(model, settings)


def same_engine(left: Settings, right: Settings) -> bool:
    """Whether two settings, for one file, are served by one engine."""
    return left is right or engine_key(left) == engine_key(right)


def pool_limits(settings: Settings, n_kv_bytes: int) -> PoolLimits:
    """What may be kept for sessions that do not run, beside ``n_kv_bytes`` of cells in all contexts."""
    memory = settings.memory
    n_host_bytes_max = None
    if memory.max_memory_mb:
        n_host_bytes_max = max(0, int(memory.max_memory_mb * _MIB * memory.memory_pressure_threshold) - n_kv_bytes)
    return PoolLimits(
        n_host_bytes_max=n_host_bytes_max,
        n_tokens_max=memory.max_cache_tokens,
        strategy=memory.cache_strategy,
        deletion_strategy=memory.cache_deletion_strategy,
        shares_prefixes=memory.enable_token_cache_reuse,
        trims_tails=memory.enable_partial_cache_deletion,
    )


def n_tokens_step_max(settings: Settings) -> int | None:
    """The most tokens of one step; None: what the context's batch holds."""
    performance = settings.performance
    return performance.batch_size if "batch_size" in performance.model_fields_set else None


def adapter_paths(settings: Settings, adapters: Sequence[str] = ()) -> tuple[str, ...]:
    """The LoRA adapters that a model is loaded with: ``adapters``, and then those of the settings."""
    return tuple(dict.fromkeys((*adapters, *(adapter.path for adapter in settings.model.lora))))


def adapter_scales(settings: Settings, paths: Sequence[str]) -> tuple[float, ...]:
    """How the settings weigh the adapters of a model, 0 for those that they do not name."""
    scales = {adapter.path: adapter.scale for adapter in settings.model.lora}
    return tuple(scales.get(path, 0.0) for path in paths)


def model_params(path: Path, settings: Settings, adapters: Sequence[str] = ()) -> ModelParams:
    """``adapters`` are the paths of LoRA adapters (``adapter_paths``)."""
    model = settings.model
    return ModelParams(
        path=path,
        n_gpu_layers=model.n_gpu_layers,
        main_gpu=model.main_gpu,
        split_mode=model.split_mode,
        tensor_split=model.tensor_split,
        use_mmap=model.use_mmap,
        use_mlock=model.use_mlock,
        check_tensors=model.check_tensors,
        adapters=tuple(map(_expanded, adapters)),
    )


def _expanded(path: str) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise InvalidArgument(f"model.lora: {path}: {error}; write the path in full") from None


def resolved_n_ctx(model: ModelNumbers, settings: Settings) -> int:
    """One sequence's window in tokens: what was asked for, or 2048, but then not more than the model's training."""
    section = settings.model
    if section.n_ctx == 0:
        return model.n_ctx_train
    if "n_ctx" not in section.model_fields_set and model.n_ctx_train:
        return min(section.n_ctx, model.n_ctx_train)
    return section.n_ctx


def kv_layouts(settings: Settings) -> tuple[KvLayout, ...]:
    """The layouts that the configuration leaves open."""
    layout = settings.memory.kv_layout
    return ("streams", "unified") if layout == "auto" else (layout,)


def wanted_context(model: ModelNumbers, settings: Settings, n_kv_bytes_elsewhere: int = 0) -> ContextParams:
    """A context for all sequences that may run at once, with as many cells as ``memory.max_memory_mb`` reaches for.

    ``n_kv_bytes_elsewhere`` is what other contexts hold of it. Raises ``InvalidArgument`` when not one window fits.
    """
    n_ctx = resolved_n_ctx(model, settings)
    n_sequences = settings.backend.max_concurrent
    n_cells = _n_cells(model, settings, n_ctx, n_kv_bytes_elsewhere)
    # Who counts the users says so; who does not may well be the only one.
    is_counted = "max_concurrent" in settings.backend.model_fields_set
    return replace(
        _as_configured(settings.model, n_ctx),
        n_sequences=n_sequences,
        n_sequences_expected=min(n_sequences, n_cells // n_ctx) if is_counted else 1,
        n_cells=n_cells,
        # Not less than the sequences, or a full set of generations would leave prompts no room.
        n_batch=max(settings.model.batch_size, n_tokens_step_max(settings) or 1, n_sequences),
    )


def embedding_context(model: ModelNumbers, settings: Settings, n_kv_bytes_elsewhere: int = 0) -> ContextParams:
    """A context that takes one batch of texts, of all lengths up to a whole batch or a prompt's limit.

    Raises ``InvalidArgument`` when it does not fit ``memory.max_memory_mb`` beside what other contexts hold.
    """
    section, memory = settings.model, settings.memory
    n_batch = section.batch_size
    kv_bytes = n_batch * model.kv_bytes_per_token(section.cache_type_k, section.cache_type_v)
    if memory.max_memory_mb and n_kv_bytes_elsewhere + kv_bytes > memory.max_memory_mb * _MIB:
        raise InvalidArgument(
            f"embeddings in batches of {n_batch} tokens need {kv_bytes / _MIB:.0f} MiB of KV cache, other contexts "
            f"hold {n_kv_bytes_elsewhere / _MIB:.0f} MiB and memory.max_memory_mb is {memory.max_memory_mb}: lower "
            f"model.batch_size, backend.max_concurrent or model.n_ctx, unload a graph or raise the limit"
        )
    return replace(
        _as_configured(section, min(n_batch, resolved_n_ctx(model, settings) - N_CELLS_RESERVED)),
        n_sequences=min(_N_TEXTS_PER_BATCH, n_batch),
        kv_layout="unified",  # so that a batch is computed in one piece, whatever lengths its texts have
        n_cells=n_batch,
        n_batch=n_batch,
    )


def _as_configured(section: ModelSettings, n_ctx: int) -> ContextParams:
    """What all contexts of a configuration have in common."""
    return ContextParams(
        n_ctx=n_ctx,
        n_ubatch=min(section.ubatch_size, section.batch_size),
        n_threads=section.threads or n_usable_cores(),
        flash_attention=section.flash_attention,
        cache_type_k=section.cache_type_k,
        cache_type_v=section.cache_type_v,
        offload_kqv=section.offload_kqv,
        rope_scaling_type=section.rope_scaling_type,
        rope_freq_base=section.rope_freq_base,
        rope_freq_scale=section.rope_freq_scale,
        yarn_ext_factor=section.yarn_ext_factor,
        yarn_attn_factor=section.yarn_attn_factor,
        yarn_beta_fast=section.yarn_beta_fast,
        yarn_beta_slow=section.yarn_beta_slow,
        yarn_orig_ctx=section.yarn_orig_ctx,
    )


def _n_cells(model: ModelNumbers, settings: Settings, n_ctx: int, n_kv_bytes_elsewhere: int) -> int:
    """Cells for all sequences. Where they would not leave anything for host memory, they get half of what there is, or
    one window: a session that has to leave the cache and finds no room there is computed again."""
    n_cells = n_ctx * settings.backend.max_concurrent
    memory = settings.memory
    if not memory.max_memory_mb:
        return n_cells
    cell_bytes = max(1, model.kv_bytes_per_token(settings.model.cache_type_k, settings.model.cache_type_v))
    n_bytes_free = memory.max_memory_mb * _MIB - n_kv_bytes_elsewhere
    if n_bytes_free < n_ctx * cell_bytes:
        raise InvalidArgument(
            f"a context of {n_ctx} tokens needs {n_ctx * cell_bytes / _MIB:.0f} MiB of KV cache, other graphs hold "
            f"{n_kv_bytes_elsewhere / _MIB:.0f} MiB and memory.max_memory_mb is {memory.max_memory_mb}: "
            f"lower model.n_ctx, unload a graph or raise the limit"
        )
    n_bytes_kept = n_bytes_free - memory.max_memory_mb * _MIB * (1 - memory.memory_pressure_threshold)
    if n_cells * cell_bytes <= n_bytes_kept:
        return n_cells
    return max(n_ctx, int(n_bytes_kept / 2 / cell_bytes))


def context_params(wanted: ContextParams, choice: AttentionChoice) -> ContextParams:
    """The context to create. Where memory is short, streams are fewer, and unified sequences share fewer cells."""
    n_ctx, n_cells, n_sequences = wanted.n_ctx, wanted.n_cells_total, wanted.n_sequences
    chosen = replace(wanted, kv_layout=choice.kv_layout, flash_attention=choice.flash_attention)
    if choice.kv_layout == "streams":
        return replace(chosen, n_sequences=min(n_sequences, n_cells // n_ctx), n_cells=None)
    if n_cells < n_ctx * n_sequences:
        n_cells = max(n_ctx, n_cells // N_CELLS_BLOCK * N_CELLS_BLOCK)
    return replace(chosen, n_cells=n_cells)
