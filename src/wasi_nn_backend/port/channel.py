"""Packets with their length in front, in four bytes, over a pair of descriptors: what Erlang calls ``{packet, 4}``."""

from __future__ import annotations

import logging
import os
import select
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from wasi_nn_backend.errors import InvalidEncoding, TooLarge

__all__ = ["N_PACKET_BYTES_MAX", "PacketChannel", "claimed_standard_streams"]

_log = logging.getLogger(__name__)

#: An input of 64 MiB and configuration of 1 MiB, as at the C door.
N_PACKET_BYTES_MAX = 66 << 20
_N_READ_BYTES = 1 << 20
_N_LENGTH_BYTES = 4


@contextmanager
def claimed_standard_streams() -> Iterator[tuple[int, int]]:
    """Descriptors of stdin and stdout that nobody else in the process has, open until the block ends.

    What native code prints goes to standard error from now on: between two packets a single byte of it would be taken
    for a length.
    """
    reading, writing = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.dup2(2, 1)
    try:
        yield reading, writing
    finally:
        os.close(reading)
        os.close(writing)


class PacketChannel:
    """One thread receives, any thread sends."""

    def __init__(self, reading_fd: int, writing_fd: int) -> None:
        self._reading_fd = reading_fd
        self._writing_fd = writing_fd
        self._wake_reading_fd, self._wake_writing_fd = os.pipe()
        self._sending = threading.Lock()
        self._is_broken = False

    def receive(self) -> bytes | None:
        """The next packet; None when the other side has closed the pipe, or after ``stop``.

        Raises ``TooLarge`` for a length beyond 66 MiB, before anything is read, and ``InvalidEncoding`` when the pipe
        ends inside of a packet. Nothing can be received after either: where the next packet begins is not known.
        """
        head = self._read(_N_LENGTH_BYTES)
        if not head:
            return None
        n_bytes = int.from_bytes(head, "big")
        if n_bytes > N_PACKET_BYTES_MAX:
            raise TooLarge(f"a packet announces {n_bytes} bytes, at most {N_PACKET_BYTES_MAX} are read: send less")
        body = self._read(n_bytes)
        if body is None:
            return None
        if len(head) < _N_LENGTH_BYTES or len(body) < n_bytes:
            raise InvalidEncoding("the pipe ended in the middle of a packet: the node went away while it wrote")
        return body

    def send(self, packet: bytes) -> None:
        """Write a packet. When nobody reads any more, ``receive`` ends and all further packets are dropped."""
        with self._sending:
            if self._is_broken:
                return
            try:
                self._write(struct.pack(">I", len(packet)) + packet)
            except OSError as error:
                self._is_broken = True
                _log.info("the node does not read any more: %s", error.strerror or error)
                self.stop()

    def stop(self) -> None:
        """Let ``receive`` return None, also one that waits. Any thread, and more than once."""
        os.write(self._wake_writing_fd, b"\0")

    def close(self) -> None:
        os.close(self._wake_reading_fd)
        os.close(self._wake_writing_fd)

    def _read(self, n_bytes: int) -> bytes | None:
        """So many bytes, fewer at the end of the pipe; None when stopped."""
        data = bytearray()
        while len(data) < n_bytes:
            readable, _, _ = select.select([self._reading_fd, self._wake_reading_fd], [], [])
            if self._wake_reading_fd in readable:
                return None
            part = os.read(self._reading_fd, min(n_bytes - len(data), _N_READ_BYTES))
            if not part:
                break
            data += part
        return bytes(data)

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self._writing_fd, view) :]
