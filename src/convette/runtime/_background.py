"""One background process that loads a core: run as a script, so that it starts in milliseconds and imports nothing.

    python _background.py KIND DUTY BYTES

It works for DUTY of every 50 ms and sleeps for the rest, until its standard input is closed: the parent holds the other
end of that pipe, and the kernel closes it however the parent ends.
"""

import os
import select
import sys
import time

PERIOD = 0.05
_SLICE = 0.002


def _arithmetic() -> None:
    value = 1
    for _ in range(20_000):
        value = (value * 1103515245 + 12345) & 0x7FFFFFFF


def _stream(source: memoryview, target: memoryview, offset: int, size: int) -> int:
    end = min(offset + size, len(source))
    target[offset:end] = source[offset:end]
    return 0 if end == len(source) else end


def _die_with_the_parent() -> None:
    # The pipe tells it too, but only once in a period.
    if sys.platform == "linux":
        import ctypes
        import signal

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def main() -> None:
    """Load the core until the parent is gone."""
    kind, duty, size = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
    _die_with_the_parent()
    source, target = memoryview(bytearray(size)), memoryview(bytearray(size))
    offset, turn = 0, 0
    os.write(1, b"r")
    while True:
        start = time.monotonic()
        while time.monotonic() - start < duty * PERIOD:
            if kind == "alu" or (kind == "mixed" and turn % 2):
                _arithmetic()
            else:
                offset = _stream(source, target, offset, 1 << 21)
            turn += 1
        rest = 0.0 if duty >= 1 else max(0.0, PERIOD - (time.monotonic() - start))
        # Readable: the other end was closed. It is also what sleeps.
        if select.select([0], [], [], rest)[0]:
            return


if __name__ == "__main__":
    main()
