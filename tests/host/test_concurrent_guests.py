"""Two guests on two threads stream from one graph, and each gets the text that it gets alone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import PROFILE
from tests.fakes.llama import FakeLlama
from tests.host.conftest import MODEL
from tests.host.guests import OUT, U8, command_wat, iovec_data, print_wat, text_data
from wasi_nn_backend.backend import Backend
from wasi_nn_backend.host import RunConfig, run_module
from wasi_nn_backend.llama.interface import DecodeBatch
from wasi_nn_backend.llama.tiny_model import write_tiny_model

EXAMPLES = Path(__file__).parents[2] / "examples" / "c"
STARTED = b"started\n"
PROMPTS = [b"once upon a time", b"a quite different beginning"]


def streaming_guest(prompt: bytes, seed: int) -> bytes:
    """Says that it has started, then streams one compute of 200 tokens with sampling."""
    config = b'{"stream-stdout": true, "n-predict": 200, "temp": 0.9, "seed": %d}' % seed
    tensor = b"".join(word.to_bytes(4, "little") for word in (0, 0, U8, 600, len(prompt)))
    data = text_data(100, MODEL) + text_data(200, config) + text_data(500, tensor) + text_data(600, prompt)
    body = f"""
        (drop (call $load_by_name_with_config (i32.const 100) (i32.const {len(MODEL)})
          (i32.const 200) (i32.const {len(config)}) (i32.const {OUT})))
        (drop (call $init_execution_context (i32.const 0) (i32.const {OUT})))
        (drop (call $set_input (i32.const 0) (i32.const 0) (i32.const 500)))
        {print_wat(400)}
        (call $exit (call $compute (i32.const 0)))"""
    return command_wat(body, data=data + iovec_data(400, 410, STARTED))


def run(backend: Backend, module: bytes | Path, args: list[str], on_text: Callable[[], None]) -> bytes:
    captured = bytearray()

    def receive(data: bytes) -> None:
        captured.extend(data)
        on_text()

    config = RunConfig(module, args=args, stdout=receive, stderr=lambda data: None, use_cache=False)
    result = run_module(config, backend)
    assert (result.exit_status, result.fault) == (0, None), result
    return bytes(captured)


def together(
    backend: Backend, guests: list[tuple[bytes | Path, list[str]]], has_text: list[threading.Event]
) -> list[bytes]:
    texts = [b""] * len(guests)

    def work(i: int) -> None:
        texts[i] = run(backend, *guests[i], has_text[i].set)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(guests))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return texts


GUESTS: list[tuple[bytes | Path, list[str]]] = [
    (streaming_guest(prompt, seed), []) for seed, prompt in enumerate(PROMPTS, start=11)
]
TOKEN_BY_TOKEN: list[tuple[bytes | Path, list[str]]] = [
    (EXAMPLES / "wasmedge_stream.wasm", [MODEL.decode(), prompt.decode(), "100"]) for prompt in PROMPTS
]


@pytest.mark.parametrize("guests", [GUESTS, TOKEN_BY_TOKEN], ids=["compute", "compute_single"])
def test_on_the_fake(tmp_path: Path, guests: list[tuple[bytes | Path, list[str]]]) -> None:
    (tmp_path / "fake.gguf").touch()
    has_text = [threading.Event(), threading.Event()]
    n_sequences_at_once = 0
    n_decodes = 0
    is_gated = False

    def watch(batch: DecodeBatch) -> None:
        nonlocal n_sequences_at_once, n_decodes
        n_decodes += 1
        n_sequences_at_once = max(n_sequences_at_once, len(set(batch.sequence_ids)))
        if is_gated and n_decodes == 3 and guests is GUESTS:
            for event in has_text:
                event.wait(30)

    with Backend(llama=FakeLlama(before_decode=watch)) as backend:
        backend.register("default", tmp_path / "fake.gguf")
        alone = [run(backend, *guest, lambda: None) for guest in guests]
        assert n_sequences_at_once == 1
        n_decodes, is_gated = 0, True
        assert together(backend, guests, has_text) == alone
    assert alone[0] != alone[1]
    assert all(len(text) > 100 for text in alone)
    if guests is GUESTS:
        assert n_sequences_at_once == 2, "the two guests never shared a step"


@pytest.mark.parametrize("guests", [GUESTS, TOKEN_BY_TOKEN], ids=["compute", "compute_single"])
def test_on_llama_cpp(tmp_path: Path, guests: list[tuple[bytes | Path, list[str]]]) -> None:
    # Weights of q8_0, because llama.cpp multiplies f16 and f32 weights by another kernel when a step has more than one
    # token (llamafile's), which sums in another order: logits then differ by up to 0.01 between alone and together.
    # With 8-bit blocks both ways give the same bits.
    write_tiny_model(tmp_path / "tiny.gguf", quantization="q8_0")
    with Backend() as backend:
        backend.register("default", tmp_path / "tiny.gguf")
        alone = [run(backend, *guest, lambda: None) for guest in guests]
        for _ in range(3 if PROFILE == "thorough" else 1):
            assert together(backend, guests, [threading.Event(), threading.Event()]) == alone
    assert alone[0] != alone[1]
