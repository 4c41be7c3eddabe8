"""The one place where the export and inference libraries are imported: late, quiet, and without telemetry."""

import contextlib
import importlib
import logging
import sys
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from convette.errors import UsageError

_NOISY_LOGGERS = (
    "torch.onnx",
    "torch.export",
    "torch.fx",
    "torch.utils.cpp_extension",
    "onnxscript",
    "onnx_ir",
    "nncf",
    "openvino",
    "root",
)


def openvino() -> Any:
    """Import OpenVINO with its telemetry off."""
    _switch_telemetry_off()
    return _imported("openvino")


def nncf() -> Any:
    """Import NNCF with its telemetry off and its log quiet."""
    _switch_telemetry_off()
    with quiet():
        module = _imported("nncf")
    # NNCF sets its logger up while it is imported.
    logging.getLogger("nncf").setLevel(logging.ERROR)
    return module


def onnxruntime() -> Any:
    """Import ONNX Runtime with its telemetry (Windows only) off and warnings off."""
    module = _imported("onnxruntime")
    module.disable_telemetry_events()
    module.set_default_logger_severity(3)
    return module


def onnx() -> Any:
    """Import onnx."""
    return _imported("onnx")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the libraries' warnings, information lines and progress bars off the user's screen."""
    levels = {name: logging.getLogger(name).level for name in _NOISY_LOGGERS}
    try:
        for name in levels:
            logging.getLogger(name).setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def one_line(error: BaseException, limit: int = 200) -> str:
    """Return the first telling line of a library's error, shortened, for use inside our own one-line errors."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _imported(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UsageError(f"{name} cannot be imported ({one_line(error)}). Install it: pip install {name}") from error


def _switch_telemetry_off() -> None:
    # OpenVINO reports every import and conversion unless a file in the home directory forbids it, and writes an
    # identifier there. Both OpenVINO and NNCF fall back to a silent stub when the reporting package is not there;
    # None in sys.modules makes Python say so.
    telemetry = sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    if telemetry is not None:
        # Somebody else imported it first: the object is a singleton, so its consent can be withdrawn.
        with contextlib.suppress(Exception):
            telemetry.Telemetry().consent = False
