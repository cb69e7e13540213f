"""How much memory a model and a configuration will need, before anything is loaded.

All numbers come from the model file's header and the configuration, by the same functions that size the real context
(``engine/sizing.py``). What llama.cpp itself takes beside weights and cells was measured; the constants say how.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from wasi_nn_backend.config import Settings
from wasi_nn_backend.engine.sizing import context_params, n_usable_cores, wanted_context
from wasi_nn_backend.errors import InvalidArgument, UnsupportedOperation
from wasi_nn_backend.llama.gguf_file import GgufSummary, read_gguf_summary
from wasi_nn_backend.llama.interface import AttentionChoice, ContextParams
from wasi_nn_backend.llama.kv_shape import (
    N_CELLS_BLOCK,
    cache_type,
    check_v_is_readable,
    n_cells_rounded,
    round_up_n_ctx,
)

__all__ = ["MemoryNeed", "Plan", "SessionCount", "Suggestion", "make_plan"]

_MIB = 1 << 20
#: Resident memory of a process with this package, numpy, wasmtime and llama.cpp loaded, and no model.
_N_PROGRAM_BYTES = 70 * _MIB
#: llama.cpp's tables for one token of the vocabulary (its text, its score, two maps): 262,144 tokens take 67 MiB.
_N_VOCABULARY_BYTES_PER_TOKEN = 268
#: Rows of n_embd and of n_ff values that a layer's graph keeps for each token of a micro batch.
_N_EMBD_ROWS = 6
_N_FF_ROWS = 3
#: A part of the machine's memory that a suggestion leaves to others.
_SUGGESTED_SHARE = 0.9
_N_CTX_SUGGESTED_MAX = 8192
_N_CTX_SUGGESTED_MIN = 2048
_SESSION_LENGTHS = (512, 2048, 8192)


@dataclass(frozen=True, slots=True)
class MemoryNeed:
    """Bytes of resident memory, each part on its own. ``cells`` are reserved when the model is loaded, whether sessions
    use them or not; ``computing`` is what batches of full windows take."""

    weights: int
    cells: int
    computing: int
    vocabulary: int
    program: int

    @property
    def total(self) -> int:
        return self.weights + self.cells + self.computing + self.vocabulary + self.program


@dataclass(frozen=True, slots=True)
class SessionCount:
    """How many sessions of ``n_tokens`` the memory holds: those in cells, and idle ones in host memory."""

    n_tokens: int
    n_sessions: int


@dataclass(frozen=True, slots=True)
class Suggestion:
    """Values for the keys of the same names. ``threads`` is what ``auto`` may choose up to."""

    n_ctx: int
    max_concurrent: int
    max_memory_mb: int
    max_cache_tokens: int
    batch_size: int
    threads: int


@dataclass(frozen=True, slots=True)
class Plan:
    """``n_bytes_available`` is what the need is held against. ``suggestion`` is None where not even one short window
    fits. ``n_sessions_at_once`` compute together, each in a window of ``n_ctx`` tokens."""

    summary: GgufSummary
    n_ctx: int
    n_sessions_at_once: int
    n_kv_bytes_per_token: int
    need: MemoryNeed
    n_bytes_available: int
    sessions: Sequence[SessionCount]
    suggestion: Suggestion | None

    @property
    def fits(self) -> bool:
        return self.need.total <= self.n_bytes_available


class _FileNumbers:
    """The header's numbers as ``engine/sizing.py`` wants them."""

    def __init__(self, summary: GgufSummary) -> None:
        self._summary = summary

    @property
    def n_ctx_train(self) -> int:
        return self._summary.n_ctx_train

    def kv_bytes_per_token(self, cache_type_k: str, cache_type_v: str) -> int:
        types = cache_type(cache_type_k, "cache_type_k"), cache_type(cache_type_v, "cache_type_v")
        return self._summary.kv_shape.bytes_per_token(*types)


