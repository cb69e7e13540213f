"""``model``: how weights are loaded and what shape the llama context has."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from wasi_nn_backend.config.section import INT32_MAX, Key, Section, zero_or_at_least

__all__ = ["ALL_LAYERS", "ModelSettings"]

#: More layers than any model has: everything is offloaded.
ALL_LAYERS: Final = 999

_N_DEVICES_MAX: Final = 128
_FLOAT32_MAX: Final = 3.4e38

#: ggml's type numbers, which guests built for WasmEdge send instead of names.
_CACHE_TYPE_NAMES: Final[Mapping[int, str]] = MappingProxyType(
    {0: "f32", 1: "f16", 2: "q4_0", 3: "q4_1", 6: "q5_0", 7: "q5_1", 8: "q8_0", 20: "iq4_nl", 30: "bf16"}
)
_FLASH_ATTENTION_NAMES: Final[Mapping[str, str]] = MappingProxyType(
    {"enabled": "on", "true": "on", "disabled": "off", "false": "off"}
)


def _as_layer_count(value: Any) -> Any:
    return ALL_LAYERS if _is_int(value) and value == -1 else value


def _as_thread_count(value: Any) -> Any:
    """``None`` stands for automatic, as -1 and ``"auto"`` do."""
    if (_is_int(value) and value == -1) or (isinstance(value, str) and value == "auto"):
        return None
    return value


def _as_flash_attention(value: Any) -> Any:
    if isinstance(value, bool):
        return "on" if value else "off"
    return _FLASH_ATTENTION_NAMES.get(value, value) if isinstance(value, str) else value


def _as_cache_type(value: Any) -> Any:
    return _CACHE_TYPE_NAMES.get(value, value) if _is_int(value) else value


def _as_tensor_split(value: Any) -> Any:
    """``"3,2"`` and ``"3/2"`` are llama.cpp's own notation for a list of shares."""
    if isinstance(value, (list, tuple)):
        return tuple(value)
    expected = PydanticCustomError(
        "tensor_split", 'Input should be an array of numbers or numbers with commas between them, as in "3,2"'
    )
    if not isinstance(value, str):
        raise expected
    try:
        return tuple(float(part) for part in value.replace("/", ",").split(",")) if value.strip() else ()
    except ValueError:
        raise expected from None


def _check_n_devices(value: tuple[float, ...]) -> tuple[float, ...]:
    if len(value) > _N_DEVICES_MAX:
        raise PydanticCustomError("too_many", f"Input should be at most {_N_DEVICES_MAX} numbers")
    return value


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


_CacheType = Annotated[
    Literal["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1"],
    BeforeValidator(_as_cache_type),
]
_Share = Annotated[float, Field(ge=0.0, le=_FLOAT32_MAX)]
_RopeValue = Annotated[float, Field(ge=0.0, le=_FLOAT32_MAX)]
_YarnValue = Annotated[float, Field(ge=-_FLOAT32_MAX, le=_FLOAT32_MAX)]


class ModelSettings(Section):
    """Token counts are for one sequence. Zero RoPE and negative YaRN values leave the model's own in force.

    ``n_ctx`` 0 is the model's training length. ``threads`` None lets the engine choose. ``flash_attention`` "auto"
    measures whether it is faster on this CPU, and leaves it to llama.cpp on a GPU. ``tensor_split`` has one share a
    device; empty leaves the split to llama.cpp. ``resolve`` lowers ``ubatch_size`` to ``batch_size``. ``embedding``
    asks for the prompt's vector instead of a continuation.
    """

    n_ctx: Annotated[int, Field(le=INT32_MAX), zero_or_at_least(128), Key(("ctx_size",), outside="error")] = 2048
    batch_size: Annotated[int, Field(ge=1, le=2048), Key(("n_batch",))] = 512
    ubatch_size: Annotated[int, Field(ge=1, le=2048)] = 512
    n_gpu_layers: Annotated[int, BeforeValidator(_as_layer_count), Field(ge=0, le=ALL_LAYERS)] = 0
    threads: Annotated[
        Annotated[int, Field(ge=1, le=64)] | None, BeforeValidator(_as_thread_count), Key(outside="default")
    ] = None
    use_mmap: bool = True
    use_mlock: bool = False
    check_tensors: bool = False
    main_gpu: Annotated[int, Field(ge=0, le=_N_DEVICES_MAX - 1), Key(outside="default")] = 0
    split_mode: Literal["layer", "none", "row"] = "layer"
    tensor_split: Annotated[
        tuple[_Share, ...], BeforeValidator(_as_tensor_split), AfterValidator(_check_n_devices), Key(outside="error")
    ] = ()
    flash_attention: Annotated[
        Literal["auto", "on", "off"], BeforeValidator(_as_flash_attention), Key(("flash_attn",))
    ] = "auto"
    cache_type_k: _CacheType = "f16"
    cache_type_v: _CacheType = "f16"
    offload_kqv: Annotated[bool, Key(negations=("no_kv_offload",))] = True
    rope_scaling_type: Annotated[int, Field(ge=-1, le=3), Key(outside="error")] = -1
    rope_freq_base: _RopeValue = 0.0
    rope_freq_scale: _RopeValue = 0.0
    yarn_ext_factor: _YarnValue = -1.0
    yarn_attn_factor: _YarnValue = -1.0
    yarn_beta_fast: _YarnValue = -1.0
    yarn_beta_slow: _YarnValue = -1.0
    yarn_orig_ctx: Annotated[int, Field(ge=0, le=INT32_MAX)] = 0
    embedding: bool = False
