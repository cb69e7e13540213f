"""Sampling under a grammar: which of the tokens may be chosen, from the configuration's sampling section.

llama.cpp has a sampler for this, which is not used. It ends the process where a token does not fit after all (a trigger
that is no text of the grammar is enough), and one token can keep it busy for minutes: thirty times ``[a-z]?`` take it
five seconds with 49,000 tokens, as it goes through every reading of every token. Here equal readings become one. The
tests hold both against each other, token for token.
"""

from __future__ import annotations

import logging
from typing import Final

import numpy as np
import numpy.typing as npt

from wasi_nn_backend.config.sampling import SamplingSettings
from wasi_nn_backend.errors import InvalidArgument, RuntimeFailure
from wasi_nn_backend.grammar import GrammarFollower, Place, Step, TokenText, json_schema_to_gbnf
from wasi_nn_backend.llama.interface import Context, TwoStepSampler, Vocabulary

__all__ = ["GrammarSampler", "open_grammar"]

_log = logging.getLogger(__name__)

_Tokens = npt.NDArray[np.int32]

#: The sets of tokens that fit are kept for the places last used: texts come back to the same few.
_N_PLACES_KEPT_MAX: Final = 8
#: How many tokens are tried, most probable first, that would trigger a grammar with a text that it forbids.
_N_TRIES_MAX: Final = 64


def open_grammar(sampling: SamplingSettings, vocabulary: Vocabulary) -> GrammarFollower | None:
    """None where no grammar is asked for. With both a grammar and a schema the schema holds, as in WasmEdge.

    Raises ``InvalidArgument`` for a grammar that is wrong, a schema that cannot be kept, and for a lazy grammar that
    nothing would switch on.
    """
    if not sampling.json_schema and not sampling.grammar:
        return None
    text = json_schema_to_gbnf(sampling.json_schema) if sampling.json_schema else sampling.grammar
    triggers = sampling.grammar_triggers
    if sampling.grammar_lazy and not triggers:
        raise InvalidArgument(
            "sampling.grammar_lazy is on and nothing would switch the grammar on: set grammar_triggers, or leave it off"
        )
    if triggers and not sampling.grammar_lazy:
        _log.warning("sampling.grammar_triggers are not waited for: grammar_lazy is off, so the grammar holds at once")
        triggers = ()

    def token_of(spelling: str) -> int | None:
        tokens = vocabulary.tokenize(spelling.encode(), add_special=False, parse_special=True)
        return tokens[0] if len(tokens) == 1 else None

    return GrammarFollower(text, triggers=triggers, token_of=token_of)


class GrammarSampler:
    """A ``Sampler`` that takes what another one chooses where that fits, else what it chooses among all that fits.

    llama.cpp's own programs do the same. A token that fits has the same probability as if only those that fit had been
    there from the beginning, but for stages that cut off unlikely tokens: at the first choice they see all tokens.

    Tokens without a text in the output fit only where the grammar names them, and the end only where a text may end.
    Not thread-safe; different samplers may sample one step's rows in parallel.
    """

    def __init__(self, sampler: TwoStepSampler, follower: GrammarFollower, vocabulary: Vocabulary) -> None:
        self._sampler = sampler
        self._follower = follower
        self._vocabulary = vocabulary
        self._ends = np.array(vocabulary.end_of_generation_tokens, dtype=np.int32)
        self._is_end = frozenset(vocabulary.end_of_generation_tokens)
        self._table = vocabulary.token_table  # here, in the caller's thread: its first use takes a moment
        self._fitting: dict[Place, _Tokens] = {}

    def sample(self, context: Context, row: int) -> int:
        """Raises what the other sampler raises, and ``RuntimeFailure`` when no token fits that its settings leave, or
        when the grammar has too many readings of the text."""
        token = self._sampler.choose(context, row)
        step = self._step(token)
        if step is None:
            token, step = self._choose_fitting(context, row, token)
        self._follower.take(step)
        self._sampler.accept(token)
        return token

    def accept(self, token: int) -> None:
        """For a prompt's tokens, which are not held to the grammar."""
        self._sampler.accept(token)

    def reset(self) -> None:
        self._follower.reset()
        self._sampler.reset()

    def close(self) -> None:
        """The tokens that were kept go too: an idle context keeps its last run, and they can be megabytes."""
        self._sampler.close()
        self._fitting.clear()

    def _step(self, token: int) -> Step | None:
        own, shown = (self._vocabulary.piece(token, special=special) for special in (True, False))
        return self._follower.after(TokenText(token, shown, own, token in self._is_end))

    def _choose_fitting(self, context: Context, row: int, refused: int) -> tuple[int, Step]:
        logits = context.logits(row)
        fitting = self._fitting_tokens()
        for _ in range(_N_TRIES_MAX):
            fitting = fitting[fitting != refused]
            refused = self._choose_among(fitting, logits)
            step = self._step(refused)
            if step is not None:
                return refused, step
        raise RuntimeFailure(
            "the tokens that would trigger the grammar all go on with what it forbids; choose a longer trigger"
        )

    def _choose_among(self, fitting: _Tokens, logits: npt.NDArray[np.float32]) -> int:
        if not len(fitting):
            raise RuntimeFailure(
                "no token of the model fits the grammar here: it asks for a character that the model does not have, or "
                "is at its end and the model has no token for that"
            )
        if np.isin(fitting, self._ends).all():
            return int(fitting[logits[fitting].argmax()])  # also where a bias bans it: there is no other way on
        return self._sampler.choose_among(fitting, logits[fitting])

    def _fitting_tokens(self) -> _Tokens:
        """All that fit at this place, ascending; every one while a trigger is waited for."""
        place = self._follower.place
        if place is None:
            return np.arange(self._vocabulary.n_tokens, dtype=np.int32)
        fitting = self._fitting.pop(place, None)
        if fitting is None:
            fitting = np.setdiff1d(self._follower.matcher.fitting(place, self._table), self._ends, assume_unique=True)
            fitting = np.union1d(fitting, self._ends) if place.can_end else fitting
        self._fitting[place] = fitting  # the last used is the last
        if len(self._fitting) > _N_PLACES_KEPT_MAX:
            del self._fitting[next(iter(self._fitting))]
        return fitting
