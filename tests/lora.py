"""Writes LoRA adapters for the tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np

N_EMBD = 64
RANK = 4


def write_adapter(
    path: Path,
    *,
    seed: int = 1,
    architecture: str = "llama",
    names: tuple[str, ...] = ("blk.0.attn_q.weight", "blk.1.attn_output.weight"),
    shapes: dict[str, tuple[int, int]] | None = None,
    dtype: Any = np.float32,
) -> None:
    """Random factors for square matrices. ``shapes`` replaces the (rows, columns) of single tensors by full name."""
    random = np.random.Generator(np.random.PCG64(seed))
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(RANK))
    for name in names:
        for suffix, shape in (("lora_a", (RANK, N_EMBD)), ("lora_b", (N_EMBD, RANK))):
            full_name = f"{name}.{suffix}"
            rows, columns = (shapes or {}).get(full_name, shape)
            writer.add_tensor(full_name, (random.standard_normal((rows, columns)) * 0.3).astype(dtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
