"""Making int8 files after training: NNCF for OpenVINO, QDQ for ONNX Runtime, both static and per channel."""

import contextlib
import io
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from convette.errors import ConvetteError, UsageError
from convette.layers.quantization.observers import PERCENTILE, observed_range
from convette.quantization._calibration import checked
from convette.runtime import _metadata, _vendors, prepare, read_export_metadata
from convette.runtime._export import convert_to_openvino, deployable, load_onnx, save_onnx, write_openvino

NNCF_OBSERVERS = ("min_max", "percentile")
ONNX_OBSERVERS = ("min_max", "percentile", "mse", "entropy")
_BATCH = 16
_KEPT_VALUES = 1 << 16  # of an activation, for a batch
_SKEWED = {"Swish", "HSwish", "Gelu", "Mish", "SoftPlus", "Elu", "PRelu", "LeakyRelu", "Selu"}


def quantize_openvino(
    model: nn.Module,
    example: Tensor,
    calibration: Iterable[Tensor | np.ndarray],
    path: Path | str,
    *,
    observer: str | None = None,
) -> Path:
    """Write `model` as an int8 OpenVINO file: static ranges, weights per output channel, biases corrected (NNCF).

    Args:
        model: a network, left as it is.
        example: ``n c h w`` float.
        calibration: batches of preprocessed training images; 128 to 300 images are usual.
        path: an ``.xml``; the weights go beside it (``.bin``). Written whole or not at all.
        observer: how ranges follow from activations: ``"min_max"``, ``"percentile"``; None: means over the images' own
            extremes (NNCF's choice).

    Raises `UsageError` for another observer, `DataError` for calibration images no range can be learnt from,
    `ConvetteError` if the network gives values that are not finite, or the quantised one does or no longer tells images
    apart. Costs about a forward pass of each image in float32 and 1 to 20 seconds besides.
    """
    path = Path(path)
    _check_observer(observer, NNCF_OBSERVERS, "NNCF (OpenVINO)")
    if path.suffix != ".xml":
        raise UsageError(f"{path}: OpenVINO files end in .xml (the weights go beside it, into .bin).")
    images = checked(calibration)
    nncf = _vendors.nncf()
    converted = convert_to_openvino(deployable(model, example), example)
    before = _run_openvino(converted, images[:_BATCH])
    _refuse_not_finite(before, f"the network {type(model).__name__}")
    # One image at a time: ranges are means over the images' own extremes, so that no single outlier widens them.
    dataset = nncf.Dataset([images[index : index + 1] for index in range(len(images))])
    # Activations that go below zero without being centred there need a zero point of their own.
    skewed = any(operation.get_type_name() in _SKEWED for operation in converted.get_ops())
    preset = nncf.QuantizationPreset.MIXED if skewed else nncf.QuantizationPreset.PERFORMANCE
    try:
        with _silence():
            quantised = nncf.quantize(
                converted,
                dataset,
                preset=preset,
                subset_size=len(images),
                target_device=nncf.TargetDevice.CPU,
                advanced_parameters=_nncf_ranges(nncf, observer),
            )
    except Exception as error:
        raise ConvetteError(f"NNCF cannot quantise {type(model).__name__}: {_vendors.one_line(error)}.") from error
    _refuse_collapse(before, _run_openvino(quantised, images[:_BATCH]), f"the int8 network for {path}")
    write_openvino(quantised, path, _metadata.describe(model, precision="int8", input_shape=images.shape[1:]))
    return path


def quantize_onnx(
    onnx_path: Path | str,
    calibration: Iterable[Tensor | np.ndarray],
    path: Path | str,
    *,
    reduce_range: bool | None = None,
    observer: str | None = None,
) -> Path:
    """Write the float ONNX file `onnx_path` as int8: QDQ, uint8 activations, int8 weights per channel.

    Metadata goes along. Signed activations are 2.7 times slower on x86, so they stay unsigned.

    Args:
        onnx_path: a file made by `convette.export`.
        calibration: batches of preprocessed training images; 128 to 300 images are usual.
        path: an ``.onnx``, written whole or not at all.
        reduce_range: 7-bit weights, which x86 processors without VNNI need (their sums saturate); None: as this
            processor needs.
        observer: how ranges follow from activations: ``"min_max"`` (None: this), ``"percentile"``, ``"mse"``,
            ``"entropy"`` (`convette.layers.quantization.observed_range` says what they are; all but ``"mse"`` are ONNX
            Runtime's own).

    Raises as `quantize_openvino`. Costs about a forward pass of each image and a few seconds besides.
    """
    onnx_path, path = Path(onnx_path), Path(path)
    _check_observer(observer, ONNX_OBSERVERS, "ONNX Runtime")
    if path.suffix != ".onnx":
        raise UsageError(f"{path}: ONNX files end in .onnx.")
    images = checked(calibration)
    metadata = read_export_metadata(onnx_path) | {"precision": "int8"}
    before = _run_file(onnx_path, images[:_BATCH])
    _refuse_not_finite(before, f"{onnx_path}")
    with tempfile.TemporaryDirectory(prefix="convette-") as folder:
        written = Path(folder) / "int8.onnx"
        try:
            with _silence():
                reduced = _needs_reduced_range() if reduce_range is None else reduce_range
                _write_qdq(onnx_path, images, written, reduced, observer or "min_max")
        except Exception as error:
            raise ConvetteError(f"ONNX Runtime cannot quantise {onnx_path}: {_vendors.one_line(error)}.") from error
        _refuse_collapse(before, _run_file(written, images[:_BATCH]), f"the int8 network for {path}")
        save_onnx(load_onnx(written), path, metadata)
    return path


