"""What the layers above may ask of a llama.

Two implementations exist: the native one in this package and ``tests/fakes/llama.py``, which has deterministic logits
and real cell limits. One conformance suite (``tests/llama_conformance.py``) runs on both, so that the fake stays true.
Protocols instead of base classes: the native classes own foreign memory and share nothing with the fake but shape.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from wasi_nn_backend.grammar import TokenTable
from wasi_nn_backend.llama.embedding_interface import EmbeddingContext
from wasi_nn_backend.llama.stages import (
    Distribution,
    Dry,
    DynamicTemperature,
    Greedy,
    LogitBias,
    MinP,
    Mirostat,
    Penalties,
    SamplerStage,
    Temperature,
    TopK,
    TopNSigma,
    TopP,
    Typical,
    Xtc,
)

__all__ = [
    "AttentionChoice",
    "Context",
    "ContextParams",
    "DecodeBatch",
    "DecodeStatus",
    "Distribution",
    "Dry",
    "DynamicTemperature",
    "Greedy",
    "Llama",
    "LogitBias",
    "MinP",
    "Mirostat",
    "Model",
    "ModelParams",
    "Penalties",
    "ProgressCallback",
    "Sampler",
    "SamplerStage",
    "Temperature",
    "TopK",
    "TopNSigma",
    "TopP",
    "TwoStepSampler",
    "Typical",
    "Vocabulary",
    "Xtc",
]

#: Called with the fraction loaded, 0.0 to 1.0. Returning False, and nothing else, cancels the load.
ProgressCallback = Callable[[float], bool | None]


#: ``streams``: every sequence has cells of its own. ``unified``: all sequences take theirs from one pool, and a token
#: attends over every used cell of it, those of other sequences masked.
KvLayout = Literal["streams", "unified"]


class DecodeStatus(enum.Enum):
    """The outcomes of ``llama_decode`` that a scheduler must tell apart; faults raise ``RuntimeFailure`` instead."""

    DONE = 0
    NO_ROOM = 1
    ABORTED = 2


@dataclass(frozen=True, slots=True)
class ModelParams:
    """What decides how weights lie in memory: two graphs with equal values share one model.

    ``adapters`` are LoRA adapters, loaded with the model; each context weighs them.
    """

    path: Path
    n_gpu_layers: int = 0
    main_gpu: int = 0
    split_mode: Literal["none", "layer", "row"] = "layer"
    tensor_split: tuple[float, ...] = ()
    use_mmap: bool = True
    use_mlock: bool = False
    check_tensors: bool = False
    adapters: tuple[Path, ...] = ()


@dataclass(frozen=True, slots=True)
class ContextParams:
    """What decides the shape of one llama context.

    ``n_ctx`` is one sequence's window in tokens. ``n_sequences_expected`` are expected to run together mostly,
    which ``Model.choose_attention`` wants to know. ``n_cells`` is how many cells the sequences of the unified layout
    share, ``n_ctx`` or more; None means ``n_ctx * n_sequences``, which streams always have. Negative or zero RoPE and
    YaRN values mean the model's own. ``cache_type_*`` are ggml type names such as ``f16``. ``adapter_scales`` has the
    weight of each of the model's ``adapters``; 0 leaves one out.
    """

    n_ctx: int
    n_sequences: int = 1
    n_sequences_expected: int = 1
    n_batch: int = 512
    n_ubatch: int = 512
    n_threads: int = 1
    flash_attention: Literal["auto", "on", "off"] = "auto"
    kv_layout: KvLayout = "streams"
    n_cells: int | None = None
    cache_type_k: str = "f16"
    cache_type_v: str = "f16"
    offload_kqv: bool = True
    rope_scaling_type: int = -1
    rope_freq_base: float = 0.0
    rope_freq_scale: float = 0.0
    yarn_ext_factor: float = -1.0
    yarn_attn_factor: float = -1.0
    yarn_beta_fast: float = -1.0
    yarn_beta_slow: float = -1.0
    yarn_orig_ctx: int = 0
    adapter_scales: tuple[float, ...] = ()

    @property
    def n_cells_total(self) -> int:
        """Cells of all sequences, before llama.cpp rounds them up."""
        return self.n_ctx * self.n_sequences if self.n_cells is None else self.n_cells


@dataclass(frozen=True, slots=True)
class AttentionChoice:
    """How a context should keep and read its cells. ``flash_attention`` is ``auto`` only where llama.cpp decides (GPU).

    ``reason`` continues a sentence such as "chose streams without flash attention: ...".
    """

    kv_layout: KvLayout
    flash_attention: Literal["auto", "on", "off"]
    reason: str


@dataclass(slots=True)
class DecodeBatch:
    """One step's input: four parallel lists with one entry a token, reused from step to step.

    ``wants_logits`` holds 1 where the step must keep the token's logits; the index of such an entry is the ``row`` that
    ``Sampler.sample`` and ``Context.logits`` take.
    """

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    sequence_ids: list[int] = field(default_factory=list)
    wants_logits: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.tokens)

    def clear(self) -> None:
        self.tokens.clear()
        self.positions.clear()
        self.sequence_ids.clear()
        self.wants_logits.clear()

    def add(self, tokens: Sequence[int], first_position: int, sequence_id: int, *, logits_for_last: bool) -> int:
        """Append consecutive tokens of one sequence; returns the row of the last one."""
        n = len(tokens)
        self.tokens.extend(tokens)
        self.positions.extend(range(first_position, first_position + n))
        self.sequence_ids.extend([sequence_id] * n)
        self.wants_logits.extend([0] * n)
        row = len(self.tokens) - 1
        if logits_for_last:
            self.wants_logits[row] = 1
        return row


class Vocabulary(Protocol):
    @property
    def n_tokens(self) -> int: ...

    @property
    def bos_text(self) -> str:
        """The beginning-of-sequence token as the model's template writes it, or an empty string."""

    @property
    def eos_text(self) -> str: ...

    def tokenize(self, text: bytes, *, add_special: bool, parse_special: bool) -> list[int]:
        """Tokens of UTF-8 ``text``; invalid bytes become byte tokens or count as U+FFFD, never an error."""

    def piece(self, token: int, *, special: bool) -> bytes:
        """The token's bytes, possibly part of a character. Control tokens are empty unless ``special``."""

    def is_end_of_generation(self, token: int) -> bool: ...

    @property
    def end_of_generation_tokens(self) -> tuple[int, ...]:
        """Every token for which ``is_end_of_generation`` holds, ascending."""

    @property
    def suppressed_tokens(self) -> tuple[int, ...]:
        """Tokens that the model's file says must never be chosen."""

    @property
    def token_table(self) -> TokenTable:
        """The texts of all tokens, sorted for grammars. Takes a moment on first use."""

    @property
    def control_texts(self) -> frozenset[str]:
        """The spellings that ``tokenize`` takes for control tokens under ``parse_special``."""


