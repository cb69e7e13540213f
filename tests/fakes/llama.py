"""A llama without a library: deterministic logits, real cell limits, the same protocol as the native one.

Tokens 0 to 255 are bytes, the rest control tokens. A cell keeps a digest of everything that its token could see when
it was decoded, and the logits come from that digest: a token decoded over a wrong prefix, at a wrong position or in
another sequence's cells gives other logits, so bookkeeping faults show up as wrong text.
"""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from wasi_nn_backend.errors import InvalidArgument, ModelNotFound, RuntimeFailure
from wasi_nn_backend.llama.interface import (
    ContextParams,
    DecodeBatch,
    DecodeStatus,
    Distribution,
    Greedy,
    LogitBias,
    MinP,
    ModelParams,
    Penalties,
    ProgressCallback,
    Sampler,
    SamplerStage,
    Temperature,
    TopK,
    TopP,
    Typical,
)

SPECIAL_TOKENS = {256: b"<s>", 257: b"<|im_start|>", 258: b"<|im_end|>"}
BOS, IM_START, IM_END = SPECIAL_TOKENS
N_VOCAB = 260
_MASK = (1 << 64) - 1
_LETTERS = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz      ,.", dtype=np.uint8)

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _mix(value: int) -> int:
    """splitmix64's finaliser: one changed bit changes half of the result's bits."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


class FakeVocabulary:
    n_tokens = N_VOCAB
    bos_text = "<s>"
    eos_text = "<|im_end|>"
    end_of_generation_tokens = (IM_END,)

    def tokenize(self, text: bytes, *, add_special: bool, parse_special: bool) -> list[int]:
        tokens = [BOS] if add_special else []
        at = 0
        while at < len(text):
            for token, name in SPECIAL_TOKENS.items():
                if parse_special and text.startswith(name, at):
                    tokens.append(token)
                    at += len(name)
                    break
            else:
                tokens.append(text[at])
                at += 1
        return tokens

    def piece(self, token: int, *, special: bool) -> bytes:
        if token < 256:
            return bytes([token])
        return SPECIAL_TOKENS.get(token, b"") if special else b""

    def is_end_of_generation(self, token: int) -> bool:
        return token == IM_END


class FakeSampler:
    """The stages in plain numpy. Agrees with itself from run to run, not with llama.cpp's random generator."""

    def __init__(self, stages: Sequence[SamplerStage]) -> None:
        if not stages or not isinstance(stages[-1], Distribution | Greedy):
            raise InvalidArgument("a sampler chain must end in Distribution or Greedy")
        self._stages = tuple(stages)
        self._history: list[int] = []
        self.closed = False
        self.reset()

    def reset(self) -> None:
        last = self._stages[-1]
        self._random = random.Random(last.seed if isinstance(last, Distribution) else 0)
        self._history.clear()

    def accept(self, token: int) -> None:
        self._history.append(token)

    def sample(self, context: FakeContext, row: int) -> int:
        logits = np.array(context.logits(row), dtype=np.float64)
        for stage in self._stages[:-1]:
            self._apply(stage, logits)
        if isinstance(self._stages[-1], Greedy):
            token = int(np.argmax(logits))
        else:
            weights = np.exp(logits - logits.max())
            token = int(np.searchsorted(np.cumsum(weights), self._random.random() * weights.sum(), side="right"))
        self.accept(token)
        return token

    def _apply(self, stage: SamplerStage, logits: np.ndarray) -> None:
        match stage:
            case Penalties(last_n, repeat, frequency, presence):
                window = self._history[-last_n:] if last_n else []
                for token in set(window):
                    logits[token] = logits[token] / repeat if logits[token] > 0 else logits[token] * repeat
                    logits[token] -= frequency * window.count(token) + presence
            case LogitBias(biases):
                for token, bias in biases:
                    logits[token] += bias
            case TopK(k) if 0 < k < len(logits):
                logits[logits < np.sort(logits)[-k]] = -np.inf
            case TopP(p) | Typical(p):
                self._keep_mass(logits, p)
            case MinP(p):
                weights = np.exp(logits - logits.max())
                logits[weights < p] = -np.inf
            case Temperature(value):
                logits /= max(value, 1e-6)

    @staticmethod
    def _keep_mass(logits: np.ndarray, p: float) -> None:
        order = np.argsort(-logits, kind="stable")
        weights = np.exp(logits[order] - logits.max())
        mass = np.cumsum(weights / weights.sum())
        logits[order[int(np.searchsorted(mass, p)) + 1 :]] = -np.inf

    def close(self) -> None:
        self.closed = True


