"""The yardstick: a decode loop written straight against llama.cpp's C API, with nothing between it and the library.

It does the least that generating greedily for several sequences at once can do: one batch a step, an argmax a sequence.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from wasi_nn_backend.llama import load_llama

# Not llama_cpp itself: libgomp reads its settings when it is loaded, which this module sees to.
from wasi_nn_backend.llama.bindings import native

#: Tokens of prompt in one decode, as many as the engine takes by default.
N_BATCH = 512


class RawLoop:
    """A model and a context for ``n_sequences`` of ``n_ctx`` tokens each. Greedy; end-of-generation tokens go on.

    ``kv_unified``: one KV cache for all sequences instead of a stream for each.
    """

    def __init__(
        self,
        path: Path,
        *,
        n_sequences: int,
        n_ctx: int,
        n_threads: int,
        kv_unified: bool = False,
        flash_attention: bool = False,
    ) -> None:
        load_llama()  # its log goes to logging, not to stderr
        model_params = native.llama_model_default_params()
        model_params.n_gpu_layers = 0
        self._model = native.llama_model_load_from_file(str(path).encode(), model_params)
        if not self._model:
            raise RuntimeError(f"llama.cpp could not load {path}")
        params = native.llama_context_default_params()
        params.n_ctx = n_ctx * n_sequences
        params.n_seq_max = n_sequences
        params.n_batch = params.n_ubatch = N_BATCH
        params.n_threads = params.n_threads_batch = n_threads
        params.kv_unified = kv_unified
        params.flash_attn_type = (
            native.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash_attention else native.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        self._context = native.llama_init_from_model(self._model, params)
        if not self._context:
            native.llama_model_free(self._model)
            raise RuntimeError("llama.cpp refused the context")
        self._memory = native.llama_get_memory(self._context)
        self._vocab = native.llama_model_get_vocab(self._model)
        self._n_vocab = native.llama_vocab_n_tokens(self._vocab)
        self._cached: list[list[int]] = [[] for _ in range(n_sequences)]
        self._batch = native.llama_batch_init(N_BATCH, 0, 1)
        self._open = True

    def tokenize(self, text: bytes) -> list[int]:
        tokens = (native.llama_token * (len(text) + 8))()
        n = native.llama_tokenize(self._vocab, text, len(text), tokens, len(tokens), True, True)
        return list(tokens[:n])

    def set_n_threads(self, n_threads: int) -> None:
        native.llama_set_n_threads(self._context, n_threads, n_threads)

    def generate(self, prompts: list[list[int]], n_tokens: int) -> list[list[int]]:
        """``n_tokens`` tokens for each prompt, all prompts at once and from an empty cache."""
        native.llama_memory_clear(self._memory, True)
        self._cached = [[] for _ in self._cached]
        firsts = self.begin(prompts)
        return [[first, *rest] for first, rest in zip(firsts, self.go_on(firsts, n_tokens - 1), strict=True)]

    def begin(self, prompts: list[list[int]]) -> list[int]:
        """Compute what each prompt does not share with what its sequence holds; returns each one's first token."""
        return [self._prompt(sequence, prompt) for sequence, prompt in enumerate(prompts)]

    def begin_alike(self, prompt: list[int]) -> list[int]:
        """``begin`` with one prompt for all: computed once, and copied as a state, so that each has its own cells."""
        first = self._prompt(0, prompt)
        n_bytes = native.llama_state_seq_get_size(self._context, 0)
        state = (ctypes.c_uint8 * n_bytes)()
        native.llama_state_seq_get_data(self._context, state, n_bytes, 0)
        for sequence in range(1, len(self._cached)):
            native.llama_memory_seq_rm(self._memory, sequence, -1, -1)
            if native.llama_state_seq_set_data(self._context, state, n_bytes, sequence) != n_bytes:
                raise RuntimeError("llama.cpp did not take back its own state")
            self._cached[sequence] = list(prompt)
        return [first] * len(self._cached)

    def go_on(self, lasts: list[int], n_steps: int) -> list[list[int]]:
        """``n_steps`` further tokens for each sequence, whose newest token is in ``lasts``."""
        outputs: list[list[int]] = [[] for _ in lasts]
        for _ in range(n_steps):
            self._batch.n_tokens = 0
            for sequence, token in enumerate(lasts):
                self._add(token, sequence, wants_logits=True)
            self._decode()
            lasts = [self._argmax(sequence) for sequence in range(len(lasts))]
            for output, token in zip(outputs, lasts, strict=True):
                output.append(token)
        return outputs

    def cut(self, n_tokens: int) -> None:
        """Forget all but the first ``n_tokens`` of each sequence."""
        for sequence in range(len(self._cached)):
            self._cut(sequence, n_tokens)

    def _cut(self, sequence: int, n_tokens: int) -> None:
        if n_tokens < len(self._cached[sequence]):
            native.llama_memory_seq_rm(self._memory, sequence, n_tokens, -1)
            del self._cached[sequence][n_tokens:]

    def _prompt(self, sequence: int, prompt: list[int]) -> int:
        pairs = enumerate(zip(self._cached[sequence], prompt, strict=False))
        n_common = next((i for i, (old, new) in pairs if old != new), min(len(self._cached[sequence]), len(prompt)))
        n_common = min(n_common, len(prompt) - 1)  # the last one is computed for its logits
        self._cut(sequence, n_common)
        for first in range(n_common, len(prompt), N_BATCH):
            chunk = prompt[first : first + N_BATCH]
            self._batch.n_tokens = 0
            for i, token in enumerate(chunk):
                self._add(token, sequence, wants_logits=i == len(chunk) - 1)
            self._decode()
        return self._argmax(-1)

    def _add(self, token: int, sequence: int, *, wants_logits: bool) -> None:
        batch, i = self._batch, self._batch.n_tokens
        batch.token[i] = token
        batch.pos[i] = len(self._cached[sequence])
        batch.n_seq_id[i] = 1
        batch.seq_id[i][0] = sequence
        batch.logits[i] = wants_logits
        batch.n_tokens = i + 1
        self._cached[sequence].append(token)

    def _decode(self) -> None:
        if native.llama_decode(self._context, self._batch) != 0:
            raise RuntimeError("llama_decode failed")

    def _argmax(self, row: int) -> int:
        pointer: Any = native.llama_get_logits_ith(self._context, row)
        address = ctypes.cast(pointer, ctypes.c_void_p).value or 0
        logits = np.frombuffer((ctypes.c_float * self._n_vocab).from_address(address), dtype=np.float32)
        return int(logits.argmax())

    def close(self) -> None:
        """Idempotent."""
        if not self._open:
            return
        self._open = False
        native.llama_batch_free(self._batch)
        native.llama_free(self._context)
        native.llama_model_free(self._model)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
