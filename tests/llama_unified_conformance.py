"""What every llama must do in the unified layout: all of the suite for streams, and what sharing cells adds to it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from tests.llama_conformance import N_CTX, LlamaConformance, decode
from wasi_nn_backend.llama.interface import Context, ContextParams, DecodeBatch, DecodeStatus, Model

UNIFIED = ContextParams(n_ctx=N_CTX, n_sequences=3, n_batch=64, n_ubatch=64, kv_layout="unified")
#: Two chunks of one ubatch and of several: there is room for a part of what comes next.
FEW_CELLS = replace(UNIFIED, n_cells=N_CTX)
N_CHUNK = 64


def fill(context: Context, n_tokens: int, sequence_id: int) -> None:
    for first in range(0, n_tokens, N_CHUNK):
        decode(context, [7 + first // N_CHUNK] * min(N_CHUNK, n_tokens - first), first, sequence_id)


def add(context: Context, n_tokens: int, first: int, sequence_id: int) -> DecodeStatus:
    batch = DecodeBatch()
    batch.add([5] * n_tokens, first, sequence_id, logits_for_last=True)
    return context.decode(batch)


class UnifiedConformance(LlamaConformance):
    @pytest.fixture
    def context(self, model: Model) -> Iterator[Context]:
        context = model.create_context(UNIFIED)
        yield context
        context.close()

    @pytest.fixture
    def small(self, model: Model) -> Iterator[Context]:
        """A third of the cells that three full windows would need."""
        context = model.create_context(FEW_CELLS)
        yield context
        context.close()

    def test_a_full_sequence_has_no_room_and_the_others_have(self, model: Model, context: Context) -> None:
        """Not here: there is room as long as there are cells, and a window is the caller's to keep."""
        fill(context, N_CTX, 0)
        assert add(context, 1, N_CTX, 0) is DecodeStatus.DONE

    def test_the_window_is_one_sequence_s_and_the_cells_are_all(self, context: Context, small: Context) -> None:
        assert (context.n_ctx, context.n_cells) == (N_CTX, 3 * N_CTX)
        assert (small.n_ctx, small.n_cells) == (N_CTX, N_CTX)

    def test_streams_have_a_window_each(self, model: Model) -> None:
        context = model.create_context(replace(UNIFIED, kv_layout="streams"))
        assert (context.n_ctx, context.n_cells) == (N_CTX, 3 * N_CTX)

    # -- no room

    @pytest.mark.parametrize("n_tokens", [57, 63])
    def test_without_room_nothing_is_lost_and_removing_makes_it(self, small: Context, n_tokens: int) -> None:
        fill(small, 150, 0)
        fill(small, 50, 1)
        before = decode(small, [5], 50, 1)
        small.remove(1, 50)
        assert add(small, n_tokens, 0, 2) is DecodeStatus.NO_ROOM
        assert [small.last_position(s) for s in range(3)] == [149, 49, -1]
        np.testing.assert_allclose(decode(small, [5], 50, 1), before, rtol=1e-4, atol=1e-4)
        assert small.remove(0, 100)
        assert add(small, n_tokens, 0, 2) is DecodeStatus.DONE

    def test_no_room_is_for_the_whole_batch_whatever_ubatches_would_fit(self, model: Model) -> None:
        context = model.create_context(replace(FEW_CELLS, n_ubatch=16))
        fill(context, 220, 0)
        assert add(context, 64, 0, 1) is DecodeStatus.NO_ROOM  # 36 cells are free: two ubatches
        assert context.last_position(1) == -1
        assert add(context, 36, 0, 1) is DecodeStatus.DONE

    def test_every_cell_can_be_used_and_used_again(self, small: Context) -> None:
        for sequence_id in (0, 1, 2, 0, 1):
            fill(small, 85, sequence_id)
            if sequence_id == 2:
                assert add(small, 2, 85, 2) is DecodeStatus.NO_ROOM
                assert add(small, 1, 85, 2) is DecodeStatus.DONE
            small.remove((sequence_id + 1) % 3, 0)

    # -- sharing

    def test_a_copy_takes_no_cells_and_frees_none_while_somebody_has_them(self, small: Context) -> None:
        fill(small, 200, 0)
        small.copy(0, 1)
        small.copy(1, 2, 0, 150)
        assert [small.last_position(s) for s in range(3)] == [199, 199, 149]
        assert add(small, 57, 200, 1) is DecodeStatus.NO_ROOM
        small.remove(0, 0)
        assert add(small, 57, 200, 1) is DecodeStatus.NO_ROOM
        small.remove(1, 150)  # cells 150 to 199 have no owner now
        assert add(small, 64, 150, 1) is DecodeStatus.DONE
        assert add(small, 42, 150, 2) is DecodeStatus.DONE
        assert add(small, 1, 192, 2) is DecodeStatus.NO_ROOM

    def test_a_target_that_had_shared_the_source_s_cells_is_its_copy_again(self, small: Context) -> None:
        fill(small, 100, 0)
        small.copy(0, 1)
        add(small, 20, 100, 1)
        small.copy(0, 1, 0, 60)
        assert small.last_position(1) == 59
        expected = decode(small, [5], 60, 1)
        fill(small, 60, 2)
        np.testing.assert_allclose(decode(small, [5], 60, 2), expected, rtol=1e-4, atol=1e-4)

    # -- shifting what is shared

    @pytest.mark.parametrize("shifted", [0, 1])
    def test_a_shift_leaves_the_others_where_they_are(self, context: Context, shifted: int) -> None:
        if not context.can_shift:
            pytest.skip("this llama cannot shift")
        other = 1 - shifted
        fill(context, 40, 0)
        context.copy(0, 1)
        add(context, 10, 40, shifted)
        expected = decode(context, [5], 40, other)
        context.remove(other, 40)
        context.remove(shifted, 4, 14)
        assert context.shift(shifted, 14, -1, -10)
        assert context.last_position(shifted) == 39
        assert context.last_position(other) == 39
        decode(context, [5], 40, shifted)
        np.testing.assert_allclose(decode(context, [5], 40, other), expected, rtol=1e-4, atol=1e-4)

    def test_a_shift_of_shared_cells_is_that_of_cells_of_its_own(self, context: Context) -> None:
        if not context.can_shift:
            pytest.skip("this llama cannot shift")
        logits = []
        fill(context, 40, 0)
        context.copy(0, 1)
        for sequence_id in (1, 0):  # shared, then left to the last owner
            context.remove(sequence_id, 4, 14)
            assert context.shift(sequence_id, 14, -1, -10)
            logits.append(decode(context, [5], 30, sequence_id))
            context.remove(sequence_id, 0)
        np.testing.assert_allclose(*logits, rtol=1e-4, atol=1e-4)

    def test_a_shift_without_room_for_copies_changes_nothing(self, small: Context) -> None:
        if not small.can_shift:
            pytest.skip("this llama cannot shift")
        fill(small, 150, 0)
        small.copy(0, 1)
        expected = decode(small, [5], 150, 0)
        small.remove(0, 150)
        small.remove(1, 10, 20)
        assert not small.shift(1, 20, -1, -10)  # 130 cells are shared, 106 free
        assert [small.last_position(s) for s in range(2)] == [149, 149]
        np.testing.assert_allclose(decode(small, [5], 150, 0), expected, rtol=1e-4, atol=1e-4)
        small.remove(0, 0)
        assert small.shift(1, 20, -1, -10)
        assert small.last_position(1) == 139

    # -- states

    def test_a_state_without_room_is_refused_and_costs_nothing(self, small: Context) -> None:
        fill(small, 150, 0)
        state = small.save_sequence(0)
        decode(small, [1, 2, 3], 0, 1)
        assert not small.restore_sequence(1, state)
        assert [small.last_position(s) for s in range(3)] == [149, -1, -1]
        assert add(small, 64, 0, 2) is DecodeStatus.DONE
        small.remove(0, 0)
        assert small.restore_sequence(1, state)
        assert small.last_position(1) == 149

    def test_a_state_of_the_shared_is_complete(self, context: Context) -> None:
        fill(context, 40, 0)
        context.copy(0, 1)
        state = context.save_sequence(1)
        context.remove(0, 0)
        context.remove(1, 0)
        fill(context, 40, 0)
        assert context.restore_sequence(2, state)
        np.testing.assert_allclose(decode(context, [5], 40, 2), decode(context, [5], 40, 0), rtol=1e-4, atol=1e-4)

    # -- the numbers

    def test_logits_are_those_of_streams(self, model: Model) -> None:
        """Other cells are masked, so that only the order of additions may differ."""
        logits: list[list[np.ndarray]] = []
        for kv_layout in ("unified", "streams"):
            context = model.create_context(replace(UNIFIED, kv_layout=kv_layout))
            logits.append([])
            for sequence_id in range(3):
                fill(context, 30 + 50 * sequence_id, sequence_id)
            for sequence_id in range(3):
                logits[-1].append(decode(context, self.tokens(model), 30 + 50 * sequence_id, sequence_id))
        for unified, streams in zip(*logits, strict=True):
            np.testing.assert_allclose(unified, streams, rtol=1e-3, atol=1e-3)