@dataclass(slots=True)
class _Sequence:
    """Cells of one stream by position, and the running sum of their digests."""

    cells: dict[int, tuple[int, int]] = field(default_factory=dict)  # position -> (token, digest)
    digest_sum: int = 0

    def put(self, position: int, token: int) -> int:
        digest = _mix((self.digest_sum ^ _mix(position * 1_000_003 + token)) & _MASK)
        self.cells[position] = (token, digest)
        self.digest_sum = (self.digest_sum + digest) & _MASK
        return digest

    def drop(self, position: int) -> None:
        _, digest = self.cells.pop(position)
        self.digest_sum = (self.digest_sum - digest) & _MASK


class FakeContext:
    """``before_decode`` is called at the start of every decode, on the engine's thread: tests gate steps with it."""

    def __init__(self, model: FakeModel, params: ContextParams) -> None:
        self.model = model
        self.params = params
        self.n_ctx = params.n_ctx
        self.n_sequences = params.n_sequences
        self.n_batch = params.n_batch
        self.can_shift = True
        self.before_decode: Callable[[DecodeBatch], None] | None = None
        self.n_decodes = 0
        self.n_tokens_decoded = 0
        self.n_threads = params.n_threads
        self.closed = False
        self._sequences = [_Sequence() for _ in range(params.n_sequences)]
        self._digests: dict[int, tuple[int, int]] = {}
        self._abort = threading.Event()

    def decode(self, batch: DecodeBatch) -> DecodeStatus:
        self._check(batch)
        self._abort.clear()
        if self.before_decode is not None:
            self.before_decode(batch)
        self.n_decodes += 1
        self._digests.clear()
        need: dict[int, int] = {}
        for sequence_id in batch.sequence_ids:
            need[sequence_id] = need.get(sequence_id, 0) + 1
        if any(len(self._sequences[s].cells) + n > self.n_ctx for s, n in need.items()):
            return DecodeStatus.NO_ROOM
        for row, (token, position, sequence_id) in enumerate(
            zip(batch.tokens, batch.positions, batch.sequence_ids, strict=True)
        ):
            if self._abort.is_set() and row >= len(batch) // 2:
                return DecodeStatus.ABORTED
            last = self.last_position(sequence_id)
            if position != last + 1:
                raise RuntimeFailure(f"sequence {sequence_id}: position {position} does not follow {last}")
            digest = self._sequences[sequence_id].put(position, token)
            self.n_tokens_decoded += 1
            if batch.wants_logits[row]:
                self._digests[row] = (digest, token)
        return DecodeStatus.DONE

    def _check(self, batch: DecodeBatch) -> None:
        if not 0 < len(batch) <= self.n_batch:
            raise InvalidArgument(f"a batch of {len(batch)} tokens; n_batch is {self.n_batch}")
        if not all(0 <= token < N_VOCAB for token in batch.tokens):
            raise InvalidArgument("a token outside of the vocabulary")
        if not all(0 <= s < self.n_sequences for s in batch.sequence_ids):
            raise InvalidArgument("a sequence id out of range")

    def logits(self, row: int) -> np.ndarray:
        if row not in self._digests:
            raise InvalidArgument(f"row {row} has no logits")
        digest, token = self._digests[row]
        logits = np.full(N_VOCAB, -30.0, dtype=np.float32)
        noise = np.random.Generator(np.random.PCG64(digest)).random(len(_LETTERS), dtype=np.float32) * 6
        np.maximum.at(logits, _LETTERS, noise)
        follow = {0xE2: 0x82, 0x82: 0xAC}.get(token)  # the euro sign, three tokens long
        if follow is not None:
            logits[follow] = 40.0
        elif digest % 11 == 0:
            logits[0xE2] = 20.0
        elif self.model.end_every and digest % self.model.end_every == 1:
            logits[IM_END] = 20.0
        return logits

    def remove(self, sequence_id: int, first_position: int, end_position: int = -1) -> bool:
        sequence = self._sequences[sequence_id]
        for position in [p for p in sequence.cells if first_position <= p and (end_position < 0 or p < end_position)]:
            sequence.drop(position)
        return True

    def copy(self, source_id: int, target_id: int, first_position: int = 0, end_position: int = -1) -> None:
        source, target = self._sequences[source_id], _Sequence()
        for position, (token, digest) in source.cells.items():
            if first_position <= position and (end_position < 0 or position < end_position):
                target.cells[position] = (token, digest)
                target.digest_sum = (target.digest_sum + digest) & _MASK
        self._sequences[target_id] = target

    def shift(self, sequence_id: int, first_position: int, end_position: int, delta: int) -> None:
        sequence = self._sequences[sequence_id]
        moved = {}
        for position, cell in sequence.cells.items():
            inside = first_position <= position and (end_position < 0 or position < end_position)
            moved[position + delta if inside else position] = cell
        sequence.cells = moved

    def last_position(self, sequence_id: int) -> int:
        return max(self._sequences[sequence_id].cells, default=-1)

    def save_sequence(self, sequence_id: int) -> bytes:
        sequence = self._sequences[sequence_id]
        return json.dumps([[p, t, d] for p, (t, d) in sequence.cells.items()]).encode()

    def restore_sequence(self, sequence_id: int, state: bytes) -> bool:
        try:
            rows = json.loads(state)
        except ValueError:
            return False
        if len(rows) > self.n_ctx:
            return False
        sequence = _Sequence({p: (t, d) for p, t, d in rows}, sum(d for _, _, d in rows) & _MASK)
        self._sequences[sequence_id] = sequence
        return True

    def set_n_threads(self, n_threads: int) -> None:
        self.n_threads = n_threads

    def request_abort(self) -> None:
        self._abort.set()

    def n_cells_used(self) -> int:
        return sum(len(sequence.cells) for sequence in self._sequences)

    def close(self) -> None:
        self.closed = True


