"""What is said of files that are no language model, and that no bytes at all get past the checks as a crash."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import n_examples
from tests.tiny_encoder import write_tiny_encoder
from wasi_nn_backend.errors import InvalidArgument, ModelNotFound, WasiNNError
from wasi_nn_backend.llama.gguf_file import read_gguf_summary
from wasi_nn_backend.llama.tiny_model import QUANTISATIONS, TINY_SHAPE, TinyShape, write_tiny_model

N_VOCAB = 320


@pytest.fixture(scope="module")
def tiny_bytes(tiny_model_path: Path) -> bytes:
    return tiny_model_path.read_bytes()


def write(path: Path, architecture: str = "llama", change: Callable[[gguf.GGUFWriter], None] | None = None) -> Path:
    """A file that has just what makes a model of it, and what ``change`` adds."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    if change is None:
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(["a", "b"])
        writer.add_tensor("token_embd.weight", np.zeros((2, 32), dtype=np.float32))
    else:
        change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def refusal(path: Path) -> str | None:
    try:
        read_gguf_summary(path)
    except WasiNNError as error:
        return str(error)
    return None


class TestSummary:
    def test_of_the_tiny_model(self, tiny_model_path: Path) -> None:
        summary = read_gguf_summary(tiny_model_path)
        assert summary.architecture == "llama"
        assert summary.name == "Tiny random llama"
        assert summary.file_type == "MOSTLY_F16"
        assert summary.n_vocab == N_VOCAB
        assert summary.n_ctx_train == TINY_SHAPE.n_ctx_train
        assert summary.n_kv_heads == (TINY_SHAPE.n_kv_heads,) * TINY_SHAPE.n_layers
        assert summary.n_file_bytes == tiny_model_path.stat().st_size
        assert "<|im_start|>" in (summary.chat_template or "")

    def test_agrees_with_the_gguf_package(self, tiny_model_path: Path) -> None:
        """Another reader of the same format, slower."""
        reader = gguf.GGUFReader(tiny_model_path)
        summary = read_gguf_summary(tiny_model_path)
        assert summary.n_tensors == len(reader.tensors)
        assert summary.n_params == sum(int(tensor.n_elements) for tensor in reader.tensors)
        for key, field in reader.fields.items():
            if key.startswith("GGUF.") or field.types[0] is gguf.GGUFValueType.ARRAY:
                continue
            assert summary.values[key] == pytest.approx(field.contents()), key

    def test_encoders_and_how_they_pool(self, tmp_path: Path, tiny_model_path: Path) -> None:
        tiny = read_gguf_summary(tiny_model_path)
        assert (tiny.is_encoder, tiny.is_causal, tiny.pooling_type) == (False, True, 0)
        write_tiny_encoder(tmp_path / "encoder.gguf", gguf.PoolingType.CLS)
        encoder = read_gguf_summary(tmp_path / "encoder.gguf")
        assert (encoder.is_encoder, encoder.is_causal, encoder.pooling_type) == (True, False, gguf.PoolingType.CLS)

    def test_heads_may_differ_from_layer_to_layer(self, tmp_path: Path) -> None:
        def change(writer: gguf.GGUFWriter) -> None:
            writer.add_head_count([4, 4])
            writer.add_head_count_kv([2, 0])
            writer.add_tokenizer_model("gpt2")
            writer.add_token_list(["a"])
            writer.add_tensor("token_embd.weight", np.zeros((1, 32), dtype=np.float32))

        summary = read_gguf_summary(write(tmp_path / "m.gguf", change=change))
        assert summary.n_kv_heads == (2, 0)
        assert summary.kv_shape.n_key_values == (16, 0)

    @pytest.mark.parametrize("quantization", QUANTISATIONS)
    def test_every_quantisation_of_the_tiny_model_passes(self, tmp_path: Path, quantization: str) -> None:
        path = tmp_path / "m.gguf"
        write_tiny_model(path, quantization=quantization, shape=TinyShape(n_embd=256, n_ff=256, n_layers=1))
        assert read_gguf_summary(path).n_layers == 1


