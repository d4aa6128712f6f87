"""Messages over a socket: plain values and arrays, as msgpack. Nothing that comes in can name code."""

from __future__ import annotations

import socket
import struct
import threading
from typing import Any

from flax.serialization import msgpack_restore, msgpack_serialize

_LENGTH = struct.Struct("!Q")
_LONGEST = 1 << 30  # bytes of a message; a stranger's first bytes say more


class Wire:
    """One end of a connection. Any thread may send; one receives."""

    def __init__(self, sock: socket.socket):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket, self._sending = sock, threading.Lock()

    def send(self, message: dict[str, Any]) -> None:
        """Raises OSError where nobody is at the other end."""
        data = msgpack_serialize(message)
        with self._sending:
            self._socket.sendall(_LENGTH.pack(len(data)) + data)

    def receive(self, timeout: float | None = None) -> dict[str, Any]:
        """The next message. Raises TimeoutError where none comes in so many seconds, OSError or EOFError where none will."""
        self._socket.settimeout(timeout)
        (length,) = _LENGTH.unpack(self._bytes(_LENGTH.size))
        if length > _LONGEST:
            raise EOFError(f"a message of {length} bytes")
        try:
            message = msgpack_restore(self._bytes(length))
        except ValueError as error:
            raise EOFError("no message") from error
        if not isinstance(message, dict):
            raise EOFError("no message")
        return message

    def close(self) -> None:
        self._socket.close()

    def _bytes(self, count: int) -> bytes:
        found = bytearray(count)
        at, view = 0, memoryview(found)
        while at < count:
            got = self._socket.recv_into(view[at:])
            if not got:
                raise EOFError("the other end is closed")
            at += got
        return bytes(found)
