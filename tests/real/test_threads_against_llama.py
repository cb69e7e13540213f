"""What lets the engine change the number of threads while it generates: llama.cpp computes the same bits with each."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from wasi_nn_backend.llama import load_llama
from wasi_nn_backend.llama.interface import ContextParams, DecodeBatch, Model, ModelParams

pytestmark = pytest.mark.real

#: Long enough for llama.cpp to divide the attention of a single token among threads, where flash attention is on.
LONG = ContextParams(n_ctx=1024, n_batch=1024, flash_attention="off")
#: Too short for that.
SHORT = ContextParams(n_ctx=256, n_batch=256, flash_attention="on")


def logits(model: Model, params: ContextParams) -> npt.NDArray[np.float32]:
    """Of a prompt, and of two single tokens after it: float32 of shape [3, n_vocab]."""
    context = model.create_context(params)
    n_prompt = params.n_ctx * 2 // 3
    tokens = np.random.default_rng(1).integers(100, 40_000, n_prompt + 2).tolist()
    rows = []
    try:
        for start, end in ((0, n_prompt), (n_prompt, n_prompt + 1), (n_prompt + 1, n_prompt + 2)):
            batch = DecodeBatch()
            row = batch.add(tokens[start:end], start, 0, logits_for_last=True)
            context.decode(batch)
            rows.append(context.logits(row).copy())
    finally:
        context.close()
    return np.stack(rows)


@pytest.mark.parametrize("params", [LONG, SHORT], ids=["long", "short, with flash attention"])
def test_the_number_of_threads_changes_no_bit(smollm2_path: Path, params: ContextParams) -> None:
    model = load_llama().load_model(ModelParams(path=smollm2_path))
    try:
        one = logits(model, replace(params, n_threads=1))
        assert np.isfinite(one).all()
        for n_threads in (2, 3):
            np.testing.assert_array_equal(one, logits(model, replace(params, n_threads=n_threads)))
    finally:
        model.close()
