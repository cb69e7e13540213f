"""``sampling``: how the next token is chosen."""

from __future__ import annotations

from typing import Annotated, Final

from pydantic import Field

from wasi_nn_backend.config.section import INT32_MAX, Key, Section

__all__ = ["SamplingSettings"]

#: The penalty window is a ring buffer that llama.cpp allocates at once: 4 MiB at this length, 8 GiB at INT32_MAX.
_N_PENALTY_TOKENS_MAX: Final = 2**20

_Probability = Annotated[float, Field(ge=0.0, le=1.0)]
_PenaltyWindow = Annotated[int, Field(ge=-1, le=_N_PENALTY_TOKENS_MAX)]
_Penalty = Annotated[float, Field(ge=-2.0, le=2.0)]


class SamplingSettings(Section):
    """``temperature`` 0 is greedy. ``top_k`` 0 and -1 switch it off. ``penalty_last_n`` -1 is the whole window.

    ``seed`` -1 draws a new one for each generation.
    """

    temperature: Annotated[float, Field(ge=0.0, le=2.0), Key(("temp",), outside="default")] = 0.7
    top_p: _Probability = 0.9
    top_k: Annotated[int, Field(ge=-1, le=INT32_MAX)] = 40
    min_p: _Probability = 0.05
    typical_p: Annotated[_Probability, Key(("typ_p",))] = 1.0
    min_keep: Annotated[int, Field(ge=0, le=100)] = 1
    repeat_penalty: Annotated[float, Field(ge=0.1, le=2.0)] = 1.1
    presence_penalty: _Penalty = 0.0
    frequency_penalty: _Penalty = 0.0
    penalty_last_n: Annotated[_PenaltyWindow, Key(("repeat_last_n", "last_n_penalty"))] = 64
    seed: Annotated[int, Field(ge=-1, le=2**32 - 1), Key(outside="default")] = -1
    ignore_eos: Annotated[bool, Key(also_in=("stopping",))] = False
