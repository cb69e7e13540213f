"""The keys ``grammar``, ``json_schema``, ``grammar_lazy`` and ``grammar_triggers``, over llama.cpp's tiny model."""

from __future__ import annotations

import json
import logging
import re
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tests.effects import changes
from tests.json_schemas import ACCEPTED, complaint
from wasi_nn_backend import Backend, Graph, InvalidArgument, RuntimeFailure
from wasi_nn_backend.dialects import WASMEDGE
from wasi_nn_backend.grammar import Matcher, Place, TokenTable

PROMPT = "the cat sat on the mat"
WORDS = 'root ::= [a-z]{3,12} (" " [a-z]{3,12}){2} "."'
#: Without the stages that cut off unlikely tokens, most of what a model with random weights says is refused.
PLAIN: dict[str, Any] = {"seed": 3, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repeat_penalty": 1.0}


@pytest.fixture(scope="module")
def graph(tiny_model_path: Path) -> Iterator[Graph]:
    config = {"n_ctx": 1024, "threads": 1, "max_concurrent": 8, "max_tokens": 150, "prompt_mode": "raw"}
    with Backend(config) as backend:
        yield backend.load_by_name(tiny_model_path)


def run(graph: Graph, sampling: dict[str, Any], **stopping: Any) -> tuple[str, dict[str, Any]]:
    """The text and the metadata of one run."""
    with graph.init_execution_context() as context:
        text = context.run_inference(PROMPT, {"sampling": PLAIN | sampling, "stopping": stopping})
        return text, context.metadata


@changes("sampling.grammar")
def test_the_text_follows_the_grammar_and_ends_with_it(graph: Graph) -> None:
    for seed in range(5):
        assert not re.fullmatch(r"[a-z]{3,12}( [a-z]{3,12}){2}\.", run(graph, {"seed": seed})[0])
        text, metadata = run(graph, {"seed": seed, "grammar": WORDS})
        assert re.fullmatch(r"[a-z]{3,12}( [a-z]{3,12}){2}\.", text)
        assert metadata["finish_reason"] == "stop"


@changes("sampling.json_schema")
def test_the_text_follows_the_schema(graph: Graph) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 3, "maximum": 5}}, "required": ["n"]}
    for shape in (schema, json.dumps(schema)):
        text, metadata = run(graph, {"json_schema": shape})
        assert json.loads(text)["n"] in (3, 4, 5)
        assert metadata["finish_reason"] == "stop"


def test_a_grammar_takes_the_place_of_a_schema_from_before(graph: Graph) -> None:
    schema = {"json_schema": {"type": "integer"}}
    with graph.init_execution_context(schema) as context:
        assert context.run_inference(PROMPT, {"sampling": PLAIN}).isdigit()
        assert context.run_inference(PROMPT, {"sampling": PLAIN | {"grammar": 'root ::= "yes"'}}) == "yes"
        assert not context.run_inference(PROMPT, {"sampling": PLAIN | {"grammar": ""}}).isdigit()
        both = PLAIN | schema | {"grammar": 'root ::= "yes"'}
        assert context.run_inference(PROMPT, {"sampling": both}).isdigit()


@changes("sampling.grammar_lazy", "sampling.grammar_triggers")
def test_a_lazy_grammar_waits_for_its_triggers(graph: Graph) -> None:
    grammar = {"grammar": 'root ::= [a-z] "!" [A-Z]{5}'}
    free, _ = run(graph, {})
    assert re.fullmatch("[a-z]![A-Z]{5}", run(graph, grammar)[0])
    letter = next(letter for letter in "qjxz" if letter in free)
    for trigger in (letter, f"/[{letter}]/"):
        text, metadata = run(graph, grammar | {"grammar_lazy": True, "grammar_triggers": [trigger]})
        before, _, after = text.partition(letter)
        assert before
        assert free.startswith(before)
        assert re.fullmatch("![A-Z]{5}", after)
        assert metadata["finish_reason"] == "stop"
    never = grammar | {"grammar_lazy": True, "grammar_triggers": ["/€€€/"]}
    assert run(graph, never)[0] == free


def test_a_lazy_grammar_needs_triggers(graph: Graph) -> None:
    with pytest.raises(InvalidArgument, match="grammar_triggers"):
        run(graph, {"grammar": WORDS, "grammar_lazy": True})
    assert run(graph, {"grammar": "", "grammar_lazy": True})[0] == run(graph, {})[0]


