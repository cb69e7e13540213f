"""Is this file a language model that llama.cpp can run, and what is in it? Asked before the native loader sees it.

llama.cpp answers a wrong file with NULL at best. At worst a number that nobody checked ends the process: a head count
of zero is a division by zero, and tensor data beyond the end of a mapped file is SIGBUS.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gguf.constants import GGMLQuantizationType, LlamaFileType

from wasi_nn_backend.errors import InvalidArgument
from wasi_nn_backend.llama.gguf_header import GgufHeader, TensorInfo, Value, read_gguf_header
from wasi_nn_backend.llama.kv_shape import KvShape

__all__ = ["GgufSummary", "read_gguf_summary"]

#: Models that only turn texts into vectors. They have no KV memory.
_ENCODERS = {
    "bert", "nomic-bert", "nomic-bert-moe", "neo-bert", "jina-bert-v2", "jina-bert-v3", "modern-bert", "eurobert",
    "gemma-embedding",
}  # fmt: skip
#: Models that want their input in two parts, diffusion models and helpers of other models: llama.cpp loads them, but
#: they neither continue a text nor give vectors of one.
_NEITHER = {
    "t5", "t5encoder", "wavtokenizer-dec", "dream", "llada", "llada-moe", "rnd1", "eagle3", "dflash",
    "gemma4-assistant",
}  # fmt: skip
_MAX_LAYERS = 512  # LLAMA_MAX_LAYERS
_MAX_EXPERTS = 1024  # LLAMA_MAX_EXPERTS
_MAX_SIZE = 2**24  # of an embedding, a feed-forward layer, a head count: far above any model, far below an overflow


@dataclass(frozen=True, slots=True)
class GgufSummary:
    """What a GGUF language model says of itself. Counts are of the whole file; of its first part where it is split.

    ``file_type`` is the quantisation as llama.cpp names it ("MOSTLY_Q4_K_M"), "unknown" where the file does not say.
    ``n_kv_heads`` has one entry a layer. ``n_ctx_short_rope`` is the window up to which a model with two sets of
    rotation factors takes the first, None for the others. ``values`` are all scalar and string keys and short integer
    arrays.
    """

    path: Path
    n_file_bytes: int
    architecture: str
    name: str
    file_type: str
    n_params: int
    n_tensors: int
    n_ctx_train: int
    n_ctx_short_rope: int | None
    n_vocab: int
    n_layers: int
    n_embd: int
    n_heads: int
    n_kv_heads: tuple[int, ...]
    n_embd_head_k: int
    n_embd_head_v: int
    n_splits: int
    tokenizer: str
    chat_template: str | None
    values: Mapping[str, Value]

    @property
    def is_encoder(self) -> bool:
        """It gives embeddings and cannot continue a text."""
        return self.architecture in _ENCODERS

    @property
    def is_causal(self) -> bool:
        """Whether a token looks back only."""
        return self.values.get(f"{self.architecture}.attention.causal", True) is not False

    @property
    def pooling_type(self) -> int:
        """How the vectors of a text's tokens become one: llama.cpp's number, 0 for not at all."""
        pooling_type = self.values.get(f"{self.architecture}.pooling_type", -1)
        return pooling_type if isinstance(pooling_type, int) and pooling_type > 0 else 0

    @property
    def kv_shape(self) -> KvShape:
        return KvShape(
            n_key_values=tuple(n * self.n_embd_head_k for n in self.n_kv_heads),
            n_value_values=tuple(n * self.n_embd_head_v for n in self.n_kv_heads),
            n_embd_head_k=self.n_embd_head_k,
            n_embd_head_v=self.n_embd_head_v,
            n_heads=self.n_heads,
        )


def read_gguf_summary(path: Path) -> GgufSummary:
    """Check a model file and sum it up; reads the header only, 25 ms for SmolLM2.

    Raises ``ModelNotFound`` when there is no such file, and ``InvalidArgument`` that says which fault it has: a
    directory, empty, not readable, no GGUF, cut short, no language model.
    """
    header = read_gguf_header(path)
    _check_kind(header, path)
    architecture = header.text("general.architecture") or ""
    _check_numbers(header, architecture, path)
    return _sum_up(header, architecture, path)


def _check_kind(header: GgufHeader, path: Path) -> None:
    kind = header.text("general.type") or "model"
    architecture = header.text("general.architecture")
    fault = None
    if kind == "adapter":
        fault = "it is a LoRA adapter; give the model that it was made for"
    elif kind == "mmproj" or architecture == "clip":
        fault = "it is a projector for images or sound; give the language model that it belongs to"
    elif kind != "model":
        fault = f"its general.type is {kind!r}"
    elif architecture is None:
        fault = "it names no architecture"
    elif architecture in _NEITHER:
        fault = f"models of the architecture {architecture!r} do not continue a text"
    elif not header.tensors:
        fault = "it holds a vocabulary and no weights"
    elif header.text("tokenizer.ggml.model") in (None, "none", "no_vocab"):
        fault = "it holds no tokenizer"
    elif header.integer("split.no") != 0:
        fault = f"it is part {header.integer('split.no') + 1} of a split model; name the first part"
    if fault is not None:
        raise InvalidArgument(f"{path} is no language model that can be run: {fault}")


def _check_numbers(header: GgufHeader, architecture: str, path: Path) -> None:
    """Refuse what would make llama.cpp divide by zero, allocate without bound, or abort the process."""
    fault = _fault_of_sizes(header, architecture) or _fault_of_floats(header) or _fault_of_experts(header, architecture)
    if fault is None and not all(_is_norm_plain(tensor) for tensor in header.tensors):
        fault = "a normalisation weight is not of the type f32"
    if fault is None and header.array_lengths.get("tokenizer.ggml.tokens", 0) == 0:
        fault = "its vocabulary is empty"
    if fault is not None:
        raise InvalidArgument(f"{path} is damaged or of an unknown kind: {fault}; download or convert it again")


def _fault_of_sizes(header: GgufHeader, architecture: str) -> str | None:
    ranges = {"block_count": (1, _MAX_LAYERS), "embedding_length": (1, _MAX_SIZE), "context_length": (1, 2**31 - 1)}
    for suffix, (least, most) in ranges.items():
        value = header.values.get(f"{architecture}.{suffix}")
        if not isinstance(value, int) or not least <= value <= most:
            return f"{architecture}.{suffix} is {value!r}, not {least} to {most}"
    for suffix in ("attention.head_count", "attention.head_count_kv"):
        if not all(0 <= n <= _MAX_SIZE for n in _per_layer(header, f"{architecture}.{suffix}")):
            return f"{architecture}.{suffix} is {header.values.get(f'{architecture}.{suffix}')!r}"
    return None


def _fault_of_floats(header: GgufHeader) -> str | None:
    for key, value in header.values.items():
        if isinstance(value, float) and not (math.isfinite(value) and (value >= 0 or not key.endswith("_epsilon"))):
            return f"{key} is {value}"
    return None


def _fault_of_experts(header: GgufHeader, architecture: str) -> str | None:
    n_experts = header.integer(f"{architecture}.expert_count")
    n_used = max(_per_layer(header, f"{architecture}.expert_used_count"))
    if 0 < n_used <= n_experts <= _MAX_EXPERTS or n_used == n_experts == 0:
        return None
    return f"it uses {n_used} of {n_experts} experts"


def _is_norm_plain(tensor: TensorInfo) -> bool:
    return not tensor.name.endswith("_norm.weight") or tensor.type_number == GGMLQuantizationType.F32


def _sum_up(header: GgufHeader, architecture: str, path: Path) -> GgufSummary:
    n_heads_per_layer = _per_layer(header, f"{architecture}.attention.head_count")
    n_heads = max(n_heads_per_layer)
    n_embd = header.integer(f"{architecture}.embedding_length")
    n_embd_head = n_embd // n_heads if n_heads else 0
    kv_key = f"{architecture}.attention.head_count_kv"
    return GgufSummary(
        path=path,
        n_file_bytes=header.n_file_bytes,
        architecture=architecture,
        name=header.text("general.name") or path.stem,
        file_type=_file_type(header),
        n_params=sum(tensor.n_values for tensor in header.tensors),
        n_tensors=len(header.tensors),
        n_ctx_train=header.integer(f"{architecture}.context_length"),
        n_ctx_short_rope=_n_ctx_short_rope(header, architecture),
        n_vocab=header.array_lengths["tokenizer.ggml.tokens"],
        n_layers=header.integer(f"{architecture}.block_count"),
        n_embd=n_embd,
        n_heads=n_heads,
        n_kv_heads=_per_layer(header, kv_key) if kv_key in header.values else n_heads_per_layer,
        n_embd_head_k=header.integer(f"{architecture}.attention.key_length", n_embd_head),
        n_embd_head_v=header.integer(f"{architecture}.attention.value_length", n_embd_head),
        n_splits=max(1, header.integer("split.count", 1)),
        tokenizer=header.text("tokenizer.ggml.model") or "",
        chat_template=header.text("tokenizer.chat_template"),
        values=header.values,
    )


def _n_ctx_short_rope(header: GgufHeader, architecture: str) -> int | None:
    if not any("rope_factors_long" in tensor.name for tensor in header.tensors):
        return None
    n_ctx_train = header.integer(f"{architecture}.context_length")
    return header.integer(f"{architecture}.rope.scaling.original_context_length", n_ctx_train)


def _per_layer(header: GgufHeader, key: str) -> tuple[int, ...]:
    """One number a layer: the file has a list, or one number for all."""
    value = header.values.get(key, 0)
    n_layers = header.integer(f"{key.split('.', 1)[0]}.block_count", 1)
    if isinstance(value, tuple):
        return tuple(int(n) for n in value) or (0,)
    return (int(value) if isinstance(value, int) else 0,) * n_layers


def _file_type(header: GgufHeader) -> str:
    try:
        return LlamaFileType(header.integer("general.file_type", -1)).name
    except ValueError:
        return "unknown"
