"""What each key of ``model`` changes: over llama.cpp itself with the tiny model, or in what the fake is asked for."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.effects import changes
from tests.fakes.llama import FakeLlama
from tests.lora import write_adapter
from wasi_nn_backend import Backend, Graph, InvalidArgument, PromptTooLong
from wasi_nn_backend.llama.interface import ContextParams, DecodeBatch, ModelParams

BASE: dict[str, Any] = {
    "n_ctx": 512,
    "threads": 1,
    "max_concurrent": 1,
    "max_tokens": 40,
    "prompt_mode": "raw",
    "temperature": 0,
    "repeat_penalty": 1.0,
}
PROMPT = "Once upon a time there was a the and in on "


class FakeGpuLlama(FakeLlama):
    supports_gpu_offload = True


def text(path: Path, **config: Any) -> str:
    """A greedy answer of llama.cpp."""
    with Backend(BASE) as backend:
        graph = backend.load_by_name_with_config(path, config)
        return graph.init_execution_context().run_inference(PROMPT)


@pytest.fixture(scope="module")
def plain_text(tiny_model_path: Path) -> str:
    return text(tiny_model_path)


def asked_for(path: Path, llama: FakeLlama, **config: Any) -> tuple[ModelParams, ContextParams]:
    with Backend({**BASE, **config}, llama=llama) as backend:
        backend.load_by_name(path)
        (model,) = llama.models
        return model.params, model.contexts[0].params


@pytest.fixture
def llama_log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.DEBUG, logger="wasi_nn_backend.llama"):
        yield caplog


def logged(log: pytest.LogCaptureFixture, path: Path, name: str, **config: Any) -> str:
    """What llama.cpp says of one of its settings while it creates a context."""
    log.clear()
    with Backend({**BASE, **config}) as backend:
        backend.load_by_name(path)
    lines = [record.getMessage() for record in log.records if record.name == "wasi_nn_backend.llama"]
    found = [line.partition("=")[2].strip() for line in lines if line.startswith("llama_context:") and name in line]
    assert found, f"llama.cpp says nothing about {name}"
    return found[0]


@changes("model.n_ctx")
def test_the_window_decides_which_prompts_fit(tiny_model_path: Path) -> None:
    with Backend(BASE) as backend:
        prompt = "ab " * 150
        wide = backend.load_by_name(tiny_model_path).init_execution_context()
        assert wide.run_inference(prompt)
        narrow = backend.load_by_name_with_config(tiny_model_path, {"n_ctx": 128}).init_execution_context()
        with pytest.raises(PromptTooLong):
            narrow.run_inference(prompt)


@changes("model.batch_size")
def test_a_prompt_is_computed_in_batches_of_that_size(tiny_model_path: Path) -> None:
    for batch_size in (32, 64):
        lengths: list[int] = []

        def note(batch: DecodeBatch, lengths: list[int] = lengths) -> None:
            lengths.append(len(batch))

        with Backend({**BASE, "batch_size": batch_size}, llama=FakeLlama(before_decode=note)) as backend:
            backend.load_by_name(tiny_model_path).init_execution_context().run_inference("x" * 200)
        assert max(lengths) == batch_size


@changes("model.ubatch_size")
def test_ubatch_size_reaches_llama_cpp(tiny_model_path: Path, llama_log: pytest.LogCaptureFixture) -> None:
    assert logged(llama_log, tiny_model_path, "n_ubatch", ubatch_size=64) == "64"
    assert logged(llama_log, tiny_model_path, "n_ubatch") == "512"


@changes("model.flash_attention")
def test_flash_attention_reaches_llama_cpp(tiny_model_path: Path, llama_log: pytest.LogCaptureFixture) -> None:
    assert logged(llama_log, tiny_model_path, "flash_attn", flash_attention="on") == "enabled"
    assert logged(llama_log, tiny_model_path, "flash_attn", flash_attention="off") == "disabled"


@changes("model.threads")
def test_the_number_of_threads(tiny_model_path: Path) -> None:
    for threads in (1, 3):
        assert asked_for(tiny_model_path, FakeLlama(), threads=threads)[1].n_threads == threads


@changes("model.n_gpu_layers")
def test_layers_for_a_gpu_are_asked_for_or_one_warning_says_how_to_get_one(
    tiny_model_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert asked_for(tiny_model_path, FakeGpuLlama(), n_gpu_layers=7)[0].n_gpu_layers == 7
    assert caplog.records == []
    assert asked_for(tiny_model_path, FakeLlama(), n_gpu_layers=7)[0].n_gpu_layers == 0
    (warning,) = caplog.records
    assert "GGML_CUDA" in warning.getMessage()


@changes("model.main_gpu", "model.split_mode", "model.tensor_split", "model.offload_kqv")
def test_how_a_gpu_is_used(tiny_model_path: Path) -> None:
    config = {"n_gpu_layers": 9, "main_gpu": 1, "split_mode": "row", "tensor_split": [3, 1], "offload_kqv": False}
    model, context = asked_for(tiny_model_path, FakeGpuLlama(), **config)
    assert (model.main_gpu, model.split_mode, model.tensor_split) == (1, "row", (3.0, 1.0))
    assert not context.offload_kqv
    model, context = asked_for(tiny_model_path, FakeGpuLlama())
    assert (model.main_gpu, model.split_mode, model.tensor_split) == (0, "layer", ())
    assert context.offload_kqv


@changes("model.use_mmap")
def test_the_file_is_mapped_or_read(tiny_model_path: Path) -> None:
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("this system does not show what a process has mapped")
    for use_mmap in (True, False):
        with Backend({**BASE, "use_mmap": use_mmap}) as backend:
            backend.load_by_name(tiny_model_path)
            assert (str(tiny_model_path) in maps.read_text()) == use_mmap


@changes("model.use_mlock")
def test_weights_are_kept_out_of_swap(tiny_model_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("this system does not show what a process has locked")

    def locked_kib() -> int:
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmLck"))

    before = locked_kib()
    with Backend({**BASE, "use_mlock": True}) as backend:
        backend.load_by_name(tiny_model_path)
        was_refused = any("mlock" in record.getMessage() for record in caplog.records)
        assert locked_kib() > before or was_refused
    with Backend(BASE) as backend:
        backend.load_by_name(tiny_model_path)
        assert locked_kib() == before


@changes("model.check_tensors")
def test_weights_that_are_no_numbers_are_found(tiny_model_path: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.gguf"
    content = bytearray(tiny_model_path.read_bytes())
    content[-4096:-4094] = b"\x00\x7e"  # an f16 that is no number, in the last matrix
    damaged.write_bytes(content)
    with Backend(BASE) as backend:
        backend.load_by_name(damaged)
        with pytest.raises(InvalidArgument):
            backend.load_by_name_with_config(damaged, {"check_tensors": True})


@changes("model.numa")
def test_memory_nodes_are_asked_for(tiny_model_path: Path) -> None:
    for config, strategies in (({}, []), ({"numa": "distribute"}, ["distribute"])):
        llama = FakeLlama()
        asked_for(tiny_model_path, llama, **config)
        assert llama.numa_strategies == strategies


def test_the_first_choice_of_memory_nodes_holds_for_the_process() -> None:
    """In a process of its own: llama.cpp never forgets it."""
    program = (
        "import logging; logging.basicConfig(level=logging.INFO)\n"
        "from wasi_nn_backend.llama import load_llama\n"
        "for strategy in ('isolate', 'isolate', 'distribute'): load_llama().set_numa(strategy)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    lines = [line for line in done.stderr.splitlines() if "wasi_nn_backend" in line]
    assert ["INFO" in lines[0], "WARNING" in lines[1], len(lines)] == [True, True, 2]
    assert "numa is distribute, but this process runs with isolate" in lines[1]


@changes("model.cache_type_k", "model.cache_type_v")
def test_smaller_cache_types_take_less_memory(tiny_model_path: Path) -> None:
    def n_kv_bytes(**config: Any) -> int:
        with Backend({**BASE, **config}) as backend:
            return backend.load_by_name(tiny_model_path).statistics().n_kv_bytes

    plain = n_kv_bytes()
    keys, values = n_kv_bytes(cache_type_k="q8_0"), n_kv_bytes(cache_type_v="q8_0")
    assert keys < plain
    assert values < plain
    assert n_kv_bytes(cache_type_k="q8_0", cache_type_v="q8_0") < min(keys, values)


ROPE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "rope_freq_base": ({}, {"rope_freq_base": 100.0}),
    "rope_freq_scale": ({}, {"rope_freq_scale": 0.25}),
    "rope_scaling_type": ({"rope_freq_scale": 0.25}, {"rope_scaling_type": "yarn"}),
    "yarn_ext_factor": ({"rope_freq_scale": 0.25, "rope_scaling_type": "yarn"}, {"yarn_ext_factor": 0.5}),
    "yarn_attn_factor": ({}, {"yarn_attn_factor": 3.0}),
    "yarn_beta_fast": ({"rope_freq_scale": 0.25, "rope_scaling_type": "yarn"}, {"yarn_beta_fast": 4.0}),
    "yarn_beta_slow": ({"rope_freq_scale": 0.25, "rope_scaling_type": "yarn"}, {"yarn_beta_slow": 8.0}),
    "yarn_orig_ctx": ({"rope_freq_scale": 0.25, "rope_scaling_type": "yarn"}, {"yarn_orig_ctx": 64}),
}


@changes(*(f"model.{key}" for key in ROPE))
@pytest.mark.parametrize("key", ROPE)
def test_positions_are_computed_otherwise(key: str, tiny_model_path: Path) -> None:
    under, changed = ROPE[key]
    assert text(tiny_model_path, **under) != text(tiny_model_path, **under, **changed)


# LoRA adapters.


@pytest.fixture
def adapters(tmp_path: Path) -> list[str]:
    paths = [tmp_path / "first.gguf", tmp_path / "second.gguf"]
    for seed, path in enumerate(paths):
        write_adapter(path, seed=seed)
    return [str(path) for path in paths]


def answer(graph: Graph, **config: Any) -> str:
    with graph.init_execution_context(config) as context:
        return context.run_inference(PROMPT)


@changes("model.lora")
def test_an_adapter_changes_the_text_by_its_scale(tiny_model_path: Path, adapters: list[str], plain_text: str) -> None:
    first, second = adapters
    with Backend(BASE) as backend:
        graph = backend.load_by_name_with_config(tiny_model_path, {"lora": adapters})
        both = answer(graph)
        texts = {
            "both": both,
            "first": answer(graph, lora=first),
            "second": answer(graph, lora=[{"path": second}]),
            "weak": answer(graph, lora=[{"path": first, "scale": 0.25}]),
            "none": answer(graph, lora=[]),
        }
        assert len(set(texts.values())) == len(texts)
        assert texts["none"] == plain_text
        assert answer(graph, lora={"path": first, "scale": 0}) == plain_text
        assert answer(graph) == both


def test_contexts_with_other_scales_share_the_weights(tiny_model_path: Path, adapters: list[str]) -> None:
    llama = FakeLlama()
    with Backend(BASE, llama=llama) as backend:
        graph = backend.load_by_name_with_config(tiny_model_path, {"lora": adapters})
        graph.init_execution_context({"lora": adapters[0]})
        assert [context.params.adapter_scales for context in llama.models[0].contexts] == [(1.0, 1.0), (1.0, 0.0)]
        assert len(llama.models) == 1
        backend.load_by_name(tiny_model_path)
        assert [len(model.params.adapters) for model in llama.models] == [2, 0]


def test_a_replaced_adapter_file_is_loaded_anew(tiny_model_path: Path, adapters: list[str]) -> None:
    llama = FakeLlama()
    with Backend(BASE, llama=llama) as backend:
        for content in (b"one", b"another"):  # the fake does not look at it
            Path(adapters[0]).write_bytes(content)
            backend.load_by_name_with_config(tiny_model_path, {"lora": adapters[0]})
        assert len(llama.models) == 2


def test_a_session_with_an_adapter_is_saved_and_restored(
    tiny_model_path: Path, adapters: list[str], tmp_path: Path
) -> None:
    with Backend(BASE) as backend:
        graph = backend.load_by_name(tiny_model_path)
        with graph.init_execution_context({"lora": [{"path": adapters[0], "scale": 0.5}]}) as context:
            expected = context.run_inference(PROMPT)
            context.save(tmp_path / "session")
        with graph.restore(tmp_path / "session") as context:
            assert context.run_inference(PROMPT) == expected


def test_cells_of_an_adapter_are_not_taken_for_the_models_own(
    tiny_model_path: Path, adapters: list[str], tmp_path: Path, plain_text: str
) -> None:
    with Backend(BASE) as backend:
        graph = backend.load_by_name_with_config(tiny_model_path, {"lora": adapters})
        with graph.init_execution_context() as context:
            context.run_inference(PROMPT)
            context.save(tmp_path / "session")
        with backend.load_by_name(tiny_model_path).restore(tmp_path / "session") as context:
            assert context.run_inference(PROMPT) == plain_text
