"""The yardstick: a decode loop written straight against llama.cpp's C API, with nothing between it and the library.

It does the least that generating greedily for several sequences at once can do: one batch a step, an argmax a sequence.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from wasi_nn_backend.llama import load_llama

# Not llama_cpp itself: libgomp reads its settings when it is loaded, which this module sees to.
from wasi_nn_backend.llama.bindings import native


class RawLoop:
    """A model and a context of ``n_sequences`` streams of ``n_ctx`` tokens. Greedy; end-of-generation tokens go on."""

    def __init__(self, path: Path, *, n_sequences: int, n_ctx: int, n_threads: int, n_batch: int = 512) -> None:
        load_llama()  # its log goes to logging, not to stderr
        model_params = native.llama_model_default_params()
        model_params.n_gpu_layers = 0
        self._model = native.llama_model_load_from_file(str(path).encode(), model_params)
        params = native.llama_context_default_params()
        params.n_ctx = n_ctx * n_sequences
        params.n_seq_max = n_sequences
        params.n_batch = params.n_ubatch = n_batch
        params.n_threads = params.n_threads_batch = n_threads
        params.kv_unified = False
        params.flash_attn_type = native.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._context = native.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError("llama.cpp refused the context")
        self._memory = native.llama_get_memory(self._context)
        self._vocab = native.llama_model_get_vocab(self._model)
        self._n_vocab = native.llama_vocab_n_tokens(self._vocab)
        self._n_sequences = n_sequences
        self._batch = native.llama_batch_init(n_batch, 0, 1)

    def tokenize(self, text: bytes) -> list[int]:
        tokens = (native.llama_token * (len(text) + 8))()
        n = native.llama_tokenize(self._vocab, text, len(text), tokens, len(tokens), True, True)
        return list(tokens[:n])

    def generate(self, prompts: list[list[int]], n_tokens: int) -> list[list[int]]:
        """``n_tokens`` tokens for each prompt, all prompts at once."""
        native.llama_memory_clear(self._memory, True)
        lasts = [self._prompt(sequence, prompt) for sequence, prompt in enumerate(prompts)]
        outputs = [[token] for token in lasts]
        positions = [len(prompt) for prompt in prompts]
        for _ in range(n_tokens - 1):
            self._batch.n_tokens = 0
            for sequence, output in enumerate(outputs):
                self._add(output[-1], positions[sequence], sequence, wants_logits=True)
                positions[sequence] += 1
            self._decode()
            for sequence, output in enumerate(outputs):
                output.append(self._argmax(sequence))
        return outputs

    def _prompt(self, sequence: int, prompt: list[int]) -> int:
        self._batch.n_tokens = 0
        for position, token in enumerate(prompt):
            self._add(token, position, sequence, wants_logits=position == len(prompt) - 1)
        self._decode()
        return self._argmax(len(prompt) - 1)

    def _add(self, token: int, position: int, sequence: int, *, wants_logits: bool) -> None:
        batch, i = self._batch, self._batch.n_tokens
        batch.token[i] = token
        batch.pos[i] = position
        batch.n_seq_id[i] = 1
        batch.seq_id[i][0] = sequence
        batch.logits[i] = wants_logits
        batch.n_tokens = i + 1

    def _decode(self) -> None:
        if native.llama_decode(self._context, self._batch) != 0:
            raise RuntimeError("llama_decode failed")

    def _argmax(self, row: int) -> int:
        pointer = native.llama_get_logits_ith(self._context, row)
        address = ctypes.cast(pointer, ctypes.c_void_p).value or 0
        logits = np.frombuffer((ctypes.c_float * self._n_vocab).from_address(address), dtype=np.float32)
        return int(logits.argmax())

    def close(self) -> None:
        native.llama_batch_free(self._batch)
        native.llama_free(self._context)
        native.llama_model_free(self._model)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
