"""The engines a network can run on, by name: `prepare` returns a runner that takes a batch and gives the logits."""

import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from convette.errors import UsageError, did_you_mean

DEVICES = ("cpu", "cuda")
PRECISIONS = ("fp32", "bf16", "int8")
CHANNELS_LAST = "channels_last"


@dataclass(frozen=True)
class Engine:
    """What an engine offers: devices, precisions (the first is the default) and the module that prepares it.

    `general`: it runs any network, so that it is worth a try with all of them.
    """

    title: str
    module: str
    devices: tuple[str, ...]
    precisions: tuple[str, ...]
    formats: tuple[str, ...] = ()
    channels_last: bool = False
    general: bool = True


ENGINES: dict[str, Engine] = {
    "eager": Engine(
        title="PyTorch, as it is",
        module="convette.runtime._torch_engines",
        devices=("cpu", "cuda"),
        precisions=("fp32", "bf16"),
        channels_last=True,
    ),
    "compiled": Engine(
        title="torch.compile with weights frozen in, channels last",
        module="convette.runtime._torch_engines",
        devices=("cpu", "cuda"),
        precisions=("fp32", "bf16"),
    ),
    "onnxruntime": Engine(
        title="ONNX Runtime",
        module="convette.runtime._file_engines",
        devices=("cpu",),
        precisions=("fp32", "int8"),
        formats=(".onnx",),
    ),
    "openvino": Engine(
        title="OpenVINO, latency hint; without a named precision the one it prefers on this processor",
        module="convette.runtime._file_engines",
        devices=("cpu",),
        precisions=("default", "fp32", "bf16", "int8"),
        formats=(".xml", ".onnx"),
    ),
    "binary": Engine(
        title="XNOR and bit counts for binary convolutions, PyTorch for the rest",
        module="convette.runtime.binary_networks",
        devices=("cpu",),
        precisions=("fp32",),
        general=False,
    ),
    "sparse": Engine(
        title="1x1 convolutions with more than two thirds of zeros as sparse products, PyTorch for the rest",
        module="convette.runtime.fast_sparse_convnets",
        devices=("cpu",),
        precisions=("fp32",),
        general=False,
    ),
}


@dataclass(frozen=True)
class EngineSpec:
    """An engine with device, precision and memory format, as written ``engine[:device][:precision][:channels_last]``.

    `precision` is None where none was named: float32, but for OpenVINO what it prefers on this processor.
    """

    engine: str
    device: str = "cpu"
    precision: str | None = None
    channels_last: bool = False

    @classmethod
    def parse(cls, text: "str | EngineSpec") -> "EngineSpec":
        """Read ``"openvino:cpu:bf16"``; parts after the engine may be left out. Raises `UsageError` with the remedy."""
        if isinstance(text, EngineSpec):
            return text
        name, *parts = text.strip().lower().split(":")
        if name not in ENGINES:
            raise UsageError(f"unknown engine {name!r} in {text!r}.{did_you_mean(name, ENGINES)}")
        engine = ENGINES[name]
        named = [precision for precision in engine.precisions if precision != "default"]
        found: dict[str, str] = {}
        for part in parts:
            if part in DEVICES:
                kind, offered = "device", engine.devices
            elif part in PRECISIONS:
                kind, offered = "precision", tuple(named)
            elif part == CHANNELS_LAST:
                kind, offered = CHANNELS_LAST, (CHANNELS_LAST,) if engine.channels_last else ()
            else:
                known = (*engine.devices, *named, *([CHANNELS_LAST] if engine.channels_last else []))
                raise UsageError(f"unknown part {part!r} in engine {text!r}.{did_you_mean(part, known)}")
            if part not in offered:
                remedy = f"it has {', '.join(offered)}" if offered else "leave it out"
                raise UsageError(f"engine {text!r}: {name} has no {part}; {remedy}.")
            if kind in found:
                raise UsageError(f"engine {text!r} names {kind} twice; keep one.")
            found[kind] = part
        return cls(name, found.get("device", "cpu"), found.get("precision"), CHANNELS_LAST in found)

    def __str__(self) -> str:
        parts = [self.engine, self.device, self.precision, CHANNELS_LAST if self.channels_last else None]
        return ":".join(part for part in parts if part)


class Runner:
    """A network made ready on an engine: ``runner(batch) -> logits``.

    Attributes: `spec` and `engine` (its text), `device`, `precision` (what is really computed in: ``"fp32"``,
    ``"bf16"``, ``"int8"``), `threads`, `batch_size` (it is tuned for), `cold_start_seconds` (from model or file in
    hand to the first answer). Use as a context manager, or `close`, to give the memory back.
    """

    def __init__(
        self,
        spec: EngineSpec,
        call: Callable[[np.ndarray], np.ndarray],
        *,
        precision: str,
        threads: int,
        batch_size: int,
        cold_start_seconds: float,
    ) -> None:
        self.spec = spec
        self.engine = str(spec)
        self.device = spec.device
        self.precision = precision
        self.threads = threads
        self.batch_size = batch_size
        self.cold_start_seconds = cold_start_seconds
        self._call: Callable[[np.ndarray], np.ndarray] | None = call

    def __call__(self, batch: np.ndarray | Tensor) -> np.ndarray:
        """Run a batch of preprocessed float images ``n c h w`` (any ``n``); the logits come back as float32."""
        if self._call is None:
            raise UsageError(f"this runner on {self.engine} was closed; prepare it again.")
        return self._call(as_array(batch))

    def close(self) -> None:
        """Give the engine's memory back; the runner cannot be called any more."""
        self._call = None

    def __enter__(self) -> "Runner":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


