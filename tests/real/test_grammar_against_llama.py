"""Grammars beside llama.cpp's own: the same tokens fit at every place of a text, and the same are chosen.

llama.cpp ends the process over some grammars, so it is only given such as were read and checked here.
"""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tests.json_schemas import ACCEPTED, complaint
from wasi_nn_backend import Backend
from wasi_nn_backend.config import Settings
from wasi_nn_backend.config.sampling import SamplingSettings
from wasi_nn_backend.grammar import GrammarFollower, Matcher, json_schema_to_gbnf
from wasi_nn_backend.llama import load_llama
from wasi_nn_backend.llama.bindings import native
from wasi_nn_backend.llama.interface import ContextParams, DecodeBatch, DecodeStatus, ModelParams
from wasi_nn_backend.llama.model import NativeModel
from wasi_nn_backend.llama.owner import Hold
from wasi_nn_backend.llama.token_array import TokenArray
from wasi_nn_backend.sampling import GrammarSampler, build_stages

PROMPT = b"the cat sat on the mat"

#: Beside the schemas. None names tokens, for which llama.cpp's search is wrong (see ``test_grammar_matcher``).
GRAMMARS = {
    "words": 'root ::= [a-z]{3,12} (" " [a-z]{3,12}){0,5} "."',
    "any": "root ::= [^\\n]*",
    "bytes": 'root ::= ("é" | "€" | "😀" | [à-ü])+ "."',
    "ambiguous": 'root ::= ("a" | "b" | "ab" | "th" | "e"){1,20} [ae]? [ae]? "."',
    "nested": 'root ::= s\ns ::= "(" s ")" s | "[" s "]" | [a-z]* | ""\n',
    "lists": 'root ::= item ("\\n" item)*\nitem ::= "- " [^\\n]{1,40}',
}
SCHEMAS = [name for at, name in enumerate(ACCEPTED) if at % 4 == 0]


def grammar_of(name: str) -> str:
    return GRAMMARS[name] if name in GRAMMARS else json_schema_to_gbnf(json.dumps(ACCEPTED[name]))


class LlamaGrammar:
    """llama.cpp's sampler of a grammar. ``choose`` is what its own programs do with it (``common_sampler_sample``)."""

    def __init__(self, model: NativeModel, text: str) -> None:
        self._n_vocab = model.vocabulary.n_tokens
        with Hold(model.links.model) as pointer:
            vocabulary = native.llama_model_get_vocab(pointer)
            self._sampler: Any = native.llama_sampler_init_grammar(vocabulary, text.encode(), b"root")
        assert self._sampler

    def fitting(self) -> set[int]:
        array = self._array(np.zeros(self._n_vocab, dtype=np.float32))
        array.apply(self._sampler)
        return set(np.flatnonzero(array.logits == 0.0).tolist())

    def choose(self, chain: Any, logits: npt.NDArray[np.float32]) -> int:
        token = self._array(logits).chosen_by(chain)
        alone = TokenArray(1)
        alone.fill(np.array([token], dtype=np.int32), np.zeros(1, dtype=np.float32))
        alone.apply(self._sampler)
        if np.isfinite(alone.logits[0]):
            return token
        array = self._array(logits)
        array.apply(self._sampler)
        return array.chosen_by(chain)

    def accept(self, token: int) -> None:
        native.llama_sampler_accept(self._sampler, token)

    def close(self) -> None:
        native.llama_sampler_free(self._sampler)

    def _array(self, logits: npt.NDArray[np.float32]) -> TokenArray:
        array = TokenArray(self._n_vocab)
        array.fill(np.arange(self._n_vocab, dtype=np.int32), logits)
        return array


@pytest.fixture(scope="module")
def model(tiny_model_path: Path) -> Iterator[NativeModel]:
    with load_llama().load_model(ModelParams(tiny_model_path)) as model:
        yield model


