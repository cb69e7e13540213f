"""What lets the engine change the number of threads while it generates: llama.cpp computes the same bits with each."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from wasi_nn_backend.llama import load_llama
from wasi_nn_backend.llama.interface import ContextParams, DecodeBatch, Model, ModelParams

pytestmark = pytest.mark.real

#: Long enough for llama.cpp to divide the attention of a single token among threads, where flash attention is on.
N_PROMPT = 700


def logits(model: Model, n_threads: int) -> npt.NDArray[np.float32]:
    """Of a prompt, and of two single tokens after it: float32 of shape [3, n_vocab]."""
    context = model.create_context(ContextParams(n_ctx=1024, n_batch=1024, n_threads=n_threads))
    tokens = np.random.default_rng(1).integers(100, 40_000, N_PROMPT + 2).tolist()
    rows = []
    try:
        for start, end in ((0, N_PROMPT), (N_PROMPT, N_PROMPT + 1), (N_PROMPT + 1, N_PROMPT + 2)):
            batch = DecodeBatch()
            row = batch.add(tokens[start:end], start, 0, logits_for_last=True)
            context.decode(batch)
            rows.append(context.logits(row).copy())
    finally:
        context.close()
    return np.stack(rows)


def test_the_number_of_threads_changes_no_bit(smollm2_path: Path) -> None:
    model = load_llama().load_model(ModelParams(path=smollm2_path))
    try:
        one = logits(model, 1)
        assert np.isfinite(one).all()
        for n_threads in (2, 3):
            np.testing.assert_array_equal(one, logits(model, n_threads))
    finally:
        model.close()