@dataclass(frozen=True)
class Prepared:
    """What an engine's module returns: the function to call, the precision it computes in, when a start began.

    Exporting a module in memory comes before `started`: a deployed program begins with the file.
    """

    call: Callable[[np.ndarray], np.ndarray]
    precision: str
    started: float


def prepare(
    engine: str | EngineSpec,
    model_or_path: nn.Module | str | Path,
    example: Tensor,
    *,
    threads: int | None = None,
    int8_path: str | Path | None = None,
) -> Runner:
    """Make a network ready to run on an engine.

    Args:
        engine: as `EngineSpec.parse` reads it, e.g. ``"openvino:cpu"``, ``"eager:cpu:bf16:channels_last"``.
        model_or_path: a module (left as it is; a copy in eval mode is used), or a file made by `export` (``.onnx`` for
            ONNX Runtime and OpenVINO, ``.xml`` for OpenVINO). A module is exported in memory where an engine needs it.
        example: ``n c h w`` float; the runner is tuned for its shape, other batch sizes work too.
        threads: CPU threads; None: those of torch (`torch.get_num_threads`), so that engines compare fairly.
        int8_path: the quantised file, for an engine with precision int8; None: `model_or_path` is that file.

    Raises `UsageError` for an unknown engine, an engine this machine lacks, a file of the wrong kind;
    `ConvetteError` if the engine cannot take the network. Takes milliseconds (eager) to a minute (compiled).
    """
    spec = EngineSpec.parse(engine)
    reason = missing(spec)
    if reason:
        raise UsageError(f"{spec}: {reason}")
    threads = _threads(threads)
    source = _source(spec, model_or_path, int8_path)
    array = as_array(example)
    maker = importlib.import_module(ENGINES[spec.engine].module).make
    prepared = maker(spec, source, array, threads)
    prepared.call(array)
    return Runner(
        spec,
        prepared.call,
        precision=prepared.precision,
        threads=threads,
        batch_size=len(array),
        cold_start_seconds=time.perf_counter() - prepared.started,
    )


def missing(engine: str | EngineSpec) -> str | None:
    """Return why this machine cannot run `engine` (one sentence with the remedy), or None if it can."""
    spec = EngineSpec.parse(engine)
    if spec.device == "cuda" and not torch.cuda.is_available():
        return f"torch sees no GPU here; use {EngineSpec(spec.engine, 'cpu', spec.precision, spec.channels_last)}."
    if spec.engine == "compiled" and spec.device == "cpu":
        from convette.runtime._torch_engines import compiler_missing

        return compiler_missing()
    if spec.engine == "openvino" and spec.precision == "bf16":
        from convette.runtime._file_engines import bfloat16_missing

        return bfloat16_missing()
    return None


def as_array(batch: np.ndarray | Tensor) -> np.ndarray:
    """Return `batch` as a contiguous float32 array on the CPU, without a copy where it is one already."""
    if isinstance(batch, Tensor):
        batch = batch.detach().to(device="cpu", dtype=torch.float32).numpy()
    return np.ascontiguousarray(batch, dtype=np.float32)


def _threads(threads: int | None) -> int:
    if threads is None:
        return torch.get_num_threads()
    if threads < 1:
        raise UsageError(f"threads = {threads}: at least one thread is needed.")
    return threads


def _source(spec: EngineSpec, model_or_path: nn.Module | str | Path, int8_path: str | Path | None) -> nn.Module | Path:
    from convette.runtime._export import existing, read_export_metadata

    formats = ENGINES[spec.engine].formats
    int8 = spec.precision == "int8"
    source = int8_path if int8 and int8_path is not None else model_or_path
    if isinstance(source, nn.Module):
        if int8:
            raise UsageError(
                f"{spec} needs a quantised file, not a module: pass int8_path (convette.quantization writes one)."
            )
        return source
    path = Path(source)
    if not formats:
        raise UsageError(f"{path}: {spec.engine} runs modules, not files; load it first: convette.load(path).")
    if path.suffix not in formats:
        raise UsageError(f"{path}: {spec.engine} reads {' and '.join(formats)} files; export the network first.")
    existing(path)
    if int8 and read_export_metadata(path).get("precision", "int8") != "int8":
        raise UsageError(f"{path}: not a quantised file, but {spec} was asked for; pass int8_path, or leave out int8.")
    return path