def assert_same_tokens_fit(model: NativeModel, text: str, chance: random.Random) -> None:
    """At each place of a text that is spoken at random."""
    vocabulary = model.vocabulary
    shown = {token for token in range(vocabulary.n_tokens) if vocabulary.piece(token, special=False)}
    ends = set(vocabulary.end_of_generation_tokens)
    theirs, matcher = LlamaGrammar(model, text), Matcher(text)
    place = matcher.start
    for _ in range(12):
        fitting = theirs.fitting()
        mine = set(matcher.fitting(place, vocabulary.token_table).tolist()) - ends
        assert mine <= fitting
        # There, a control token's own text fits, though nobody would see it, and bytes that begin no character.
        for token in (fitting & shown) - ends - mine:
            assert not begins_utf8(place.pending + vocabulary.piece(token, special=False))
        assert place.can_end is bool(fitting & ends)
        if not mine:
            break
        token = chance.choice(sorted(mine))
        place = matcher.after(place, token, vocabulary.piece(token, special=False))
        theirs.accept(token)
    theirs.close()


def begins_utf8(text: bytes) -> bool:
    for n_bytes in range(4):
        for rest in product(b"\x80\x90\xa0\xbf", repeat=n_bytes):
            with contextlib.suppress(UnicodeDecodeError):
                (text + bytes(rest)).decode()
                return True
    return False


@pytest.mark.parametrize("name", [*GRAMMARS, *SCHEMAS])
def test_the_same_tokens_fit(model: NativeModel, name: str) -> None:
    for seed in range(3):
        assert_same_tokens_fit(model, grammar_of(name), random.Random(seed))


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.0},
        {"temperature": 0.0, "repeat_penalty": 1.5},
        {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
        {"temperature": 1.0, "top_k": 40},
        {"temperature": 1.5, "top_k": 5, "min_p": 0.1, "frequency_penalty": 0.5},
        {"temperature": 1.0, "top_k": 200, "top_p": 0.8, "dry_multiplier": 1.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["words", "nested", "ambiguous"])
def test_the_same_tokens_are_chosen(model: NativeModel, name: str, sampling: dict[str, Any]) -> None:
    settings = Settings(sampling=SamplingSettings(seed=5, **sampling))
    stages = build_stages(settings, model.vocabulary, 256)
    text = GRAMMARS[name]
    mine = GrammarSampler(model.create_sampler(stages), GrammarFollower(text), model.vocabulary)
    theirs, chain = LlamaGrammar(model, text), model.links.chain(stages)
    with model.create_context(ContextParams(n_ctx=256)) as context:
        tokens, position = model.vocabulary.tokenize(PROMPT, add_special=True, parse_special=False), 0
        batch = DecodeBatch()
        for _ in range(80):
            batch.clear()
            row = batch.add(tokens, position, 0, logits_for_last=True)
            assert context.decode(batch) is DecodeStatus.DONE
            position += len(tokens)
            expected = theirs.choose(chain, context.logits(row))
            native.llama_sampler_accept(chain, expected)
            assert mine.sample(context, row) == expected
            if model.vocabulary.is_end_of_generation(expected):
                break
            theirs.accept(expected)
            tokens = [expected]
    theirs.close()
    native.llama_sampler_free(chain)


@pytest.mark.real
def test_the_same_tokens_of_a_real_vocabulary_fit(smollm2_path: Path) -> None:
    with load_llama().load_model(ModelParams(smollm2_path)) as model:
        for name in ("any", "bytes", "lists", "open object", "short string", "reference to itself"):
            assert_same_tokens_fit(model, grammar_of(name), random.Random(name))


@pytest.mark.real
def test_what_a_real_model_says_fits_its_schema(smollm2_path: Path) -> None:
    """All schemas at once, in one batch; they share the prompt, too."""
    assert len(ACCEPTED) >= 50
    backend = {"max_concurrent": len(ACCEPTED), "default_task_timeout_ms": 0}
    with Backend({"backend": backend, "n_ctx": 192, "max_tokens": 64, "seed": 1, "temperature": 0.8}) as opened:
        graph = opened.load_by_name(smollm2_path)

        def answer(schema: Any) -> tuple[str, str]:
            with graph.init_execution_context({"json_schema": schema}) as context:
                text = context.run_inference("Give me a short example, as JSON.")
                return text, context.metadata["finish_reason"]

        with ThreadPoolExecutor(len(ACCEPTED)) as pool:
            answers = list(pool.map(answer, ACCEPTED.values()))
    ended = [(name, text) for name, (text, reason) in zip(ACCEPTED, answers, strict=True) if reason == "stop"]
    assert len(ended) > 40
    for name, text in ended:
        assert complaint(ACCEPTED[name], json.loads(text)) is None, f"{name}: {text}"
