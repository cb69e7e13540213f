"""Any mixture of operations on shared cells: the fake and llama.cpp have room, and run out of it, at the same times."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import n_examples
from tests.fakes.llama import FakeLlama
from wasi_nn_backend.llama import load_llama
from wasi_nn_backend.llama.interface import Context, ContextParams, DecodeBatch, DecodeStatus, Model, ModelParams

PARAMS = ContextParams(n_ctx=256, n_sequences=4, n_batch=64, n_ubatch=16, kv_layout="unified", n_cells=256)
N_TOKENS_MAX = 200

sequences = st.integers(0, PARAMS.n_sequences - 1)
shares = st.floats(0, 1)
operations = st.one_of(
    st.tuples(st.just("decode"), sequences, st.integers(1, PARAMS.n_batch)),
    st.tuples(st.just("cut"), sequences, shares),
    st.tuples(st.just("copy"), sequences, sequences, shares),
    st.tuples(st.just("shift"), sequences, shares, shares),
    st.tuples(st.just("move"), sequences, sequences),
)


def carry_out(context: Context, operation: tuple) -> object:  # type: ignore[type-arg]
    """What can be seen of an operation from outside."""
    kind, sequence_id, *rest = operation
    n_cached = context.last_position(sequence_id) + 1
    match kind:
        case "decode":
            n_tokens = min(rest[0], N_TOKENS_MAX - n_cached)
            return decode(context, sequence_id, n_cached, n_tokens) if n_tokens > 0 else None
        case "cut":
            return context.remove(sequence_id, round(rest[0] * n_cached))
        case "copy":
            return sequence_id == rest[0] or context.copy(sequence_id, rest[0], 0, round(rest[1] * n_cached))
        case "shift":
            n_keep = round(rest[0] * n_cached)
            n_discard = round(rest[1] * (n_cached - n_keep))
            context.remove(sequence_id, n_keep, n_keep + n_discard)
            if n_discard and not context.shift(sequence_id, n_keep + n_discard, -1, -n_discard):
                context.remove(sequence_id, n_keep)
                return False
        case "move":
            return context.restore_sequence(rest[0], context.save_sequence(sequence_id))
    return None


def decode(context: Context, sequence_id: int, first: int, n_tokens: int) -> DecodeStatus:
    batch = DecodeBatch()
    batch.add([7 + sequence_id] * n_tokens, first, sequence_id, logits_for_last=True)
    return context.decode(batch)


@pytest.fixture(scope="module")
def models(tiny_model_path: Path) -> Iterator[tuple[Model, Model]]:
    with load_llama().load_model(ModelParams(tiny_model_path)) as native:
        yield native, FakeLlama().load_model(ModelParams(tiny_model_path))


@settings(deadline=None, max_examples=n_examples(100))
@given(st.integers(0, 3), st.lists(operations, max_size=40))
def test_both_see_the_same(models: tuple[Model, Model], n_filled: int, operations: list[tuple]) -> None:  # type: ignore[type-arg]
    """From an empty cache, and from one where two sequences share most of the cells."""
    native, fake = (model.create_context(PARAMS) for model in models)
    start = [("decode", 0, 60)] * n_filled + [("copy", 0, 1, 1.0)]
    for operation in start + operations:
        assert carry_out(native, operation) == carry_out(fake, operation)
        for sequence_id in range(PARAMS.n_sequences):
            assert native.last_position(sequence_id) == fake.last_position(sequence_id)
    for sequence_id in range(PARAMS.n_sequences):
        native.remove(sequence_id, 0)
    for first in range(0, 256, 64):  # no cell was lost
        assert decode(native, 0, first, 64) is DecodeStatus.DONE
    assert decode(native, 1, 0, 1) is DecodeStatus.NO_ROOM
    native.close()


@settings(deadline=None, max_examples=n_examples(30))
@given(st.lists(operations, max_size=25))
def test_no_operation_changes_what_a_sequence_it_does_not_name_says(
    models: tuple[Model, Model],
    operations: list[tuple],  # type: ignore[type-arg]
) -> None:
    """With cells enough for everything, a sequence that shares its cells with all others stays what it was."""
    native = models[0].create_context(replace(PARAMS, n_cells=2048, n_sequences=5))
    witness = 4
    assert decode(native, witness, 0, 60) is DecodeStatus.DONE
    for sequence_id in range(4):
        native.copy(witness, sequence_id, 0, 15 * (sequence_id + 1))
    assert decode(native, witness, 60, 1) is DecodeStatus.DONE
    expected = np.array(native.logits(0))
    native.remove(witness, 60)
    for operation in operations:
        carry_out(native, operation)
    assert native.last_position(witness) == 59
    assert decode(native, witness, 60, 1) is DecodeStatus.DONE
    np.testing.assert_allclose(native.logits(0), expected, rtol=1e-4, atol=1e-4)
    native.close()
