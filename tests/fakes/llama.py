"""A llama without a library: deterministic logits, real cell limits, the same protocol as the native one.

Tokens 0 to 255 are bytes, the rest control tokens. A cell keeps a digest of everything that its token could see when
it was decoded, and the logits come from that digest: a token decoded over a wrong prefix, at a wrong position or in
another sequence's cells gives other logits, so bookkeeping faults show up as wrong text.
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from tests.fakes.sampler import FakeSampler
from wasi_nn_backend.errors import InvalidArgument, ModelNotFound, RuntimeFailure
from wasi_nn_backend.grammar import TokenTable
from wasi_nn_backend.llama.interface import (
    AttentionChoice,
    ContextParams,
    DecodeBatch,
    DecodeStatus,
    KvLayout,
    ModelParams,
    ProgressCallback,
    SamplerStage,
    TwoStepSampler,
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
    suppressed_tokens: tuple[int, ...] = ()
    token_table = TokenTable([*(bytes([byte]) for byte in range(256)), *(b"" for _ in range(256, N_VOCAB))])
    control_texts = frozenset(name.decode() for name in SPECIAL_TOKENS.values())

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


@dataclass(slots=True, eq=False)
class _Cell:
    token: int
    digest: int
    n_owners: int = 0


@dataclass(slots=True)
class _Sequence:
    """The cells that a sequence owns, by position, and the running sum of their digests."""

    cells: dict[int, _Cell] = field(default_factory=dict)
    digest_sum: int = 0

    def next_cell(self, position: int, token: int) -> _Cell:
        return _Cell(token, _mix((self.digest_sum ^ _mix(position * 1_000_003 + token)) & _MASK))

    def own(self, position: int, cell: _Cell) -> None:
        cell.n_owners += 1
        self.cells[position] = cell
        self.digest_sum = (self.digest_sum + cell.digest) & _MASK

    def disown(self, position: int) -> _Cell:
        cell = self.cells.pop(position)
        cell.n_owners -= 1
        self.digest_sum = (self.digest_sum - cell.digest) & _MASK
        return cell

    def positions(self, first_position: int, end_position: int) -> list[int]:
        return [p for p in self.cells if first_position <= p and (end_position < 0 or p < end_position)]


class FakeContext:
    """``before_decode`` is called at the start of every decode, on the engine's thread: tests gate steps with it."""

    def __init__(self, model: FakeModel, params: ContextParams) -> None:
        self.model = model
        self.params = params
        self.n_ctx = params.n_ctx
        self.n_cells = params.n_cells_total
        self._is_unified = params.kv_layout == "unified"
        self._n_cells_used = 0
        self.n_sequences = params.n_sequences
        self.n_batch = params.n_batch
        self.can_shift = True
        self.before_decode: Callable[[DecodeBatch], None] | None = None
        self.n_decodes = 0
        self.n_tokens_decoded = 0
        self.n_threads = params.n_threads
        self.n_threads_single: int | None = None
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
        if not self._has_room(batch.sequence_ids):
            return DecodeStatus.NO_ROOM
        for row, (token, position, sequence_id) in enumerate(
            zip(batch.tokens, batch.positions, batch.sequence_ids, strict=True)
        ):
            if self._abort.is_set() and row >= len(batch) // 2:
                return DecodeStatus.ABORTED
            last = self.last_position(sequence_id)
            if position != last + 1:
                raise RuntimeFailure(f"sequence {sequence_id}: position {position} does not follow {last}")
            cell = self._sequences[sequence_id].next_cell(position, token)
            self._own(sequence_id, position, cell)
            self.n_tokens_decoded += 1
            if batch.wants_logits[row]:
                self._digests[row] = (cell.digest, token)
        return DecodeStatus.DONE

    def _has_room(self, sequence_ids: Sequence[int]) -> bool:
        """For all of the batch or none of it. The unified layout knows no windows, as llama.cpp's does not."""
        if self._is_unified:
            return self._n_cells_used + len(sequence_ids) <= self.n_cells
        n_new = Counter(sequence_ids)
        return all(len(self._sequences[s].cells) + n <= self.n_ctx for s, n in n_new.items())

    def _own(self, sequence_id: int, position: int, cell: _Cell) -> None:
        self._n_cells_used += cell.n_owners == 0
        self._sequences[sequence_id].own(position, cell)

    def _disown(self, sequence_id: int, position: int) -> _Cell:
        cell = self._sequences[sequence_id].disown(position)
        self._n_cells_used -= cell.n_owners == 0
        return cell

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
        for position in self._sequences[sequence_id].positions(first_position, end_position):
            self._disown(sequence_id, position)
        return True

    def copy(self, source_id: int, target_id: int, first_position: int = 0, end_position: int = -1) -> bool:
        """A copy in streams takes cells of its own, one in the unified layout none."""
        if self.last_position(source_id) + 1 < end_position:
            self.remove(target_id, 0)
            return False
        source = self._sequences[source_id].cells
        kept = [(p, source[p]) for p in self._sequences[source_id].positions(first_position, end_position)]
        self.remove(target_id, 0)
        for position, cell in kept:
            self._own(target_id, position, cell if self._is_unified else _Cell(cell.token, cell.digest))
        return True

    def shift(self, sequence_id: int, first_position: int, end_position: int, delta: int) -> bool:
        sequence = self._sequences[sequence_id]
        if not self._take_apart(sequence_id, first_position):
            return False
        inside = set(sequence.positions(first_position, end_position))
        sequence.cells = {p + delta if p in inside else p: cell for p, cell in sequence.cells.items()}
        return True

    def _take_apart(self, sequence_id: int, first_position: int) -> bool:
        """Copies of the cells that have other owners, where there is room for them."""
        cells = self._sequences[sequence_id].cells
        shared = [p for p in self._sequences[sequence_id].positions(first_position, -1) if cells[p].n_owners > 1]
        if self._n_cells_used + len(shared) > self.n_cells:
            return False
        for position in shared:
            cell = self._disown(sequence_id, position)
            self._own(sequence_id, position, _Cell(cell.token, cell.digest))
        return True

    def last_position(self, sequence_id: int) -> int:
        return max(self._sequences[sequence_id].cells, default=-1)

    def save_sequence(self, sequence_id: int) -> bytes:
        cells = self._sequences[sequence_id].cells
        return json.dumps([[p, cell.token, cell.digest] for p, cell in cells.items()]).encode()

    def restore_sequence(self, sequence_id: int, state: bytes) -> bool:
        self.remove(sequence_id, 0)
        try:
            rows = json.loads(state)
        except ValueError:
            return False
        if not self._has_room([sequence_id] * len(rows)):
            return False
        for position, token, digest in rows:
            self._own(sequence_id, position, _Cell(token, digest))
        return True

    def set_n_threads(self, n_threads: int) -> None:
        self.n_threads = n_threads

    def request_abort(self) -> None:
        self._abort.set()

    def n_cells_used(self) -> int:
        return self._n_cells_used

    def close(self) -> None:
        self.closed = True


