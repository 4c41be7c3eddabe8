"""Background load: processes that take processor time while something is measured, and that always end."""

import contextlib
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch

from convette.errors import ConvetteError, UsageError, did_you_mean

Kind = Literal["alu", "mem", "mixed"]
_START_SECONDS = 10.0
_MOST_BYTES = 1 << 27


@dataclass(frozen=True)
class Contention:
    """Background load to measure under: `processes`, each busy for the share `duty` of every 50 ms, at `kind` of work.

    `kind`: ``"alu"`` (arithmetic in registers), ``"mem"`` (streams over a buffer larger than the caches, 128 MB at
    most), ``"mixed"`` (in turns). ``str(...)`` names the condition: "2 x alu 100 %", or "idle".

    Raises `UsageError` for a negative number of processes, a duty outside (0, 1] or an unknown kind.
    """

    processes: int = 0
    duty: float | int = 1.0
    kind: str = "alu"

    def __post_init__(self) -> None:
        if self.processes < 0 or self.processes > 64:
            raise UsageError(f"contention: {self.processes} background processes cannot be; 0 to 64 can.")
        if not 0 < self.duty <= 1:
            raise UsageError(f"contention: duty = {self.duty}: a share above 0 and up to 1 is needed.")
        if self.kind not in get_args(Kind):
            raise UsageError(f"contention: kind {self.kind!r} is not known.{did_you_mean(self.kind, get_args(Kind))}")

    def __str__(self) -> str:
        return f"{self.processes} x {self.kind} {100 * self.duty:g} %" if self.processes else "idle"

    @property
    def demanded(self) -> float:
        """The share of all cores it asks for; above 1 they are oversubscribed."""
        return self.processes * self.duty / (os.cpu_count() or 1)


class Load:
    """Background processes that run: `pids`, and how much processor time they got (`achieved`)."""

    def __init__(self, processes: list[subprocess.Popen], condition: Contention) -> None:
        self.condition = condition
        self.pids = tuple(process.pid for process in processes)
        self._started = time.monotonic()
        self._begin = self._busy()

    def achieved(self) -> float:
        """Return the processor seconds all processes together got per second since the load began."""
        return (self._busy() - self._begin) / max(time.monotonic() - self._started, 1e-9)

    def _busy(self) -> float:
        import psutil

        total = 0.0
        for pid in self.pids:
            with contextlib.suppress(psutil.Error):
                times = psutil.Process(pid).cpu_times()
                total += times.user + times.system
        return total


@contextlib.contextmanager
def contention(
    processes: int | Contention = 1, duty: float | int = 1.0, kind: str = "alu", *, settle: float | int = 0.2
) -> Iterator[Load]:
    """Run background load while the block runs: ``with contention(2) as load: ...``.

    The processes end with the block however it ends, and with this process however it ends (a pipe that the kernel
    closes; on Linux the parent-death signal too). Torch's thread count is put back. `settle`: seconds to wait before
    the block begins. Raises `UsageError` for values that cannot be, `ConvetteError` if a process does not start.
    """
    condition = processes if isinstance(processes, Contention) else Contention(processes, duty, kind)
    size = 0 if condition.kind == "alu" else min(4 * _last_level_cache(), _MOST_BYTES)
    # -I and -S: nothing of the user's environment is imported.
    command = [sys.executable, "-I", "-S", str(Path(__file__).with_name("_background.py")), condition.kind]
    command += [str(float(condition.duty)), str(size)]
    threads = torch.get_num_threads()
    running: list[subprocess.Popen] = []
    try:
        for _ in range(condition.processes):
            running.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        for process in running:
            _wait_until_ready(process)
        if running and settle > 0:
            time.sleep(settle)
        yield Load(running, condition)
    finally:
        for process in running:
            process.kill()
        for process in running:
            process.communicate()
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)


def _wait_until_ready(process: subprocess.Popen) -> None:
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], _START_SECONDS)
    if not ready or os.read(process.stdout.fileno(), 1) != b"r":
        raise ConvetteError("contention: a background process did not start; is the machine out of processes?")


def _last_level_cache() -> int:
    sizes = [1 << 25]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        with contextlib.suppress(OSError, ValueError):
            text = path.read_text().strip()
            sizes.append(int(text[:-1]) << {"K": 10, "M": 20, "G": 30}[text[-1]])
    return max(sizes)
