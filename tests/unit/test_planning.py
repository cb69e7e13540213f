"""Plans from a model file's header, and whether they hold: real processes are in tests/real/test_plan.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import n_examples
from tests.tiny_encoder import write_tiny_encoder
from wasi_nn_backend.config import Settings, parse_layer, resolve
from wasi_nn_backend.engine.sizing import context_params, wanted_context
from wasi_nn_backend.errors import InvalidArgument, ModelNotFound, UnsupportedOperation
from wasi_nn_backend.llama import load_llama
from wasi_nn_backend.llama.interface import AttentionChoice, ModelParams
from wasi_nn_backend.planning import Plan, make_plan

MIB = 1 << 20
GIB = 1 << 30


def settings_of(values: dict[str, Any]) -> Settings:
    return resolve([parse_layer(values, name="test", unknown="error")])


@pytest.fixture
def path(tiny_model_path: Path) -> Path:
    return tiny_model_path


@settings(max_examples=n_examples(30), deadline=None)
@given(
    n_ctx=st.integers(128, 5000),
    n_sequences=st.integers(1, 64),
    cache_type=st.sampled_from(["f16", "f32"]),
    max_memory_mb=st.sampled_from([0, 64, 4096]),
)
def test_the_cells_are_those_that_the_engine_would_ask_for(
    tiny_model_path: Path, n_ctx: int, n_sequences: int, cache_type: str, max_memory_mb: int
) -> None:
    settings = settings_of(
        {
            "n_ctx": n_ctx,
            "max_concurrent": n_sequences,
            "cache_type_k": cache_type,
            "memory": {"max_memory_mb": max_memory_mb},
        }
    )
    plan = make_plan(tiny_model_path, settings, GIB)
    with load_llama().load_model(ModelParams(tiny_model_path)) as model:
        params = context_params(wanted_context(model, settings), AttentionChoice("streams", "off", "test"))
        assert plan.n_kv_bytes_per_token == model.kv_bytes_per_token(cache_type, "f16")
        assert (plan.n_ctx, plan.n_sessions_at_once) == (params.n_ctx, params.n_sequences)
        n_cells = -(-params.n_ctx // 256) * 256 * params.n_sequences
        assert plan.need.cells == n_cells * plan.n_kv_bytes_per_token


@settings(max_examples=n_examples(30), deadline=None)
@given(st.integers(1, 64 * GIB), st.integers(1, 64 * GIB))
def test_more_memory_holds_more(tiny_model_path: Path, one: int, other: int) -> None:
    small, large = sorted((one, other))
    plans = [make_plan(tiny_model_path, settings_of({}), n_bytes) for n_bytes in (small, large)]
    assert [p.fits for p in plans] in ([False, False], [False, True], [True, True])
    for less, more in zip(plans[0].sessions, plans[1].sessions, strict=True):
        assert less.n_tokens == more.n_tokens
        assert less.n_sessions <= more.n_sessions


@settings(max_examples=n_examples(30), deadline=None)
@given(n_mib=st.integers(80, 64 * 1024), n_sequences=st.integers(1, 64))
def test_what_is_suggested_is_valid_and_fits(tiny_model_path: Path, n_mib: int, n_sequences: int) -> None:
    plan = make_plan(tiny_model_path, settings_of({"max_concurrent": n_sequences}), n_mib * MIB)
    if plan.suggestion is None:
        assert n_mib < 128, "the program alone takes half of that"
        return
    better = plan.suggestion
    values = {
        "n_ctx": better.n_ctx,
        "max_concurrent": better.max_concurrent,
        "batch_size": better.batch_size,
        "max_memory_mb": better.max_memory_mb,
        "max_cache_tokens": better.max_cache_tokens,
        "threads": better.threads,
    }
    suggested = make_plan(tiny_model_path, settings_of(values), n_mib * MIB)
    assert suggested.fits
    assert suggested.n_ctx == better.n_ctx
    assert better.max_concurrent <= n_sequences


def test_a_machine_too_small_gets_no_suggestion(path: Path) -> None:
    plan = make_plan(path, settings_of({}), 1 * MIB)
    assert not plan.fits
    assert plan.suggestion is None


def test_parts_add_up_and_bigger_settings_cost_more(path: Path) -> None:
    def plan(**values: Any) -> Plan:
        return make_plan(path, settings_of(values), GIB)

    base = plan(n_ctx=512, max_concurrent=2)
    need = base.need
    assert need.total == need.weights + need.cells + need.computing + need.vocabulary + need.program
    assert plan(n_ctx=1024, max_concurrent=2).need.cells == 2 * need.cells
    assert plan(n_ctx=512, max_concurrent=4).need.cells == 2 * need.cells
    assert plan(n_ctx=512, max_concurrent=2, flash_attention=True).need.computing < need.computing
    assert (
        plan(n_ctx=512, max_concurrent=2, cache_type_k="f32").n_kv_bytes_per_token == 3 * base.n_kv_bytes_per_token // 2
    )


def test_files_that_are_no_model_for_sessions(tmp_path: Path) -> None:
    encoder = tmp_path / "encoder.gguf"
    write_tiny_encoder(encoder)
    with pytest.raises(UnsupportedOperation, match="only gives embeddings"):
        make_plan(encoder, settings_of({}), GIB)
    with pytest.raises(ModelNotFound):
        make_plan(tmp_path / "missing.gguf", settings_of({}), GIB)


def test_a_window_beyond_the_memory_limit_is_refused(path: Path) -> None:
    with pytest.raises(InvalidArgument, match="max_memory_mb"):
        make_plan(path, settings_of({"n_ctx": 1_000_000, "max_memory_mb": 64}), GIB)
    with pytest.raises(InvalidArgument, match="nothing to plan with"):
        make_plan(path, settings_of({}), 0)