class FakeEmbeddingContext:
    """A text's vector comes from a digest of its tokens. ``before_embed`` is called with the texts of every call."""

    def __init__(self, model: FakeModel, params: ContextParams) -> None:
        self.params = params
        self.n_embd = model.n_embd
        self.n_batch = params.n_batch
        self.n_tokens_max = min(params.n_ctx, params.n_batch)
        self.n_sequences = params.n_sequences
        self.before_embed: Callable[[Sequence[Sequence[int]]], None] | None = model.llama.before_embed
        self.n_calls = 0
        self.closed = False
        self._abort = threading.Event()

    def embed(self, texts: Sequence[Sequence[int]]) -> np.ndarray | None:
        self._check(texts)
        self._abort.clear()
        if self.before_embed is not None:
            self.before_embed(texts)
        self.n_calls += 1
        return None if self._abort.is_set() else np.stack([self._vector(tokens) for tokens in texts])

    def _vector(self, tokens: Sequence[int]) -> np.ndarray:
        digest = 0
        for token in tokens:
            digest = _mix(digest ^ token)
        return np.random.Generator(np.random.PCG64(digest)).normal(size=self.n_embd).astype(np.float32)

    def _check(self, texts: Sequence[Sequence[int]]) -> None:
        lengths = [len(tokens) for tokens in texts]
        if not 0 < len(texts) <= self.n_sequences:
            raise InvalidArgument(f"{len(texts)} texts; n_sequences is {self.n_sequences}")
        if min(lengths) < 1 or max(lengths) > self.n_tokens_max or sum(lengths) > self.n_batch:
            raise InvalidArgument(f"texts of {lengths} tokens; n_batch is {self.n_batch}")
        if not all(0 <= token < N_VOCAB for tokens in texts for token in tokens):
            raise InvalidArgument("a token outside of the vocabulary")

    def request_abort(self) -> None:
        self._abort.set()

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
        self.embedding_contexts: list[FakeEmbeddingContext] = []
        self.can_generate = not llama.is_encoder
        self.closed = False

    def kv_bytes_per_token(self, cache_type_k: str, cache_type_v: str) -> int:
        return 64

    def choose_attention(self, params: ContextParams, layouts: Sequence[KvLayout]) -> AttentionChoice:
        """The choice that the fake was made with, within what the caller leaves open."""
        choice = self.llama.attention
        kv_layout = choice.kv_layout if choice.kv_layout in layouts else layouts[0]
        flash_attention = choice.flash_attention if params.flash_attention == "auto" else params.flash_attention
        if params.flash_attention == "auto" and params.cache_type_v not in ("f32", "f16", "bf16"):
            flash_attention = "on"
        return AttentionChoice(kv_layout, flash_attention, choice.reason)

    def create_context(self, params: ContextParams) -> FakeContext:
        context = FakeContext(self, params)
        context.before_decode = self.llama.before_decode
        self.contexts.append(context)
        return context

    def create_embedding_context(self, params: ContextParams) -> FakeEmbeddingContext:
        self.embedding_contexts.append(FakeEmbeddingContext(self, params))
        return self.embedding_contexts[-1]

    def create_sampler(self, stages: Sequence[SamplerStage]) -> TwoStepSampler:
        return FakeSampler(stages, lambda token: self.vocabulary.piece(token, special=True))

    def close(self) -> None:
        self.closed = True


