"""What a server and a relay on loopback do alike: listen, hand over who connects, hang up."""

import abc
import contextlib
import socket
import threading
from typing import TypeVar

Same = TypeVar("Same", bound="Listening")


class Listening(abc.ABC):
    """Listens on 127.0.0.1 at a free port, in a thread, within its ``with`` block; `_connected` takes who connects."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._accept, daemon=True)

    @property
    def address(self) -> tuple[str, int]:
        """Where clients connect."""
        host, port = self._listener.getsockname()[:2]
        return str(host), int(port)

    def __enter__(self: Same) -> Same:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        shut(self._listener)
        self._hang_up()
        self._thread.join(5)

    @abc.abstractmethod
    def _connected(self, client: socket.socket) -> None:
        """Take a client that has just connected; what takes long belongs into a thread."""

    @abc.abstractmethod
    def _hang_up(self) -> None:
        """End all connections."""

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self._connected(client)


def shut(end: socket.socket) -> None:
    """End a connection, whatever state it is in."""
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
    with contextlib.suppress(OSError):
        end.close()
