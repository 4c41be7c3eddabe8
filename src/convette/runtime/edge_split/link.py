"""A loopback link with a rate and a delay, that can be made to break."""

import contextlib
import socket
import threading
import time

from convette.errors import UsageError
from convette.runtime.edge_split._listening import Listening, shut

_CHUNK = 2048


class ShapedLink(Listening):
    """A relay on 127.0.0.1 in front of a server: `rate` bytes a second each way, `latency` seconds each way.

    ``with ShapedLink(server.address, rate=1e6, latency=0.02) as link: EdgeClient(..., link.address)``. Bytes are paced
    in pieces of 2 KB by the clock. `drop_after`: bytes towards the server after which the link breaks, once;
    `break_now` breaks it at any time, `repair` lets connections through again. Raises `UsageError` for a rate that is
    not above 0.
    """

    def __init__(
        self,
        target: tuple[str, int],
        rate: float | int = 1e7,
        latency: float | int = 0.0,
        drop_after: int | None = None,
    ) -> None:
        if rate <= 0 or latency < 0:
            raise UsageError(f"rate = {rate} and latency = {latency}: above 0, and 0 or more.")
        super().__init__()
        self.target, self.rate, self.latency, self.drop_after = target, float(rate), float(latency), drop_after
        self.broken = False
        self.sent = 0
        self._sockets: list[socket.socket] = []
        self._lock = threading.Lock()

    def break_now(self) -> None:
        """Cut all connections and take no more until `repair`."""
        self.broken = True
        self._hang_up()

    def repair(self) -> None:
        """Let connections through again."""
        self.broken, self.drop_after = False, None

    def _connected(self, client: socket.socket) -> None:
        """Connect to the server and pass on what comes from either; hang up while broken."""
        if self.broken:
            shut(client)
            return
        try:
            server = socket.create_connection(self.target, timeout=5)
        except OSError:
            shut(client)
            return
        # The five seconds were for connecting: a message over a slow link takes longer.
        server.settimeout(None)
        with self._lock:
            self._sockets += [client, server]
        for source, target, up in ((client, server, True), (server, client, False)):
            threading.Thread(target=self._relay, args=(source, target, up), daemon=True).start()

    def _relay(self, source: socket.socket, target: socket.socket, up: bool) -> None:
        free = 0.0  # when the link has sent all it was given
        with contextlib.suppress(OSError):
            while piece := source.recv(_CHUNK):
                now = time.monotonic()
                if now > free:
                    free = now + self.latency
                free += len(piece) / self.rate
                time.sleep(max(0.0, free - time.monotonic()))
                if up:
                    self.sent += len(piece)
                    if self.drop_after is not None and self.sent > self.drop_after:
                        self.break_now()
                        return
                target.sendall(piece)
        for end in (source, target):
            shut(end)

    def _hang_up(self) -> None:
        """End all connections; new ones are let through."""
        with self._lock:
            sockets, self._sockets = self._sockets, []
        for end in sockets:
            shut(end)
