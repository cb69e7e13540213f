"""The only part of this package that touches the native library. ``interface`` is what the others may ask of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wasi_nn_backend.llama.library import NativeLlama

__all__ = ["load_llama"]


def load_llama() -> NativeLlama:
    """llama.cpp, loaded into the process at the first call (0.3 s) and the same object ever after."""
    # Imported here: a program that only reads configuration or runs on a fake shall not load a native library.
    from wasi_nn_backend.llama import library

    return library.load_llama()
