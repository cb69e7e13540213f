"""The external term format: what was written is read, and nothing else gets through."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wasi_nn_backend.errors import InvalidArgument, InvalidEncoding
from wasi_nn_backend.port.terms import N_DEPTH_MAX, N_TERMS_MAX, Atom, Term, decode, encode

ATOMS = st.text(st.characters(exclude_categories=["Cs"]), max_size=60).map(Atom)
SCALARS = ATOMS | st.binary(max_size=50) | st.integers(1 - 2**64, 2**64 - 1)
TERMS = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.lists(inner, max_size=4).map(tuple),
    max_leaves=20,
)

#: What erlang:term_to_binary/1 of OTP 25 makes of terms.
FROM_ERLANG = {
    "836400026f6b": Atom("ok"),
    "8377026f6b": Atom("ok"),
    "8364000361e462": Atom("aäb"),
    "83760005c3a461c3a4": Atom("äaä"),
    "836107": 7,
    "8362ffffffff": -1,
    "836e08000000000000000080": 2**63,
    "836e0401ffffffff": -(2**32) + 1,
    "836d00000003616263": b"abc",
    "836a": [],
    "836b0003010203": [1, 2, 3],
    "836c00000001640001616a": [Atom("a")],
    "83680261016800": (1, ()),
}


@pytest.mark.parametrize(("data", "term"), FROM_ERLANG.items())
def test_what_erlang_writes_is_read(data: str, term: Term) -> None:
    read = decode(bytes.fromhex(data))
    assert read == term
    assert type(read) is type(term)


@given(TERMS)
def test_a_round_trip(term: Term) -> None:
    read = decode(encode(term))
    assert read == term
    assert type(read) is type(term)


def test_truth_is_an_atom() -> None:
    assert decode(encode((True, False))) == (Atom("true"), Atom("false"))


@given(TERMS, st.data())
def test_a_term_that_is_cut_off_is_refused(term: Term, data: st.DataObject) -> None:
    whole = encode(term)
    with pytest.raises(InvalidEncoding):
        decode(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(InvalidEncoding, match="follow the term"):
        decode(whole + b"x")


@given(st.binary(max_size=60), st.booleans())
def test_garbage_is_a_term_or_refused(data: bytes, has_version: bool) -> None:
    """Nothing else is raised, and what is read can be written; only names of atoms may be longer there."""
    with contextlib.suppress(InvalidEncoding):
        term = decode(b"\x83" + data if has_version else data)
        with contextlib.suppress(InvalidArgument):
            assert decode(encode(term)) == term


@pytest.mark.parametrize(
    "data",
    [
        b"\x83P\x00\x00\x10\x00x\x9c",  # compressed
        b"\x83\x68\x01" * 50,
        b"\x83" + b"\x68\x01" * (N_DEPTH_MAX + 2) + b"\x6a",
        b"\x83\x6c" + (N_TERMS_MAX + 1).to_bytes(4, "big") + b"\x6a" * (N_TERMS_MAX + 2),
        b"\x83\x69\xff\xff\xff\xff",  # a tuple of four billion parts
        b"\x83\x6d\xff\xff\xff\xff",
        b"\x83\x6e\xff\x00" + b"\xff" * 255,
        b"\x83\x6c\x00\x00\x00\x01\x61\x01\x61\x02",  # improper
        b"\x83\x74\x00\x00\x00\x00",  # a map
        b"\x83\x77\x02\xff\xfe",
        b"\x83\x76\xff\xff" + b"a" * 0xFFFF,
    ],
)
def test_what_no_packet_needs_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidEncoding):
        decode(data)


@pytest.mark.parametrize("term", [2**64, -(2**64), Atom("a" * 256), None, 1.5, {}])
def test_what_does_not_fit_is_not_written(term: Term) -> None:
    with pytest.raises(InvalidArgument):
        encode(term)