class FakeModel:
    description = "fake"
    chat_template: str | None = CHAT_TEMPLATE
    n_ctx_train = 4096
    n_embd = 8
    n_params = 1000
    n_weight_bytes = 2000

    def __init__(self, llama: FakeLlama, params: ModelParams) -> None:
        self.llama = llama
        self.params = params
        self.vocabulary = FakeVocabulary()
        self.metadata: Mapping[str, str] = {"general.architecture": "fake"}
        self.end_every = llama.end_every
        self.contexts: list[FakeContext] = []
        self.closed = False

    def kv_bytes_per_token(self, cache_type_k: str, cache_type_v: str) -> int:
        return 64

    def create_context(self, params: ContextParams) -> FakeContext:
        context = FakeContext(self, params)
        context.before_decode = self.llama.before_decode
        self.contexts.append(context)
        return context

    def create_sampler(self, stages: Sequence[SamplerStage]) -> Sampler:
        return FakeSampler(stages)

    def close(self) -> None:
        self.closed = True


class FakeLlama:
    """``end_every``: about every so many tokens a model ends by itself; 0 for never."""

    build_number = 4321
    build_commit = "fake"
    system_info = "FAKE = 1"
    supports_gpu_offload = False

    def __init__(self, *, end_every: int = 0, before_decode: Callable[[DecodeBatch], None] | None = None) -> None:
        self.end_every = end_every
        self.before_decode = before_decode
        self.models: list[FakeModel] = []

    def load_model(self, params: ModelParams, progress: ProgressCallback | None = None) -> FakeModel:
        if not params.path.exists():
            raise ModelNotFound(f"{params.path}: no such file")
        if progress is not None:
            progress(0.0)
            progress(1.0)
        model = FakeModel(self, params)
        self.models.append(model)
        return model
