"""A llama that says what the test wants, byte by byte: every tag and every character lies over token borders. Control
tokens are written as their text."""

from __future__ import annotations

from collections import Counter

import numpy as np

from tests.fakes.llama import IM_END, N_VOCAB, FakeContext, FakeLlama, FakeModel, FakeVocabulary
from wasi_nn_backend.llama.interface import ContextParams, DecodeBatch, DecodeStatus, ModelParams, ProgressCallback

__all__ = ["ScriptedLlama"]


class _ScriptedContext(FakeContext):
    """The answer begins anew after each prompt, which must be longer than one token and shorter than a batch."""

    def __init__(self, model: _ScriptedModel, params: ContextParams) -> None:
        super().__init__(model, params)
        self._answer = model.answer
        self._prompts = model.prompts
        self._n_said: Counter[int] = Counter()  # by sequence
        self._next: dict[int, int] = {}  # by row

    def decode(self, batch: DecodeBatch) -> DecodeStatus:
        n_tokens = Counter(batch.sequence_ids)
        piece = self.model.vocabulary.piece
        for sequence_id in n_tokens:
            pairs = zip(batch.tokens, batch.sequence_ids, strict=True)
            tokens = [token for token, owner in pairs if owner == sequence_id]
            if len(tokens) > 1:
                self._prompts.append(b"".join(piece(token, special=True) for token in tokens).decode())
        self._next.clear()
        for row, sequence_id in enumerate(batch.sequence_ids):
            if batch.wants_logits[row]:
                at = 0 if n_tokens[sequence_id] > 1 else self._n_said[sequence_id]
                self._next[row] = self._answer[at] if at < len(self._answer) else IM_END
                self._n_said[sequence_id] = at + 1
        return super().decode(batch)

    def logits(self, row: int) -> np.ndarray:
        logits = np.full(N_VOCAB, -30.0, dtype=np.float32)
        logits[self._next[row]] = 40.0
        return logits


class _ScriptedModel(FakeModel):
    def __init__(self, llama: ScriptedLlama, params: ModelParams) -> None:
        super().__init__(llama, params)
        self.answer, self.prompts = llama.answer, llama.prompts
        self.chat_template = llama.chat_template

    def create_context(self, params: ContextParams) -> FakeContext:
        context = _ScriptedContext(self, params)
        context.before_decode = self.llama.before_decode
        self.contexts.append(context)
        return context


class ScriptedLlama(FakeLlama):
    """``chat_template`` is the models' own; None for models without one. ``prompts`` are what contexts computed, less
    what was in their cells already."""

    def __init__(self, answer: str | bytes, *, chat_template: str | None = FakeModel.chat_template) -> None:
        super().__init__()
        text = answer.encode() if isinstance(answer, str) else answer
        self.answer = FakeVocabulary().tokenize(text, add_special=False, parse_special=True)
        self.chat_template = chat_template
        self.prompts: list[str] = []

    def load_model(self, params: ModelParams, progress: ProgressCallback | None = None) -> FakeModel:
        super().load_model(params, progress)
        self.models[-1] = _ScriptedModel(self, params)
        return self.models[-1]