def test_triggers_without_a_lazy_grammar_are_not_waited_for(graph: Graph, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert run(graph, {"grammar": WORDS, "grammar_triggers": ["a"]})[0] == run(graph, {"grammar": WORDS})[0]
    assert "grammar_lazy is off" in caplog.text


def test_the_schema_holds_where_there_are_both(graph: Graph) -> None:
    assert run(graph, {"grammar": WORDS, "json_schema": {"const": 5}})[0] == "5"
    assert run(graph, {"grammar": 'root ::= "x"', "json_schema": ""})[0] == "x"


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.0},
        {"temperature": 0.0, "repeat_penalty": 1.3},
        {"top_k": 40},
        {"top_k": 1},
        {"top_p": 0.1, "typical_p": 0.5},
        {"temperature": 2.0, "xtc_probability": 1.0, "xtc_threshold": 0.01},
        {"mirostat": 2},
        {"mirostat": 1},
        {"dry_multiplier": 2.0, "repeat_penalty": 1.5},
        {"dynatemp_range": 1.0, "top_n_sigma": 1.0},
        {"n_probs": 3},
    ],
    ids=str,
)
def test_whatever_else_is_set(graph: Graph, sampling: dict[str, Any]) -> None:
    texts = [run(graph, sampling | {"grammar": WORDS})[0] for _ in range(2)]
    assert re.fullmatch(r"[a-z]{3,12}( [a-z]{3,12}){2}\.", texts[0])
    assert texts[0] == texts[1], "one seed, one text"


def test_a_grammar_that_refuses_nothing_changes_nothing(graph: Graph) -> None:
    for sampling in ({}, {"top_k": 40}, {"temperature": 0.0}):
        text, metadata = run(graph, sampling)
        under, metadata_under = run(graph, sampling | {"grammar": "root ::= .*"})
        n_same = next(
            (n for n, (a, b) in enumerate(zip(text, under, strict=False)) if a != b), min(len(text), len(under))
        )
        assert n_same > 20  # sooner or later the model says bytes that are no text
        assert metadata["finish_reason"] in ("stop", "length")
        assert metadata_under["finish_reason"] in ("stop", "length")


def test_ignore_eos_cannot_keep_a_complete_text_going(graph: Graph) -> None:
    text, metadata = run(graph, {"grammar": 'root ::= "yes" | "no"', "ignore_eos": True})
    assert (text in ("yes", "no"), metadata["finish_reason"]) == (True, "stop")


def test_stop_strings_and_limits_end_it_as_ever(graph: Graph) -> None:
    endless = {"grammar": 'root ::= [a-z ]+ "."'}
    assert run(graph, endless, max_tokens=7)[1]["finish_reason"] == "length"
    assert run(graph, endless, max_tokens=150, stop=["e"])[1]["finish_reason"] == "stop_string"
    reason = run(graph, endless, max_tokens=-1, max_time_ms=30)[1]["finish_reason"]
    assert reason in ("time_limit", "stop", "context_full")


def test_a_grammar_that_no_token_fits_ends_its_run_and_no_other(graph: Graph) -> None:
    """The model's tokens are bytes, so every character can be said but NUL. The bans leave none."""
    others = {"sampling": PLAIN | {"grammar": WORDS}}
    dead = {"sampling": PLAIN | {"grammar": 'root ::= "é"+', "logit_bias": [[0xC3, -100]]}}
    alone = run(graph, {"grammar": WORDS})[0]

    def in_company(config: dict[str, Any]) -> str:
        with graph.init_execution_context() as context:
            return context.run_inference(PROMPT, config)

    with ThreadPoolExecutor(6) as pool:
        futures = [pool.submit(in_company, config) for config in (others, dead, others, dead, others, others)]
        assert [future.result() for future in futures[::2]] == [alone] * 3
        for future in (futures[1], futures[3]):
            with pytest.raises(RuntimeFailure, match="no token is left"):
                future.result()


def test_the_text_so_far_is_kept_where_a_grammar_leads_nowhere(graph: Graph) -> None:
    config = {"sampling": PLAIN | {"grammar": 'root ::= "ab" "é"', "logit_bias": [[0xC3, -100]]}}
    with graph.init_execution_context(config) as context:
        context.set_input(0, PROMPT)
        with pytest.raises(RuntimeFailure):
            context.compute()
        assert context.get_output(0) == b"ab"
        assert context.metadata["finish_reason"] == "error"


