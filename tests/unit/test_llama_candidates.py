"""Candidates hold whatever can be among the largest, whatever the logits look like."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import n_examples
from wasi_nn_backend.llama.candidates import CandidateFinder, Candidates, search

Logits = npt.NDArray[np.float32]


def check(logits: Logits, n_top: int, found: Candidates) -> None:
    """``found`` holds every token at or above a bound that is no higher than the ``n_top``-th largest logit."""
    assert len(found.tokens) >= n_top
    assert len(set(found.tokens.tolist())) == len(found.tokens)
    np.testing.assert_array_equal(logits[found.tokens], found.logits)
    least = found.logits.min()
    assert least <= np.sort(logits)[len(logits) - n_top]
    assert np.count_nonzero(logits >= least) == len(found.tokens)
    assert found.largest == logits.max()
    if found.distinct:
        assert len(set(found.logits.tolist())) == len(found.logits)


@st.composite
def matrices(draw: st.DrawFn) -> Logits:
    n_rows, n_vocab = draw(st.integers(1, 5)), draw(st.integers(1, 3000))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    logits = random.standard_normal((n_rows, n_vocab)) * draw(st.sampled_from([0.0, 0.1, 5.0, 1e30]))
    decimals = draw(st.sampled_from([-1, 0, 2, 9]))
    rounded: Logits = np.round(logits, decimals).astype(np.float32)
    if draw(st.booleans()):
        rounded.sort(axis=1)
    rounded[random.random((n_rows, n_vocab)) < draw(st.sampled_from([0.0, 0.5, 0.99]))] = -np.inf
    return rounded


@given(matrices(), st.data())
@settings(max_examples=n_examples(300), deadline=None)
def test_nothing_that_may_be_on_top_is_missing(logits: Logits, data: st.DataObject) -> None:
    n_top = data.draw(st.integers(1, logits.shape[1]))
    for row, found in zip(logits, search(logits, n_top), strict=True):
        check(row, n_top, found)


@given(matrices())
@settings(max_examples=n_examples(50), deadline=None)
def test_the_best_is_the_first_of_the_largest(logits: Logits) -> None:
    finder = CandidateFinder()
    finder.start(np.zeros_like(logits))
    assert finder.best(0) == 0
    finder.start(logits)
    for index, row in enumerate(logits):
        best = finder.best(index)
        assert row[best] == row.max()
        assert (row[:best] < row[best]).all()
    if logits[0].max() > -np.inf:
        logits[0, -1] = np.nan
        finder.start(logits)
        assert finder.best(0) == logits.shape[1] - 1, "whoever looks at its logit sees that the row is broken"


@pytest.mark.parametrize("n_vocab", [49152, 50257, 262144])
@pytest.mark.parametrize("n_top", [1, 40, 200])
def test_candidates_are_few(n_vocab: int, n_top: int) -> None:
    logits = np.random.default_rng(n_vocab).standard_normal((4, n_vocab)).astype(np.float32)
    for row, found in zip(logits, search(logits, n_top), strict=True):
        check(row, n_top, found)
        assert len(found.tokens) < 1.5 * n_top + 10


@pytest.mark.parametrize("position", [0, 4321, 50_256])
def test_a_nan_anywhere_shows_in_the_largest_of_its_row_only(position: int) -> None:
    logits = np.random.default_rng(1).standard_normal((3, 50_257)).astype(np.float32)
    logits[1, position] = np.nan
    found = search(logits, 40)
    assert np.isnan(found[1].largest)
    check(logits[0], 40, found[0])
    check(logits[2], 40, found[2])


def test_two_zeros_are_equal() -> None:
    logits: Logits = np.tile(-1 - np.arange(500, dtype=np.float32), (2, 1))
    logits[1, [5, 400]] = 0.0, -0.0
    assert [found.distinct for found in search(logits, 3)] == [True, False]


def test_equals_in_different_rows_are_none() -> None:
    logits: Logits = np.tile(-1 - np.arange(500, dtype=np.float32), (2, 1))
    assert [found.distinct for found in search(logits, 3)] == [True, True]


def test_a_later_sampler_may_ask_for_more() -> None:
    logits = np.random.default_rng(2).standard_normal((4, 5000)).astype(np.float32)
    finder = CandidateFinder()
    for _ in range(3):
        finder.start(logits)
        assert finder.found(0, 1) is None
        for index, n_top in enumerate((5, 40, 300, 1)):
            found = finder.find(index, n_top)
            check(logits[index], n_top, found)
            assert finder.found(index, n_top) is found
    finder.start(logits[::-1].copy())
    check(logits[0], 40, finder.find(3, 40))


def test_threads_may_ask_at_the_same_time() -> None:
    logits = np.random.default_rng(3).standard_normal((32, 5000)).astype(np.float32)
    finder = CandidateFinder()
    with ThreadPoolExecutor(8) as pool:
        for _ in range(20):
            finder.start(logits)
            for index, found in enumerate(pool.map(lambda index: finder.find(index, 1 + 5 * index), range(32))):
                check(logits[index], 1 + 5 * index, found)
