"""From ``ContextParams`` to llama.cpp's struct, with every check that llama.cpp would answer with an abort."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from gguf.constants import GGMLQuantizationType

from wasi_nn_backend.errors import InvalidArgument
from wasi_nn_backend.llama.bindings import native
from wasi_nn_backend.llama.host_memory import available_bytes
from wasi_nn_backend.llama.interface import ContextParams
from wasi_nn_backend.llama.kv_shape import (
    N_CELLS_BLOCK,
    KvShape,
    cache_type,
    check_v_is_readable,
    is_quantised,
    n_cells_rounded,
    round_up_n_ctx,
)
from wasi_nn_backend.llama.shared_cells import N_SPARE_SEQUENCES

__all__ = ["MAX_THREADS", "ModelFacts", "cuts_single_queries", "rotation", "to_native"]

_MAX_CELLS = 2**31 - N_CELLS_BLOCK  # positions and cell indices are int32
_MAX_BATCH = 2**20
_CUT_TYPES = (GGMLQuantizationType.F32, GGMLQuantizationType.F16)
MAX_THREADS = 512  # GGML_MAX_N_THREADS: ggml aborts above
_ROPE_FIELDS = (
    "rope_scaling_type",
    "rope_freq_base",
    "rope_freq_scale",
    "yarn_ext_factor",
    "yarn_attn_factor",
    "yarn_beta_fast",
    "yarn_beta_slow",
    "yarn_orig_ctx",
)
#: Bookkeeping of one cell beside keys and values (position, shift, a bit for each of 256 sequences, ordered sets).
_CELL_BYTES = 128


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a context has to know of its model.

    ``n_ctx_short_rope`` is the window up to which it rotates with one set of factors, and beyond it with another; None
    for the models that have one set. ``is_recurrent``: it has state beside its cells (also where only in some layers).
    """

    name: str
    n_vocab: int
    n_embd: int
    n_swa: int
    n_ctx_short_rope: int | None
    is_recurrent: bool
    kv_shape: KvShape
    on_gpu: bool
    fingerprint: bytes


def to_native(params: ContextParams, facts: ModelFacts) -> Any:
    """A filled ``llama_context_params`` (callbacks unset). Raises ``InvalidArgument`` that names the key to change."""
    _check_ranges(params)
    _check_cells(params, facts)
    type_k, type_v = cache_type(params.cache_type_k, "cache_type_k"), cache_type(params.cache_type_v, "cache_type_v")
    flash_attention = _flash_attention(params, facts)
    is_on = flash_attention == native.LLAMA_FLASH_ATTN_TYPE_ENABLED
    check_v_is_readable(params.cache_type_v, has_flash_attention=is_on)
    _check_memory(params, facts, flash_attention)
    result = native.llama_context_default_params()
    result.n_ctx = n_cells_rounded(params)
    result.n_seq_max = params.n_sequences
    result.n_batch = params.n_batch
    result.n_ubatch = min(params.n_ubatch, params.n_batch)
    result.n_threads = result.n_threads_batch = params.n_threads
    result.type_k, result.type_v = int(type_k), int(type_v)
    result.flash_attn_type = flash_attention
    result.offload_kqv = params.offload_kqv
    result.kv_unified = params.kv_layout == "unified"
    # A ring of only the sliding window's size could neither be cut at its tail nor reused from a shared prefix.
    result.swa_full = True
    result.no_perf = True
    result.embeddings = False
    _set_rope(result, params)
    return result


def _set_rope(result: Any, params: ContextParams) -> None:
    result.rope_scaling_type = params.rope_scaling_type
    result.rope_freq_base = max(params.rope_freq_base, 0.0)
    result.rope_freq_scale = max(params.rope_freq_scale, 0.0)
    result.yarn_ext_factor = params.yarn_ext_factor
    result.yarn_attn_factor = params.yarn_attn_factor
    result.yarn_beta_fast = params.yarn_beta_fast
    result.yarn_beta_slow = params.yarn_beta_slow
    result.yarn_orig_ctx = max(params.yarn_orig_ctx, 0)


def rotation(native_params: Any, facts: ModelFacts, n_ctx_seq: int) -> tuple[str, ...]:
    """What of a context's rotation of keys is not the model's own: cells that were rotated otherwise are of no use."""
    own = native.llama_context_default_params()
    changed = [name for name in _ROPE_FIELDS if getattr(native_params, name) != getattr(own, name)]
    parts = [f"{name}={getattr(native_params, name)}" for name in changed]
    if facts.n_ctx_short_rope is not None and n_ctx_seq > facts.n_ctx_short_rope:
        parts.append("long factors")
    return tuple(parts)


def cuts_single_queries(native_params: Any, n_cells_seen: int) -> bool:
    """Whether the bits of a token that is alone in its ubatch depend on the number of threads.

    As in ``ggml_compute_forward_flash_attn_ext_f16``, where a single query over 512 cells or more is cut into one piece
    a thread, for keys and values of one unquantised type: at 1,500 tokens that moved logits by up to 0.7.
    """
    return (
        native_params.flash_attn_type != native.LLAMA_FLASH_ATTN_TYPE_DISABLED
        and native_params.type_k == native_params.type_v
        and native_params.type_k in _CUT_TYPES
        and n_cells_seen > N_CELLS_BLOCK
    )


