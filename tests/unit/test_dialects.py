"""The dialects' numbers against the ABI documents, restated here as data."""

from __future__ import annotations

import pytest

from wasi_nn_backend.dialects import (
    CAPI,
    CORE_DIALECTS,
    HYPERBEAM,
    WAMR,
    WAMR_EPHEMERAL,
    WAMR_LEGACY,
    WASMEDGE,
    WITX,
    Dialect,
    argument_kind,
)
from wasi_nn_backend.errors import ErrorCode, InvalidArgument, InvalidEncoding
from wasi_nn_backend.host.core_abi import CoreAbi

#: errno by name, and which names share a number because the ABI has none for them.
ERRNOS = {
    "success": 0,
    "invalid_argument": 1,
    "invalid_encoding": 2,
    "missing_memory": 3,
    "busy": 4,
    "timeout": 4,
    "runtime_error": 5,
    "unknown": 5,
    "unsupported_operation": 6,
    "security": 6,
    "too_large": 7,
    "not_found": 8,
    "end_of_sequence": 100,
    "context_full": 101,
    "prompt_too_long": 102,
    "model_not_found": 103,
}
TENSOR_TYPES = {0: "fp16", 1: "fp32", 2: "fp64", 3: "u8", 4: "i32", 5: "i64"}
ENCODINGS = {
    0: "openvino",
    1: "onnx",
    2: "tensorflow",
    3: "pytorch",
    4: "tensorflowlite",
    5: "autodetect",
    6: "ggml",
}
#: WAMR numbers as the C header does.
ENCODINGS_WAMR = ENCODINGS | {5: "ggml", 6: "autodetect"}
TENSOR_TYPES_LEGACY = {0: "fp16", 1: "fp32", 2: "u8", 3: "i32"}
TARGETS = {0: "cpu", 1: "gpu", 2: "tpu"}
N_PARAMETERS_WITX = {
    "load": 5,
    "load_by_name": 3,
    "init_execution_context": 2,
    "set_input": 3,
    "compute": 1,
    "get_output": 5,
}
N_PARAMETERS_WASMEDGE = N_PARAMETERS_WITX | {
    "load_by_name_with_config": 5,
    "get_output_single": 5,
    "compute_single": 1,
    "fini_single": 1,
    "unload": 1,
    "finalize_execution_context": 1,
}

N_PARAMETERS_WAMR = N_PARAMETERS_WITX | {"load_by_name_with_config": 5}
N_PARAMETERS_LEGACY = N_PARAMETERS_WITX | {"load": 4, "get_output": 4}
N_PARAMETERS_HYPERBEAM = N_PARAMETERS_WAMR | {"run_inference": 2}

dialects = pytest.mark.parametrize("dialect", CORE_DIALECTS, ids=lambda dialect: dialect.name)


@dialects
def test_every_error_has_the_number_of_the_abi(dialect: Dialect) -> None:
    assert {code.value: dialect.errno(code) for code in ErrorCode} == ERRNOS


def tensor_types(dialect: Dialect) -> dict[int, str]:
    return TENSOR_TYPES_LEGACY if dialect is WAMR_LEGACY else TENSOR_TYPES


def encodings(dialect: Dialect) -> dict[int, str]:
    return ENCODINGS_WAMR if dialect in (WAMR_EPHEMERAL, WAMR_LEGACY) else ENCODINGS


@dialects
def test_pointers_and_lengths_are_told_from_words(dialect: Dialect) -> None:
    parameters = {parameter for parameters in dialect.functions.values() for parameter in parameters}
    words = {parameter for parameter in parameters if argument_kind(parameter) == "word"}
    lengths = {parameter for parameter in parameters if argument_kind(parameter) == "length"}
    assert words == {"graph", "context", "index", "encoding", "target"}
    assert lengths == {parameter for parameter in parameters if parameter.startswith("n_")}


@dialects
def test_types_encodings_and_targets_are_those_of_the_abi(dialect: Dialect) -> None:
    assert {number: value.value for number, value in dialect.tensor_types.items()} == tensor_types(dialect)
    assert {number: value.value for number, value in dialect.encodings.items()} == encodings(dialect)
    assert {number: value.value for number, value in dialect.targets.items()} == TARGETS


