"""Adapter files are checked before llama.cpp sees them: it would end the process over some of these."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from tests.lora import write_adapter
from wasi_nn_backend.errors import InvalidArgument, ModelNotFound, UnsupportedOperation
from wasi_nn_backend.llama import load_llama
from wasi_nn_backend.llama.interface import ContextParams, ModelParams
from wasi_nn_backend.llama.lora import check_adapter

Q = "blk.0.attn_q.weight"


def load(model: Path, adapter: Path) -> None:
    """Load the model with the adapter, and use it in a context."""
    with load_llama().load_model(ModelParams(model, adapters=(adapter,))) as loaded:
        loaded.create_context(ContextParams(n_ctx=256, adapter_scales=(1.0,))).close()


def refuse(model: Path, adapter: Path, reason: str) -> None:
    with pytest.raises(InvalidArgument, match=reason):
        load(model, adapter)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_what_the_converter_writes_is_loaded(tiny_model_path: Path, tmp_path: Path, dtype: type) -> None:
    write_adapter(tmp_path / "a.gguf", dtype=dtype)
    load(tiny_model_path, tmp_path / "a.gguf")


@pytest.mark.parametrize(
    ("shapes", "reason"),
    [
        ({f"{Q}.lora_b": (64, 8)}, "ranks"),
        ({f"{Q}.lora_a": (4, 32)}, "incorrect shape"),
        ({f"{Q}.lora_b": (32, 4)}, "incorrect shape"),
    ],
)
def test_shapes_that_do_not_fit(
    tiny_model_path: Path, tmp_path: Path, shapes: dict[str, tuple[int, int]], reason: str
) -> None:
    write_adapter(tmp_path / "a.gguf", shapes=shapes)
    refuse(tiny_model_path, tmp_path / "a.gguf", reason)


def test_ranks_of_an_embedding_are_elsewhere(tiny_model_path: Path, tmp_path: Path) -> None:
    """llama.cpp does not compare them: it would abort while it computes."""
    name = "token_embd.weight"
    with load_llama().load_model(ModelParams(tiny_model_path)) as model:
        n_vocab = model.vocabulary.n_tokens
    good = {f"{name}.lora_a": (n_vocab, 4), f"{name}.lora_b": (64, 4)}
    write_adapter(tmp_path / "good.gguf", names=(name,), shapes=good)
    load(tiny_model_path, tmp_path / "good.gguf")
    write_adapter(tmp_path / "bad.gguf", names=(name,), shapes=good | {f"{name}.lora_b": (64, 5)})
    refuse(tiny_model_path, tmp_path / "bad.gguf", "ranks")


def write(path: Path, *, kind: str = "adapter", pairs: bool = True, **keys: object) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type(kind)
    writer.add_string("adapter.type", str(keys.get("adapter_type", "lora")))
    alpha = keys.get("alpha", 4.0)
    if isinstance(alpha, float) and keys.get("alpha_is_double"):
        writer.add_float64("adapter.lora.alpha", alpha)
    elif isinstance(alpha, float):
        writer.add_float32("adapter.lora.alpha", alpha)
    else:
        writer.add_string("adapter.lora.alpha", str(alpha))
    if "invocation_tokens" in keys:
        writer.add_array("adapter.alora.invocation_tokens", keys["invocation_tokens"])
    dtype = keys.get("dtype", np.float32)
    writer.add_tensor(f"{Q}.lora_a", np.ones((4, 64), dtype=dtype))
    if pairs:
        writer.add_tensor(f"{Q}.lora_b", np.ones((64, 4), dtype=dtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"kind": "model"}, "general.type is 'model'"),
        ({"adapter_type": "dora"}, "adapter.type is 'dora'"),
        ({"alpha": "much"}, "alpha is 'much'"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"alpha_is_double": True}, "alpha is 4.0"),
        ({"pairs": False}, "not there as a pair"),
        ({"dtype": np.int32}, "type I32"),
    ],
)
def test_what_is_no_adapter(tiny_model_path: Path, tmp_path: Path, keys: dict[str, object], reason: str) -> None:
    write(tmp_path / "a.gguf", **keys)  # type: ignore[arg-type]
    refuse(tiny_model_path, tmp_path / "a.gguf", reason)


def test_an_adapter_for_another_architecture(tiny_model_path: Path, tmp_path: Path) -> None:
    write_adapter(tmp_path / "a.gguf", architecture="gemma3")
    refuse(tiny_model_path, tmp_path / "a.gguf", "architecture 'gemma3'")


def test_an_activated_adapter_is_unsupported(tiny_model_path: Path, tmp_path: Path) -> None:
    write(tmp_path / "a.gguf", invocation_tokens=[1, 2])
    with pytest.raises(UnsupportedOperation, match="activated"):
        load(tiny_model_path, tmp_path / "a.gguf")


def test_files_that_are_none(tiny_model_path: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound):
        check_adapter(tmp_path / "gone.gguf", None)
    refuse(tiny_model_path, tiny_model_path, "general.type is 'model'")
    write_adapter(tmp_path / "a.gguf")
    whole = (tmp_path / "a.gguf").read_bytes()
    for n_bytes in (0, 3, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.gguf").write_bytes(whole[:n_bytes])
        with pytest.raises(InvalidArgument):
            load(tiny_model_path, tmp_path / "cut.gguf")


def test_one_scale_for_each_adapter(tiny_model_path: Path, tmp_path: Path) -> None:
    write_adapter(tmp_path / "a.gguf")
    with load_llama().load_model(ModelParams(tiny_model_path, adapters=(tmp_path / "a.gguf",))) as model:
        for scales in ((), (1.0, 1.0)):
            with pytest.raises(InvalidArgument, match="1 LoRA adapters"):
                model.create_context(ContextParams(n_ctx=256, adapter_scales=scales))
