"""Writes a hybrid of some 150 kB with random weights: a Jamba with a recurrent and an attending layer."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

from tests.random_gguf import finish_model

N_EMBD, N_INNER, N_STATE, N_RANK, N_CONV, N_FF, N_HEADS = 32, 64, 8, 4, 4, 64, 2
_LETTERS = [*(chr(code) for code in range(0x21, 0x7F)), "<s>", "</s>"]


def write_tiny_hybrid(path: Path) -> None:
    writer = gguf.GGUFWriter(path, "jamba")
    writer.add_type("model")
    writer.add_name("Tiny random hybrid")
    writer.add_block_count(2)
    writer.add_context_length(256)
    writer.add_embedding_length(N_EMBD)
    writer.add_feed_forward_length(N_FF)
    writer.add_head_count(N_HEADS)
    writer.add_head_count_kv([0, N_HEADS])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_ssm_conv_kernel(N_CONV)
    writer.add_ssm_inner_size(N_INNER)
    writer.add_ssm_state_size(N_STATE)
    writer.add_ssm_time_step_rank(N_RANK)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(_LETTERS)
    writer.add_token_types([3 if len(letter) > 1 else 1 for letter in _LETTERS])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(len(_LETTERS) - 1)
    finish_model(writer, _matrices(), _constants())


def _matrices() -> dict[str, tuple[int, ...]]:
    matrices: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (len(_LETTERS), N_EMBD),
        "blk.0.ssm_in.weight": (2 * N_INNER, N_EMBD),
        "blk.0.ssm_conv1d.weight": (N_INNER, N_CONV),
        "blk.0.ssm_conv1d.bias": (N_INNER,),
        "blk.0.ssm_x.weight": (N_RANK + 2 * N_STATE, N_INNER),
        "blk.0.ssm_dt.weight": (N_INNER, N_RANK),
        "blk.0.ssm_dt.bias": (N_INNER,),
        "blk.0.ssm_out.weight": (N_EMBD, N_INNER),
        "blk.0.ssm_d": (N_INNER,),
    }
    matrices |= {f"blk.1.attn_{part}.weight": (N_EMBD, N_EMBD) for part in ("q", "k", "v", "output")}
    for layer in range(2):
        matrices |= {f"blk.{layer}.ffn_{part}.weight": (N_FF, N_EMBD) for part in ("gate", "up")}
        matrices[f"blk.{layer}.ffn_down.weight"] = (N_EMBD, N_FF)
    return matrices


def _constants() -> dict[str, npt.NDArray[np.floating]]:
    norms = {"output_norm": N_EMBD, "blk.0.ssm_dt_norm": N_RANK}
    norms |= {f"blk.0.ssm_{part}_norm": N_STATE for part in "bc"}
    norms |= {f"blk.{layer}.{part}_norm": N_EMBD for layer in range(2) for part in ("attn", "ffn")}
    ones = {f"{name}.weight": np.ones(n_values) for name, n_values in norms.items()}
    return {"blk.0.ssm_a": -np.ones((N_INNER, N_STATE)), **ones}
