"""Cells of a unified cache that several sequences own, and how one of these gets its own again.

A copy between sequences of a unified cache copies nothing: the cells get one more owner. That is right until one of
the owners is shifted, since llama.cpp keeps one position for a cell and would move everybody's token.
"""

from __future__ import annotations

from wasi_nn_backend.llama import state
from wasi_nn_backend.llama.bindings import native

__all__ = ["N_SPARE_SEQUENCES", "SharedCells"]

#: Sequence ids behind those of the caller that ``make_own`` needs.
N_SPARE_SEQUENCES = 2
_OWNER = state.fingerprint(("shared cells",))


class SharedCells:
    """Which sequences may own the same cells: llama.cpp knows, but does not tell."""

    def __init__(self, n_sequences: int) -> None:
        self._n_sequences = n_sequences
        # For each sequence: another one, and the position below which they may have cells in common.
        self._ends: list[dict[int, int]] = [{} for _ in range(n_sequences)]

    def end(self, sequence_id: int) -> int:
        """No cell at this position or above it has another owner."""
        return max(self._ends[sequence_id].values(), default=0)

    def copied(self, source_id: int, target_id: int, end_position: int) -> None:
        """The target, empty before, owns the source's cells below ``end_position``."""
        for other_id, end in list(self._ends[source_id].items()):
            self._set_end(target_id, other_id, min(end, end_position))
        self._set_end(source_id, target_id, end_position)

    def removed(self, sequence_id: int, first_position: int) -> None:
        """The sequence's cells from ``first_position`` on are gone, or its own now."""
        for other_id, end in list(self._ends[sequence_id].items()):
            self._set_end(sequence_id, other_id, min(end, first_position))

    def _set_end(self, one_id: int, other_id: int, end: int) -> None:
        for left, right in ((one_id, other_id), (other_id, one_id)):
            if end > 0:
                self._ends[left][right] = end
            else:
                self._ends[left].pop(right, None)

    def make_own(self, context: int, sequence_id: int, first_position: int) -> bool:
        """Put copies in free cells where a sequence shares cells from ``first_position`` on. False, and nothing done,
        where there are too few.

        llama.cpp has no call for it. But a state that is restored lies in new cells; and ids that the caller does not
        use hold the old cells until it is sure that there is room.
        """
        end_position = self.end(sequence_id)
        memory = native.llama_get_memory(context)
        held_id, copied_id = self._n_sequences, self._n_sequences + 1
        native.llama_memory_seq_cp(memory, sequence_id, held_id, -1, -1)
        native.llama_memory_seq_rm(memory, sequence_id, 0, first_position)
        native.llama_memory_seq_rm(memory, sequence_id, end_position, -1)
        has_room = False
        try:
            last = int(native.llama_memory_seq_pos_max(memory, sequence_id))
            saved = state.save(context, sequence_id, last, _OWNER)
            has_room = state.restore(context, copied_id, saved, _OWNER) == last
        finally:
            native.llama_memory_seq_rm(memory, sequence_id, -1, -1)
            if has_room:
                native.llama_memory_seq_cp(memory, copied_id, sequence_id, -1, -1)
                native.llama_memory_seq_cp(memory, held_id, sequence_id, 0, first_position)
                native.llama_memory_seq_cp(memory, held_id, sequence_id, end_position, -1)
                self.removed(sequence_id, first_position)
            else:
                native.llama_memory_seq_cp(memory, held_id, sequence_id, -1, -1)
            for spare_id in (held_id, copied_id):
                native.llama_memory_seq_rm(memory, spare_id, -1, -1)
        return has_room
