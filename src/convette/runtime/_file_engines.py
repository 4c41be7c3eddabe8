"""Running an exported file (or a module exported in memory): ONNX Runtime and OpenVINO."""

import tempfile
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from convette.errors import ConvetteError, UsageError
from convette.runtime import _vendors
from convette.runtime._export import convert_to_openvino, deployable, export, read_export_metadata, read_openvino
from convette.runtime.engines import EngineSpec, Prepared

_COMPILED_SIZES = 4  # batch sizes an OpenVINO runner keeps compiled


def make(spec: EngineSpec, source: nn.Module | Path, example: np.ndarray, threads: int) -> Prepared:
    """Return the function that runs `source` on the engine of `spec`."""
    if spec.engine == "onnxruntime":
        return _onnxruntime(spec, source, example, threads)
    return _openvino(spec, source, example, threads)


def bfloat16_missing() -> str | None:
    """Return why OpenVINO cannot compute in bfloat16 here (it would silently take float32), or None."""
    capabilities = _vendors.openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return None if "BF16" in capabilities else "this processor has no bfloat16; use openvino:cpu."


def _onnxruntime(spec: EngineSpec, source: nn.Module | Path, example: np.ndarray, threads: int) -> Prepared:
    ort = _vendors.onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Threads that spin while they wait steal the cores of whatever runs next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    with tempfile.TemporaryDirectory(prefix="convette-") as folder:
        path = source
        if isinstance(path, nn.Module):
            path = export(path, torch.from_numpy(example), Path(folder) / "model.onnx")
        started = time.perf_counter()
        try:
            session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise ConvetteError(f"ONNX Runtime cannot load {path}: {_vendors.one_line(error)}.") from error
        precision = spec.precision or (_precision(path) if isinstance(source, Path) else "fp32")
    name = session.get_inputs()[0].name

    def call(batch: np.ndarray) -> np.ndarray:
        try:
            return session.run(None, {name: batch})[0]
        except Exception as error:
            raise _misfit("ONNX Runtime", batch, error) from error

    return Prepared(call, precision, started)


def _openvino(spec: EngineSpec, source: nn.Module | Path, example: np.ndarray, threads: int) -> Prepared:
    ov = _vendors.openvino()
    if isinstance(source, Path):
        precision = spec.precision or _precision(source)
        started = time.perf_counter()
        model = read_openvino(source)
    else:
        precision = spec.precision or "fp32"
        images = torch.from_numpy(example)
        model = convert_to_openvino(deployable(source, images), images)
        started = time.perf_counter()
    core = ov.Core()
    config: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1", "INFERENCE_NUM_THREADS": threads}
    # Pinned threads of several processes (or runners) would sit on the same core while others idle.
    config["ENABLE_CPU_PINNING"] = False
    if spec.precision in ("fp32", "bf16"):
        config["INFERENCE_PRECISION_HINT"] = {"fp32": "f32", "bf16": "bf16"}[spec.precision]
    requests: OrderedDict[tuple[int, ...], Any] = OrderedDict()

    def request_for(shape: tuple[int, ...]) -> Any:
        # Compiled for one shape each: with a free batch size OpenVINO plans neither kernels nor memory as well.
        if shape not in requests:
            fixed = model.clone()
            try:
                fixed.reshape(ov.PartialShape(list(shape)))
                requests[shape] = core.compile_model(fixed, "CPU", config).create_infer_request()
            except Exception as error:
                raise _misfit("OpenVINO", shape, error) from error
            if len(requests) > _COMPILED_SIZES:
                requests.popitem(last=False)
        requests.move_to_end(shape)
        return requests[shape]

    def call(batch: np.ndarray) -> np.ndarray:
        request = request_for(batch.shape)
        request.infer([batch], share_inputs=True)
        return np.array(request.get_output_tensor(0).data, dtype=np.float32)

    hint = request_for(example.shape).get_compiled_model().get_property("INFERENCE_PRECISION_HINT")
    if precision == "fp32" and hint.to_string() == "bf16":
        precision = "bf16"
    return Prepared(call, precision, started)


def _precision(path: Path) -> str:
    return str(read_export_metadata(path).get("precision", "fp32"))


def _misfit(engine: str, batch: np.ndarray | tuple[int, ...], error: Exception) -> ConvetteError:
    shape = batch if isinstance(batch, tuple) else batch.shape
    kind = UsageError if "shape" in str(error).lower() or "dimension" in str(error).lower() else ConvetteError
    return kind(f"{engine} cannot run a batch of shape {tuple(shape)}: {_vendors.one_line(error)}.")