def _flash_attention(params: ContextParams, facts: ModelFacts) -> int:
    """``auto`` on a CPU means off: who wants to know better asks ``choose_attention`` before.

    A quantised V cache works with flash attention only, so there ``auto`` means on.
    """
    if params.flash_attention == "on":
        return int(native.LLAMA_FLASH_ATTN_TYPE_ENABLED)
    if params.flash_attention == "off":
        return int(native.LLAMA_FLASH_ATTN_TYPE_DISABLED)
    if is_quantised(cache_type(params.cache_type_v, "cache_type_v")):
        return int(native.LLAMA_FLASH_ATTN_TYPE_ENABLED)
    return int(native.LLAMA_FLASH_ATTN_TYPE_AUTO if facts.on_gpu else native.LLAMA_FLASH_ATTN_TYPE_DISABLED)


def _check_ranges(params: ContextParams) -> None:
    n_sequences_max = int(native.llama_max_parallel_sequences())
    ranges = {
        "n_sequences": (params.n_sequences, 1, n_sequences_max),
        "n_ctx": (params.n_ctx, 1, _MAX_CELLS // max(1, params.n_sequences)),
        "n_batch": (params.n_batch, 1, _MAX_BATCH),
        "n_ubatch": (params.n_ubatch, 1, _MAX_BATCH),
        "n_threads": (params.n_threads, 1, MAX_THREADS),
        "rope_scaling_type": (params.rope_scaling_type, -1, 3),
        "yarn_orig_ctx": (params.yarn_orig_ctx, -1, 2**31 - 1),
    }
    for key, (value, least, most) in ranges.items():
        if not least <= value <= most:
            raise InvalidArgument(f"{key} is {value}; it must be from {least} to {most}")
    for key in ("rope_freq_base", "rope_freq_scale", "yarn_ext_factor", "yarn_attn_factor", "yarn_beta_fast"):
        if not math.isfinite(getattr(params, key)):
            raise InvalidArgument(f"{key} is {getattr(params, key)}; it must be a finite number")


def _check_cells(params: ContextParams, facts: ModelFacts) -> None:
    """What only one of the layouts can do."""
    if params.kv_layout == "streams":
        if params.n_cells not in (None, params.n_ctx * params.n_sequences):
            raise InvalidArgument(
                f"n_cells is {params.n_cells}, but streams have {params.n_ctx} cells each; leave it out, or set "
                "memory.kv_layout to unified"
            )
        return
    n_sequences_max = int(native.llama_max_parallel_sequences()) - N_SPARE_SEQUENCES
    if params.n_sequences > n_sequences_max:
        raise InvalidArgument(
            f"n_sequences is {params.n_sequences}; in the unified KV layout it must be from 1 to {n_sequences_max}: "
            "lower backend.max_concurrent or set memory.kv_layout to streams"
        )
    if not params.n_ctx <= params.n_cells_total <= _MAX_CELLS:
        raise InvalidArgument(
            f"n_cells is {params.n_cells_total}; it must be from {params.n_ctx}, one sequence's window, to {_MAX_CELLS}"
        )
    n_ctx_short = facts.n_ctx_short_rope
    if n_ctx_short is not None and params.n_ctx <= n_ctx_short < n_cells_rounded(params):
        raise InvalidArgument(
            f"{facts.name} has other rotation factors for more than {n_ctx_short} tokens, and llama.cpp would take "
            f"them for {n_cells_rounded(params)} cells that several sequences share: set memory.kv_layout to streams"
        )


def _check_memory(params: ContextParams, facts: ModelFacts, flash_attention: int) -> None:
    """On a GPU llama.cpp itself finds out, and returns an error; the machine's own memory it takes without asking."""
    n_available_bytes = None if facts.on_gpu else available_bytes()
    if n_available_bytes is None:
        return
    n_cells = n_cells_rounded(params)
    n_ctx = n_cells if params.kv_layout == "unified" else round_up_n_ctx(params.n_ctx)  # what one token attends over
    type_k, type_v = cache_type(params.cache_type_k, "cache_type_k"), cache_type(params.cache_type_v, "cache_type_v")
    kv_bytes = n_cells * (facts.kv_shape.bytes_per_token(type_k, type_v) + _CELL_BYTES)
    # Measured: the compute buffer is the larger of one ubatch's logits and its attention mask plus, without flash
    # attention, its scores over a whole window.
    n_ubatch = min(params.n_ubatch, params.n_batch, n_cells)
    n_heads = 0 if flash_attention == native.LLAMA_FLASH_ATTN_TYPE_ENABLED else facts.kv_shape.n_heads
    compute_bytes = 4 * n_ubatch * (max(facts.n_vocab, n_ctx * (n_heads + 1)) + 16 * facts.n_embd)
    if kv_bytes + compute_bytes > n_available_bytes:
        raise InvalidArgument(
            f"a context of {params.n_sequences} x {params.n_ctx} tokens of {facts.name} needs {_gib(kv_bytes)} of "
            f"KV cache and {_gib(compute_bytes)} to compute, and {_gib(n_available_bytes)} are free; lower n_ctx, the "
            "number of sequences or n_ubatch, or choose a smaller cache_type_k and cache_type_v"
        )


def _gib(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:.1f} GiB"
