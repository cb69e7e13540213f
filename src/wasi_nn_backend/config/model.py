"""``model``: how weights are loaded and what shape the llama context has."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from wasi_nn_backend.config.lora import LoraAdapter, lora_adapters
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
_CACHE_TYPES_WRITTEN: Final = (*_CACHE_TYPE_NAMES.values(), *_CACHE_TYPE_NAMES)

#: ``enum ggml_numa_strategy`` and ``enum llama_rope_scaling_type``.
_NUMA_NAMES: Final[Mapping[int, str]] = MappingProxyType({0: "disabled", 1: "distribute", 2: "isolate", 3: "numactl"})
_ROPE_SCALING_TYPES: Final[Mapping[str, int]] = MappingProxyType({"none": 0, "linear": 1, "yarn": 2, "longrope": 3})

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


def _as_numa(value: Any) -> Any:
    return _NUMA_NAMES.get(value, value) if _is_int(value) else value


def _as_rope_scaling(value: Any) -> Any:
    return _ROPE_SCALING_TYPES.get(value, value) if isinstance(value, str) else value


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
    BeforeValidator(_as_cache_type, json_schema_input_type=Literal[_CACHE_TYPES_WRITTEN]),
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

    n_ctx: Annotated[
        int,
        Field(
            le=INT32_MAX,
            description="tokens of one session's window, 128 or more; 0: as many as the model was trained with. The "
            "default is lowered to that",
        ),
        zero_or_at_least(128),
        Key(("ctx_size",), outside="error"),
    ] = 2048
    batch_size: Annotated[
        int, Field(ge=1, le=2048, description="tokens of prompt in one decode"), Key(("n_batch",))
    ] = 512
    ubatch_size: Annotated[
        int, Field(ge=1, le=2048, description="tokens that are computed at once; at most `batch_size`")
    ] = 512
    threads: Annotated[
        Annotated[int, Field(ge=1, le=64)] | None,
        BeforeValidator(_as_thread_count, json_schema_input_type=int | Literal["auto"] | None),
        Field(description='1 to 64; `null`, -1 or `"auto"`: as many of the usable cores as prove best'),
        Key(outside="default"),
    ] = None
    n_gpu_layers: Annotated[
        int,
        BeforeValidator(_as_layer_count, json_schema_input_type=int),
        Field(ge=0, le=ALL_LAYERS, description="layers that a GPU computes, -1 for all (untested)"),
    ] = 0
    main_gpu: Annotated[
        int,
        Field(ge=0, le=_N_DEVICES_MAX - 1, description="the GPU that counts where only one is used"),
        Key(outside="default"),
    ] = 0
    split_mode: Annotated[
        Literal["layer", "none", "row"], Field(description="how several GPUs share a model: `layer`, `none`, `row`")
    ] = "layer"
    tensor_split: Annotated[
        tuple[_Share, ...],
        BeforeValidator(_as_tensor_split, json_schema_input_type=list[float] | str),
        AfterValidator(_check_n_devices),
        Field(description='shares of the devices, `[3, 1]` or `"3,1"`'),
        Key(outside="error"),
    ] = ()
    use_mmap: Annotated[bool, Field(description="map the file instead of reading it")] = True
    use_mlock: Annotated[bool, Field(description="keep the weights out of swap")] = False
    check_tensors: Annotated[bool, Field(description="look for values that are no numbers while loading")] = False
    numa: Annotated[
        Literal["disabled", "distribute", "isolate", "numactl"],
        BeforeValidator(
            _as_numa, json_schema_input_type=Literal["disabled", "distribute", "isolate", "numactl", 0, 1, 2, 3]
        ),
        Field(
            description="where threads run on a machine with several memory nodes: `disabled`, `distribute`, "
            "`isolate`, `numactl`. For the whole process: the first model that asks for one decides"
        ),
    ] = "disabled"
    lora: Annotated[
        tuple[LoraAdapter, ...],
        *lora_adapters(),
        Field(
            description='LoRA adapters (GGUF): `[{"path": ..., "scale": 1.0}]`, a path, or paths with commas between '
            "them. A context may give those of its graph other scales"
        ),
        Key(outside="error"),
    ] = ()
    flash_attention: Annotated[
        Literal["auto", "on", "off"],
        BeforeValidator(
            _as_flash_attention,
            json_schema_input_type=bool | Literal["auto", "on", "off", "enabled", "disabled", "true", "false"],
        ),
        Field(
            description="`on`, `off`, true, false; `auto`: what is faster on this CPU "
            "([measured](#what-auto-chooses)), on a GPU what llama.cpp says"
        ),
        Key(("flash_attn",)),
    ] = "auto"
    cache_type_k: Annotated[
        _CacheType,
        Field(
            description="type of the cached keys: `f32`, `f16`, `bf16`, `q8_0`, `q5_0`, `q5_1`, `q4_0`, `q4_1`, "
            "`iq4_nl`, or ggml's number"
        ),
    ] = "f16"
    cache_type_v: Annotated[_CacheType, Field(description="type of the cached values, as above")] = "f16"
    offload_kqv: Annotated[bool, Field(description="KV cache on the GPU"), Key(negations=("no_kv_offload",))] = True
    rope_scaling_type: Annotated[
        int,
        BeforeValidator(_as_rope_scaling, json_schema_input_type=int | Literal["none", "linear", "yarn", "longrope"]),
        Field(
            ge=-1,
            le=3,
            description="`none`, `linear`, `yarn`, `longrope`, or llama.cpp's number; -1 is the model's own",
        ),
        Key(("rope_scaling",), outside="error"),
    ] = -1
    rope_freq_base: Annotated[_RopeValue, Field(description="0 is the model's own")] = 0.0
    rope_freq_scale: Annotated[_RopeValue, Field(description="0 is the model's own")] = 0.0
    yarn_ext_factor: Annotated[_YarnValue, Field(description="negative is the model's own")] = -1.0
    yarn_attn_factor: Annotated[
        _YarnValue,
        Field(description="negative is the model's own; without effect where `yarn_ext_factor` is not 0"),
    ] = -1.0
    yarn_beta_fast: Annotated[_YarnValue, Field(description="negative is the model's own")] = -1.0
    yarn_beta_slow: Annotated[_YarnValue, Field(description="negative is the model's own")] = -1.0
    yarn_orig_ctx: Annotated[
        int, Field(ge=0, le=INT32_MAX, description="tokens of the training before YaRN; 0 is the model's own")
    ] = 0
    embedding: Annotated[bool, Field(description="the output is the prompt's vector instead of text")] = False
