"""The door for Erlang: a process that a node starts as a port, and asks through its standard input and output.

``channel.py`` moves packets, ``terms.py`` reads and writes the external term format, ``requests.py`` says what may be
asked, ``calls.py`` does it, ``server.py`` runs many calls at once. ``erlang/wasi_nn`` is the other side.
"""

from __future__ import annotations

from wasi_nn_backend.port.channel import PacketChannel, claimed_standard_streams
from wasi_nn_backend.port.server import PortServer

__all__ = ["PacketChannel", "PortServer", "claimed_standard_streams"]
