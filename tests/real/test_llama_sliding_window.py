"""Cells behind a sliding window: what copies and shifts of a model that looks back only so far must not get wrong."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.llama_conformance import decode
from wasi_nn_backend.llama import load_llama
from wasi_nn_backend.llama.context import NativeContext
from wasi_nn_backend.llama.interface import ContextParams, KvLayout, ModelParams
from wasi_nn_backend.llama.model import NativeModel

pytestmark = pytest.mark.real

N_WINDOW = 512  # of Gemma 3 270M
N_TOKENS = N_WINDOW + 100
TOKENS = [100 + 37 * index % 5000 for index in range(N_TOKENS)]


@pytest.fixture(scope="module")
def model(gemma_path: Path) -> Iterator[NativeModel]:
    with load_llama().load_model(ModelParams(gemma_path)) as model:
        yield model


@pytest.fixture(params=["streams", "unified"])
def context(model: NativeModel, request: pytest.FixtureRequest) -> Iterator[NativeContext]:
    layout: KvLayout = request.param
    with model.create_context(
        ContextParams(n_ctx=768, n_sequences=3, n_batch=N_TOKENS, n_threads=2, kv_layout=layout)
    ) as context:
        yield context


def relative_error(logits: np.ndarray, expected: np.ndarray) -> float:
    """Where tokens lie in the cache changes the last bits of sums, and rounding to 8 bits makes some of them count:
    less than 0.1. A window that is not there gave 2.4.
    """
    difference = logits - expected
    return float(np.std(difference) / np.std(expected))


def test_a_prefix_is_not_copied_from_a_sequence_that_has_lost_its_window(context: NativeContext) -> None:
    """A restored sequence has the cells that its own end looks back at, and not those that an earlier end would."""
    decode(context, TOKENS)
    assert context.restore_sequence(1, context.save_sequence(0))
    n_prefix = N_TOKENS - 50
    assert not context.copy(1, 2, 0, n_prefix)
    assert context.last_position(2) == -1
    assert context.copy(1, 2)  # all of it has its window
    expected = decode(context, [5], N_TOKENS, 0)
    assert relative_error(decode(context, [5], N_TOKENS, 2), expected) < 0.1
    assert context.copy(0, 2, 0, n_prefix)
    assert context.last_position(2) == n_prefix - 1


def test_a_shift_of_shared_cells_leaves_the_others_and_knows_its_window(context: NativeContext) -> None:
    decode(context, TOKENS)
    assert context.copy(0, 1)
    expected = decode(context, [5], N_TOKENS, 0)
    context.remove(0, N_TOKENS)
    assert context.remove(1, 10, 30)
    assert context.shift(1, 30, -1, -20)
    shifted = decode(context, [5], N_TOKENS - 20, 1)
    assert relative_error(decode(context, [5], N_TOKENS, 0), expected) < 0.1
    context.remove(0, N_TOKENS)
    assert context.remove(0, 10, 30)
    assert context.shift(0, 30, -1, -20)  # has the cells for itself now
    assert relative_error(decode(context, [5], N_TOKENS - 20, 0), shifted) < 0.1


def test_copies_that_a_shift_made_cannot_be_cut_behind_their_window(model: NativeModel) -> None:
    """They are made through a state, which leaves out what the end does not look back at."""
    params = ContextParams(n_ctx=768, n_sequences=2, n_batch=N_TOKENS, n_threads=2, kv_layout="unified")
    with model.create_context(params) as context:
        decode(context, TOKENS)
        assert context.copy(0, 1)
        assert context.shift(1, 20, -1, 1)
        assert not context.remove(1, N_TOKENS - 70)
        assert context.remove(0, N_TOKENS - 70)