class Sampler(Protocol):
    """A sampler chain with its own state (random generator, penalty window). Not thread-safe."""

    def sample(self, context: Context, row: int) -> int:
        """Choose a token from the logits of batch entry ``row`` and record it in the chain's state."""

    def accept(self, token: int) -> None:
        """Record a token that was not sampled here (a prompt's) in the chain's state."""

    def reset(self) -> None: ...

    def close(self) -> None: ...


class TwoStepSampler(Sampler, Protocol):
    """``sample`` in two steps, for those who have a say in the choice: ``choose``, and ``accept`` what was taken."""

    def choose(self, context: Context, row: int) -> int:
        """The token that ``sample`` would take. Moves the random generator on, and nothing else."""

    def choose_among(self, tokens: npt.NDArray[np.int32], logits: npt.NDArray[np.float32]) -> int:
        """The same from a part of the vocabulary: parallel arrays, with the tokens ascending."""


class Model(Protocol):
    @property
    def vocabulary(self) -> Vocabulary: ...

    @property
    def description(self) -> str: ...

    @property
    def metadata(self) -> Mapping[str, str]:
        """The GGUF's key-value pairs as llama.cpp prints them (arrays left out)."""

    @property
    def chat_template(self) -> str | None: ...

    @property
    def n_ctx_train(self) -> int: ...

    @property
    def n_embd(self) -> int: ...

    @property
    def n_params(self) -> int: ...

    @property
    def n_weight_bytes(self) -> int: ...

    @property
    def can_generate(self) -> bool:
        """False for an encoder, which gives embeddings only."""

    def kv_bytes_per_token(self, cache_type_k: str, cache_type_v: str) -> int:
        """An estimate of what one token costs in one sequence's cache, from the model's own numbers."""

    def choose_attention(self, params: ContextParams, layouts: Sequence[KvLayout]) -> AttentionChoice:
        """The best of ``layouts`` for the sequences of ``params``, and flash attention or not where that is ``auto``.

        ``params.n_cells`` is what the memory allows, perhaps less than all sequences' windows; ``params.kv_layout`` is
        not read. Measures for half a second at most, once for a machine, and nothing that the caller has fixed.
        """

    def create_context(self, params: ContextParams) -> Context:
        """Raises ``InvalidArgument`` when llama.cpp refuses the parameters or cannot get the memory."""

    def create_embedding_context(self, params: ContextParams) -> EmbeddingContext:
        """Raises ``InvalidArgument`` as ``create_context`` does, ``UnsupportedOperation`` (it has no embeddings)."""

    def create_sampler(self, stages: Sequence[SamplerStage]) -> TwoStepSampler: ...

    def close(self) -> None:
        """Idempotent. Contexts and samplers that are still open keep the weights alive until they close."""


