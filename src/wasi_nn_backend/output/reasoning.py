"""Text between ``<think>`` and ``</think>``: a model's reasoning, told from its answer while it is generated.

A block at the beginning is reasoning even when it is never closed: the run may have ended in the middle of it. In the
middle of an answer it is reasoning only once it is closed, since a model may also write about such tags.
"""

from __future__ import annotations

import enum
from typing import Final

__all__ = ["ReasoningSplitter", "opens_reasoning", "split_reasoning"]

_OPEN: Final = b"<think>"
_CLOSE: Final = b"</think>"
_SPACE: Final = b" \t\r\n"


def opens_reasoning(prompt: bytes) -> bool:
    """Whether the prompt ends inside of a block that it has just opened, as templates of reasoning models do."""
    return prompt[-256:].rstrip(_SPACE).endswith(_OPEN)


def split_reasoning(text: bytes, *, is_open: bool) -> tuple[bytes, bytes]:
    """(answer, reasoning) of a whole text. ``is_open``: it begins inside of a block."""
    splitter = ReasoningSplitter(is_open=is_open)
    answer = splitter.feed(text) + splitter.finish()
    return answer, splitter.reasoning


class _State(enum.Enum):
    BEGINNING = enum.auto()  # nothing of the answer yet: its first block is reasoning, open or closed
    FIRST_BLOCK = enum.auto()
    ANSWER = enum.auto()
    LATER_BLOCK = enum.auto()  # held back until it is known whether it is closed


class ReasoningSplitter:
    """Takes a text in pieces, cut anywhere, and gives the answer in pieces."""

    def __init__(self, *, is_open: bool) -> None:
        self._state = _State.FIRST_BLOCK if is_open else _State.BEGINNING
        self._held = bytearray()
        self._n_searched = 0  # bytes of a later block in which there is no closing tag
        self._blocks: list[bytearray] = [bytearray()]  # the last one is still open

    @property
    def reasoning(self) -> bytes:
        """What was in blocks so far, one after the other, without the white space around each."""
        return b"\n".join(block for block in (bytes(block).strip(_SPACE) for block in self._blocks) if block)

    def feed(self, piece: bytes) -> bytes:
        """Add a piece; returns what it releases of the answer, possibly nothing."""
        self._held += piece
        released = bytearray()
        while self._advance(released):
            pass
        return bytes(released)

    def finish(self) -> bytes:
        """The text is over; returns what was held back of the answer."""
        rest, state = bytes(self._held), self._state
        self._held.clear()
        self._state = _State.ANSWER
        if state is _State.FIRST_BLOCK:
            self._blocks[-1] += rest
            return b""
        if state is _State.LATER_BLOCK:
            return _OPEN + rest
        return rest.lstrip(_SPACE) if state is _State.BEGINNING and self._has_block else rest

    @property
    def _has_block(self) -> bool:
        return len(self._blocks) > 1

    def _advance(self, released: bytearray) -> bool:
        """Work on what is held back. True when a tag was found, and there may be another one behind it."""
        if self._state in (_State.FIRST_BLOCK, _State.LATER_BLOCK):
            return self._advance_in_block()
        if self._state is _State.BEGINNING:
            stripped = self._held.lstrip(_SPACE)
            if _OPEN.startswith(stripped[: len(_OPEN)]) and len(stripped) < len(_OPEN):
                return False  # white space so far, and perhaps the beginning of a tag
            if not stripped.startswith(_OPEN):
                if self._has_block:
                    self._held = stripped  # what lies between a block and the answer belongs to neither
                self._state = _State.ANSWER
        return self._advance_in_answer(released)

    def _advance_in_answer(self, released: bytearray) -> bool:
        before, tag, after = self._held.partition(_OPEN)
        if tag:
            if self._state is _State.ANSWER:
                released += before
            self._state = _State.FIRST_BLOCK if self._state is _State.BEGINNING else _State.LATER_BLOCK
            self._held, self._n_searched = after, 0
            return True
        n_released = len(self._held) - _n_bytes_begun(self._held, _OPEN)
        released += self._held[:n_released]
        del self._held[:n_released]
        return False

    def _advance_in_block(self) -> bool:
        at = self._held.find(_CLOSE, max(0, self._n_searched - len(_CLOSE)))
        if at >= 0:
            self._blocks[-1] += self._held[:at]
            self._blocks.append(bytearray())
            del self._held[: at + len(_CLOSE)]
            self._state = _State.BEGINNING if self._state is _State.FIRST_BLOCK else _State.ANSWER
            return True
        if self._state is _State.FIRST_BLOCK:
            n_settled = len(self._held) - _n_bytes_begun(self._held, _CLOSE)
            self._blocks[-1] += self._held[:n_settled]
            del self._held[:n_settled]
        self._n_searched = len(self._held)
        return False


def _n_bytes_begun(text: bytes | bytearray, tag: bytes) -> int:
    """How many bytes at the text's end may be the beginning of ``tag``."""
    return next((n for n in range(min(len(tag) - 1, len(text)), 0, -1) if text.endswith(tag[:n])), 0)