def _write_qdq(source: Path, images: np.ndarray, written: Path, reduce_range: bool, observer: str) -> None:
    _vendors.onnxruntime()
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = written.with_name("prepared.onnx")
    quant_pre_process(source, prepared)
    methods = {"percentile": CalibrationMethod.Percentile, "entropy": CalibrationMethod.Entropy}
    options: dict[str, Any] = {"CalibPercentile": PERCENTILE} if observer == "percentile" else {}
    if observer == "mse":
        # ONNX Runtime offers no such observer but takes ranges: ours are given for every activation.
        options["TensorQuantOverrides"] = _observed_tensors(prepared, images, observer)
    quantize_static(
        prepared,
        written,
        _Reader(images, load_onnx(source).graph.input[0].name),  # type: ignore[arg-type]
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        reduce_range=reduce_range,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=methods.get(observer, CalibrationMethod.MinMax),
        extra_options=options,
    )


def _observed_tensors(path: Path, images: np.ndarray, observer: str) -> dict[str, list[dict[str, Any]]]:
    """Return ONNX Runtime's overrides with the observed range of every float activation of the file."""
    onnx, ort = _vendors.onnx(), _vendors.onnxruntime()
    model = load_onnx(path)
    first = model.graph.input[0].name
    known = {value.name: value for value in (*model.graph.value_info, *model.graph.output)}
    floats = [
        name
        for node in model.graph.node
        for name in node.output
        if name in known and known[name].type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    ]
    shown = {value.name for value in model.graph.output}
    model.graph.output.extend(known[name] for name in floats if name not in shown)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    kept: dict[str, list[np.ndarray]] = {first: [images.ravel()]}
    for start in range(0, len(images), _BATCH):
        found = session.run(floats, {first: images[start : start + _BATCH]})
        for name, value in zip(floats, found, strict=True):
            kept.setdefault(name, []).append(value.ravel()[:: max(1, value.size // _KEPT_VALUES)])
    overrides = {}
    for name, parts in kept.items():
        low, high = observed_range(torch.from_numpy(np.concatenate(parts)), observer)
        overrides[name] = [{"rmin": np.float32(low), "rmax": np.float32(high)}]
    return overrides


def _nncf_ranges(nncf: Any, observer: str | None) -> Any:
    if observer is None:
        return None
    from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters
    from nncf.quantization.range_estimator import (
        AggregatorType,
        RangeEstimatorParameters,
        StatisticsCollectorParameters,
        StatisticsType,
    )

    def side(lowest: bool) -> Any:
        if observer == "min_max":
            kind = StatisticsType.MIN if lowest else StatisticsType.MAX
            return StatisticsCollectorParameters(
                statistics_type=kind, aggregator_type=AggregatorType.MIN if lowest else AggregatorType.MAX
            )
        return StatisticsCollectorParameters(
            statistics_type=StatisticsType.QUANTILE,
            aggregator_type=AggregatorType.MEAN,
            quantile_outlier_prob=1 - PERCENTILE / 100,
        )

    return AdvancedQuantizationParameters(
        activations_range_estimator_params=RangeEstimatorParameters(min=side(True), max=side(False))
    )


def _check_observer(observer: str | None, offered: tuple[str, ...], whose: str) -> None:
    if observer is not None and observer not in offered:
        raise UsageError(f"observer {observer!r}: {whose} offers {', '.join(offered)}.")


class _Reader:
    """ONNX Runtime's way to be given calibration batches."""

    def __init__(self, images: np.ndarray, name: str) -> None:
        # All of one size: its histograms cannot be made of batches of several.
        size = next(size for size in range(_BATCH, 0, -1) if len(images) % size == 0)
        self._batches = iter(np.split(images, len(images) // size))
        self._name = name

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self._batches, None)
        return None if batch is None else {self._name: batch}

    def __iter__(self) -> "_Reader":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        batch = self.get_next()
        if batch is None:
            raise StopIteration
        return batch


def _run_file(path: Path, images: np.ndarray) -> np.ndarray:
    with prepare("onnxruntime:cpu", path, torch.from_numpy(images)) as runner:
        return runner(images)


def _run_openvino(model: Any, images: np.ndarray) -> np.ndarray:
    ov = _vendors.openvino()
    threads = {"INFERENCE_NUM_THREADS": torch.get_num_threads()}
    return np.array(ov.compile_model(model, "CPU", threads)([images])[0], dtype=np.float32)


def _refuse_not_finite(outputs: np.ndarray, what: str) -> None:
    if not np.isfinite(outputs).all():
        raise ConvetteError(f"{what} gives values that are not finite on calibration images; nothing was quantised.")


def _refuse_collapse(before: np.ndarray, after: np.ndarray, what: str) -> None:
    _refuse_not_finite(after, what)
    if np.ptp(before, axis=0).max() > 0 and np.ptp(after, axis=0).max() == 0:
        raise ConvetteError(
            f"{what} gives the same output for every calibration image (no activation range); nothing was written."
        )


def _needs_reduced_range() -> bool:
    # Without VNNI, products of uint8 and int8 are added in 16 bits, which overflow.
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    return "avx2" in flags and not flags & {"avx512_vnni", "avx_vnni", "amx_int8"}


@contextlib.contextmanager
def _silence():
    # NNCF draws bars on standard output, where machine-readable results go.
    with _vendors.quiet(), contextlib.redirect_stdout(io.StringIO()):
        yield