class TestTinyModel:
    @pytest.mark.parametrize(
        ("has_factors", "original", "expected"), [(True, 64, 64), (True, None, 128), (False, 64, None)]
    )
    def test_models_with_two_sets_of_rotation_factors_say_how_far_the_first_goes(
        self, tmp_path: Path, has_factors: bool, original: int | None, expected: int | None
    ) -> None:
        def change(writer: gguf.GGUFWriter) -> None:
            writer.add_tokenizer_model("gpt2")
            writer.add_token_list(["a", "b"])
            writer.add_tensor("token_embd.weight", np.zeros((2, 32), dtype=np.float32))
            if original is not None:
                writer.add_rope_scaling_orig_ctx_len(original)
            if has_factors:
                writer.add_tensor("rope_factors_long.weight", np.ones(16, dtype=np.float32))

        assert read_gguf_summary(write(tmp_path / "m.gguf", "phi3", change)).n_ctx_short_rope == expected

    @pytest.mark.parametrize("n_embd_head", [None, 16, 48])
    def test_heads_of_the_tiny_model_may_be_of_any_width(self, tmp_path: Path, n_embd_head: int | None) -> None:
        path = tmp_path / "m.gguf"
        write_tiny_model(path, quantization="f32", shape=TinyShape(n_embd_head=n_embd_head))
        summary = read_gguf_summary(path)
        assert (summary.n_embd_head_k, summary.n_embd_head_v) == ((n_embd_head or 32),) * 2

    def test_one_seed_gives_one_file(self, tmp_path: Path, tiny_bytes: bytes) -> None:
        for seed in (0, 0, 1):
            write_tiny_model(tmp_path / "again.gguf", seed=seed)
            assert ((tmp_path / "again.gguf").read_bytes() == tiny_bytes) == (seed == 0)

    def test_is_small(self, tiny_bytes: bytes) -> None:
        assert len(tiny_bytes) < 300_000

    @pytest.mark.parametrize("quantization", ["q4_K", "q3_K", "", "F16"])
    def test_a_quantisation_that_does_not_fit_is_refused(self, tmp_path: Path, quantization: str) -> None:
        with pytest.raises(InvalidArgument):
            write_tiny_model(tmp_path / "m.gguf", quantization=quantization)


