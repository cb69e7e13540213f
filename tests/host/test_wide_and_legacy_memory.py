"""What 64-bit memories and WAMR's older structures have that the others have not."""

from __future__ import annotations

import pytest
from wasmtime import WasmtimeError

from tests.host.abis import ABIS, Abi
from tests.host.conftest import MODEL
from tests.host.guests import OUT, PAGE, Driver, malloc_wat, memory_wat
from wasi_nn_backend.backend import Backend

#: One bit above what 32-bit words hold: cut off, it would leave a good pointer or length.
HIGH = 1 << 32

wide = pytest.mark.parametrize("abi", [abi for abi in ABIS if abi.n_bits == 64], ids=str)
legacy = pytest.mark.parametrize("abi", [abi for abi in ABIS if abi.is_legacy], ids=str)


@wide
@pytest.mark.parametrize("high", [HIGH, 1 << 63, HIGH * 7])
def test_no_bit_of_a_pointer_is_dropped(fake_backend: Backend, abi: Abi, high: int) -> None:
    with Driver(fake_backend, abi) as guest:
        context, prompt = guest.open(MODEL), guest.tensor(b"hello")
        expected = guest.generate(context, b"hello")
        name = guest.place(MODEL)
        assert guest.call("load_by_name", name + high, len(MODEL), OUT) == 1
        assert guest.call("load_by_name", name, len(MODEL), OUT + high) == 1
        assert guest.call("init_execution_context", 0, OUT + high) == 1
        assert guest.call("set_input", context, 0, prompt + high) == 1
        assert guest.call_get_output(context, 0, PAGE + high, PAGE, OUT) == 1
        if not abi.is_legacy:
            at = guest.place(b"x")
            for dims, data in ((at + high, at), (at, at + high)):
                tensor = guest.place(abi.tensor(dims, 1, abi.u8, data, 1))
                assert guest.call("set_input", context, 0, tensor) == 1
        assert guest.call("compute", context) == 0
        assert guest.output(context) == expected


def test_no_bit_of_a_wide_length_is_dropped(fake_backend: Backend) -> None:
    abi = next(abi for abi in ABIS if abi.has_wide_lengths)
    with Driver(fake_backend, abi, memory=memory_wat(abi) + malloc_wat(abi)) as guest:
        context, at = guest.open(MODEL), guest.place(MODEL)
        for high in (HIGH, 1 << 63):
            assert guest.call("load_by_name", at, len(MODEL) + high, OUT) == 7
            assert guest.call("load_by_name_with_config", at, len(MODEL), at, high, OUT) == 7
            assert guest.call("get_output", context, 0, PAGE, 8 + high, OUT) == 1
            assert guest.call("run_inference", at, 5 + high) == 0
            assert guest.call("load", at, 1 + high, 6, 0, OUT) == 7
        assert len(guest.state.graphs) == 1


@wide
def test_a_memory_beyond_four_gigabytes_is_reached(fake_backend: Backend, abi: Abi) -> None:
    """Pages that nobody touches cost nothing, so the guest has them for real."""
    with Driver(fake_backend, abi) as guest:
        context = guest.open(MODEL)
        expected = guest.generate(context, b"hello")
        try:
            guest.memory.grow(guest.store, HIGH // PAGE + 1)
        except WasmtimeError as error:
            pytest.skip(f"this machine gives no 4 GiB of address space: {error}")
        guest.memory.write(guest.store, MODEL, HIGH + 8)
        assert guest.call("load_by_name", HIGH + 8, len(MODEL), HIGH) == 0
        assert guest.call_get_output(context, 0, HIGH + 64, 4096, HIGH) == 0
        assert guest.peek(HIGH + 64, guest.peek_u32(HIGH)) == expected


@legacy
@pytest.mark.parametrize("dims", [(5,), (1, 5), (5, 1, 1)])
def test_the_product_of_the_dimensions_is_the_length(fake_backend: Backend, abi: Abi, dims: tuple[int, ...]) -> None:
    with Driver(fake_backend, abi) as guest:
        context = guest.open(MODEL)
        expected = guest.generate(context, b"hello")
        assert guest.call("set_input", context, 0, guest.tensor(b"hello and more", dims=dims)) == 0
        assert guest.call("compute", context) == 0
        assert guest.output(context) == expected


@legacy
@pytest.mark.parametrize(
    ("dims", "errno"),
    [((), 1), ((0,), 0), ((0xFFFF_FFFF,), 7), ((3 * PAGE,), 1), ((1 << 31,) * 2, 7), ((1 << 31,) * 64, 7)],
)
def test_dimensions_that_are_no_length(fake_backend: Backend, abi: Abi, dims: tuple[int, ...], errno: int) -> None:
    with Driver(fake_backend, abi) as guest:
        context = guest.open(MODEL)
        assert guest.call("set_input", context, 0, guest.tensor(b"hello", dims=dims)) == errno


@legacy
@pytest.mark.parametrize("type_word", [0, 1, 2, 3, 0xDEAD_BE02])
def test_any_known_type_is_text(fake_backend: Backend, abi: Abi, type_word: int) -> None:
    with Driver(fake_backend, abi) as guest:
        context = guest.open(MODEL)
        assert guest.call("set_input", context, 0, guest.tensor(b"hello", type_word=type_word)) == 0
        assert guest.call("set_input", context, 0, guest.tensor(b"hello", type_word=4)) == 1


@legacy
def test_sizes_go_in_and_out_through_one_word(fake_backend: Backend, abi: Abi) -> None:
    with Driver(fake_backend, abi) as guest:
        context = guest.open(MODEL)
        expected = guest.generate(context, b"hello")
        assert guest.call_get_output(context, 0, PAGE, len(expected) - 1, OUT) == 7
        assert guest.peek_u32(OUT) == len(expected)
        assert guest.call("get_output", context, 0, PAGE, OUT) == 0, "the size needed is the capacity now"
        assert guest.peek(PAGE, guest.peek_u32(OUT)) == expected
