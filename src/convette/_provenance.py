"""Where a result came from: machine, versions, command. Every result file carries it."""

import contextlib
import importlib.metadata
import os
import platform
import shlex
import sys
from functools import cache
from pathlib import Path

_PACKAGES = ("convette", "torch", "torchvision", "timm", "onnxruntime", "openvino", "nncf", "numpy")


def provenance(seconds: float) -> dict:
    """Return machine, versions, command and `seconds` (of the work itself) as a JSON-ready dict."""
    return {
        "machine": machine(),
        "versions": versions(),
        "command": command(local=False),
        "seconds": round(seconds, 1),
    }


@cache
def machine() -> str:
    """Return processor, core count and memory in words, without the machine's name."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30 if hasattr(os, "sysconf") else 0
    return f"{processor()}, {os.cpu_count()} cores, {memory:.0f} GiB, {platform.system()} {platform.machine()}"


@cache
def versions() -> str:
    """Return Python's and the main packages' versions as one line."""
    return ", ".join(f"{name} {version}" for name, version in package_versions().items())


def package_versions() -> dict[str, str]:
    """Return Python's and the main packages' versions by name; packages that are not installed are left out."""
    found = {"Python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def command(local: bool = True) -> str:
    """Return the command that runs now, the program's path shortened to what a user would type.

    Not `local`: for readers elsewhere; of absolute paths only what is in the working folder, or the name, stays.
    """
    program = Path(sys.argv[0])
    if program.name in ("__main__.py", "convette"):
        words = ["convette"]
    else:
        inside = program.is_absolute() and program.is_relative_to(Path.cwd())
        words = ["python", str(program.relative_to(Path.cwd()) if inside else program)]
    return shlex.join([*words, *(sys.argv[1:] if local else map(_elsewhere, sys.argv[1:]))])


def _elsewhere(argument: str) -> str:
    option, equals, value = argument.rpartition("=")
    path = Path(value)
    if not path.is_absolute():
        return argument
    inside = path.is_relative_to(Path.cwd())
    return option + equals + (str(path.relative_to(Path.cwd())) if inside else path.name)


def processor() -> str:
    """Return the processor's name as the system gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown processor"
