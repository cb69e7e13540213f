"""``sampling``: how the next token is chosen."""

from __future__ import annotations

from typing import Annotated, Any, Final

from pydantic import AfterValidator, BeforeValidator, Field

from wasi_nn_backend.config.grammar import GrammarTriggers, as_schema_text, check_grammar, check_schema
from wasi_nn_backend.config.section import INT32_MAX, Key, Section, text_of_at_most, texts_of_at_most
from wasi_nn_backend.config.token_choice import SAMPLER_NAMES, LogitBiases, SamplerOrder

__all__ = ["SamplingSettings"]

#: The windows of the penalties and of DRY are buffers that llama.cpp allocates at once: 4 MiB at this length, 8 GiB at
#: INT32_MAX.
_N_PENALTY_TOKENS_MAX: Final = 2**20

#: As much as a whole document; a mapping from Python could hold more.
_N_GRAMMAR_BYTES_MAX: Final = 2**20

#: llama.cpp looks at no more of each sequence breaker.
_N_BREAKER_BYTES_MAX: Final = 40
_N_BREAKERS_MAX: Final = 64

#: llama.cpp's LLAMA_DEFAULT_SEED, which programs that know its header send for "random".
_LLAMA_RANDOM_SEED: Final = 2**32 - 1

_Probability = Annotated[float, Field(ge=0.0, le=1.0)]
_TokenWindow = Annotated[int, Field(ge=-1, le=_N_PENALTY_TOKENS_MAX)]
_Penalty = Annotated[float, Field(ge=-2.0, le=2.0)]
_GrammarText = Annotated[str, text_of_at_most(_N_GRAMMAR_BYTES_MAX)]


def _as_seed(value: Any) -> Any:
    return -1 if type(value) is int and value == _LLAMA_RANDOM_SEED else value


