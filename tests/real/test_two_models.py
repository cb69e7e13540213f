"""Two real models in one backend, and one put in the other's place while it serves."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from wasi_nn_backend import Backend, InvalidArgument

pytestmark = pytest.mark.real

CONFIG = {"temperature": 0, "repeat_penalty": 1.0, "max_tokens": 12, "n_ctx": 512, "max_concurrent": 3}
PROMPT = "Name the capital city of France."


def first_line(answer: str) -> str:
    """As far as an answer is the same alone and in a batch: what the base model says then is a matter of rounding."""
    return answer.split("\n", maxsplit=1)[0]


def test_interleaved_calls_and_a_reload_under_load(smollm2_path: Path, gemma_path: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(smollm2_path.read_bytes()[:100_000])
    with Backend(CONFIG) as backend, ThreadPoolExecutor(4) as threads:
        paths = {"small": smollm2_path, "gemma": gemma_path}
        for name, path in paths.items():
            backend.register(name, path)
        graphs = {name: backend.load_by_name(name) for name in paths}
        alone = {
            name: first_line(graph.init_execution_context().run_inference(PROMPT)) for name, graph in graphs.items()
        }
        assert alone["gemma"] != alone["small"]
        assert "Paris" in alone["gemma"] or "Paris" in alone["small"]

        def ask(name: str) -> str:
            with graphs[name].init_execution_context() as context:
                return first_line(context.run_inference(PROMPT))

        names = ["small", "gemma"] * 4
        assert list(threads.map(ask, names)) == [alone[name] for name in names]

        swapped = threading.Event()

        def ask_on(_: int) -> list[str]:
            answers = []
            while not swapped.is_set():
                answers.append(ask("small"))
            # The last one may have begun before the reload: one more is surely served by the new model.
            return [*answers, ask("small")]

        asking = [threads.submit(ask_on, n) for n in range(3)]
        try:
            model = graphs["small"].model
            with pytest.raises(InvalidArgument):
                backend.reload("small", broken)
            assert (graphs["small"].path, graphs["small"].model) == (smollm2_path, model)
            assert ask("small") == alone["small"]
            backend.reload("small", gemma_path)
        finally:
            swapped.set()
        answers = [answer for future in asking for answer in future.result(timeout=120)]  # raises what a call raised
        assert set(answers) == set(alone.values())
        assert ask("small") == ask("gemma") == alone["gemma"]
