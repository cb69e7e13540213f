"""What only the native llama has: memory that is owned, files that are loaded, limits that abort the process."""

from __future__ import annotations

import gc
import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.conftest import n_examples
from tests.llama_conformance import decode
from wasi_nn_backend.errors import Cancelled, InvalidArgument, ModelNotFound, WasiNNError
from wasi_nn_backend.llama import context_params, load_llama
from wasi_nn_backend.llama.context import NativeContext
from wasi_nn_backend.llama.interface import (
    ContextParams,
    DecodeBatch,
    DecodeStatus,
    Distribution,
    Dry,
    DynamicTemperature,
    Greedy,
    LogitBias,
    MinP,
    Mirostat,
    ModelParams,
    Penalties,
    SamplerStage,
    Temperature,
    TopK,
    TopNSigma,
    TopP,
    Typical,
    Xtc,
)
from wasi_nn_backend.llama.kv_shape import CACHE_TYPES
from wasi_nn_backend.llama.model import NativeModel
from wasi_nn_backend.llama.tiny_model import TinyShape, write_tiny_model
from wasi_nn_backend.llama.vocab import NativeVocabulary

SMALL = ContextParams(n_ctx=256, n_sequences=2, n_batch=64, n_ubatch=64)
TOKENS = list(range(40, 80))


@pytest.fixture
def model(tiny_model_path: Path) -> Iterator[NativeModel]:
    with load_llama().load_model(ModelParams(tiny_model_path)) as model:
        yield model


@pytest.fixture
def context(model: NativeModel) -> Iterator[NativeContext]:
    with model.create_context(SMALL) as context:
        yield context


@pytest.fixture(scope="module")
def vocabulary(tiny_model_path: Path) -> Iterator[NativeVocabulary]:
    with load_llama().load_model(ModelParams(tiny_model_path)) as model:
        yield model.vocabulary


class TestLibrary:
    def test_is_loaded_once(self) -> None:
        assert load_llama() is load_llama()

    def test_knows_its_build(self) -> None:
        llama = load_llama()
        assert isinstance(llama.build_number, int)
        assert llama.build_commit.strip()
        assert " = 1" in llama.system_info

    def test_restores_the_environment(self) -> None:
        code = (
            "import os; names = {'GOMP_SPINCOUNT', 'OMP_WAIT_POLICY', 'KMP_BLOCKTIME'}\n"
            "for name in names: os.environ.pop(name, None)\n"
            "from wasi_nn_backend.llama import load_llama\n"
            "load_llama(); raise SystemExit(bool(names & set(os.environ)))"
        )
        assert run_python(code).returncode == 0

    def test_openmp_takes_the_settings(self) -> None:
        code = (
            "import os\n"
            "for name in ('GOMP_SPINCOUNT', 'OMP_WAIT_POLICY', 'KMP_BLOCKTIME'): os.environ.pop(name, None)\n"
            "os.environ['OMP_DISPLAY_ENV'] = 'verbose'\n"
            "from wasi_nn_backend.llama import load_llama\n"
            "print(load_llama().system_info)"
        )
        done = run_python(code)
        if "OPENMP = 1" not in done.stdout or "GOMP_" not in done.stderr:
            pytest.skip("this llama.cpp does not use libgomp")
        assert "GOMP_SPINCOUNT = '1000'" in done.stderr
        assert "OMP_WAIT_POLICY = 'ACTIVE'" in done.stderr

    def test_says_nothing_by_itself_and_little_at_level_info(
        self, tiny_model_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.DEBUG, logger="wasi_nn_backend.llama")
        with load_llama().load_model(ModelParams(tiny_model_path)) as model:
            decode(model.create_context(SMALL), TOKENS)
        assert capfd.readouterr() == ("", "")
        assert len(caplog.records) > 50
        assert not [record for record in caplog.records if record.levelno >= logging.INFO]
        assert not [record for record in caplog.records if record.getMessage().endswith("\n")]


