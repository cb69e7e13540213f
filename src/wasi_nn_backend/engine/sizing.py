"""How large a llama context to create: the numbers between the configuration and llama.cpp."""

from __future__ import annotations

import os
from collections.abc import Hashable
from pathlib import Path

from wasi_nn_backend.config import Settings
from wasi_nn_backend.errors import InvalidArgument
from wasi_nn_backend.kvcache import PoolLimits
from wasi_nn_backend.llama.interface import ContextParams, Model, ModelParams
from wasi_nn_backend.llama.kv_shape import cache_type, is_quantised

__all__ = [
    "context_params",
    "engine_key",
    "model_params",
    "n_threads_max",
    "n_usable_cores",
    "pool_limits",
    "resolved_n_ctx",
    "same_engine",
]

_MIB = 1 << 20


def n_usable_cores() -> int:
    """Cores that this process may run on, which in a container is fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def n_threads_max(settings: Settings) -> int:
    """How many threads the engine may choose from for each decode; 1 where the number must not change.

    With flash attention llama.cpp cuts a long context into one piece a thread and adds the results up: at 1,500 tokens
    another number of threads moved logits by up to 0.7, so equal seeds would no longer give equal texts. Without it,
    every number gives the same bits.
    """
    section = settings.model
    may_use_flash_attention = section.flash_attention == "on" or (
        section.flash_attention == "auto"
        and (section.n_gpu_layers > 0 or is_quantised(cache_type(section.cache_type_v, "cache_type_v")))
    )
    return 1 if section.threads is not None or may_use_flash_attention else n_usable_cores()


def engine_key(settings: Settings) -> Hashable:
    """What in the settings makes an engine: equal keys, for one file, are served by one."""
    memory = settings.memory
    return (
        settings.model,
        settings.backend,
        memory.max_memory_mb,
        memory.memory_pressure_threshold,
        memory.max_cache_tokens,
        memory.cache_strategy,
        memory.cache_deletion_strategy,
        memory.enable_partial_cache_deletion,
        memory.enable_token_cache_reuse,
    )


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


def model_params(path: Path, settings: Settings) -> ModelParams:
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
    )


def resolved_n_ctx(model: Model, settings: Settings) -> int:
    """One sequence's window in tokens: what was asked for, or 2048, but then not more than the model's training."""
    section = settings.model
    if section.n_ctx == 0:
        return model.n_ctx_train
    if "n_ctx" not in section.model_fields_set and model.n_ctx_train:
        return min(section.n_ctx, model.n_ctx_train)
    return section.n_ctx


def context_params(model: Model, settings: Settings, n_kv_bytes_elsewhere: int = 0) -> ContextParams:
    """One stream for each sequence that may run at once, as far as ``memory.max_memory_mb`` reaches.

    ``n_kv_bytes_elsewhere`` is what other contexts hold of it. Raises ``InvalidArgument`` when not one stream fits.
    """
    section = settings.model
    n_ctx = resolved_n_ctx(model, settings)
    kv_bytes_per_stream = n_ctx * model.kv_bytes_per_token(section.cache_type_k, section.cache_type_v)
    n_sequences = settings.backend.max_concurrent
    if settings.memory.max_memory_mb:
        n_bytes_free = settings.memory.max_memory_mb * _MIB - n_kv_bytes_elsewhere
        n_sequences = min(n_sequences, n_bytes_free // max(1, kv_bytes_per_stream))
    if n_sequences < 1:
        raise InvalidArgument(
            f"a context of {n_ctx} tokens needs {kv_bytes_per_stream / _MIB:.0f} MiB of KV cache, other graphs hold "
            f"{n_kv_bytes_elsewhere / _MIB:.0f} MiB and memory.max_memory_mb is {settings.memory.max_memory_mb}: "
            f"lower model.n_ctx, unload a graph or raise the limit"
        )
    return ContextParams(
        n_ctx=n_ctx,
        n_sequences=n_sequences,
        n_batch=max(section.batch_size, n_sequences),  # or a full set of generations would leave prompts no room
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
