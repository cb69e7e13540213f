"""Which of llama.cpp's results depend on the number of threads: none that the engine lets vary."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from wasi_nn_backend.llama import load_llama
from wasi_nn_backend.llama.interface import ContextParams, DecodeBatch, DecodeStatus, ModelParams

#: Beyond 512 cells flash attention cuts the cells of single queries. An even and an odd number of threads.
WINDOW = ContextParams(n_ctx=768, n_sequences=3, n_batch=256, n_ubatch=256, n_threads=2, flash_attention="on")
PROMPT_LENGTHS = (700, 601, 520)

Logits = npt.NDArray[np.float32]


def results(path: Path, params: ContextParams, n_threads: int) -> dict[str, Logits]:
    """The logits of prompts in pieces, of steps of two and three sequences, of a mixed batch and of a single token."""
    tokens = np.random.default_rng(1).integers(40, 80, 1000).tolist()
    found: dict[str, Logits] = {}
    with load_llama().load_model(ModelParams(path)) as model, model.create_context(params) as context:
        context.set_n_threads(n_threads)
        n_cached = [0] * params.n_sequences

        def run(name: str, n_tokens_each: dict[int, int]) -> None:
            batch = DecodeBatch()
            for sequence_id, n_tokens in n_tokens_each.items():
                first = n_cached[sequence_id]
                batch.add(tokens[first : first + n_tokens], first, sequence_id, logits_for_last=True)
                n_cached[sequence_id] += n_tokens
            assert context.decode(batch) is DecodeStatus.DONE
            lasts = np.cumsum(list(n_tokens_each.values())) - 1
            found[name] = np.stack([context.logits(int(row)) for row in lasts])

        for sequence_id, length in enumerate(PROMPT_LENGTHS):
            for n_tokens in (2, 17, 63, 64, 65, 200, 200, length):  # around the tile of 64 queries
                n_left = length - n_cached[sequence_id]
                if n_left:
                    run(f"prompt {sequence_id}, {n_left} left", {sequence_id: min(n_tokens, n_left)})
        run("two", {0: 1, 1: 1})
        run("three", {0: 1, 1: 1, 2: 1})
        run("apart", {0: 1, 2: 1})
        run("mixed", {0: 1, 1: 1, 2: 40})
        run("single", {1: 1})
    return found


@pytest.mark.parametrize("layout", ["streams", "unified"])
@pytest.mark.parametrize("flash_attention", ["on", "off"])
def test_the_number_of_threads_changes_no_bit(tiny_model_path: Path, layout: str, flash_attention: str) -> None:
    params = replace(WINDOW, kv_layout=layout, flash_attention=flash_attention)  # type: ignore[arg-type]
    expected = results(tiny_model_path, params, 2)
    for n_threads in (1, 3):
        found = results(tiny_model_path, params, n_threads)
        assert [name for name in expected if not np.array_equal(found[name], expected[name])] == []


def test_a_single_token_is_the_reason_for_a_number_of_its_own(tiny_model_path: Path) -> None:
    """Should this fail, llama.cpp no longer cuts by threads, and ``n_threads_single`` can go."""
    one, two = (results(tiny_model_path, replace(WINDOW, n_threads=n), 2) for n in (1, 2))
    assert {name.split()[0] for name in one if not np.array_equal(one[name], two[name])} == {"single", "apart"}


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, 2),
        ({"flash_attention": "off"}, None),
        ({"n_ctx": 256}, None),
        ({"n_ctx": 257}, 2),
        ({"n_ctx": 256, "kv_layout": "unified"}, 2),  # of which there are three
        ({"n_ctx": 85, "kv_layout": "unified"}, None),
        ({"cache_type_k": "f32", "cache_type_v": "f32"}, 2),
        ({"cache_type_k": "q8_0", "cache_type_v": "q8_0"}, None),
        ({"cache_type_k": "q8_0"}, None),
        ({"cache_type_k": "bf16", "cache_type_v": "bf16"}, None),
    ],
)
def test_contexts_that_have_a_number_for_single_tokens(
    tiny_model_path: Path, changed: dict[str, object], expected: int | None
) -> None:
    params = replace(WINDOW, **changed)  # type: ignore[arg-type]
    with load_llama().load_model(ModelParams(tiny_model_path)) as model, model.create_context(params) as context:
        assert context.n_threads_single == expected