def make_plan(path: Path, settings: Settings, n_bytes_available: int) -> Plan:
    """Read the model file's header and plan for ``settings``.

    Weights count once, as they are in the file: where llama.cpp keeps a second, rearranged copy (AMX, Q4_0) up to as
    much comes on top, and layers on a GPU are in its memory instead.

    Raises ``ModelNotFound`` and ``InvalidArgument`` for a file that is no whole model, ``UnsupportedOperation`` for one
    that only gives embeddings, and ``InvalidArgument`` when not one window fits into ``memory.max_memory_mb``.
    """
    if n_bytes_available <= 0:
        raise InvalidArgument(f"{n_bytes_available} bytes of memory are nothing to plan with; give what there is")
    summary = read_gguf_summary(path)
    if summary.is_encoder:
        raise UnsupportedOperation(f"{path} only gives embeddings: it keeps no sessions, so there is nothing to plan")
    numbers = _FileNumbers(summary)
    # Streams without flash attention, which needs the most: what the machine will choose is known when it has measured.
    flash_attention = settings.model.flash_attention
    check_v_is_readable(settings.model.cache_type_v, has_flash_attention=flash_attention != "off")
    choice = AttentionChoice("streams", "on" if flash_attention == "on" else "off", "a plan")
    params = context_params(wanted_context(numbers, settings), choice)
    cell_bytes = numbers.kv_bytes_per_token(params.cache_type_k, params.cache_type_v)
    need = _need(summary, params, cell_bytes)
    n_bytes_for_sessions = max(0, n_bytes_available - (need.total - need.cells))
    if settings.memory.max_memory_mb:
        limit = int(settings.memory.max_memory_mb * _MIB * settings.memory.memory_pressure_threshold)
        n_bytes_for_sessions = min(n_bytes_for_sessions, max(limit, need.cells))
    lengths = sorted({*(n for n in _SESSION_LENGTHS if n < params.n_ctx), params.n_ctx})
    return Plan(
        summary=summary,
        n_ctx=params.n_ctx,
        n_sessions_at_once=params.n_sequences,
        n_kv_bytes_per_token=cell_bytes,
        need=need,
        n_bytes_available=n_bytes_available,
        sessions=[SessionCount(n, n_bytes_for_sessions // max(1, n * cell_bytes)) for n in lengths],
        suggestion=_suggest(summary, settings, cell_bytes, int(n_bytes_available * _SUGGESTED_SHARE)),
    )


def _need(summary: GgufSummary, params: ContextParams, cell_bytes: int) -> MemoryNeed:
    return MemoryNeed(
        weights=summary.n_file_bytes,
        cells=n_cells_rounded(params) * cell_bytes,
        computing=_computing_bytes(summary, params, round_up_n_ctx(params.n_ctx)),
        vocabulary=summary.n_vocab * _N_VOCABULARY_BYTES_PER_TOKEN,
        program=_N_PROGRAM_BYTES,
    )


def _computing_bytes(summary: GgufSummary, params: ContextParams, n_ctx: int) -> int:
    """A micro batch's rows in one layer, its attention scores over a full window and their mask, and the logits of all
    sequences, which are in the graph and in llama.cpp's own buffer."""
    n_ubatch = min(params.n_ubatch, params.n_batch)
    n_ff = summary.values.get(f"{summary.architecture}.feed_forward_length", 4 * summary.n_embd)
    n_ff_max = max(n_ff) if isinstance(n_ff, tuple) and n_ff else n_ff
    n_row_values = _N_EMBD_ROWS * summary.n_embd + _N_FF_ROWS * (n_ff_max if isinstance(n_ff_max, int) else 0)
    n_score_values = n_ctx * (1 + (summary.n_heads if params.flash_attention != "on" else 0))
    return 4 * (n_ubatch * (n_row_values + n_score_values) + 2 * params.n_sequences * summary.n_vocab)


def _suggest(summary: GgufSummary, settings: Settings, cell_bytes: int, n_bytes: int) -> Suggestion | None:
    """The longest window up to the model's own, or 8,192 tokens, for as many sessions at once as are configured, in a
    half of the memory: the other is for idle sessions. Sessions at once go down to keep a window of 2,048 tokens."""
    section = settings.model
    wanted = section.n_ctx if "n_ctx" in section.model_fields_set and section.n_ctx else _N_CTX_SUGGESTED_MAX
    n_ctx_max = min(wanted, summary.n_ctx_train or wanted)
    for n_sequences in range(settings.backend.max_concurrent, 0, -1):
        params = ContextParams(
            n_ctx=n_ctx_max, n_sequences=n_sequences, n_batch=section.batch_size, n_ubatch=section.ubatch_size
        )
        need = _need(summary, params, cell_bytes)
        n_bytes_for_sessions = n_bytes - (need.total - need.cells)
        n_ctx = min(n_ctx_max, n_bytes_for_sessions // 2 // max(1, n_sequences * cell_bytes))
        if n_ctx >= min(n_ctx_max, _N_CTX_SUGGESTED_MIN) or (n_sequences == 1 and n_ctx >= N_CELLS_BLOCK):
            return Suggestion(
                n_ctx=n_ctx if n_ctx == n_ctx_max else n_ctx // N_CELLS_BLOCK * N_CELLS_BLOCK,
                max_concurrent=n_sequences,
                max_memory_mb=max(64, n_bytes_for_sessions // _MIB),
                max_cache_tokens=int(n_bytes_for_sessions // max(1, cell_bytes)),
                batch_size=section.batch_size,
                threads=n_usable_cores(),
            )
    return None
