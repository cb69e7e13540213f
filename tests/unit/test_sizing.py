"""How many sequences and cells a context gets, and what the store does with the choice of a layout."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fakes.llama import FakeLlama
from wasi_nn_backend.config import Settings, parse_layer, resolve
from wasi_nn_backend.engine.sizing import (
    context_params,
    kv_layouts,
    n_threads_max,
    n_usable_cores,
    same_engine,
    wanted_context,
)
from wasi_nn_backend.engine.store import EngineStore
from wasi_nn_backend.errors import InvalidArgument
from wasi_nn_backend.llama.interface import AttentionChoice, ContextParams, KvLayout, Model, ModelParams

CELL_BYTES = 64  # of the fake model
MIB = 1 << 20


def settings(**values: Any) -> Settings:
    return resolve([parse_layer(values, name="test")])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    path = tmp_path_factory.mktemp("fake") / "fake.gguf"
    path.touch()
    return FakeLlama().load_model(ModelParams(path))


def sized(model: Model, layout: KvLayout, given_settings: Settings, n_kv_bytes_elsewhere: int = 0) -> ContextParams:
    wanted = wanted_context(model, given_settings, n_kv_bytes_elsewhere)
    return context_params(wanted, AttentionChoice(layout, "off", "a test"))


@pytest.mark.parametrize("layout", ["streams", "unified"])
def test_with_enough_memory_every_sequence_has_a_window(model: Model, layout: KvLayout) -> None:
    params = sized(model, layout, settings(n_ctx=1000, max_concurrent=7))
    assert (params.kv_layout, params.n_sequences, params.n_cells_total) == (layout, 7, 7000)


@given(
    n_ctx=st.integers(128, 10**6),
    max_concurrent=st.integers(1, 256),
    max_memory_mb=st.integers(64, 4096),
    n_kv_mib_elsewhere=st.integers(0, 64),
)
def test_short_memory_takes_streams_or_cells(
    model: Model, n_ctx: int, max_concurrent: int, max_memory_mb: int, n_kv_mib_elsewhere: int
) -> None:
    limits = settings(n_ctx=n_ctx, max_concurrent=max_concurrent, max_memory_mb=max_memory_mb)
    n_elsewhere = n_kv_mib_elsewhere * MIB
    n_bytes_free = max_memory_mb * MIB - n_elsewhere
    if n_ctx * CELL_BYTES > n_bytes_free:
        with pytest.raises(InvalidArgument, match=r"memory\.max_memory_mb"):
            sized(model, "streams", limits, n_elsewhere)
        return
    streams, unified = (sized(model, layout, limits, n_elsewhere) for layout in ("streams", "unified"))
    # Within the threshold all cells are had, or else half of it, since host memory must get some, or one window.
    n_bytes_kept = n_bytes_free - 0.2 * max_memory_mb * MIB
    n_cells = n_ctx * max_concurrent
    if n_cells * CELL_BYTES > n_bytes_kept:
        n_cells = max(n_ctx, int(n_bytes_kept / 2 / CELL_BYTES))
    assert streams.n_sequences == n_cells // n_ctx
    assert streams.n_cells is None
    assert unified.n_sequences == max_concurrent
    assert n_ctx <= unified.n_cells_total <= n_ctx * max_concurrent
    for params in (streams, unified):
        assert params.n_cells_total * CELL_BYTES <= n_bytes_free
        assert params.n_batch >= params.n_sequences
    if unified.n_cells_total < n_ctx * max_concurrent:
        assert unified.n_cells_total % 256 == 0 or unified.n_cells_total == n_ctx
        assert unified.n_cells_total + 256 > n_cells or unified.n_cells_total == n_ctx


def test_only_auto_leaves_the_layout_open() -> None:
    assert kv_layouts(settings()) == ("streams", "unified")
    for layout in ("streams", "unified"):
        assert kv_layouts(settings(kv_layout=layout)) == (layout,)


def test_threads_adapt_unless_their_number_is_configured() -> None:
    assert n_threads_max(settings()) == n_usable_cores()
    assert n_threads_max(settings(threads=2)) == 1


class TestStore:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        path = tmp_path / "model.gguf"
        path.touch()
        return path

    @pytest.fixture
    def llama(self) -> Iterator[FakeLlama]:
        llama = FakeLlama(attention=AttentionChoice("unified", "on", "it was faster"))
        yield llama
        assert all(context.closed for model in llama.models for context in model.contexts)

    def params(self, llama: FakeLlama) -> ContextParams:
        return llama.models[-1].contexts[-1].params

    def test_what_the_model_chooses_is_created_reported_and_logged(
        self, llama: FakeLlama, path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO, logger="wasi_nn_backend.engine")
        lease = EngineStore(llama, time.monotonic).acquire(path, settings(n_ctx=512, max_concurrent=3))
        params, engine = self.params(llama), lease.engine
        assert (params.kv_layout, params.flash_attention, params.n_cells) == ("unified", "on", 3 * 512)
        assert (engine.kv_layout, engine.flash_attention) == ("unified", "on")
        assert engine.kv_bytes == 3 * 512 * CELL_BYTES
        assert [r.getMessage() for r in caplog.records if "it was faster" in r.getMessage()] == [
            "fake: KV layout unified of 3 sequences and 1536 cells, flash attention on: it was faster"
        ]
        lease.release()

    def test_the_configuration_wins(self, llama: FakeLlama, path: Path) -> None:
        fixed = settings(kv_layout="streams", flash_attention="off")
        lease = EngineStore(llama, time.monotonic).acquire(path, fixed)
        assert (lease.engine.kv_layout, lease.engine.flash_attention) == ("streams", "off")
        assert self.params(llama).n_cells is None
        lease.release()

    def test_cells_of_a_small_pool_are_all_that_is_counted(self, llama: FakeLlama, path: Path) -> None:
        """One window of five: 64 MiB hold 1,048,576 of the fake's cells, and two would leave host memory nothing."""
        store = EngineStore(llama, time.monotonic)
        lease = store.acquire(path, settings(n_ctx=500_000, max_concurrent=5, max_memory_mb=64))
        assert lease.engine.n_sequences == 5
        assert lease.engine.kv_bytes == 500_000 * 64
        with pytest.raises(InvalidArgument, match="other graphs hold 31 MiB"):
            store.acquire(path, settings(n_ctx=601_000, max_concurrent=5, max_memory_mb=64))
        lease.release()

    def test_graphs_of_other_layouts_have_engines_of_their_own(self) -> None:
        layouts = [settings(kv_layout=layout) for layout in ("auto", "streams", "unified")]
        assert not any(same_engine(left, right) for left in layouts for right in layouts if left is not right)
