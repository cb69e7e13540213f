"""The native llama with a real model: what random weights cannot show."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.llama_conformance import decode, greedy_tokens
from wasi_nn_backend.llama import load_llama
from wasi_nn_backend.llama.context import NativeContext
from wasi_nn_backend.llama.interface import (
    ContextParams,
    DecodeBatch,
    DecodeStatus,
    Distribution,
    Greedy,
    ModelParams,
    Temperature,
    TopK,
)
from wasi_nn_backend.llama.model import NativeModel

pytestmark = pytest.mark.real

QUESTION = b"<|im_start|>user\nName the capital city of France.<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def model(smollm2_path: Path) -> Iterator[NativeModel]:
    with load_llama().load_model(ModelParams(smollm2_path)) as model:
        yield model


@pytest.fixture
def context(model: NativeModel) -> Iterator[NativeContext]:
    with model.create_context(ContextParams(n_ctx=1024, n_sequences=2)) as context:
        yield context


def question(model: NativeModel) -> list[int]:
    return model.vocabulary.tokenize(QUESTION, add_special=False, parse_special=True)


def test_knows_the_capital_of_france(model: NativeModel, context: NativeContext) -> None:
    tokens = greedy_tokens(context, model.create_sampler([Greedy()]), question(model), 12)
    text = b"".join(model.vocabulary.piece(token, special=False) for token in tokens)
    assert b"Paris" in text
    assert any(model.vocabulary.is_end_of_generation(token) for token in tokens)


def test_the_file_s_own_numbers(model: NativeModel) -> None:
    assert model.n_ctx_train == 8192
    assert model.vocabulary.n_tokens == model.summary.n_vocab == 49152
    assert model.kv_bytes_per_token("f16", "f16") == 23040
    assert model.kv_bytes_per_token("q8_0", "q4_0") == 30 * (192 // 32) * (34 + 18)
    assert (model.vocabulary.bos_text, model.vocabulary.eos_text) == ("<|im_start|>", "<|im_end|>")


def test_the_short_cut_of_greedy_over_the_whole_vocabulary(model: NativeModel, context: NativeContext) -> None:
    short, chain = model.create_sampler([Greedy()]), model.create_sampler([Temperature(0.5), Greedy()])
    batch = DecodeBatch()
    for position, token in enumerate(question(model)):
        batch.add([token], position, 0, logits_for_last=True)
    assert context.decode(batch) is DecodeStatus.DONE
    assert [short.sample(context, row) for row in range(len(batch))] == [
        chain.sample(context, row) for row in range(len(batch))
    ]


def test_a_seed_repeats_itself(model: NativeModel, context: NativeContext) -> None:
    texts = []
    for sequence_id in (0, 0):
        context.remove(sequence_id, 0)
        sampler = model.create_sampler([TopK(40), Temperature(1.0), Distribution(7)])
        texts.append(greedy_tokens(context, sampler, question(model), 16))
    assert texts[0] == texts[1]


def test_a_restored_conversation_goes_on_as_before(model: NativeModel, context: NativeContext) -> None:
    tokens = question(model)
    decode(context, tokens)
    state = context.save_sequence(0)
    expected = decode(context, [198], len(tokens))
    assert context.restore_sequence(1, state)
    logits = decode(context, [198], len(tokens), sequence_id=1)
    np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-3)


def test_a_prompt_in_one_step_stops_within_the_step(context: NativeContext) -> None:
    """512 tokens are one ubatch: it is the graph itself that stops."""
    prompt = DecodeBatch()
    prompt.add([7] * 512, 0, 0, logits_for_last=True)
    stop = threading.Event()

    def hammer() -> None:
        while not stop.is_set():
            context.request_abort()

    thread = threading.Thread(target=hammer)
    thread.start()
    try:
        status = context.decode(prompt)
    finally:
        stop.set()
        thread.join()
    assert status is DecodeStatus.ABORTED
    assert context.last_position(0) == -1
    decode(context, [7, 8, 9])


def test_text_that_breaks_tokenisers(model: NativeModel) -> None:
    """Long runs without a space make regular expressions recurse, bytes that are no UTF-8 make decoders throw."""
    vocabulary = model.vocabulary
    for text in (
        b"a" * 200_000,
        b" " * 200_000,
        b"1" * 200_000,
        b"\xff" * 1000,
        b"\xed\xa0\x80" * 100,
        b"\xf7\xbf\xbf\xbf",
        b"\0" * 1000,
    ):
        tokens = vocabulary.tokenize(text, add_special=True, parse_special=True)
        assert tokens
        assert max(tokens) < vocabulary.n_tokens
