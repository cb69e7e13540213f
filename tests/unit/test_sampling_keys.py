"""Every key of ``sampling`` changes what the program does: with one seed, another value gives another text.

Over llama.cpp itself, with the tiny model. The keys of grammars have tests of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.effects import changes
from wasi_nn_backend import Backend, Graph, InvalidArgument
from wasi_nn_backend.llama import load_llama
from wasi_nn_backend.llama.interface import ModelParams

N_TOKENS = 120
PROMPT = "the cat sat on the mat, the cat sat on the mat. the"
#: Nothing narrows or reshapes the distribution, so that each key acts alone.
PLAIN: dict[str, Any] = {
    "seed": 3,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repeat_penalty": 1.0,
    "ignore_eos": True,
}
DYNAMIC = {"dynatemp_range": 0.6}
XTC = {"xtc_probability": 1.0, "xtc_threshold": 0.01}
DRY = {"dry_multiplier": 4.0, "dry_allowed_length": 1, "temperature": 0.5, "dry_penalty_last_n": 60}
MIROSTAT = {"mirostat": 2}
#: Key -> what it needs to matter, two values of it.
EFFECTS: dict[str, tuple[dict[str, Any], Any, Any]] = {
    "temperature": ({}, 1.0, 0.4),
    "dynatemp_range": ({}, 0.0, 0.6),
    "dynatemp_exponent": (DYNAMIC, 1.0, 3.0),
    "top_p": ({}, 1.0, 0.5),
    "top_k": ({}, 0, 5),
    "min_p": ({}, 0.0, 0.3),
    "typical_p": ({}, 1.0, 0.4),
    "top_n_sigma": ({}, -1.0, 1.0),
    "xtc_probability": (XTC, 1.0, 0.2),
    "xtc_threshold": (XTC, 0.01, 0.2),
    "min_keep": ({"top_p": 0.0}, 1, 20),
    "repeat_penalty": ({}, 1.0, 1.8),
    "presence_penalty": ({}, 0.0, 2.0),
    "frequency_penalty": ({}, 0.0, 2.0),
    "penalty_last_n": ({"repeat_penalty": 1.8}, 64, 4),
    "dry_multiplier": (DRY, 4.0, 0.0),
    "dry_base": (DRY | {"dry_multiplier": 0.5, "temperature": 0.0}, 1.1, 4.0),
    "dry_allowed_length": (DRY, 1, 3),
    "dry_penalty_last_n": (DRY, 60, 5),
    "dry_sequence_breakers": (DRY, [], ["a", "e", "t"]),
    "mirostat": ({}, 0, 2),
    "mirostat_tau": (MIROSTAT, 5.0, 1.5),
    "mirostat_eta": (MIROSTAT | {"mirostat_tau": 2.0}, 0.1, 0.8),
    "samplers": (
        {"top_k": 3, "repeat_penalty": 1.8},
        ["penalties", "top_k", "temperature"],
        ["top_k", "penalties", "temperature"],
    ),
    "seed": ({}, 3, 4),
    "logit_bias": ({}, [], [[ord("e"), 3.0]]),
}


@pytest.fixture(scope="module")
def graph(tiny_model_path: Path) -> Iterator[Graph]:
    config = {"n_ctx": 512, "threads": 1, "max_concurrent": 2, "max_tokens": N_TOKENS, "prompt_mode": "raw"}
    with Backend(config) as backend:
        yield backend.load_by_name(tiny_model_path)


def run(graph: Graph, sampling: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The text and the metadata of one run."""
    with graph.init_execution_context() as context:
        text = context.run_inference(PROMPT, {"sampling": PLAIN | sampling})
        return text, context.metadata


@changes(*(f"sampling.{key}" for key in EFFECTS))
@pytest.mark.parametrize("key", EFFECTS)
def test_another_value_gives_another_text(graph: Graph, key: str) -> None:
    needs, one, other = EFFECTS[key]
    texts = [run(graph, needs | {key: value})[0] for value in (one, one, other)]
    assert texts[0] == texts[1], "without a change of settings the text must stay the same"
    assert texts[0] != texts[2]


def test_mirostat_1_is_not_mirostat_2(graph: Graph) -> None:
    assert run(graph, {"mirostat": 1})[0] not in (run(graph, {})[0], run(graph, {"mirostat": 2})[0])


def test_a_random_seed_is_another_one_each_time(graph: Graph) -> None:
    assert len({run(graph, {"seed": -1})[0] for _ in range(3)}) == 3


@changes("sampling.ignore_eos")
def test_ignore_eos_goes_on_where_the_model_would_end(graph: Graph) -> None:
    # The end-of-generation token of the tiny model is a probable one: some of these runs meet it.
    ended = [run(graph, {"ignore_eos": False, "seed": seed})[1] for seed in range(5)]
    ignored = [run(graph, {"ignore_eos": True, "seed": seed})[1] for seed in range(5)]
    assert any(metadata["finish_reason"] == "stop" for metadata in ended)
    assert all(metadata["finish_reason"] == "length" for metadata in ignored)
    assert all(metadata["output_tokens"] == N_TOKENS for metadata in ignored)


def test_a_banned_token_never_comes(graph: Graph, tiny_model_path: Path) -> None:
    with load_llama().load_model(ModelParams(tiny_model_path)) as model:
        pieces = [model.vocabulary.piece(token, special=True) for token in range(model.vocabulary.n_tokens)]
    assert "e" in run(graph, {})[0]
    assert "e" not in run(graph, {"logit_bias": [[token, -100] for token, p in enumerate(pieces) if b"e" in p]})[0]


def test_a_bias_of_a_token_that_the_model_does_not_have_is_an_error(graph: Graph) -> None:
    with pytest.raises(InvalidArgument, match=r"sampling\.logit_bias names token 320, but the model's tokens are 0 to"):
        run(graph, {"logit_bias": [[5, 1.0], [320, -100]]})


@changes("sampling.n_probs")
def test_n_probs_shows_each_position(graph: Graph) -> None:
    assert "probabilities" not in run(graph, {"n_probs": 0})[1]
    for n_probs in (1, 5):
        text, metadata = run(graph, {"n_probs": n_probs})
        assert len(metadata["probabilities"]) == metadata["output_tokens"] == N_TOKENS
        assert "".join(position["text"] for position in metadata["probabilities"]) == text
        assert {len(position["top"]) for position in metadata["probabilities"]} == {n_probs}
