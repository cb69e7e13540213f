"""The ABIs of core modules as their specifications state them, for guests that the tests write.

Nothing here is taken from ``wasi_nn_backend.dialects``: a number that is wrong there has to show.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace

__all__ = ["ABIS", "Abi", "abi_of"]

#: Parameters: ``p`` a pointer, ``n`` a length, ``w`` a 32-bit word. The result is an error number; after ``>``, what it
#: is instead.
WITX = {
    "load": "pnwwp",
    "load_by_name": "pnp",
    "init_execution_context": "wp",
    "set_input": "wwp",
    "compute": "w",
    "get_output": "wwpnp",
}
WITH_CONFIG = {"load_by_name_with_config": "pnpnp"}
SINGLE = {"compute_single": "w", "get_output_single": "wwpnp", "fini_single": "w"}
RELEASE = {"unload": "w", "finalize_execution_context": "w"}
LEGACY = {**WITX, "load": "pwwp", "get_output": "wwpp"}
HYPERBEAM = {**WITX, **WITH_CONFIG, "run_inference": "pn>p"}


@dataclass(frozen=True)
class Abi:
    """One dialect at one pointer width. ``u8`` is the tensor type that text is sent as, ``ggml`` the encoding."""

    dialect: str
    import_module: str
    functions: Mapping[str, str]
    u8: int
    ggml: int
    n_bits: int = 32
    has_wide_lengths: bool = False
    is_legacy: bool = False

    def __str__(self) -> str:
        return self.dialect + ("" if self.n_bits == 32 else "-64") + ("-size_t" if self.has_wide_lengths else "")

    @property
    def pointer(self) -> str:
        return f"i{self.n_bits}"

    def types(self, function: str) -> tuple[list[str], str]:
        """WebAssembly's types of the parameters and of the result."""
        parameters, _, result = self.functions[function].partition(">")
        of = {"p": self.pointer, "n": "i64" if self.has_wide_lengths else "i32", "w": "i32"}
        return [of[kind] for kind in parameters], of[result or "w"]

    def tensor(self, dims: int, n_dims: int, type_word: int, data: int, n_data_bytes: int) -> bytes:
        """A tensor as in the witx: 20 bytes, or as a 64-bit C compiler lays the same structure out."""
        if self.n_bits == 32:
            return struct.pack("<IIIII", dims, n_dims, type_word, data, n_data_bytes)
        return struct.pack(
            "<QIIIIQII", dims, n_dims, 0xAAAA_AAAA, type_word, 0xAAAA_AAAA, data, n_data_bytes, 0xAAAA_AAAA
        )

    def legacy_tensor(self, shape: int, type_word: int, data: int) -> bytes:
        if self.n_bits == 32:
            return struct.pack("<III", shape, type_word, data)
        return struct.pack("<QIIQ", shape, type_word, 0xAAAA_AAAA, data)

    def span(self, address: int, count: int) -> bytes:
        """A pointer and a count: a builder, a legacy shape, the head of a legacy builder array."""
        if self.n_bits == 32:
            return struct.pack("<II", address, count)
        return struct.pack("<QII", address, count, 0xAAAA_AAAA)


_32_BITS = (
    Abi("witx", "wasi_ephemeral_nn", WITX, u8=3, ggml=5),
    Abi("wasmedge", "wasi_ephemeral_nn", {**WITX, **WITH_CONFIG, **SINGLE, **RELEASE}, u8=3, ggml=6),
    Abi("wamr", "wasi_ephemeral_nn", {**WITX, **WITH_CONFIG}, u8=3, ggml=5),
    Abi("wamr-legacy", "wasi_nn", LEGACY, u8=2, ggml=5, is_legacy=True),
    Abi("hyperbeam", "wasi_ephemeral_nn", HYPERBEAM, u8=3, ggml=5),
)
#: Each dialect in a 32-bit and in a 64-bit memory, and once with lengths of 64 bits.
ABIS: tuple[Abi, ...] = (
    *_32_BITS,
    *(replace(abi, n_bits=64) for abi in _32_BITS),
    replace(_32_BITS[-1], n_bits=64, has_wide_lengths=True),
)


def abi_of(dialect: str) -> Abi:
    """The one for 32-bit memories."""
    return next(abi for abi in ABIS if abi.dialect == dialect)
