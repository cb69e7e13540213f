"""Embeddings for guests: both ABIs, from the configuration to the text in the guest's memory."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import pytest

from tests.host.conftest import MODEL
from tests.host.guests import OUT, PAGE, Driver
from wasi_nn_backend.backend import Backend
from wasi_nn_backend.dialects import CORE_DIALECTS, Dialect

CONFIG = b'{"embedding": true, "ctx-size": 256, "batch-size": 64, "n-predict": 5, "stream-stdout": true}'
PROMPT = b"<|im_start|>a question"

dialects = pytest.mark.parametrize("dialect", CORE_DIALECTS, ids=lambda dialect: dialect.name)


@pytest.fixture(params=["fake_backend", "tiny_backend"])
def backend(request: pytest.FixtureRequest) -> Backend:
    backend: Backend = request.getfixturevalue(request.param)
    return backend


@pytest.fixture
def guest(fake_backend: Backend) -> Iterator[Driver]:
    with Driver(fake_backend) as driver:
        yield driver


@dialects
def test_a_guest_gets_the_vector_of_its_prompt(backend: Backend, dialect: Dialect) -> None:
    expected = backend.load_by_name("default").embed([PROMPT.decode()])[0]
    with Driver(backend, dialect) as guest:
        context = guest.open(MODEL)
        assert guest.configure(context, CONFIG) == 0
        output = guest.generate(context, PROMPT)
        document = json.loads(output)
        assert list(document) == ["n_embedding", "embedding"]
        assert document["n_embedding"] == len(document["embedding"]) == len(expected)
        np.testing.assert_allclose(document["embedding"], expected, atol=1e-3)
        assert np.linalg.norm(document["embedding"]) == pytest.approx(1, abs=1e-6)
        assert output.startswith(f'{{"n_embedding": {len(expected)}, "embedding": ['.encode())
        assert b" " not in output.partition(b"[")[2]
        metadata = json.loads(guest.output(context, 1))
        n_tokens = len(
            backend.load_by_name("default").model.vocabulary.tokenize(PROMPT, add_special=True, parse_special=True)
        )
        assert (metadata["input_tokens"], metadata["output_tokens"]) == (n_tokens, 0)
        assert guest.streamed == b""  # as in WasmEdge


def test_configuration_at_load(guest: Driver) -> None:
    context = guest.open(MODEL, CONFIG)
    assert b"n_embedding" in guest.generate(context, PROMPT)
    assert list(json.loads(guest.output(context, 1))) == [
        "input_tokens",
        "output_tokens",
        "llama_build_number",
        "llama_commit",
    ]


def test_a_guest_switches_between_text_and_vectors(guest: Driver) -> None:
    context = guest.open(MODEL)
    text = guest.generate(context, PROMPT)
    assert guest.configure(context, b'{"embedding": true}') == 0
    vector = guest.generate(context, PROMPT)
    assert json.loads(vector)["n_embedding"] > 0
    assert guest.configure(context, b'{"embedding": false}') == 0
    assert guest.generate(context, PROMPT) == text
    assert guest.configure(context, b'{"embedding": 1}') == 1


def test_tokens_beyond_the_batch_are_a_prompt_too_long(guest: Driver) -> None:
    context = guest.open(MODEL, CONFIG)
    guest.set_prompt(context, b"x" * 64)  # and the beginning token
    assert guest.call("compute", context) == 102
    assert guest.output(context) == b""
    assert json.loads(guest.output(context, 1))["input_tokens"] == 65
    assert b"n_embedding" in guest.generate(context, b"x" * 63)


def test_no_prompt_and_an_empty_one_are_invalid(guest: Driver) -> None:
    context = guest.open(MODEL, CONFIG)
    assert guest.call("compute", context) == 1
    guest.set_prompt(context, b"")
    assert guest.call("compute", context) == 1


def test_token_by_token_is_not_supported(guest: Driver) -> None:
    context = guest.open(MODEL, CONFIG)
    guest.set_prompt(context, PROMPT)
    assert guest.single_tokens(context) == ([], 6)
    assert guest.call("fini_single", context) == 0
    assert guest.call("compute", context) == 0


def test_a_small_buffer_learns_the_size(guest: Driver) -> None:
    context = guest.open(MODEL, CONFIG)
    output = guest.generate(context, PROMPT)
    assert guest.call("get_output", context, 0, PAGE, len(output) - 1, OUT) == 7
    assert guest.peek_u32(OUT) == len(output)
    assert guest.call("get_output", context, 0, PAGE, len(output), OUT) == 0
    assert guest.peek(PAGE, len(output)) == output