class Context(Protocol):
    """One KV memory and the compute graph over it. Every method but ``request_abort`` belongs to one thread."""

    @property
    def n_ctx(self) -> int:
        """One sequence's window in tokens, never less than asked for: llama.cpp rounds it up in streams.

        Nothing keeps a sequence of the unified layout inside of its window but the caller.
        """

    @property
    def n_cells(self) -> int:
        """Cells of all sequences together, as llama.cpp rounded them. In streams each has its share, ``n_ctx``."""

    @property
    def n_sequences(self) -> int: ...

    @property
    def n_batch(self) -> int: ...

    @property
    def can_shift(self) -> bool:
        """Whether positions of cached tokens may be moved (``llama_memory_can_shift``)."""

    @property
    def n_threads_single(self) -> int | None:
        """The threads for a token alone in its batch, where another number gives other bits; None where none does."""

    def decode(self, batch: DecodeBatch) -> DecodeStatus:
        """Run one batch. Longer than ``n_batch``, empty, or with ids out of range: ``InvalidArgument`` before the call.

        NO_ROOM leaves every cell as it was, also where a part of the batch would have found room: places are found for
        the whole batch before anything is computed. In streams it means that a sequence's own cells are full, in the
        unified layout that fewer cells are free than the batch has tokens. After ABORTED an unknown part of the batch
        is in the memory: remove what was not committed.
        """

    def logits(self, row: int) -> npt.NDArray[np.float32]:
        """The logits of batch entry ``row`` of the last decode, shape [n_vocab], valid until the next decode."""

    def remove(self, sequence_id: int, first_position: int, end_position: int = -1) -> bool:
        """Forget positions [first, end) of a sequence (-1: to the end). False where the memory cannot cut there."""

    def copy(self, source_id: int, target_id: int, first_position: int = 0, end_position: int = -1) -> bool:
        """Make the target the copy of positions [first, end) of the source, whatever it held.

        In the unified layout both have the same cells from then on, at no cost, and a cell is free when its last owner
        has removed it. False, and an empty target, where the source ends before ``end_position``, where it no longer
        has what a sequence that ends there would look back at (a sliding window), and where the memory cannot be cut
        there (recurrent models).
        """

    def shift(self, sequence_id: int, first_position: int, end_position: int, delta: int) -> bool:
        """Add ``delta`` to the positions [first, end). Raises ``UnsupportedOperation`` where ``can_shift`` is false.

        A cell has one position for all its owners. So cells from ``first_position`` on that other sequences may share
        (unified layout) are copied to free ones first. False, and nothing has changed, when there are not enough.
        """

    def last_position(self, sequence_id: int) -> int:
        """The highest position cached, -1 for none."""

    def save_sequence(self, sequence_id: int) -> bytes: ...

    def restore_sequence(self, sequence_id: int, state: bytes) -> bool:
        """False, and an empty sequence, when the state is not accepted (another model, version or layout, no room)."""

    def set_n_threads(self, n_threads: int) -> None:
        """For all decodes from now on but those that ``n_threads_single`` is for."""

    def request_abort(self) -> None:
        """Make a decode that runs now return ABORTED soon; without effect when none runs. Any thread may call it."""

    def close(self) -> None: ...


class Llama(Protocol):
    """The library: process-wide, loaded once."""

    @property
    def build_number(self) -> int: ...

    @property
    def build_commit(self) -> str: ...

    @property
    def system_info(self) -> str: ...

    @property
    def supports_gpu_offload(self) -> bool: ...

    def set_numa(self, strategy: str) -> None:
        """How threads lie on a machine's memory nodes (``distribute``, ``isolate``, ``numactl``).

        For the whole process and once: later calls that want something else log a warning and change nothing.
        """

    def load_model(self, params: ModelParams, progress: ProgressCallback | None = None) -> Model:
        """Load weights. Raises ``ModelNotFound``, ``InvalidArgument`` (bad file), ``Cancelled``."""
