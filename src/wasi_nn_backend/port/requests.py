"""What a node may ask, as it arrives: terms in, checked requests out. Numbers of backends, graphs and contexts are the
node's to choose, so that they stay the same when this process is replaced by another one.

    {call, Id, Operation, [Argument]}   ->   {reply, Id, {ok, Term}} or {reply, Id, {error, Code, Message}}
                                             and, while a stream runs, {token, Id, Text}
    {cancel, Id}                             the call's reply says what came of it

``{ready, Version}`` is the first packet of all, and ``{fault, Message}`` the answer to what is no request.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType

from wasi_nn_backend.errors import ErrorCode, InvalidArgument
from wasi_nn_backend.port.terms import Atom, Term, encode

__all__ = [
    "OPERATIONS",
    "CallRequest",
    "CancelRequest",
    "fault",
    "parse_request",
    "ready",
    "reply_error",
    "reply_ok",
    "token",
]


class Argument(Enum):
    """The kinds of arguments. Numbers of objects are positive."""

    NUMBER = "a positive integer"
    INDEX = "an index, 0 or 1"
    BYTES = "a binary"


_NUMBER, _INDEX, _BYTES = Argument.NUMBER, Argument.INDEX, Argument.BYTES

#: Each operation with its arguments, in order. An empty binary is no configuration, or no session id.
OPERATIONS: Mapping[str, tuple[Argument, ...]] = MappingProxyType(
    {
        "ping": (),
        "init_backend": (_NUMBER, _BYTES),
        "deinit_backend": (_NUMBER,),
        "status": (_NUMBER,),
        "load_by_name": (_NUMBER, _NUMBER, _BYTES, _BYTES),
        "unload": (_NUMBER,),
        "init_execution_context": (_NUMBER, _NUMBER, _BYTES),
        "set_input": (_NUMBER, _INDEX, _BYTES),
        "compute": (_NUMBER,),
        "get_output": (_NUMBER, _INDEX),
        "run_inference": (_NUMBER, _BYTES, _BYTES),
        "stream": (_NUMBER, _BYTES, _BYTES),
        "close_execution_context": (_NUMBER,),
    }
)


@dataclass(frozen=True, slots=True)
class CallRequest:
    """``arguments`` fit the operation, or ``error`` says why they do not: such a call still gets its reply."""

    id: int
    operation: str
    arguments: tuple[int | bytes, ...] = ()
    error: InvalidArgument | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class CancelRequest:
    id: int


def parse_request(term: Term) -> CallRequest | CancelRequest:
    """Raises ``InvalidArgument`` for what is no request that could be answered."""
    match term:
        case (Atom("cancel"), int(number)):
            return CancelRequest(number)
        case (Atom("call"), int(number), Atom() as operation, list(arguments)):
            return _checked(number, operation, arguments)
    raise InvalidArgument("a request is {call, Id, Operation, Arguments} or {cancel, Id}")


def _checked(number: int, operation: str, arguments: list[Term]) -> CallRequest:
    kinds = OPERATIONS.get(operation)
    if kinds is None:
        error = InvalidArgument(f'there is no operation "{operation[:64]}": {", ".join(OPERATIONS)}')
        return CallRequest(number, operation, error=error)
    values = tuple(value for value, kind in zip(arguments, kinds, strict=False) if _fits(value, kind))
    if len(values) == len(kinds) == len(arguments):
        return CallRequest(number, operation, tuple(value for value in values if isinstance(value, int | bytes)))
    wanted = ", ".join(kind.value for kind in kinds) or "nothing"
    return CallRequest(number, operation, error=InvalidArgument(f"{operation} takes {wanted}"))


def _fits(value: Term, kind: Argument) -> bool:
    if kind is Argument.BYTES:
        return isinstance(value, bytes)
    return isinstance(value, int) and (value > 0 if kind is Argument.NUMBER else value in (0, 1))


def ready(version: str) -> bytes:
    return encode((Atom("ready"), version.encode()))


def fault(message: str) -> bytes:
    return encode((Atom("fault"), message.encode()))


def token(call_id: int, text: bytes) -> bytes:
    return encode((Atom("token"), call_id, text))


def reply_ok(call_id: int, result: Term) -> bytes:
    return encode((Atom("reply"), call_id, (Atom("ok"), result)))


def reply_error(call_id: int, code: ErrorCode | str, message: str) -> bytes:
    """The code is a binary: the node turns those that it knows into atoms, and no others."""
    name = code if isinstance(code, str) else code.value
    error: Term = (Atom("error"), name.encode(), message.encode(errors="replace"))
    return encode((Atom("reply"), call_id, error))