@pytest.mark.parametrize(
    ("dialect", "import_module", "n_parameters"),
    [
        (WITX, "wasi_ephemeral_nn", N_PARAMETERS_WITX),
        (WASMEDGE, "wasi_ephemeral_nn", N_PARAMETERS_WASMEDGE),
        (WAMR_EPHEMERAL, "wasi_ephemeral_nn", N_PARAMETERS_WAMR),
        (HYPERBEAM, "wasi_ephemeral_nn", N_PARAMETERS_HYPERBEAM),
        (WAMR_LEGACY, "wasi_nn", N_PARAMETERS_LEGACY),
    ],
)
def test_functions_have_the_parameters_of_the_abi(
    dialect: Dialect, import_module: str, n_parameters: dict[str, int]
) -> None:
    assert dialect.import_module == import_module
    assert {name: len(parameters) for name, parameters in dialect.functions.items()} == n_parameters


@dialects
def test_every_function_of_a_dialect_is_implemented(dialect: Dialect) -> None:
    assert [name for name in dialect.functions if not callable(getattr(CoreAbi, name, None))] == []


@dialects
@pytest.mark.parametrize("padding", [0, 0x100, 0xABCDEF00])
def test_only_the_low_byte_of_type_and_encoding_counts(dialect: Dialect, padding: int) -> None:
    types, formats = tensor_types(dialect), encodings(dialect)
    assert {n: dialect.tensor_type(n | padding).value for n in types} == types
    assert {n: dialect.encoding(n | padding).value for n in formats} == formats


@dialects
def test_numbers_outside_of_the_tables_are_refused(dialect: Dialect) -> None:
    for number in range(6, 256):
        with pytest.raises(InvalidArgument):
            dialect.tensor_type(number)
    for number in range(7, 256):
        with pytest.raises(InvalidEncoding):
            dialect.encoding(number)
    for number in (3, 256, 0xFFFF_FFFF):
        with pytest.raises(InvalidArgument):
            dialect.target(number)


def test_wasmedge_shows_four_metadata_keys_and_its_own_defaults() -> None:
    assert WASMEDGE.metadata_keys == ("input_tokens", "output_tokens", "llama_build_number", "llama_commit")
    assert all(dialect.metadata_keys is None for dialect in CORE_DIALECTS if dialect is not WASMEDGE)
    assert WASMEDGE.door.defaults["sampling"] == {"temperature": 0.8, "top_p": 0.95, "repeat_penalty": 1.0}
    assert WASMEDGE.door.unknown_keys == "ignore"


@dialects
def test_guests_send_raw_prompts_and_may_not_open_paths(dialect: Dialect) -> None:
    assert dialect.door.prompt_mode == "raw"
    assert dialect.door.defaults["session"]["keep_control_text"] is True
    assert not dialect.door.is_trusted


@dialects
def test_tables_cannot_be_changed(dialect: Dialect) -> None:
    for table in (dialect.errnos, dialect.tensor_types, dialect.encodings, dialect.targets, dialect.functions):
        with pytest.raises(TypeError):
            table[0] = None  # type: ignore[index]


# The C ABI: error names of the header's table, in its two columns.
C_ERRORS = {
    "success": (0, 0),
    "invalid_argument": (1, 1),
    "invalid_encoding": (2, 2),
    "timeout": (3, 4),
    "runtime_error": (4, 5),
    "unsupported_operation": (5, 6),
    "too_large": (6, 7),
    "not_found": (7, 8),
    "security": (8, 6),
    "unknown": (9, 5),
    "busy": (3, 4),
    "missing_memory": (4, 3),
    "end_of_sequence": (100, 100),
    "context_full": (101, 101),
    "prompt_too_long": (102, 102),
    "model_not_found": (103, 103),
}
C_ENCODINGS = ["openvino", "onnx", "tensorflow", "pytorch", "tensorflowlite", "ggml", "autodetect"]


@pytest.mark.parametrize(("dialect", "column"), [(CAPI, 0), (WAMR, 1)])
def test_the_numbers_of_the_c_libraries(dialect: Dialect, column: int) -> None:
    assert {code.value: number for code, number in dialect.errnos.items()} == {
        name: numbers[column] for name, numbers in C_ERRORS.items()
    }
    assert [dialect.encodings[number].value for number in range(7)] == C_ENCODINGS
    assert [dialect.targets[number].value for number in range(3)] == ["cpu", "gpu", "tpu"]
    assert (dialect.door.prompt_mode, dialect.door.is_trusted) == (("chat", True), ("raw", False))[column]