class SamplingSettings(Section):
    """``temperature`` 0 is greedy. ``top_k`` 0 and -1 switch it off, ``top_n_sigma`` 0 and less. The windows
    ``penalty_last_n`` and ``dry_penalty_last_n`` count tokens, -1 is the whole context window and 0 is off.

    ``seed`` -1 draws a new one for each generation. ``samplers`` are the stages in their order, by llama.cpp's names;
    what is not in it does not run. ``n_probs`` is how many candidates of each position the metadata shows.
    ``logit_bias`` has (token, bias) pairs; -100 and less bans the token. ``json_schema`` is JSON text, whatever shape
    it came in. ``grammar_triggers`` are words, and regular expressions between slashes.
    """

    temperature: Annotated[
        float,
        Field(ge=0.0, le=2.0, description="0 takes the most probable token"),
        Key(("temp",), outside="default"),
    ] = 0.7
    dynatemp_range: Annotated[
        float,
        Field(ge=0.0, le=2.0, description="the temperature varies by so much with the model's certainty; 0 is off"),
    ] = 0.0
    dynatemp_exponent: Annotated[
        float, Field(ge=0.0, le=10.0, description="how the certainty turns into the temperature")
    ] = 1.0
    top_k: Annotated[int, Field(ge=-1, le=INT32_MAX, description="choose among so many; 0 and -1 are off")] = 40
    top_p: Annotated[
        _Probability, Field(description="choose among the most probable that together reach it; 1 is off")
    ] = 0.9
    min_p: Annotated[
        _Probability, Field(description="drop what is less probable than this part of the most probable; 0 is off")
    ] = 0.05
    typical_p: Annotated[_Probability, Field(description="locally typical sampling; 1 is off"), Key(("typ_p",))] = 1.0
    top_n_sigma: Annotated[
        float,
        Field(
            ge=-1.0, le=100.0, description="drop logits so many standard deviations below the highest; 0 and -1 are off"
        ),
    ] = -1.0
    xtc_probability: Annotated[
        _Probability, Field(description="how often XTC leaves out the most probable tokens; 0 is off")
    ] = 0.0
    xtc_threshold: Annotated[
        _Probability,
        Field(description="XTC leaves out tokens above this probability, except the last; above 0.5 it is off"),
    ] = 0.1
    min_keep: Annotated[
        int, Field(ge=1, le=100, description="candidates that `top_p`, `min_p`, `typical_p` and XTC leave at least")
    ] = 1
    repeat_penalty: Annotated[float, Field(ge=0.1, le=2.0, description="divides what was said before; 1 is off")] = 1.1
    presence_penalty: Annotated[_Penalty, Field(description="subtracted from what was said before; 0 is off")] = 0.0
    frequency_penalty: Annotated[
        _Penalty, Field(description="subtracted once for each time that it was said; 0 is off")
    ] = 0.0
    penalty_last_n: Annotated[
        _TokenWindow,
        Field(description="tokens that the penalties look back; -1: the whole window, 0: off"),
        Key(("repeat_last_n", "last_n_penalty")),
    ] = 64
    # The other spellings of the two DRY keys are WasmEdge's own.
    dry_multiplier: Annotated[
        float,
        Field(ge=0.0, le=100.0, description="strength of the penalty on repeated phrases (DRY); 0 is off"),
        Key(("dry_multipier",)),
    ] = 0.0
    dry_base: Annotated[
        float, Field(ge=1.0, le=100.0, description="the penalty grows by this factor with each repeated token")
    ] = 1.75
    dry_allowed_length: Annotated[
        int, Field(ge=1, le=_N_PENALTY_TOKENS_MAX, description="tokens that may be repeated for nothing")
    ] = 2
    dry_penalty_last_n: Annotated[
        _TokenWindow,
        Field(description="tokens that DRY looks back; -1: the whole window, 0: off"),
        Key(("dry_last_n_penalty",)),
    ] = -1
    dry_sequence_breakers: Annotated[
        tuple[Annotated[str, text_of_at_most(_N_BREAKER_BYTES_MAX)], ...],
        *texts_of_at_most(_N_BREAKERS_MAX),
        Field(description="texts at which DRY begins anew; up to 64 of 40 bytes"),
        Key(outside="error"),
    ] = ("\n", ":", '"', "*")
    mirostat: Annotated[
        int,
        Field(
            ge=0,
            le=2,
            description="Mirostat of version 1 or 2 instead of all of `samplers` but the temperature; 0 is off",
        ),
    ] = 0
    mirostat_tau: Annotated[float, Field(ge=0.0, le=100.0, description="the surprise that Mirostat aims at")] = 5.0
    mirostat_eta: Annotated[float, Field(ge=0.0, le=1.0, description="how fast Mirostat learns")] = 0.1
    samplers: Annotated[
        SamplerOrder,
        Field(description='which samplers run, in their order; names, or llama.cpp\'s letters (`"edskypmxt"`)'),
    ] = SAMPLER_NAMES
    seed: Annotated[
        int,
        BeforeValidator(_as_seed, json_schema_input_type=int),
        Field(ge=-1, le=2**31, description="equal seeds give equal texts; -1 draws a new one each time"),
        Key(outside="default"),
    ] = -1
    n_probs: Annotated[
        int,
        Field(
            ge=0,
            le=100,
            description="the metadata show the model's own probability of each token and of so many others",
        ),
        Key(("logprobs",)),
    ] = 0
    ignore_eos: Annotated[
        bool, Field(description="go on when the model would end; also in `stopping`"), Key(also_in=("stopping",))
    ] = False
    logit_bias: Annotated[
        LogitBiases,
        Field(description="`[[token, bias], ...]` is added to the tokens' logits; -100 and less bans one"),
    ] = ()
    grammar: Annotated[
        _GrammarText,
        AfterValidator(check_grammar),
        Field(description="a GBNF grammar that the text follows, from its rule `root`"),
    ] = ""
    json_schema: Annotated[
        _GrammarText,
        BeforeValidator(as_schema_text, json_schema_input_type=str | dict[str, Any] | bool),
        AfterValidator(check_schema),
        Field(description="a JSON schema, or a string that holds one: the text is JSON that follows it"),
    ] = ""
    grammar_lazy: Annotated[bool, Field(description="the grammar begins to hold at one of `grammar_triggers`")] = False
    grammar_triggers: Annotated[
        GrammarTriggers, Field(description="words, and regular expressions between slashes; up to 64")
    ] = ()
