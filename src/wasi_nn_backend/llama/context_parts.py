"""What contexts for text and for embeddings are both made of: opening, the arrays of a batch, the abort flag."""

from __future__ import annotations

import ctypes
from typing import Any

from wasi_nn_backend.errors import InvalidArgument
from wasi_nn_backend.llama.bindings import libc, native
from wasi_nn_backend.llama.interface import ContextParams, DecodeBatch
from wasi_nn_backend.llama.log_bridge import LogBridge
from wasi_nn_backend.llama.owner import Hold, Resource

__all__ = ["AbortFlag", "BatchArrays", "open_context"]


class AbortFlag:
    """How another thread stops a decode.

    The abort callback is the C library's strlen over a buffer that holds "" or "\\1": llama.cpp asks before every node
    of the graph, some thousand times a step, and a Python callback would take the GIL each time, from whatever thread.
    One byte is written to ask for the abort; no lock is needed.
    """

    def __init__(self, native_params: Any) -> None:
        """Attach to a ``llama_context_params``. The flag has to live as long as the context."""
        self._flag = (ctypes.c_uint8 * 2)()
        self._callback = ctypes.cast(libc.strlen, native.ggml_abort_callback)
        native_params.abort_callback = self._callback
        native_params.abort_callback_data = ctypes.cast(self._flag, ctypes.c_void_p)

    def raise_it(self) -> None:
        self._flag[0] = 1

    def lower(self) -> None:
        self._flag[0] = 0

    def detach(self, pointer: int) -> None:
        native.llama_set_abort_callback(pointer, native.ggml_abort_callback(), None)

    def attach(self, pointer: int) -> None:
        native.llama_set_abort_callback(pointer, self._callback, ctypes.addressof(self._flag))


class BatchArrays:
    """The arrays behind a ``llama_batch``, allocated once and filled by slice assignment, which loops in C."""

    def __init__(self, n_batch: int) -> None:
        self._tokens: Any = (ctypes.c_int32 * n_batch)()
        self._positions: Any = (ctypes.c_int32 * n_batch)()
        self._sequence_ids: Any = (ctypes.c_int32 * n_batch)()
        self._wants_logits: Any = (ctypes.c_int8 * n_batch)()
        # Every token belongs to exactly one sequence: the counts are all 1, the pointers run along the ids.
        self._n_ids = (ctypes.c_int32 * n_batch)(*([1] * n_batch))
        base, step = ctypes.addressof(self._sequence_ids), ctypes.sizeof(ctypes.c_int32)
        pointer = ctypes.POINTER(ctypes.c_int32)
        addresses = (ctypes.c_void_p * (n_batch + 1))(*range(base, base + n_batch * step, step), None)
        self._id_pointers = ctypes.cast(addresses, ctypes.POINTER(pointer))
        self._batch = native.llama_batch(
            token=self._tokens,
            pos=self._positions,
            n_seq_id=self._n_ids,
            seq_id=self._id_pointers,
            logits=self._wants_logits,
        )

    def fill(self, batch: DecodeBatch) -> Any:
        n = len(batch)
        self._tokens[:n] = batch.tokens
        self._positions[:n] = batch.positions
        self._sequence_ids[:n] = batch.sequence_ids
        self._wants_logits[:n] = batch.wants_logits
        self._batch.n_tokens = n
        return self._batch


def open_context(model: Resource, name: str, params: ContextParams, native_params: Any, log: LogBridge) -> int:
    """``llama_init_from_model``. Raises ``InvalidArgument`` with llama.cpp's reason."""
    pointer = None
    # llama.cpp takes all cells of the unified layout for one window, and warns that it is longer than in training.
    collector = log.collector(quiet=params.kv_layout == "unified")
    try:
        with Hold(model) as model_pointer, collector:
            pointer = native.llama_init_from_model(model_pointer, native_params)
    except BaseException:  # a signal arrived in the log callback
        if pointer:
            native.llama_free(pointer)
        raise
    if not pointer:
        raise InvalidArgument(
            f"llama.cpp refused a context of {params.n_sequences} x {params.n_ctx} tokens for {name}: "
            f"{collector.reason()}"
        )
    return int(pointer)
