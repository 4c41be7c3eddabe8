"""The two ends: a server on loopback that runs tails, and a client that runs heads and answers alone when it must."""

import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from convette.errors import ConvetteError, UsageError
from convette.runtime.edge_split._listening import Listening, shut
from convette.runtime.edge_split.codec import MOST_BYTES, decode, encode

Run = Callable[[Tensor], Tensor]
Where = Literal["local", "remote", "filtered", "fallback"]
_LENGTH = struct.Struct("<I")
_MOST_MESSAGE = MOST_BYTES + 64


@dataclass(frozen=True)
class Answer:
    """What the client says: outputs (None where the filter found nothing), from where, bytes sent, seconds, and why a
    fallback was needed."""

    outputs: np.ndarray | None
    where: Where
    bytes_sent: int
    seconds: float
    reason: str = ""


class EdgeServer(Listening):
    """Runs `run` on the tensors that come in, on 127.0.0.1 and a free port: ``with EdgeServer(tail) as server: ...``.

    Messages are lengths and checked headers (`decode`); a malformed one ends its connection and nothing else. A client
    that says nothing for `timeout` seconds is let go.
    """

    def __init__(self, run: Run, *, bits: int = 32, timeout: float | int = 30.0) -> None:
        super().__init__()
        self.run, self.bits, self.timeout = run, bits, float(timeout)
        self.failures: list[str] = []
        self._clients: set[socket.socket] = set()

    def _connected(self, client: socket.socket) -> None:
        """Answer a client in a thread of its own."""
        client.settimeout(self.timeout)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._clients.add(client)
        threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _hang_up(self) -> None:
        """End all connections."""
        for end in list(self._clients):
            shut(end)

    def _serve(self, client: socket.socket) -> None:
        # Closed last: whoever sees the connection end finds the reason noted.
        with client:
            try:
                while True:
                    values = decode(receive(client))
                    with torch.no_grad():
                        outputs = self.run(torch.from_numpy(values))
                    send(client, encode(outputs.float().numpy(), self.bits))
            except EOFError:
                pass
            except Exception as error:
                self.failures.append(str(error))
            finally:
                self._clients.discard(client)


class EdgeClient:
    """Runs `head`, sends what comes out to the server at `address`, and gives its answer; alone when the link fails.

    Args:
        head: images -> the tensor to send (for remote execution: the images themselves).
        local: images -> outputs, all on the device: the fallback when connecting, sending or waiting fails or takes
            longer than `timeout` seconds. The answer says so (`Answer.where` "fallback", and the reason); the next
            image tries the link again.
        bits: 8, 16 or 32 a number sent. clip: see `convette.runtime.edge_split.quantize`.
        worth: images -> scores; images below `threshold` are answered by "nothing" and not sent. Batches go whole: they
            are sent where any image passes.
    """

    def __init__(
        self,
        head: Run,
        local: Run,
        address: tuple[str, int],
        *,
        bits: int = 8,
        clip: float | int = 0.0,
        timeout: float | int = 1.0,
        worth: Run | None = None,
        threshold: float | int = 0.0,
    ) -> None:
        if timeout <= 0:
            raise UsageError(f"timeout = {timeout}: seconds above 0 are needed.")
        self.head, self.local, self.address = head, local, address
        self.bits, self.clip, self.timeout = bits, clip, float(timeout)
        self.worth, self.threshold = worth, threshold
        self._socket: socket.socket | None = None

    def __enter__(self) -> "EdgeClient":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Hang up."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def __call__(self, images: Tensor) -> Answer:
        """Return the answer to a batch of preprocessed images."""
        started = time.perf_counter()
        with torch.no_grad():
            if self.worth is not None and not bool((self.worth(images) >= self.threshold).any()):
                return Answer(None, "filtered", 0, time.perf_counter() - started)
            message = encode(self.head(images).numpy(), self.bits, self.clip)
            try:
                outputs = self._ask(message)
            except (OSError, EOFError, ConvetteError) as error:
                self.close()
                reason = f"{type(error).__name__}: {error}".rstrip(": ")
                outputs = self.local(images).float().numpy()
                return Answer(outputs, "fallback", 0, time.perf_counter() - started, reason)
        return Answer(outputs, "remote", len(message) + _LENGTH.size, time.perf_counter() - started)

    def _ask(self, message: bytes) -> np.ndarray:
        deadline = time.monotonic() + self.timeout
        if self._socket is None:
            self._socket = socket.create_connection(self.address, timeout=self.timeout)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        send(self._socket, message, deadline)
        return np.asarray(decode(receive(self._socket, deadline)), np.float32)


def send(end: socket.socket, message: bytes, deadline: float | None = None) -> None:
    """Send a message behind its length; raises `TimeoutError` past `deadline` (of ``time.monotonic``)."""
    view = memoryview(_LENGTH.pack(len(message)) + message)
    while view:
        _wait(end, deadline)
        view = view[end.send(view) :]


def receive(end: socket.socket, deadline: float | None = None) -> bytes:
    """Return the next message; raises `EOFError` where the other side hung up, `ConvetteError` for too large a one."""
    (length,) = _LENGTH.unpack(_exactly(end, _LENGTH.size, deadline))
    if length > _MOST_MESSAGE:
        raise ConvetteError(f"a message of {length} bytes is announced; {_MOST_MESSAGE} are the most.")
    return _exactly(end, length, deadline)


def _exactly(end: socket.socket, count: int, deadline: float | None) -> bytes:
    parts: list[bytes] = []
    while count:
        _wait(end, deadline)
        piece = end.recv(min(count, 1 << 16))
        if not piece:
            raise EOFError("the other side hung up")
        parts.append(piece)
        count -= len(piece)
    return b"".join(parts)


def _wait(end: Any, deadline: float | None) -> None:
    if deadline is not None:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("no answer in time")
        end.settimeout(left)
