"""The delay of local, offloaded and split execution as a function of the link's rate, in closed form."""

from dataclasses import dataclass
from typing import Literal

from convette.errors import UsageError

Mode = Literal["local", "remote", "split"]


@dataclass(frozen=True)
class EdgeDelay:
    r"""What an answer takes, in seconds; `R` is the uplink's rate in bytes a second.

    .. math:: T_{local} = t_{device}, \quad T_{remote} = l + S_{in}/R + t_{server}, \quad
        T_{split} = t_{head} + p\,(l + S_z/R + t_{tail})

    Attributes:
        device, server: seconds of the whole network on each. head, tail: of the two parts, on device and server.
        input_bytes, bottleneck_bytes: what remote and split execution send.
        latency: seconds a message and its answer need besides (`l`).
        passing: share of the images the filter lets pass (`p`); 1: no filter.
    """

    device: float
    server: float
    head: float
    tail: float
    input_bytes: int
    bottleneck_bytes: int
    latency: float = 0.0
    passing: float = 1.0

    def seconds(self, mode: str, rate: float | int) -> float:
        """Return the delay of a mode at `rate` bytes a second."""
        if rate <= 0:
            raise UsageError(f"rate = {rate}: bytes a second above 0 are needed.")
        if mode == "local":
            return self.device
        if mode == "remote":
            return self.latency + self.input_bytes / rate + self.server
        if mode == "split":
            return self.head + self.passing * (self.latency + self.bottleneck_bytes / rate + self.tail)
        raise UsageError(f"mode {mode!r} is none of local, remote, split.")

    def best(self, rate: float | int) -> Mode:
        """Return the mode with the least delay at `rate`."""
        modes: tuple[Mode, ...] = ("local", "remote", "split")
        return min(modes, key=lambda mode: self.seconds(mode, rate))

    def break_even(self, one: str, other: str) -> float | None:
        """Return the rate (bytes a second) at which two modes take the same time; None where there is none."""
        (fixed, sent), (fixed_other, sent_other) = self._parts(one), self._parts(other)
        # fixed + sent / R = fixed_other + sent_other / R
        if fixed == fixed_other:
            return None
        rate = (sent - sent_other) / (fixed_other - fixed)
        return rate if rate > 0 else None

    def _parts(self, mode: str) -> tuple[float, float]:
        if mode == "local":
            return self.device, 0.0
        if mode == "remote":
            return self.latency + self.server, float(self.input_bytes)
        if mode == "split":
            return self.head + self.passing * (self.latency + self.tail), self.passing * self.bottleneck_bytes
        raise UsageError(f"mode {mode!r} is none of local, remote, split.")