class FakeLlama:
    """``end_every``: about every so many tokens a model ends by itself; 0 for never. ``attention``: what is chosen.

    ``is_encoder``: its models give embeddings only.
    """

    build_number = 4321
    build_commit = "fake"
    system_info = "FAKE = 1"
    supports_gpu_offload = False

    def __init__(
        self,
        *,
        end_every: int = 0,
        before_decode: Callable[[DecodeBatch], None] | None = None,
        attention: AttentionChoice | None = None,
        before_embed: Callable[[Sequence[Sequence[int]]], None] | None = None,
        is_encoder: bool = False,
    ) -> None:
        self.end_every = end_every
        self.before_embed = before_embed
        self.is_encoder = is_encoder
        self.attention = attention or AttentionChoice("streams", "off", "the fake's rule")
        self.before_decode = before_decode
        self.models: list[FakeModel] = []
        self.numa_strategies: list[str] = []  # asked for

    def set_numa(self, strategy: str) -> None:
        self.numa_strategies.append(strategy)

    def load_model(self, params: ModelParams, progress: ProgressCallback | None = None) -> FakeModel:
        if not params.path.exists():
            raise ModelNotFound(f"{params.path}: no such file")
        if progress is not None:
            progress(0.0)
            progress(1.0)
        model = FakeModel(self, params)
        self.models.append(model)
        return model
