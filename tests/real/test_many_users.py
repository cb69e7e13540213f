"""64 threads, 100 sessions and 500 calls at once on SmolLM2: each call ends in one way, and nothing is left behind.

Texts are compared with those of the same calls alone. With weights of four bits llama.cpp's logits depend on the shape
of the batch: a last bit that flips the rounding of an activation moves log probabilities, by 0.22 at most among 2,160
that were compared. So a text may part from the one alone, but only at a token where the model alone finds both ways as
probable as that, and most must be equal. In ``tests/unit/test_many_users.py``, on a model without such ties, all are.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from tests.many_users import CONFIG, Crowd, Ending, Plan, count_outcomes, leaves_nothing, texts_alone
from wasi_nn_backend import Backend, Graph

pytestmark = pytest.mark.real

N_THREADS = 64
TOPICS = ("the sea", "a dog", "snow", "bread", "trains", "the moon", "a king", "rivers", "chess", "glass", "bees")
PLAN = Plan(
    n_calls=500,
    n_sessions=100,
    prompts=[f"Once upon a time there was a small story, and it was about {topic}. It" for topic in TOPICS],
    lengths=(3, 8, 16),
    timeout_max_ms=2000,
)
#: Of log probabilities: about twice what rounding was seen to do.
NEAR_TIE = 0.5


@pytest.mark.timeout(290)
def test_500_calls_of_100_sessions_on_64_threads(smollm2_path: Path) -> None:
    limits = {"max_concurrent": 8, "max_sessions": PLAN.n_sessions + 1, "queue_reject_threshold": 52}
    with leaves_nothing(), Backend(CONFIG | limits | {"n_ctx": 256}) as backend:
        graph = backend.load_by_name(smollm2_path)
        alone, expected = candidates_alone(graph), texts_alone(graph, PLAN)
        endings = Crowd(graph, PLAN.n_sessions).run(PLAN.calls(seed=1), N_THREADS)
        outcomes = count_outcomes(endings)
        print(dict(outcomes))
        assert len(endings) == PLAN.n_calls
        assert set(outcomes) == {"text", "timeout", "cancelled", "refused"}
        others = [
            ending
            for ending in endings
            if ending.outcome == "text" and ending.text != expected[ending.call.prompt, ending.call.n_tokens]
        ]
        assert len(others) <= outcomes["text"] / 4
        for ending in others:
            assert parts_at_a_near_tie(ending, alone[ending.call.prompt])
        assert len(backend.sessions) == 0


def candidates_alone(graph: Graph) -> dict[str, list[dict[str, Any]]]:
    """For each prompt the tokens of its longest text alone, each with the most probable others."""
    config = {"enable_token_cache_reuse": False, "n_probs": 5, "max_tokens": max(PLAN.lengths)}
    with graph.init_execution_context(config) as context:
        found = {}
        for prompt in PLAN.prompts:
            context.run_inference(prompt)
            found[prompt] = context.metadata["probabilities"]
        return found


def parts_at_a_near_tie(ending: Ending, positions: list[dict[str, Any]]) -> bool:
    """Whether the first token that differs was nearly as probable alone as the one that was chosen there."""
    rest = ending.text
    for position in positions:
        if rest.startswith(position["text"]):
            rest = rest[len(position["text"]) :]
            continue
        return any(
            math.log(position["probability"] / other["probability"]) < NEAR_TIE
            for other in position["top"]
            if other["token"] != position["token"] and rest.startswith(other["text"])
        )
    return False
