"""Many users at once on the tiny model with real llama.cpp: each call ends in one way, with the text it has alone.

Weights and cache are in f32, where near ties do not change a text: so all texts are equal, not only alike. SmolLM2 does
the same in ``tests/real/test_many_users.py``.
"""

from __future__ import annotations

from pathlib import Path

from tests.conftest import F32_CACHE
from tests.many_users import CONFIG, Crowd, Plan, count_outcomes, leaves_nothing, texts_alone
from wasi_nn_backend import Backend

N_THREADS = 24
PLAN = Plan(
    n_calls=120,
    n_sessions=40,
    prompts=[f"All of these begin with the same words, and number {n} goes on." for n in range(6)],
    lengths=(4, 16, 40),
    timeout_max_ms=40,
)


def test_every_call_ends_in_one_way_and_texts_are_those_alone(tiny_f32_model_path: Path) -> None:
    limits = {"max_concurrent": 6, "max_sessions": PLAN.n_sessions + 1, "queue_reject_threshold": 12}
    with leaves_nothing(), Backend(CONFIG | F32_CACHE | limits | {"n_ctx": 256, "threads": 1}) as backend:
        graph = backend.load_by_name(tiny_f32_model_path)
        expected = texts_alone(graph, PLAN)
        endings = Crowd(graph, PLAN.n_sessions).run(PLAN.calls(seed=1), N_THREADS)
        assert len(endings) == PLAN.n_calls
        assert set(count_outcomes(endings)) == {"text", "timeout", "cancelled", "refused"}
        for ending in endings:
            if ending.outcome == "text":
                assert ending.text == expected[ending.call.prompt, ending.call.n_tokens]
        assert len(backend.sessions) == 0
