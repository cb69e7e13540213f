"""The measurement of KV layouts and flash attention on llama.cpp itself. No test here says what must be faster."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from wasi_nn_backend import Backend
from wasi_nn_backend.llama import load_llama
from wasi_nn_backend.llama.attention_probe import AttentionOption, AttentionWork, measure
from wasi_nn_backend.llama.interface import ContextParams, ModelParams
from wasi_nn_backend.llama.model import NativeModel

TINY = AttentionWork(2, 1, 32, n_tokens=100, n_sequences=2, n_threads=1, cache_type_k="f16", cache_type_v="f16")
SMOLLM2 = AttentionWork(9, 3, 64, n_tokens=230, n_sequences=4, n_threads=1, cache_type_k="f16", cache_type_v="f16")
GEMMA = replace(SMOLLM2, n_heads=4, n_kv_heads=1, n_embd_head=256)
OPTIONS = tuple(
    AttentionOption(layout, flash_attention)  # type: ignore[arg-type]
    for layout in ("streams", "unified")
    for flash_attention in ("off", "on")
)


def load(path: Path) -> NativeModel:
    return NativeModel(ModelParams(path), load_llama().log, use_extra_buffers=False)


@pytest.mark.parametrize("work", [TINY, SMOLLM2, GEMMA], ids=["tiny", "SmolLM2", "Gemma"])
def test_llama_cpp_runs_stand_ins_of_every_shape(work: AttentionWork) -> None:
    samples = measure(work, OPTIONS, load, time.perf_counter, 0.2)
    assert OPTIONS[0] in samples
    assert all(len(times) >= 5 and min(times) > 0 for times in samples.values())


@pytest.mark.parametrize("cache_type", ["f32", "bf16", "q8_0"])
def test_other_caches_are_measured_as_they_are(cache_type: str) -> None:
    work = replace(SMOLLM2, cache_type_k=cache_type, cache_type_v=cache_type)
    flash = [option for option in OPTIONS if option.flash_attention == "on"]
    assert flash[0] in measure(work, flash, load, time.perf_counter, 0.2)


class TestModel:
    @pytest.fixture(autouse=True)
    def cache_path(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setenv("WASI_NN_ATTENTION_PROBE", "1")
        return tmp_path / "wasi-nn-backend" / "attention.json"

    @pytest.fixture
    def model(self, tiny_model_path: Path) -> Iterator[NativeModel]:
        with load_llama().load_model(ModelParams(tiny_model_path)) as model:
            yield model

    def test_a_model_chooses_by_measurement(self, model: NativeModel, cache_path: Path) -> None:
        params = ContextParams(n_ctx=256, n_sequences=2)
        choice = model.choose_attention(params, ("streams", "unified"))
        assert "measure" in choice.reason
        assert choice.flash_attention in ("on", "off")
        chosen = replace(params, kv_layout=choice.kv_layout, flash_attention=choice.flash_attention)
        model.create_context(chosen).close()
        if cache_path.exists():  # it was not disturbed
            assert len(json.loads(cache_path.read_text())["entries"]) == 1
            assert "measured earlier" in model.choose_attention(params, ("streams", "unified")).reason

    def test_what_llama_cpp_refuses_leaves_the_rule(self, model: NativeModel, cache_path: Path) -> None:
        params = ContextParams(n_ctx=512, n_sequences=2, n_threads=100_000)
        choice = model.choose_attention(params, ("streams", "unified"))
        assert (choice.kv_layout, choice.flash_attention) == ("streams", "off")
        assert "n_threads" in choice.reason
        assert not cache_path.exists()

    @pytest.mark.parametrize("layout", ["auto", "streams", "unified"])
    def test_a_graph_runs_with_what_was_chosen_and_says_so(
        self, tiny_model_path: Path, caplog: pytest.LogCaptureFixture, layout: str
    ) -> None:
        caplog.set_level(logging.INFO, logger="wasi_nn_backend")
        config = {"n_ctx": 256, "max_concurrent": 2, "kv_layout": layout, "max_tokens": 4, "temperature": 0}
        with Backend(config | {"default_task_timeout_ms": 0}) as backend:
            graph = backend.load_by_name(str(tiny_model_path))
            assert graph.init_execution_context().run_inference("the cat")
        lines = [record.getMessage() for record in caplog.records if "KV layout" in record.getMessage()]
        assert len(lines) == 1
        assert layout == "auto" or f"KV layout {layout} " in lines[0]
