"""One llama context: the KV memory of some sequences and the compute graph over it."""

from __future__ import annotations

import ctypes
from itertools import compress, count
from typing import Any

import numpy as np
import numpy.typing as npt

from wasi_nn_backend.errors import InvalidArgument, RuntimeFailure, UnsupportedOperation
from wasi_nn_backend.llama import state
from wasi_nn_backend.llama.bindings import logits_address, native
from wasi_nn_backend.llama.candidates import CandidateFinder, Candidates
from wasi_nn_backend.llama.context_params import MAX_THREADS, ModelFacts, cuts_single_queries, rotation, to_native
from wasi_nn_backend.llama.context_parts import AbortFlag, BatchArrays, open_context
from wasi_nn_backend.llama.interface import ContextParams, DecodeBatch, DecodeStatus
from wasi_nn_backend.llama.log_bridge import LogBridge
from wasi_nn_backend.llama.owner import Hold, Owner, Resource
from wasi_nn_backend.llama.shared_cells import SharedCells

__all__ = ["NativeContext"]

_MAX_POSITION = 2**31 - 1


class NativeContext(Owner):
    """``Context`` over llama.cpp. Only ``request_abort`` and ``close`` may be called by other threads than the owner's.

    ``decode`` returns when the numbers are there: llama.cpp computes on a CPU in the calling thread.
    """

    def __init__(self, model: Resource, facts: ModelFacts, params: ContextParams, log: LogBridge) -> None:
        native_params = to_native(params, facts)
        self._abort = AbortFlag(native_params)
        pointer = open_context(model, facts.name, params, native_params, log)
        super().__init__(Resource(f"a context of {facts.name}", pointer, native.llama_free, parent=model))
        self._memory = native.llama_get_memory(pointer)
        if not self._memory:
            self.close()
            raise UnsupportedOperation(f"{facts.name} has no KV memory: it is no model that continues a text")
        is_unified = params.kv_layout == "unified"
        n_streams = 1 if is_unified else params.n_sequences
        self._fingerprint = state.fingerprint(
            (
                facts.fingerprint,
                params.cache_type_k,
                params.cache_type_v,
                n_streams,
                *rotation(native_params, facts, int(native.llama_n_ctx_seq(pointer))),
            )
        )
        self._n_vocab = facts.n_vocab
        self._n_swa = facts.n_swa
        self._is_recurrent = facts.is_recurrent
        self._n_sequences = params.n_sequences
        self._n_cells = int(native.llama_n_ctx(pointer))
        # llama.cpp takes all cells of the unified layout for the window of each sequence.
        self._n_ctx = params.n_ctx if is_unified else int(native.llama_n_ctx_seq(pointer))
        n_cells_seen = self._n_cells if is_unified else self._n_ctx
        self._shared_cells = SharedCells(params.n_sequences) if is_unified else None
        self._n_threads_single = params.n_threads if cuts_single_queries(native_params, n_cells_seen) else None
        self._n_batch = int(native.llama_n_batch(pointer))
        self._arrays = BatchArrays(self._n_batch)
        self._decode_log = log.collector(quiet=True)
        self._shift_is_pending = False
        self._copy_is_pending = False
        self._logits_rows: dict[int, int] = {}
        self._logits = np.empty((0, facts.n_vocab), dtype=np.float32)
        self._logits_place = 0, 0  # address and number of rows
        self._finder = CandidateFinder()

    @property
    def n_ctx(self) -> int:
        return self._n_ctx

    @property
    def n_cells(self) -> int:
        return self._n_cells

    @property
    def n_sequences(self) -> int:
        return self._n_sequences

    @property
    def n_batch(self) -> int:
        return self._n_batch

    @property
    def can_shift(self) -> bool:
        with self._native():
            return bool(native.llama_memory_can_shift(self._memory))

    @property
    def n_threads_single(self) -> int | None:
        return self._n_threads_single

    def pointer(self) -> Hold:
        """For the samplers, which hand the context to llama.cpp."""
        return self._native()

    def decode(self, batch: DecodeBatch) -> DecodeStatus:
        """Run one batch: see ``Context.decode``.

        NO_ROOM leaves the cells as they were: llama.cpp looks for places for all ubatches (``init_batch``) before it
        computes the first, and takes back those that it had found. Copies and shifts that were put off are carried out
        all the same. A gap in a sequence's positions and failures of llama.cpp raise ``RuntimeFailure``. After ABORTED
        the ubatches before the stopped one are in the memory.
        """
        self._check(batch)
        with self._native() as pointer, self._decode_log as log:
            self._abort.lower()
            self._logits_rows = {}
            result = self._decode(pointer, self._arrays.fill(batch))
            if result == 0:
                self._view_logits(pointer, batch)
                return DecodeStatus.DONE
        if result in (1, 2):
            return DecodeStatus(result)
        raise RuntimeFailure(f"llama.cpp failed to decode {len(batch)} tokens (code {result}): {log.reason()}")

    def _view_logits(self, pointer: int, batch: DecodeBatch) -> None:
        """llama.cpp orders the rows at the first access. Done here, later reads may come from several threads."""
        address = logits_address(pointer)
        n_rows = sum(map(bool, batch.wants_logits))
        if not n_rows or not address:
            return
        if (address, n_rows) != self._logits_place:
            memory: Any = (ctypes.c_float * (n_rows * self._n_vocab)).from_address(address)
            self._logits = np.frombuffer(memory, dtype=np.float32).reshape(n_rows, self._n_vocab)
            self._logits_place = address, n_rows
        self._logits_rows = dict(zip(compress(range(len(batch)), batch.wants_logits), count()))
        self._finder.start(self._logits)

    def _decode(self, pointer: int, native_batch: Any) -> int:
        """``llama_decode``, which first carries out pending shifts and copies.

        A shift must not be aborted: llama.cpp would rotate again at the next decode what it had rotated already.
        """
        if not self._shift_is_pending:
            result = int(native.llama_decode(pointer, native_batch))
        else:
            self._abort.detach(pointer)
            result = int(native.llama_decode(pointer, native_batch))
            self._abort.attach(pointer)
        if result != -1:  # -1: the batch was refused before anything was done
            self._shift_is_pending = self._copy_is_pending = False
        return result

    def _check(self, batch: DecodeBatch) -> None:
        """Everything that llama.cpp would abort on, or read out of bounds for."""
        n = len(batch)
        if not 0 < n <= self._n_batch:
            raise InvalidArgument(f"a batch of {n} tokens; it must hold 1 to {self._n_batch} (batch_size)")
        if not n == len(batch.positions) == len(batch.sequence_ids) == len(batch.wants_logits):
            raise InvalidArgument("the lists of a batch differ in length; build it with DecodeBatch.add")
        if min(batch.tokens) < 0 or max(batch.tokens) >= self._n_vocab:
            raise InvalidArgument(f"a batch has a token outside of the vocabulary of {self._n_vocab}")
        if min(batch.sequence_ids) < 0 or max(batch.sequence_ids) >= self._n_sequences:
            raise InvalidArgument(f"a batch has a sequence id that is not in 0 to {self._n_sequences - 1}")
        if min(batch.positions) < 0 or max(batch.positions) > _MAX_POSITION:
            raise InvalidArgument(f"a batch has a position that is not in 0 to {_MAX_POSITION}")

    def logits(self, row: int) -> npt.NDArray[np.float32]:
        """A view of llama.cpp's memory, float32 of shape [n_vocab], valid until the next decode or close."""
        row_logits: npt.NDArray[np.float32] = self._logits[self._logits_index(row)]
        return row_logits

    def candidates(self, row: int, n_top: int) -> Candidates:
        """For the samplers: the ``n_top`` largest logits of a batch entry and perhaps some more. Thread-safe.

        Searched for once a decode, in all rows: logits that are overwritten after the first call are not seen.
        """
        index = self._logits_index(row)
        found = self._finder.found(index, n_top)
        if found is None:
            with self._native():
                found = self._finder.find(index, n_top)
        return found

    def best(self, row: int) -> tuple[int, float]:
        """For the samplers: the token with the largest logit of a batch entry, and that logit; as ``candidates``."""
        index = self._logits_index(row)
        with self._native():
            token = self._finder.best(index)
            return token, float(self._logits[index, token])

    def _logits_index(self, row: int) -> int:
        index = self._logits_rows.get(row)
        if index is None:
            raise InvalidArgument(f"row {row} of the last decode has no logits; ask for them in the batch")
        return index

    def remove(self, sequence_id: int, first_position: int, end_position: int = -1) -> bool:
        self._check_sequence(sequence_id)
        with self._native():
            if not self._window_survives(sequence_id, first_position, end_position):
                return False
            removed = bool(native.llama_memory_seq_rm(self._memory, sequence_id, first_position, end_position))
            if removed and end_position < 0 and self._shared_cells is not None:
                self._shared_cells.removed(sequence_id, first_position)
            return removed

    def _window_survives(self, sequence_id: int, first_position: int, end_position: int) -> bool:
        """Whether a sequence cut at ``first_position`` keeps the cells that sliding-window layers look back at.

        A saved state leaves out what lies outside of the window. Cut back after a restore, the new end would look back
        at cells that are not there, and llama.cpp would compute other text without a word.
        """
        if self._n_swa == 0 or first_position <= 0:
            return True
        last = int(native.llama_memory_seq_pos_max(self._memory, sequence_id))
        if last < first_position or 0 <= end_position <= last:
            return True
        least = int(native.llama_memory_seq_pos_min(self._memory, sequence_id))
        return least <= max(0, first_position - self._n_swa)

    def copy(self, source_id: int, target_id: int, first_position: int = 0, end_position: int = -1) -> bool:
        """See ``Context.copy``. In streams the data moves at the next decode.

        There llama.cpp copies whole streams only and aborts when asked for less: the rest is removed from the target.
        """
        self._check_sequence(source_id)
        self._check_sequence(target_id)
        with self._native():
            if end_position >= 0 and not self._reaches(source_id, end_position):
                self._clear(target_id)
                return False
            if source_id != target_id:
                self._clear(target_id)
                native.llama_memory_seq_cp(self._memory, source_id, target_id, -1, -1)
                self._record_copy(source_id, target_id)
            if first_position > 0:
                native.llama_memory_seq_rm(self._memory, target_id, 0, first_position)
            if end_position >= 0:
                if not native.llama_memory_seq_rm(self._memory, target_id, end_position, -1):
                    self._clear(target_id)  # a recurrent memory is copied whole or not at all
                    return False
                if self._shared_cells is not None:
                    self._shared_cells.removed(target_id, end_position)
            return True

    def _reaches(self, sequence_id: int, end_position: int) -> bool:
        """Whether a sequence has what one that ends at ``end_position`` needs of it."""
        last = int(native.llama_memory_seq_pos_max(self._memory, sequence_id))
        return last + 1 >= end_position and self._window_survives(sequence_id, end_position, -1)

    def _record_copy(self, source_id: int, target_id: int) -> None:
        if self._shared_cells is None:
            self._copy_is_pending = True
        else:
            last = int(native.llama_memory_seq_pos_max(self._memory, source_id))
            self._shared_cells.copied(source_id, target_id, last + 1)

    def _clear(self, sequence_id: int) -> None:
        native.llama_memory_seq_rm(self._memory, sequence_id, -1, -1)
        if self._shared_cells is not None:
            self._shared_cells.removed(sequence_id, 0)

    def shift(self, sequence_id: int, first_position: int, end_position: int, delta: int) -> bool:
        """See ``Context.shift``. The keys are rotated at the next decode."""
        self._check_sequence(sequence_id)
        if not self.can_shift:
            raise UnsupportedOperation(f"{self._resource.name} cannot move cached tokens: turn context_shifting off")
        if not -_MAX_POSITION <= delta <= _MAX_POSITION - max(0, self.last_position(sequence_id)):
            raise InvalidArgument(f"a shift by {delta} leads out of the range of positions")
        with self._native() as pointer, self._decode_log:
            if not self._take_apart(pointer, sequence_id, first_position):
                return False
            native.llama_memory_seq_add(self._memory, sequence_id, first_position, end_position, delta)
            self._shift_is_pending = True
            if self._shared_cells is not None:  # where tokens moved down to, there was nothing
                self._shared_cells.removed(sequence_id, first_position + min(0, delta))
            return True

    def _take_apart(self, pointer: int, sequence_id: int, first_position: int) -> bool:
        """Make sure that nobody else owns a sequence's cells from ``first_position`` on."""
        if self._shared_cells is None or self._shared_cells.end(sequence_id) <= first_position:
            return True
        if self._is_recurrent:  # its state beside the cells has no place for the spare sequences
            return False
        self._carry_out_pending(pointer)
        # Where a window slides, a saved state leaves cells out: from its beginning on, so that it leaves no hole.
        return self._shared_cells.make_own(pointer, sequence_id, 0 if self._n_swa else max(0, first_position))

    def last_position(self, sequence_id: int) -> int:
        self._check_sequence(sequence_id)
        with self._native():
            return int(native.llama_memory_seq_pos_max(self._memory, sequence_id))

    def save_sequence(self, sequence_id: int) -> bytes:
        """The cells of one sequence. Readable by contexts of the same model, cache types and ``n_sequences``."""
        self._check_sequence(sequence_id)
        with self._native() as pointer, self._decode_log:
            self._carry_out_pending(pointer)
            last = int(native.llama_memory_seq_pos_max(self._memory, sequence_id))
            return state.save(pointer, sequence_id, last, self._fingerprint)

    def restore_sequence(self, sequence_id: int, state_bytes: bytes) -> bool:
        """See ``Context.restore_sequence``; after False the sequence is empty."""
        self._check_sequence(sequence_id)
        with self._native() as pointer, self._decode_log:
            self._carry_out_pending(pointer)
            self._clear(sequence_id)  # llama.cpp leaves it for an empty state
            expected = state.restore(pointer, sequence_id, state_bytes, self._fingerprint)
            if expected is not None and expected == native.llama_memory_seq_pos_max(self._memory, sequence_id):
                return True
            native.llama_memory_seq_rm(self._memory, sequence_id, -1, -1)
            return False

    def _carry_out_pending(self, pointer: int) -> None:
        """Do the copies and shifts that llama.cpp has put off: reading and writing states does not wait for them.

        Only a decode carries them out. So one token is decoded and forgotten again, in an empty sequence if there is
        one; without a shift it is aborted at its first node, which comes after the copies.
        """
        if not (self._copy_is_pending or self._shift_is_pending):
            return
        lasts = [int(native.llama_memory_seq_pos_max(self._memory, s)) for s in range(self._n_sequences)]
        sequence_id = lasts.index(min(lasts))
        batch = DecodeBatch()
        batch.add([0], lasts[sequence_id] + 1, sequence_id, logits_for_last=False)
        self._abort.raise_it()
        self._logits_rows = {}
        result = self._decode(pointer, self._arrays.fill(batch))
        if result == 0:
            native.llama_memory_seq_rm(self._memory, sequence_id, lasts[sequence_id] + 1, -1)
        if result < 0:
            raise RuntimeFailure(f"llama.cpp failed to carry out copies and shifts: {self._decode_log.reason()}")

    def set_n_threads(self, n_threads: int) -> None:
        if not 1 <= n_threads <= MAX_THREADS:
            raise InvalidArgument(f"{n_threads} threads; it must be from 1 to {MAX_THREADS}")
        n_threads_single = n_threads if self._n_threads_single is None else self._n_threads_single
        with self._native() as pointer:
            native.llama_set_n_threads(pointer, n_threads_single, n_threads)

    def request_abort(self) -> None:
        self._abort.raise_it()

    def _check_sequence(self, sequence_id: int) -> None:
        if not 0 <= sequence_id < self._n_sequences:
            raise InvalidArgument(
                f"sequence {sequence_id} does not exist; this context has 0 to {self._n_sequences - 1}"
            )
