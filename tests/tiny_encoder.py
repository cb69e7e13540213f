"""Writes an encoder of some 60 kB with random weights: a BERT in every respect that llama.cpp looks at."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

from tests.random_gguf import finish_model

N_EMBD, N_FF, N_LAYERS, N_HEADS, N_CTX_TRAIN = 32, 64, 2, 2, 64
#: The control tokens have the ids of the first BERT. A word piece begins with the space before it ("phantom space") or
#: goes on with the word.
TOKENS = [
    "[PAD]",
    *(f"[unused{n}]" for n in range(99)),
    *("[UNK]", "[CLS]", "[SEP]", "[MASK]"),
    *(f"\u2581{letter}" for letter in "abcdefghijklmnopqrstuvwxyz.,"),
    *"abcdefghijklmnopqrstuvwxyz",
]


def write_tiny_encoder(path: Path, pooling_type: gguf.PoolingType = gguf.PoolingType.MEAN) -> None:
    writer = gguf.GGUFWriter(path, "bert")
    writer.add_type("model")
    writer.add_name("Tiny random encoder")
    writer.add_block_count(N_LAYERS)
    writer.add_context_length(N_CTX_TRAIN)
    writer.add_embedding_length(N_EMBD)
    writer.add_feed_forward_length(N_FF)
    writer.add_head_count(N_HEADS)
    writer.add_layer_norm_eps(1e-12)
    writer.add_causal_attention(False)
    writer.add_pooling_type(pooling_type)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("bert")
    writer.add_token_list(TOKENS)
    writer.add_token_types([gguf.TokenType.CONTROL if token[0] == "[" else gguf.TokenType.NORMAL for token in TOKENS])
    writer.add_token_type_count(2)
    finish_model(writer, _matrices(), _norms())


def _matrices() -> dict[str, tuple[int, ...]]:
    matrices = {
        "token_embd": (len(TOKENS), N_EMBD),
        "token_types": (2, N_EMBD),
        "position_embd": (N_CTX_TRAIN, N_EMBD),
    }
    for layer in range(N_LAYERS):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            matrices[f"blk.{layer}.{name}"] = (N_EMBD, N_EMBD)
        matrices[f"blk.{layer}.ffn_up"] = (N_FF, N_EMBD)
        matrices[f"blk.{layer}.ffn_down"] = (N_EMBD, N_FF)
    return {f"{name}.weight": shape for name, shape in matrices.items()}


def _norms() -> dict[str, npt.NDArray[np.floating]]:
    outputs = [f"blk.{layer}.{part}_output_norm" for layer in range(N_LAYERS) for part in ("attn", "layer")]
    values = {"weight": np.ones(N_EMBD), "bias": np.zeros(N_EMBD)}
    return {f"{name}.{part}": each for name in ("token_embd_norm", *outputs) for part, each in values.items()}
