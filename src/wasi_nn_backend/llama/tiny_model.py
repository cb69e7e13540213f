"""Writes a language model of some 250 kB with random weights, for tests and for the AMX probe.

It is a llama in every respect that llama.cpp looks at: byte-level BPE vocabulary with a few merges, ChatML template and
control tokens, rotary embeddings, grouped attention. The weights come from the raw stream of a PCG64, which numpy keeps
the same for ever, so that one seed gives the same file, byte for byte, everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

from wasi_nn_backend.errors import InvalidArgument

__all__ = ["PROBE_SHAPE", "QUANTISATIONS", "TINY_SHAPE", "TinyShape", "write_tiny_model"]

_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_MERGED_WORDS = (
    "Ġ t", "Ġ a", "h e", "i n", "r e", "o n", "Ġt he", "e r", "Ġ s", "a t", "Ġ w", "Ġ o", "e n", "Ġ c", "i t", "i s",
    "a n", "o r", "e s", "Ġ b", "e d", "Ġ f", "in g", "Ġ p", "o u", "Ġan d", "a l", "a r", "Ġt o", "Ġ m", "Ġo f",
    "Ġ in", "Ġ d", "Ġ h", "l l", "i c", "o m", "l e", "Ġb e", "a s", "v e", "r o", "Ġ re", "Ġ n", "i on", "Ġ g", "Ġ l",
    "c t", "e l", "Ġi s", "e t", "Ġ e", "s t", "i d", "Ġt h", "u t", "o t", "i l", "Ġf or", "o w",
)  # fmt: skip
_CONTROL_TOKENS = ("<s>", "<|im_start|>", "<|im_end|>", "<|pad|>")
_NORMAL, _CONTROL = 1, 3  # llama_token_type

#: The types that ``write_tiny_model`` takes. The K types have no encoder in the gguf package: their weights are random
#: blocks, which are as good as random weights that were encoded.
QUANTISATIONS = ("f32", "f16", "q8_0", "q4_0", "q4_1", "q4_K", "q5_K", "q6_K", "iq4_xs")


@dataclass(frozen=True, slots=True)
class TinyShape:
    """Rows of 32 values fit the plain quantisations, rows of 256 the K types.

    ``n_embd_head`` is the width of an attention head, None for the usual ``n_embd / n_heads``. ``pooling_type`` is how
    the vectors of a text's tokens become one embedding, None for that of the last token.
    """

    n_embd: int = 64
    n_ff: int = 128
    n_layers: int = 2
    n_heads: int = 2
    n_kv_heads: int = 1
    n_ctx_train: int = 4096
    n_embd_head: int | None = None
    pooling_type: gguf.PoolingType | None = None
    is_causal: bool = True

    @property
    def n_head_values(self) -> int:
        return self.n_embd_head or self.n_embd // self.n_heads


TINY_SHAPE = TinyShape()
#: Wide enough for every kernel that AMX replaces: rows are multiples of 256, their number one of 32.
PROBE_SHAPE = TinyShape(n_embd=256, n_ff=512, n_layers=4, n_heads=4, n_kv_heads=2, n_ctx_train=256)


def write_tiny_model(
    path: Path, *, quantization: str | tuple[str, ...] = "f16", seed: int = 0, shape: TinyShape = TINY_SHAPE
) -> None:
    """Write the model to ``path``; several quantisations take turns from matrix to matrix.

    Raises ``InvalidArgument`` for an unknown quantisation or one whose blocks do not fit the shape.
    """
    names = (quantization,) if isinstance(quantization, str) else quantization
    types = [_ggml_type(name, shape) for name in names]
    tokens = _vocabulary()
    writer = gguf.GGUFWriter(path, "llama")
    _add_hyperparameters(writer, shape, len(tokens))
    writer.add_file_type(LlamaFileType.ALL_F32 if names == ("f32",) else LlamaFileType.MOSTLY_F16)
    _add_vocabulary(writer, tokens)
    random = _Random(seed)
    for index, (name, n_rows, n_columns) in enumerate(_matrices(shape, len(tokens))):
        ggml_type = types[index % len(types)]
        row_scales = _output_scales(tokens) if name == "output.weight" else None
        writer.add_tensor(name, random.matrix(n_rows, n_columns, ggml_type, row_scales), raw_dtype=ggml_type)
    for name in _norms(shape):
        writer.add_tensor(name, np.ones(shape.n_embd, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _ggml_type(name: str, shape: TinyShape) -> GGMLQuantizationType:
    if name not in QUANTISATIONS:
        raise InvalidArgument(f"{name!r} is no quantisation of a tiny model; choose from {', '.join(QUANTISATIONS)}")
    ggml_type = GGMLQuantizationType[name.upper()]
    n_block = GGML_QUANT_SIZES[ggml_type][0]
    n_queries = shape.n_head_values * shape.n_heads
    for n_row in (shape.n_embd, shape.n_ff, n_queries):
        if n_row % n_block:
            raise InvalidArgument(f"{name} has blocks of {n_block} values, which do not fit rows of {n_row}")
    return ggml_type


def _add_hyperparameters(writer: gguf.GGUFWriter, shape: TinyShape, n_vocab: int) -> None:
    writer.add_type("model")
    writer.add_name("Tiny random llama")
    writer.add_block_count(shape.n_layers)
    writer.add_context_length(shape.n_ctx_train)
    writer.add_embedding_length(shape.n_embd)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_head_count(shape.n_heads)
    writer.add_head_count_kv(shape.n_kv_heads)
    writer.add_rope_dimension_count(shape.n_head_values)
    if shape.n_embd_head is not None:
        writer.add_key_length(shape.n_embd_head)
        writer.add_value_length(shape.n_embd_head)
    if shape.pooling_type is not None:
        writer.add_pooling_type(shape.pooling_type)
    if not shape.is_causal:
        writer.add_causal_attention(False)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(n_vocab)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _vocabulary() -> list[str]:
    """Tokens 0 to 255 are the bytes, then the control tokens, then the merges."""
    return [*_byte_letters(), *_CONTROL_TOKENS, *(merge.replace(" ", "") for merge in _MERGED_WORDS)]


def _byte_letters() -> list[str]:
    """The printable stand-ins of GPT-2's vocabulary: printing bytes stand for themselves, others begin at U+0100."""
    prints = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in prints else chr(next(others)) for byte in range(256)]