class TestWrongFiles:
    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(ModelNotFound, match="no such file"):
            read_gguf_summary(tmp_path / "none.gguf")

    def test_below_a_file(self, tiny_model_path: Path) -> None:
        with pytest.raises(ModelNotFound):
            read_gguf_summary(tiny_model_path / "x.gguf")

    def test_directory(self, tmp_path: Path) -> None:
        with pytest.raises(InvalidArgument, match="is a directory"):
            read_gguf_summary(tmp_path)

    def test_empty(self, tmp_path: Path) -> None:
        (tmp_path / "m.gguf").touch()
        with pytest.raises(InvalidArgument, match="is empty"):
            read_gguf_summary(tmp_path / "m.gguf")

    def test_a_pipe_does_not_block(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "m.gguf")
        with pytest.raises(InvalidArgument, match="no regular file"):
            read_gguf_summary(tmp_path / "m.gguf")

    def test_a_loop_of_links(self, tmp_path: Path) -> None:
        (tmp_path / "m.gguf").symlink_to(tmp_path / "m.gguf")
        with pytest.raises(InvalidArgument, match="cannot be opened"):
            read_gguf_summary(tmp_path / "m.gguf")

    def test_a_name_with_a_nul(self) -> None:
        with pytest.raises(InvalidArgument, match="cannot be opened"):
            read_gguf_summary(Path("a\0b"))

    def test_no_permission(self, tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Through a patched open, as root may read everything."""

        def refuse(*_arguments: object) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "open", refuse)
        with pytest.raises(InvalidArgument, match="may not be read"):
            read_gguf_summary(tiny_model_path)

    @pytest.mark.parametrize("content", [b"GGU", b"PK\x03\x04" * 9, b"\0" * 100])
    def test_no_gguf(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "m.gguf").write_bytes(content)
        with pytest.raises(InvalidArgument, match="is no GGUF file"):
            read_gguf_summary(tmp_path / "m.gguf")

    @pytest.mark.parametrize("share", [0.0001, 0.01, 0.02, 0.5, 0.999, 1 - 1e-5])
    def test_cut_short(self, tmp_path: Path, tiny_bytes: bytes, share: float) -> None:
        (tmp_path / "m.gguf").write_bytes(tiny_bytes[: max(8, int(len(tiny_bytes) * share))])
        with pytest.raises(InvalidArgument, match="damaged or cut short"):
            read_gguf_summary(tmp_path / "m.gguf")

    def test_big_endian_and_unknown_versions(self, tmp_path: Path, tiny_bytes: bytes) -> None:
        for version, message in ((struct.pack(">I", 3), "big-endian"), (struct.pack("<I", 9), "version is 9")):
            (tmp_path / "m.gguf").write_bytes(b"GGUF" + version + tiny_bytes[8:])
            with pytest.raises(InvalidArgument, match=message):
                read_gguf_summary(tmp_path / "m.gguf")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda writer: writer.add_type("adapter"), "LoRA"),
            (lambda writer: writer.add_type("mmproj"), "projector"),
            (lambda writer: writer.add_type("imatrix"), "imatrix"),
            (lambda writer: writer.add_tokenizer_model("gpt2"), "no weights"),
            (lambda writer: writer.add_tensor("t", np.zeros((1, 32), dtype=np.float32)), "no tokenizer"),
        ],
    )
    def test_no_language_model(self, tmp_path: Path, change: Callable[[gguf.GGUFWriter], None], message: str) -> None:
        with pytest.raises(InvalidArgument, match="no language model") as caught:
            read_gguf_summary(write(tmp_path / "m.gguf", change=change))
        assert message in str(caught.value)

    @pytest.mark.parametrize(
        ("architecture", "message"), [("clip", "projector"), ("dream", "continue a text"), ("t5", "t5")]
    )
    def test_architectures_that_do_not_run(self, tmp_path: Path, architecture: str, message: str) -> None:
        with pytest.raises(InvalidArgument, match=message):
            read_gguf_summary(write(tmp_path / "m.gguf", architecture))

    def test_a_later_part_of_a_split_model(self, tmp_path: Path) -> None:
        def change(writer: gguf.GGUFWriter) -> None:
            writer.add_uint16("split.no", 1)
            writer.add_tokenizer_model("gpt2")
            writer.add_tensor("t", np.zeros((1, 32), dtype=np.float32))

        with pytest.raises(InvalidArgument, match="part 2 of a split model"):
            read_gguf_summary(write(tmp_path / "m.gguf", change=change))

    def test_a_token_twice(self, tmp_path: Path) -> None:
        def change(writer: gguf.GGUFWriter) -> None:
            writer.add_tokenizer_model("gpt2")
            writer.add_token_list(["a", "b", "a"])
            writer.add_tensor("t", np.zeros((1, 32), dtype=np.float32))

        with pytest.raises(InvalidArgument, match="1 tokens twice"):
            read_gguf_summary(write(tmp_path / "m.gguf", change=change))


class TestHostileBytes:
    """Each claim is far larger than the file: it must be refused before anything of that size is done."""

    @pytest.mark.parametrize(
        "body",
        [
            struct.pack("<QQ", 2**64 - 1, 0),
            struct.pack("<QQ", 0, 2**64 - 1),
            struct.pack("<QQQ", 0, 1, 2**64 - 1),
            struct.pack("<QQQ", 0, 1, 65535),
            struct.pack("<QQQ1sIIQ", 0, 1, 1, b"k", 9, 8, 2**64 - 1),
            struct.pack("<QQQ1sIIQ", 0, 1, 1, b"k", 9, 8, 2**20),
            struct.pack("<QQQ1sIIQ", 0, 1, 1, b"k", 9, 10, 2**61),
            struct.pack("<QQQ1sIIQ", 0, 1, 1, b"k", 9, 9, 2**30),
            struct.pack("<QQQ1sIQ", 0, 1, 1, b"k", 8, 2**63),
            struct.pack("<QQQ1sIQ", 0, 1, 1, b"k", 99, 0),
            struct.pack("<QQQ1sI", 1, 0, 1, b"t", 2**32 - 1),
            struct.pack("<QQQ1sIQQQQIQ", 1, 0, 1, b"t", 4, *[2**63] * 4, 0, 0),
            struct.pack("<QQQ1sIQIQ", 1, 0, 1, b"t", 1, 32, 0, 2**64 - 1),
        ],
    )
    def test_huge_claims_are_refused(self, tmp_path: Path, body: bytes) -> None:
        (tmp_path / "m.gguf").write_bytes(b"GGUF" + struct.pack("<I", 3) + body)
        with pytest.raises(InvalidArgument):
            read_gguf_summary(tmp_path / "m.gguf")

    def test_many_empty_strings_are_refused_by_their_number(self, tmp_path: Path) -> None:
        """48 MB of zeros are six million empty strings: more than any vocabulary has."""
        header = b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 8, 6_000_000)
        with (tmp_path / "m.gguf").open("wb") as file:
            file.write(header)
            file.truncate(len(header) + 48_000_000)
        with pytest.raises(InvalidArgument, match="array of 6000000 strings"):
            read_gguf_summary(tmp_path / "m.gguf")

    @settings(max_examples=n_examples(300), suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(data=st.data())
    def test_mutations_end_in_a_summary_or_an_error_of_ours(
        self, tmp_path: Path, tiny_bytes: bytes, data: st.DataObject
    ) -> None:
        content = bytearray(tiny_bytes)
        for _ in range(data.draw(st.integers(1, 4))):
            at = data.draw(st.integers(0, 8000))
            patch = data.draw(
                st.binary(min_size=1, max_size=8) | st.sampled_from([b"\xff" * 8, b"\0" * 8, b"\xff" * 4])
            )
            content[at : at + len(patch)] = patch
        cut = data.draw(st.none() | st.integers(0, len(content)))
        path = tmp_path / "m.gguf"
        path.write_bytes(bytes(content[:cut]))
        message = refusal(path)
        assert message is None or str(path) in message
