"""A model's vocabulary: text to tokens and back."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from functools import cached_property

from wasi_nn_backend.errors import InvalidArgument, RuntimeFailure
from wasi_nn_backend.grammar import TokenTable
from wasi_nn_backend.llama.bindings import native
from wasi_nn_backend.llama.log_bridge import LogBridge
from wasi_nn_backend.llama.owner import Hold, Resource

__all__ = ["NativeVocabulary"]

_NO_TOKEN = -1
_MAX_TEXT_BYTES = 2**31 - 1  # llama_tokenize takes an int32 length


class NativeVocabulary:
    """The vocabulary inside a model: it has no memory of its own, each call holds the model. Thread-safe."""

    def __init__(self, model: Resource, log: LogBridge) -> None:
        self._model = model
        self._log = log
        with Hold(model) as pointer:
            self._vocab = native.llama_model_get_vocab(pointer)
            self._n_tokens = int(native.llama_vocab_n_tokens(self._vocab))
            self._bos_text = self._text(native.llama_vocab_bos(self._vocab))
            self._eos_text = self._text(native.llama_vocab_eos(self._vocab))

    @property
    def n_tokens(self) -> int:
        return self._n_tokens

    @property
    def bos_text(self) -> str:
        return self._bos_text

    @property
    def eos_text(self) -> str:
        return self._eos_text

    @cached_property
    def end_of_generation_tokens(self) -> tuple[int, ...]:
        """Found by asking for every token, about 0.2 s per million, on first use."""
        with Hold(self._model):
            return tuple(token for token in range(self._n_tokens) if native.llama_vocab_is_eog(self._vocab, token))

    @cached_property
    def suppressed_tokens(self) -> tuple[int, ...]:
        """``tokenizer.ggml.suppress_tokens`` of the model's file."""
        n_tokens = ctypes.c_int32()
        with Hold(self._model):
            tokens = native.llama_vocab_get_suppress_tokens(self._vocab, ctypes.byref(n_tokens))
            return tuple(tokens[: n_tokens.value]) if n_tokens.value else ()

    @cached_property
    def control_texts(self) -> frozenset[str]:
        """Found by asking for every token, on first use. An unknown token's spelling is parsed as a control token's."""
        mask = native.LLAMA_TOKEN_ATTR_CONTROL | native.LLAMA_TOKEN_ATTR_UNKNOWN
        attributes = native.llama_vocab_get_attr
        with Hold(self._model):
            found = [token for token in range(self._n_tokens) if attributes(self._vocab, token) & mask]
            return frozenset(text for token in found if (text := self._text(token)))

    @cached_property
    def token_table(self) -> TokenTable:
        """Some 0.3 s for 49,000 tokens, on first use."""
        return TokenTable(self._pieces())

    def _pieces(self) -> Iterator[bytes]:
        """``piece`` of every token, faster than one by one."""
        capacity = 256
        buffer = ctypes.create_string_buffer(capacity)
        with Hold(self._model):
            for token in range(self._n_tokens):
                n = native.llama_token_to_piece(self._vocab, token, buffer, capacity, 0, False)
                yield buffer.raw[:n] if n >= 0 else self.piece(token, special=False)

    def _text(self, token: int) -> str:
        if token == _NO_TOKEN:
            return ""
        return (native.llama_vocab_get_text(self._vocab, token) or b"").decode("utf-8", "replace")

    def tokenize(self, text: bytes, *, add_special: bool, parse_special: bool) -> list[int]:
        """Bytes that are no UTF-8 count as U+FFFD. Raises ``InvalidArgument`` for text of 2 GiB and more."""
        text = _valid_utf8(text)
        if len(text) > _MAX_TEXT_BYTES:
            raise InvalidArgument(f"a text of {len(text)} bytes is longer than llama.cpp can tokenise; split it")
        # One token a byte and the special ones around the text is the most that byte-level vocabularies give; others
        # answer with the size that they need.
        capacity = len(text) + 8
        for _attempt in range(2):
            tokens = (ctypes.c_int32 * capacity)()
            # Quiet: llama.cpp warns of every prompt that begins with a beginning token of its own.
            with Hold(self._model), self._log.collector(quiet=True):
                n = native.llama_tokenize(self._vocab, text, len(text), tokens, capacity, add_special, parse_special)
            if n >= 0:
                return tokens[:n]
            capacity = -n
        raise RuntimeFailure(f"llama.cpp could not tokenise {len(text)} bytes of text; it asked for {capacity} tokens")

    def piece(self, token: int, *, special: bool) -> bytes:
        """Raises ``InvalidArgument`` for a token outside of the vocabulary."""
        self._check(token)
        capacity = 64
        for _attempt in range(2):
            buffer = ctypes.create_string_buffer(capacity)
            with Hold(self._model):
                n = native.llama_token_to_piece(self._vocab, token, buffer, capacity, 0, special)
            if n >= 0:
                return buffer.raw[:n]
            capacity = -n
        raise RuntimeFailure(f"llama.cpp could not give the text of token {token}")

    def is_end_of_generation(self, token: int) -> bool:
        self._check(token)
        with Hold(self._model):
            return bool(native.llama_vocab_is_eog(self._vocab, token))

    def _check(self, token: int) -> None:
        # llama.cpp indexes without asking: an exception of C++ would end the process here.
        if not 0 <= token < self._n_tokens:
            raise InvalidArgument(f"token {token} is outside of the vocabulary of {self._n_tokens}")


def _valid_utf8(text: bytes) -> bytes:
    """llama.cpp replaces most broken bytes itself, but ends the process over some (F7 BF BF BF, beyond U+10FFFF)."""
    try:
        text.decode()
    except UnicodeDecodeError:
        return text.decode("utf-8", "replace").encode()
    return text