class TestLoading:
    def test_progress_rises_to_one(self, tiny_model_path: Path) -> None:
        seen: list[float] = []
        load_llama().load_model(ModelParams(tiny_model_path), lambda f: seen.append(f) is None).close()
        assert seen == sorted(seen)
        assert seen[-1] == 1.0

    def test_progress_cancels(self, tiny_model_path: Path) -> None:
        with pytest.raises(Cancelled, match=r"tiny\.gguf"):
            load_llama().load_model(ModelParams(tiny_model_path), lambda _fraction: False)

    @pytest.mark.parametrize("error", [KeyboardInterrupt(), ZeroDivisionError("mine")])
    def test_an_exception_in_progress_comes_back(self, tiny_model_path: Path, error: BaseException) -> None:
        def progress(_fraction: float) -> bool:
            raise error

        with pytest.raises(type(error)) as caught:
            load_llama().load_model(ModelParams(tiny_model_path), progress)
        assert caught.value is error

    def test_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(ModelNotFound):
            load_llama().load_model(ModelParams(tmp_path / "none.gguf"))

    def test_what_llama_cpp_complains_of_is_in_the_error(
        self, tmp_path: Path, tiny_model_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        path = tmp_path / "m.gguf"
        path.write_bytes(tiny_model_path.read_bytes().replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_XX.weight"))
        with caplog.at_level(logging.INFO), pytest.raises(InvalidArgument, match=r"blk\.1\.ffn_up\.weight"):
            load_llama().load_model(ModelParams(path))
        assert not caplog.records

    @pytest.mark.parametrize(
        "params",
        [{"n_gpu_layers": -1}, {"split_mode": "diagonal"}, {"tensor_split": (1.0,) * 99}],
    )
    def test_values_out_of_range_are_refused(self, tiny_model_path: Path, params: dict[str, object]) -> None:
        with pytest.raises(InvalidArgument):
            load_llama().load_model(replace(ModelParams(tiny_model_path), **params))  # type: ignore[arg-type]

    @pytest.mark.parametrize("params", [{"use_mmap": False}, {"check_tensors": True}, {"tensor_split": (1.0,)}])
    def test_ways_to_load_give_the_same_model(self, tiny_model_path: Path, params: dict[str, object]) -> None:
        logits = []
        for changed in ({}, params):
            loaded = load_llama().load_model(replace(ModelParams(tiny_model_path), **changed))  # type: ignore[arg-type]
            logits.append(decode(loaded.create_context(SMALL), TOKENS))
        np.testing.assert_array_equal(*logits)

    def test_facts(self, model: NativeModel, tiny_model_path: Path) -> None:
        assert model.n_ctx_train == 4096
        assert model.n_embd == 64
        assert model.n_params > 100_000
        assert 0 < model.n_weight_bytes < tiny_model_path.stat().st_size
        assert model.metadata["general.architecture"] == "llama"
        assert "<|im_start|>" in (model.chat_template or "")
        assert "llama" in model.description

    def test_kv_bytes_are_what_llama_cpp_allocates(self, model: NativeModel, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.DEBUG, logger="wasi_nn_backend.llama"):
            model.create_context(replace(SMALL, n_ctx=4096, n_sequences=4)).close()
        (line,) = [m for m in caplog.messages if "KV buffer size" in m]
        mebibytes = float(line.rpartition("=")[2].split()[0])
        assert mebibytes * 2**20 == pytest.approx(model.kv_bytes_per_token("f16", "f16") * 4096 * 4, rel=0.01)
        with pytest.raises(InvalidArgument, match="cache_type_k"):
            model.kv_bytes_per_token("f17", "f16")


class TestOwnership:
    def test_close_is_idempotent_and_use_after_it_an_error_with_a_name(self, tiny_model_path: Path) -> None:
        model = load_llama().load_model(ModelParams(tiny_model_path))
        context, sampler = model.create_context(SMALL), model.create_sampler([Greedy()])
        chain = model.create_sampler([Temperature(0.5), Greedy()])
        for owner in (context, sampler, chain, model):
            owner.close()
            owner.close()
        with pytest.raises(InvalidArgument, match=r"the model Tiny random llama \(tiny\.gguf\) is closed"):
            model.create_context(SMALL)
        with pytest.raises(InvalidArgument, match="is closed"):
            model.vocabulary.tokenize(b"a", add_special=False, parse_special=False)
        with pytest.raises(InvalidArgument, match=r"a context of the model .* is closed"):
            context.last_position(0)
        for closed in (sampler, chain):
            with pytest.raises(InvalidArgument, match="sampler is closed"):
                closed.accept(1)
        assert model.n_embd == 64  # facts outlive the memory
        context.request_abort()  # and asking an ended context to stop does no harm

    def test_a_context_keeps_its_closed_model_alive(self, tiny_model_path: Path) -> None:
        model = load_llama().load_model(ModelParams(tiny_model_path))
        context = model.create_context(SMALL)
        before = decode(context, TOKENS)
        model.close()
        context.remove(0, 0)
        np.testing.assert_array_equal(decode(context, TOKENS), before)
        context.close()
        with pytest.raises(InvalidArgument):
            model.vocabulary.piece(1, special=False)

    def test_lost_objects_are_freed(self, tiny_model_path: Path) -> None:
        model = load_llama().load_model(ModelParams(tiny_model_path))
        resource = model._resource
        contexts = [model.create_context(SMALL) for _ in range(3)]
        del model
        gc.collect()
        with resource._lock:
            assert not resource._freed
        contexts.clear()
        gc.collect()
        assert resource._freed

    def test_objects_left_at_exit_do_no_harm(self, tiny_model_path: Path) -> None:
        code = (
            "import sys, threading; from pathlib import Path\n"
            "from wasi_nn_backend.llama import load_llama\n"
            "from wasi_nn_backend.llama.interface import *\n"
            f"model = load_llama().load_model(ModelParams(Path({str(tiny_model_path)!r})))\n"
            "context = model.create_context(ContextParams(n_ctx=256)); context.cycle = context\n"
            "started = threading.Event()\n"
            "def work():\n"
            "    batch = DecodeBatch(); batch.add([5], 0, 0, logits_for_last=True)\n"
            "    while True:\n"
            "        context.remove(0, 0); context.decode(batch); started.set()\n"
            "threading.Thread(target=work, daemon=True).start(); started.wait()\n"
        )
        result = run_python(code)
        assert (result.returncode, result.stderr) == (0, "")

    def test_closing_while_other_threads_use_it_never_crashes(self, tiny_model_path: Path) -> None:
        for _ in range(20):
            model = load_llama().load_model(ModelParams(tiny_model_path))
            barrier = threading.Barrier(4)
            with ThreadPoolExecutor(3) as pool:
                uses = [pool.submit(tokenize_often, model.vocabulary, barrier) for _ in range(3)]
                barrier.wait()
                model.close()
            assert all(isinstance(use.exception(), InvalidArgument | None) for use in uses)


def tokenize_often(vocabulary: NativeVocabulary, barrier: threading.Barrier) -> None:
    barrier.wait()
    for _ in range(200):
        vocabulary.tokenize(b"some text to tokenise", add_special=True, parse_special=True)


class TestVocabulary:
    @given(st.text())
    @settings(max_examples=n_examples(200))
    def test_text_round_trips(self, vocabulary: NativeVocabulary, text: str) -> None:
        for parse_special in (False, True):
            tokens = vocabulary.tokenize(text.encode(), add_special=False, parse_special=parse_special)
            assert b"".join(vocabulary.piece(token, special=True) for token in tokens) == text.encode()

    @example(b"\xf7\xbf\xbf\xbf")  # a code point beyond U+10FFFF: llama.cpp would end the process
    @example(b"\xed\xa0\x80")  # a surrogate
    @given(st.binary() | st.lists(st.sampled_from([b"\xf7", b"\xf4", b"\x90", b"\xbf", b"a", b" "])).map(b"".join))
    @settings(max_examples=n_examples(200))
    def test_any_bytes_are_tokenised(self, vocabulary: NativeVocabulary, text: bytes) -> None:
        tokens = vocabulary.tokenize(text, add_special=True, parse_special=True)
        assert all(0 <= token < vocabulary.n_tokens for token in tokens)

    def test_a_prompt_with_its_own_beginning_token_is_no_warning(
        self, vocabulary: NativeVocabulary, caplog: pytest.LogCaptureFixture
    ) -> None:
        assert vocabulary.tokenize(b"<s>a", add_special=True, parse_special=True)[:2] == [256, 256]
        assert not caplog.records

    def test_tokens_out_of_range_are_refused(self, model: NativeModel) -> None:
        for token in (-1, model.vocabulary.n_tokens, 2**31, -(2**40)):
            with pytest.raises(InvalidArgument):
                model.vocabulary.piece(token, special=False)
            with pytest.raises(InvalidArgument):
                model.vocabulary.is_end_of_generation(token)

    def test_a_long_text_without_spaces(self, model: NativeModel) -> None:
        assert len(model.vocabulary.tokenize(b"x" * 100_000, add_special=False, parse_special=True)) == 100_000


class TestContextParams:
    @pytest.mark.parametrize("n_ctx", [1, 128, 255, 256, 257, 1000])
    @pytest.mark.parametrize("n_sequences", [1, 3])
    def test_a_sequence_has_at_least_the_window_asked_for(
        self, model: NativeModel, n_ctx: int, n_sequences: int
    ) -> None:
        with model.create_context(replace(SMALL, n_ctx=n_ctx, n_sequences=n_sequences)) as context:
            assert context.n_ctx >= n_ctx
            assert context.n_sequences == n_sequences

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("n_ctx", 0),
            ("n_ctx", -5),
            ("n_ctx", 2**31),
            ("n_sequences", 0),
            ("n_sequences", 257),
            ("n_batch", 0),
            ("n_batch", 2**31),
            ("n_ubatch", 0),
            ("n_threads", 0),
            ("n_threads", 100_000),
            ("cache_type_k", "q9"),
            ("cache_type_v", ""),
            ("rope_scaling_type", 17),
            ("rope_freq_base", float("nan")),
        ],
    )
    def test_a_value_out_of_range_is_named(self, model: NativeModel, key: str, value: object) -> None:
        with pytest.raises(InvalidArgument, match=key):
            model.create_context(replace(SMALL, **{key: value}))  # type: ignore[arg-type]

    @pytest.mark.parametrize("type_v", CACHE_TYPES)
    def test_every_cache_type_works_with_automatic_flash_attention(self, model: NativeModel, type_v: str) -> None:
        with model.create_context(replace(SMALL, cache_type_k=type_v, cache_type_v=type_v)) as context:
            assert np.isfinite(decode(context, TOKENS)).all()

    def test_a_quantised_v_cache_without_flash_attention_is_refused(self, model: NativeModel) -> None:
        with pytest.raises(InvalidArgument, match="flash_attention"):
            model.create_context(replace(SMALL, cache_type_v="q8_0", flash_attention="off"))

    def test_flash_attention_computes_the_same(self, model: NativeModel) -> None:
        logits = [decode(model.create_context(replace(SMALL, flash_attention=f)), TOKENS) for f in ("on", "off")]
        np.testing.assert_allclose(*logits, rtol=1e-2, atol=1e-2)

    def test_more_memory_than_there_is_is_refused_before_it_is_touched(
        self, model: NativeModel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with pytest.raises(InvalidArgument, match="lower n_ctx"):
            model.create_context(replace(SMALL, n_ctx=2**30, n_sequences=1))
        monkeypatch.setattr(context_params, "available_bytes", lambda: 100_000)
        with pytest.raises(InvalidArgument, match="lower n_ctx"):
            model.create_context(SMALL)
        monkeypatch.setattr(context_params, "available_bytes", lambda: None)
        model.create_context(SMALL).close()

    @pytest.mark.parametrize(
        ("n_ctx", "n_cells", "is_refused"), [(512, 1024, True), (512, 512, False), (768, 1024, False)]
    )
    def test_rotation_factors_for_long_windows_are_not_taken_for_short_ones(
        self, model: NativeModel, n_ctx: int, n_cells: int, is_refused: bool
    ) -> None:
        """llama.cpp chooses them by the number of cells, which in the unified layout is not a sequence's window."""
        facts = replace(model._facts, n_ctx_short_rope=512)
        params = ContextParams(n_ctx=n_ctx, n_sequences=2, kv_layout="unified", n_cells=n_cells)
        if is_refused:
            with pytest.raises(InvalidArgument, match=r"memory\.kv_layout"):
                context_params.to_native(params, facts)
        else:
            assert context_params.to_native(params, facts).n_ctx == n_cells
        assert context_params.to_native(replace(params, kv_layout="streams", n_cells=None), facts).kv_unified is False

    def test_thread_counts_are_checked(self, context: NativeContext) -> None:
        before = decode(context, TOKENS)
        context.set_n_threads(2)
        context.remove(0, 0)
        np.testing.assert_allclose(decode(context, TOKENS), before, rtol=1e-4, atol=1e-4)
        for n_threads in (0, -1, 100_000):
            with pytest.raises(InvalidArgument):
                context.set_n_threads(n_threads)


class Hammer:
    """Asks for an abort again and again from another thread while the block runs."""

    def __init__(self, context: NativeContext) -> None:
        self._context = context
        self._stop = threading.Event()
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._stop.is_set():
            self._context.request_abort()
            self._started.set()

    def __enter__(self) -> None:
        self._thread.start()
        self._started.wait()

    def __exit__(self, *_error: object) -> None:
        self._stop.set()
        self._thread.join()


class TestAbort:
    @pytest.fixture
    def context(self, model: NativeModel) -> Iterator[NativeContext]:
        with model.create_context(ContextParams(n_ctx=2048, n_batch=2048, n_ubatch=64)) as context:
            yield context

    def test_a_long_prompt_stops_and_the_memory_can_be_cleaned(self, context: NativeContext) -> None:
        before = decode(context, TOKENS)
        prompt = DecodeBatch()
        row = prompt.add([7] * 2000, len(TOKENS), 0, logits_for_last=True)
        with Hammer(context):
            assert context.decode(prompt) is DecodeStatus.ABORTED
        with pytest.raises(InvalidArgument):
            context.logits(row)
        assert len(TOKENS) - 1 <= context.last_position(0) < len(TOKENS) + 1999
        assert context.remove(0, len(TOKENS))
        assert context.remove(0, len(TOKENS) - 1)
        again = decode(context, TOKENS[-1:], len(TOKENS) - 1)
        np.testing.assert_allclose(again, before, rtol=1e-3, atol=1e-3)

    def test_a_shift_is_never_stopped_half_way(self, model: NativeModel, context: NativeContext) -> None:
        def shifted(abort: bool) -> np.ndarray:
            context.remove(0, 0)
            decode(context, [*TOKENS, *TOKENS])
            context.remove(0, 3, 23)
            context.shift(0, 23, -1, -20)
            if abort:
                with Hammer(context):
                    return decode(context, [5], 60)
            return decode(context, [5], 60)

        expected = shifted(abort=False)
        for _ in range(5):
            np.testing.assert_array_equal(shifted(abort=True), expected)


class TestStates:
    def test_are_for_the_same_model_and_layout_only(self, tmp_path: Path, model: NativeModel) -> None:
        other_path = tmp_path / "other.gguf"
        write_tiny_model(other_path, shape=TinyShape(n_ctx_train=2048))
        with model.create_context(SMALL) as context:
            decode(context, TOKENS)
            state = context.save_sequence(0)
        assert model.create_context(replace(SMALL, n_ctx=512)).restore_sequence(1, state)
        other = load_llama().load_model(ModelParams(other_path))
        for reader in (
            other.create_context(SMALL),
            model.create_context(replace(SMALL, n_sequences=3)),
            model.create_context(replace(SMALL, cache_type_k="f32")),
            model.create_context(replace(SMALL, flash_attention="on")),
        ):
            assert not reader.restore_sequence(0, state)
            assert reader.last_position(0) == -1

    def test_cut_or_long_states_are_refused(self, context: NativeContext) -> None:
        decode(context, TOKENS)
        state = context.save_sequence(0)
        for bad in (state[:-1], state + b"\0", state[: len(state) // 2], state[:20], b"X" + state[1:]):
            assert not context.restore_sequence(1, bad)
            assert context.last_position(1) == -1
        assert context.restore_sequence(1, state)

    def test_one_that_does_not_fit_is_refused(self, model: NativeModel) -> None:
        with model.create_context(replace(SMALL, n_ctx=512)) as large:
            for first in range(0, 320, 64):
                decode(large, [7] * 64, first)
            state = large.save_sequence(0)
        with model.create_context(SMALL) as small:
            assert not small.restore_sequence(0, state)
            decode(small, TOKENS)

    @pytest.mark.parametrize(
        "changed",
        [
            {"rope_scaling_type": 2},
            {"rope_freq_base": 5e5},
            {"rope_freq_scale": 0.5},
            {"yarn_ext_factor": 1.0},
            {"yarn_attn_factor": 2.0},
            {"yarn_beta_fast": 16.0},
            {"yarn_beta_slow": 2.0},
            {"yarn_orig_ctx": 128},
        ],
    )
    def test_cells_that_were_rotated_otherwise_are_refused(
        self, model: NativeModel, context: NativeContext, changed: dict[str, float]
    ) -> None:
        decode(context, TOKENS)
        with model.create_context(replace(SMALL, **changed)) as other:  # type: ignore[arg-type]
            assert not other.restore_sequence(0, context.save_sequence(0))
            decode(other, TOKENS)
            assert not context.restore_sequence(1, other.save_sequence(0))
            assert other.restore_sequence(1, other.save_sequence(0))

    def test_cells_of_a_window_with_other_rotation_factors_are_refused(self, model: NativeModel) -> None:
        model._facts = replace(model._facts, n_ctx_short_rope=300)
        with model.create_context(SMALL) as short, model.create_context(replace(SMALL, n_ctx=512)) as long:
            decode(short, TOKENS)
            assert not long.restore_sequence(0, short.save_sequence(0))

    def test_an_empty_sequence_is_saved_too(self, context: NativeContext) -> None:
        decode(context, TOKENS, sequence_id=1)
        assert context.restore_sequence(1, context.save_sequence(0))
        assert context.last_position(1) == -1

    def test_a_shift_is_in_the_state_that_follows(self, context: NativeContext) -> None:
        decode(context, TOKENS)
        context.remove(0, 3, 10)
        context.shift(0, 10, -1, -7)
        state = context.save_sequence(0)
        expected = decode(context, [5], len(TOKENS) - 7)
        assert context.restore_sequence(1, state)
        logits = decode(context, [5], len(TOKENS) - 7, sequence_id=1)
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)

    def test_a_restore_after_a_copy_wins(self, context: NativeContext) -> None:
        """A copy moves its data at the next decode, when the target holds something else already."""
        decode(context, TOKENS)
        state = context.save_sequence(0)
        expected = decode(context, [5], len(TOKENS))
        context.remove(0, 0)
        decode(context, list(reversed(TOKENS)))
        context.copy(0, 1)
        assert context.restore_sequence(1, state)
        logits = decode(context, [5], len(TOKENS), sequence_id=1)
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


#: A stage that changes no order but makes llama.cpp's own chain sample.
CHAIN = [Temperature(0.5)]


class TestSampling:
    @pytest.mark.parametrize(
        "stages",
        [
            [Penalties(64, 1.3, 0.0, 0.0)],
            [Penalties(8, 1.1, 0.4, 0.7)],
            [Penalties(3, 2.0, -1.0, 0.5)],
            [LogitBias(((40, 3.0), (41, -float("inf")), (40, 0.5)))],
            [LogitBias(((5, -float("inf")), (6, 1.0))), Penalties(16, 1.5, 0.2, 0.2)],
        ],
    )
    def test_biases_and_penalties_on_the_short_cut_are_llama_cpp_s(
        self, model: NativeModel, context: NativeContext, stages: list[SamplerStage]
    ) -> None:
        """200 tokens, each fed back, so that windows fill, overflow and repeat."""
        short, chain = model.create_sampler([*stages, Greedy()]), model.create_sampler([*stages, *CHAIN, Greedy()])
        for token in TOKENS:
            short.accept(token)
            chain.accept(token)
        decode(context, TOKENS)
        row, chosen = len(TOKENS) - 1, []
        for position in range(len(TOKENS), len(TOKENS) + 200):
            token = short.sample(context, row)
            assert token == chain.sample(context, row)
            chosen.append(token)
            decode(context, [token], position)
            row = 0
        assert len(set(chosen)) > 1

    def test_the_short_cut_chooses_what_llama_cpp_s_greedy_chooses(
        self, model: NativeModel, context: NativeContext
    ) -> None:
        short, chain = model.create_sampler([Greedy()]), model.create_sampler([*CHAIN, Greedy()])
        batch = DecodeBatch()
        for position, token in enumerate(TOKENS):
            batch.add([token], position, 0, logits_for_last=True)
        assert context.decode(batch) is DecodeStatus.DONE
        rows = range(len(TOKENS))
        assert [short.sample(context, row) for row in rows] == [chain.sample(context, row) for row in rows]

    def test_the_lowest_of_equals_wins(self, model: NativeModel, context: NativeContext) -> None:
        decode(context, TOKENS)
        row = len(TOKENS) - 1
        logits = context.logits(row)  # llama.cpp's own memory: what is written here, its samplers see
        logits[:] = 0.0
        logits[[9, 200]] = 1.0
        for stages in ([Greedy()], [*CHAIN, Greedy()]):
            assert model.create_sampler(stages).sample(context, row) == 9

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_logits_that_are_no_numbers_are_an_error(
        self, model: NativeModel, context: NativeContext, value: float
    ) -> None:
        decode(context, TOKENS)
        row = len(TOKENS) - 1
        context.logits(row)[5] = value
        for stages in ([Greedy()], [TopK(5), Distribution(1)]):
            with pytest.raises(WasiNNError, match="largest logit"):
                model.create_sampler(stages).sample(context, row)

    @pytest.mark.parametrize(
        "stage",
        [
            Penalties(-1, 1.0, 0.0, 0.0),
            Penalties(64, 0.0, 0.0, 0.0),
            Penalties(64, float("nan"), 0.0, 0.0),
            LogitBias(((-1, 1.0),)),
            LogitBias(((320, 1.0),)),
            LogitBias(((1, float("inf")),)),
            LogitBias(tuple((token, float("-inf")) for token in range(320))),
            TopP(1.5, 1),
            TopP(float("nan"), 1),
            MinP(0.5, -1),
            Typical(-0.1, 1),
            Temperature(-1.0),
            Temperature(float("inf")),
            TopK(2**40),
            TopNSigma(float("nan")),
            Xtc(-0.1, 0.1, 1, 1),
            Xtc(0.5, float("nan"), 1, 1),
            Xtc(0.5, 0.1, -1, 1),
            DynamicTemperature(0.5, -0.1, 1.0),
            DynamicTemperature(0.5, float("inf"), 1.0),
            DynamicTemperature(0.5, 0.5, -1.0),
            DynamicTemperature(0.5, 0.5, float("nan")),
            Dry(-1.0, 1.75, 2, 64, ()),
            Dry(1.0, float("inf"), 2, 64, ()),
            Dry(1.0, 1.75, -1, 64, ()),
            Dry(1.0, 1.75, 2, -1, ()),
            Dry(1.0, 1.75, 2, 2**30, ()),
            Dry(1.0, 1.75, 2, 64, (b"",)),
            Dry(1.0, 1.75, 2, 64, (b"a\0b",)),
            Dry(1.0, 1.75, 2, 64, (b"a" * 41,)),
        ],
    )
    def test_values_without_meaning_are_refused(self, model: NativeModel, stage: SamplerStage) -> None:
        with pytest.raises(InvalidArgument, match="value out of range"):
            model.create_sampler([stage, Greedy()])

    @pytest.mark.parametrize(
        "mirostat", [Mirostat(1, float("nan"), 0.1, 1), Mirostat(2, 5.0, -0.1, 1), Mirostat(2, float("inf"), 0.1, 1)]
    )
    def test_mirostat_values_without_meaning_are_refused(self, model: NativeModel, mirostat: Mirostat) -> None:
        with pytest.raises(InvalidArgument, match="value out of range"):
            model.create_sampler([mirostat])

    @pytest.mark.parametrize("temperature", [0.0, 1e-30, 1e-7])
    def test_a_temperature_near_zero_is_greedy(
        self, model: NativeModel, context: NativeContext, temperature: float
    ) -> None:
        logits = decode(context, TOKENS)
        sampler = model.create_sampler([Temperature(temperature), Distribution(3)])
        assert sampler.sample(context, len(TOKENS) - 1) == int(np.argmax(logits))

    @pytest.mark.parametrize("exponent", [1.0, 2.0])
    @pytest.mark.parametrize("advantage", [30.0, 60.0, 90.0])
    def test_a_dynamic_temperature_near_zero_is_greedy(
        self, model: NativeModel, context: NativeContext, advantage: float, exponent: float
    ) -> None:
        """Of what overflows there llama.cpp would take the least probable token."""
        decode(context, TOKENS)
        row = len(TOKENS) - 1
        best = int(context.logits(row).argmax())
        context.logits(row)[best] += advantage
        sampler = model.create_sampler([DynamicTemperature(0.5, 0.5, exponent), Distribution(3)])
        assert {sampler.sample(context, row) for _ in range(10)} == {best}

    def test_a_row_without_logits_is_refused(self, model: NativeModel, context: NativeContext) -> None:
        decode(context, TOKENS)
        for stages in ([Greedy()], [TopK(5), Distribution(1)]):
            with pytest.raises(InvalidArgument, match="row 0"):
                model.create_sampler(stages).sample(context, 0)

    def test_rows_may_be_sampled_in_parallel(self, model: NativeModel, context: NativeContext) -> None:
        """Mixed sequences make llama.cpp reorder the rows at the first access, which must not race."""
        batch = DecodeBatch()
        for position in range(20):
            for sequence_id in (1, 0):
                batch.add([40 + position + sequence_id], position, sequence_id, logits_for_last=True)
        chosen: list[list[int]] = []
        for n_threads in (1, 4):
            for sequence_id in (0, 1):
                context.remove(sequence_id, 0)
            assert context.decode(batch) is DecodeStatus.DONE
            samplers = [model.create_sampler([TopK(40), Temperature(1.0), Distribution(row)]) for row in range(40)]
            with ThreadPoolExecutor(n_threads) as pool:
                chosen.append(list(pool.map(lambda row: samplers[row].sample(context, row), range(40))))  # noqa: B023
        assert chosen[0] == chosen[1]


class TestBounds:
    def test_sequences_out_of_range_are_refused_everywhere(self, context: NativeContext) -> None:
        for bad in (-1, 2, 255, 256, 2**31):
            for call in (
                lambda bad=bad: context.remove(bad, 0),
                lambda bad=bad: context.copy(bad, 0),
                lambda bad=bad: context.copy(0, bad),
                lambda bad=bad: context.shift(bad, 0, -1, 1),
                lambda bad=bad: context.last_position(bad),
                lambda bad=bad: context.save_sequence(bad),
                lambda bad=bad: context.restore_sequence(bad, b""),
            ):
                with pytest.raises(InvalidArgument):
                    call()

    def test_positions_out_of_range_are_refused(self, context: NativeContext) -> None:
        for position in (-1, 2**31, -(2**31)):
            batch = DecodeBatch([5], [position], [0], [1])
            with pytest.raises(InvalidArgument):
                context.decode(batch)

    def test_uneven_lists_are_refused(self, context: NativeContext) -> None:
        with pytest.raises(InvalidArgument, match="differ in length"):
            context.decode(DecodeBatch([5, 6], [0, 1], [0, 0], [1]))

    def test_a_shift_out_of_range_is_refused(self, context: NativeContext) -> None:
        decode(context, TOKENS)
        with pytest.raises(InvalidArgument):
            context.shift(0, 0, -1, 2**31 - 5)

    def test_a_cut_that_a_sliding_window_does_not_survive_is_refused(self, context: NativeContext) -> None:
        """As after the restore of a state, which holds the last window only: positions 30 to 39, a window of 5."""
        decode(context, TOKENS)
        context.remove(0, 0, 30)
        context._n_swa = 5
        assert not context.remove(0, 33)  # position 33 would look back at 28 and 29
        assert context.last_position(0) == 39
        assert context.remove(0, 35)
        assert context.remove(0, 0)

    def test_a_copy_onto_itself_changes_nothing(self, context: NativeContext) -> None:
        decode(context, TOKENS)
        context.copy(0, 0)
        assert context.last_position(0) == len(TOKENS) - 1


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
