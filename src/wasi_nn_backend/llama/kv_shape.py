"""What the KV cache of a model costs, from the numbers in its file."""

from __future__ import annotations

from dataclasses import dataclass

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from wasi_nn_backend.errors import InvalidArgument
from wasi_nn_backend.llama.interface import ContextParams

__all__ = [
    "CACHE_TYPES",
    "N_CELLS_BLOCK",
    "KvShape",
    "cache_type",
    "check_v_is_readable",
    "is_quantised",
    "n_cells_rounded",
    "round_up_n_ctx",
]

#: llama.cpp reserves cells, and computes attention over them, in blocks of so many.
N_CELLS_BLOCK = 256

#: The ggml types that llama.cpp accepts for the cache, by the names that its command line uses.
CACHE_TYPES = {
    name: GGMLQuantizationType[name.upper()]
    for name in ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1")
}


def cache_type(name: str, key: str) -> GGMLQuantizationType:
    """Raises ``InvalidArgument`` that names ``key`` for a type that no cache can have."""
    try:
        return CACHE_TYPES[name.lower()]
    except KeyError:
        raise InvalidArgument(f"{key}: {name!r} is no cache type; choose one of {', '.join(CACHE_TYPES)}") from None


def is_quantised(ggml_type: GGMLQuantizationType) -> bool:
    return GGML_QUANT_SIZES[ggml_type][0] > 1


def check_v_is_readable(cache_type_v: str, *, has_flash_attention: bool) -> None:
    """Raises ``InvalidArgument`` for quantised values without flash attention: llama.cpp has no other way to them."""
    if is_quantised(cache_type(cache_type_v, "cache_type_v")) and not has_flash_attention:
        raise InvalidArgument(
            f"cache_type_v {cache_type_v} needs flash attention; set flash_attention to auto or on, or use f16"
        )


def round_up_n_ctx(n_ctx: int) -> int:
    return -(-n_ctx // N_CELLS_BLOCK) * N_CELLS_BLOCK


def n_cells_rounded(params: ContextParams) -> int:
    """The cells of all sequences that llama.cpp will reserve."""
    if params.kv_layout == "unified":
        return round_up_n_ctx(params.n_cells_total)
    return round_up_n_ctx(params.n_ctx) * params.n_sequences


@dataclass(frozen=True, slots=True)
class KvShape:
    """Values of one token in the cache, layer by layer; 0 for a layer without attention."""

    n_key_values: tuple[int, ...]
    n_value_values: tuple[int, ...]
    n_embd_head_k: int
    n_embd_head_v: int
    n_heads: int

    def bytes_per_token(self, type_k: GGMLQuantizationType, type_v: GGMLQuantizationType) -> int:
        return sum(_row_bytes(n, type_k) for n in self.n_key_values) + sum(
            _row_bytes(n, type_v) for n in self.n_value_values
        )


def _row_bytes(n_values: int, ggml_type: GGMLQuantizationType) -> int:
    n_block, block_bytes = GGML_QUANT_SIZES[ggml_type]
    return -(-n_values // n_block) * block_bytes