def _add_vocabulary(writer: gguf.GGUFWriter, tokens: list[str]) -> None:
    control = range(256, 256 + len(_CONTROL_TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([_CONTROL if token in control else _NORMAL for token in range(len(tokens))])
    writer.add_token_merges(list(_MERGED_WORDS))
    writer.add_bos_token_id(control[0])
    writer.add_eos_token_id(control[2])
    writer.add_pad_token_id(control[3])
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)
    writer.add_chat_template(_CHAT_TEMPLATE)


def _matrices(shape: TinyShape, n_vocab: int) -> Iterator[tuple[str, int, int]]:
    """(name, rows, columns) of each weight matrix; a row is what one output value is computed with."""
    n_queries, n_kv = shape.n_head_values * shape.n_heads, shape.n_head_values * shape.n_kv_heads
    yield "token_embd.weight", n_vocab, shape.n_embd
    yield "output.weight", n_vocab, shape.n_embd
    for layer in range(shape.n_layers):
        yield f"blk.{layer}.attn_q.weight", n_queries, shape.n_embd
        yield f"blk.{layer}.attn_k.weight", n_kv, shape.n_embd
        yield f"blk.{layer}.attn_v.weight", n_kv, shape.n_embd
        yield f"blk.{layer}.attn_output.weight", shape.n_embd, n_queries
        yield f"blk.{layer}.ffn_gate.weight", shape.n_ff, shape.n_embd
        yield f"blk.{layer}.ffn_up.weight", shape.n_ff, shape.n_embd
        yield f"blk.{layer}.ffn_down.weight", shape.n_embd, shape.n_ff


def _norms(shape: TinyShape) -> Iterator[str]:
    yield "output_norm.weight"
    for layer in range(shape.n_layers):
        yield f"blk.{layer}.attn_norm.weight"
        yield f"blk.{layer}.ffn_norm.weight"


def _output_scales(tokens: list[str]) -> npt.NDArray[np.float32]:
    """Letters get larger logits than other bytes and control tokens: the text is readable, and ends now and then."""
    scales = np.full(len(tokens), 0.5, dtype=np.float32)
    scales[list(map(ord, "abcdefghijklmnopqrstuvwxyz"))] = 3.0
    scales[[ord(" "), ord("."), *range(256 + len(_CONTROL_TOKENS), len(tokens))]] = 3.0
    scales[256 + _CONTROL_TOKENS.index("<|im_end|>")] = 2.5
    return scales[:, np.newaxis]


class _Random:
    """Weights from the raw 64-bit stream: numpy's distributions may change from version to version, this does not."""

    def __init__(self, seed: int) -> None:
        self._bits = np.random.PCG64(seed)

    def _uniform(self, *shape: int) -> npt.NDArray[np.float32]:
        """float32 from -1 to 1, exact: 24 bits each."""
        raw = self._bits.random_raw(int(np.prod(shape)))
        return ((raw >> np.uint64(40)).astype(np.float32) / np.float32(2**23) - np.float32(1)).reshape(shape)

    def matrix(
        self, n_rows: int, n_columns: int, ggml_type: GGMLQuantizationType, row_scales: npt.NDArray[np.float32] | None
    ) -> npt.NDArray[np.generic]:
        """Encoded weights of variance 3 / n_columns: attention is sharp enough for the text to depend on all of it."""
        if ggml_type in _BLOCK_SCALES:
            return self._blocks(n_rows, n_columns, ggml_type)
        weights = self._uniform(n_rows, n_columns) * np.float32(3 / np.sqrt(n_columns))
        if row_scales is not None:
            weights *= row_scales
        return gguf.quants.quantize(weights, ggml_type)

    def _blocks(self, n_rows: int, n_columns: int, ggml_type: GGMLQuantizationType) -> npt.NDArray[np.uint8]:
        n_block, block_bytes = GGML_QUANT_SIZES[ggml_type]
        n_blocks = n_rows * n_columns // n_block
        raw = self._bits.random_raw(-(-n_blocks * block_bytes // 8)).view(np.uint8)
        blocks = raw[: n_blocks * block_bytes].reshape(n_blocks, block_bytes).copy()
        for at, scale in _BLOCK_SCALES[ggml_type].items():
            value = np.float16(scale * 16 / np.sqrt(n_columns))
            blocks[:, at : at + 2] = np.frombuffer(value.tobytes(), dtype=np.uint8)
        return blocks.reshape(n_rows, n_columns // n_block * block_bytes)


#: Where a block keeps its f16 scales, and values that give weights of mean 0 and the size of the other encodings. The
#: second scale of Q4_K and Q5_K is that of the minimum, which cancels the mean of the quants (7.5 and 15.5).
_BLOCK_SCALES = {
    GGMLQuantizationType.Q4_K: {0: 4e-4, 2: 4e-4 * 7.5},
    GGMLQuantizationType.Q5_K: {0: 2e-4, 2: 2e-4 * 15.5},
    GGMLQuantizationType.Q6_K: {208: 8e-5},
    GGMLQuantizationType.IQ4_XS: {0: 8e-5},
}