def test_too_many_readings_end_the_run(graph: Graph) -> None:
    ambiguous = 'root ::= y{1,60}\ny ::= x{1,60}\nx ::= "a"{1,60}'
    with pytest.raises(RuntimeFailure, match="too many readings"):
        run(graph, {"grammar": ambiguous, "ignore_eos": True})


def test_token_by_token(graph: Graph) -> None:
    with graph.init_execution_context({"sampling": PLAIN | {"grammar": WORDS}}) as context:
        assert "".join(context.stream(PROMPT)) == run(graph, {"grammar": WORDS})[0]


NAMES = [name for at, name in enumerate(ACCEPTED) if at % 3 == 0]


def test_what_a_model_with_random_weights_says_fits_the_schemas(graph: Graph) -> None:
    def answer(name: str) -> tuple[str, dict[str, Any]]:
        return run(graph, {"json_schema": ACCEPTED[name]})

    with ThreadPoolExecutor(8) as pool:
        ended = 0
        for name, (text, metadata) in zip(NAMES, pool.map(answer, NAMES), strict=True):
            if metadata["finish_reason"] == "stop":
                ended += 1
                assert complaint(ACCEPTED[name], json.loads(text)) is None, f"{name}: {text}"
    assert ended > len(NAMES) // 2


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"grammar": 'root ::= "a'}, "grammar .* line 1, column 10: a text in quotes does not end"),
        ({"json-schema": {"type": "array", "uniqueItems": True}}, "json-schema .* at #/uniqueItems"),
        ({"json-schema": "{"}, "json-schema .* line 1, column 2"),
        ({"sampling": {"grammar_triggers": ["/(/"]}}, r"sampling\.grammar_triggers .* at character 1"),
        ({"grammar": 5}, "grammar is the integer 5"),
    ],
)
def test_a_wrong_grammar_is_refused_where_it_is_set(graph: Graph, config: dict[str, Any], words: str) -> None:
    with graph.init_execution_context() as context:
        with pytest.raises(InvalidArgument, match=words):
            context.set_input(1, json.dumps(config))
        context.set_input(0, PROMPT)
        context.compute()  # nothing has changed


def test_a_token_that_the_model_does_not_have_is_refused_when_it_runs(graph: Graph) -> None:
    assert run(graph, {"grammar": 'root ::= "a" <[98]> <|im_start|> "c"'})[0] == "abc"
    with pytest.raises(InvalidArgument, match="<think> is not one token of this model"):
        run(graph, {"grammar": 'root ::= <think> "a"'})


def test_control_tokens_do_not_pass_for_their_texts(graph: Graph) -> None:
    text, metadata = run(graph, {"grammar": 'root ::= "<|im_start|>" "x"', "temperature": 2.0})
    assert text == "<|im_start|>x"
    assert metadata["output_tokens"] > 2


def test_an_idle_context_keeps_no_lists_of_fitting_tokens(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[npt.NDArray[np.int32]]] = []
    fitting_of = Matcher.fitting

    def fitting(self: Matcher, place: Place, table: TokenTable) -> npt.NDArray[np.int32]:
        found = fitting_of(self, place, table)
        made.append(weakref.ref(found))
        return found

    monkeypatch.setattr(Matcher, "fitting", fitting)
    monkeypatch.setattr(np, "setdiff1d", lambda found, _ends, assume_unique: found)  # it would copy the list
    with graph.init_execution_context() as context:
        context.run_inference(PROMPT, {"sampling": PLAIN | {"grammar": WORDS}})
        context.statistics()  # the engine has gone on from that run
        assert made
        assert context.get_output()
        assert not any(each() is not None for each in made)


def test_guests_of_wasmedge_have_both_keys(tiny_model_path: Path) -> None:
    with Backend({"n_ctx": 256, "max_tokens": 60}) as backend:
        backend.register("default", tiny_model_path)
        graph = backend.load_by_name("default", door=WASMEDGE.door)
        with graph.init_execution_context() as context:
            for metadata, text in (
                (b'{"grammar": "root ::= \\"ab\\""}', b"ab"),
                (b'{"json-schema": "{\\"const\\": 7}"}', b"7"),
            ):
                context.set_input(1, metadata)
                context.set_input(0, PROMPT)
                context.compute()
                assert context.get_output(0) == text
            for metadata in (
                b'{"grammar": "root ::= ("}',
                b'{"json-schema": "{"}',
                b'{"json-schema": "{\\"not\\": {}}"}',
            ):
                with pytest.raises(InvalidArgument) as error:
                    context.set_input(1, metadata)
                assert WASMEDGE.errnos[error.value.code] == 1
