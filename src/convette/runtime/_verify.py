"""Verifying an exported file: run it on real images and compare with the network it was made from."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from convette._typing import Images
from convette.errors import ConvetteError, UsageError
from convette.layers._watching import in_eval
from convette.runtime._export import existing, read_export_metadata
from convette.runtime.engines import ENGINES, EngineSpec, prepare

# Differences of logits up to this share of the largest logit are rounding. float32: a few times what BN folding and
# another order of summation do to deep networks. bfloat16 has 8 bits of mantissa, int8 at best 8 bits in all.
TOLERANCES = {"fp32": 1e-4, "bf16": 0.02, "int8": 0.05}
AGREEMENTS = {"fp32": 1.0, "bf16": 0.98, "int8": 0.95}


@dataclass(frozen=True)
class Verification:
    """An exported file against its network on `images` real images.

    `max_abs_error` and `max_relative_error` (a share of the network's largest logit) compare the logits; `agreement`
    is the share of images with the same best class, `decided_agreement` the same without counting images on which
    the network itself has both classes within `tolerance` (relative, as above). `passed`: see `verify`.
    """

    images: int
    max_abs_error: float
    max_relative_error: float
    agreement: float
    decided_agreement: float
    tolerance: float
    minimum_agreement: float
    passed: bool
    engine: str
    precision: str


def verify(
    path: Path | str,
    model: nn.Module,
    images: Images,
    *,
    tolerance: float | None = None,
    minimum_agreement: float | None = None,
    engine: str | EngineSpec | None = None,
    batch_size: int = 64,
    threads: int | None = None,
) -> Verification:
    """Run the exported file `path` on `images` and compare its logits with those of `model` (eval mode).

    A file computed in float32 passes if no logit differs by more than `tolerance` times the largest logit. In bfloat16
    or int8 it passes if the best class is the same on at least `minimum_agreement` of the images, not counting those
    on which the network has both classes within that tolerance, so that an untrained network does not fail by chance.

    Args:
        path: a file made by `export` or by the quantization room.
        model: the network it was made from, on any device.
        images: real images, preprocessed; 256 or more say something.
        tolerance: share of the largest logit; None: 1e-4 in float32, 0.02 in bfloat16, 0.05 in int8.
        minimum_agreement: None: 1.0 in float32, 0.98 in bfloat16, 0.95 in int8.
        engine: None: OpenVINO in float32 for ``.xml``, ONNX Runtime for ``.onnx`` (int8 files: as they are). Verify
            once more with ``"openvino:cpu"`` to see what its preferred precision (bfloat16 on many servers) does.
        batch_size: images run at once.

    Raises `UsageError` without images or for an engine that does not read the file; `ConvetteError` if the file or the
    network gives values that are not finite.
    """
    if len(images) == 0:
        raise UsageError(f"{path}: no images to verify with; at least one is needed, 256 say something.")
    spec = EngineSpec.parse(engine) if engine is not None else _default_engine(existing(path))
    example = images[:batch_size]
    expected = _outputs_of_model(model, images, batch_size)
    with prepare(spec, path, example, threads=threads) as runner:
        parts = [runner(part) for part in images.split(batch_size)]
        precision = runner.precision
    actual = np.concatenate(parts)
    if actual.shape != expected.shape:
        raise ConvetteError(
            f"{path} gives outputs of shape {actual.shape}, the network {expected.shape}: not its file."
        )
    _refuse_not_finite(expected, f"the network {type(model).__name__}")
    _refuse_not_finite(actual, f"{path} on {spec}")
    return compare(
        expected,
        actual,
        tolerance=TOLERANCES[precision] if tolerance is None else tolerance,
        minimum_agreement=AGREEMENTS[precision] if minimum_agreement is None else minimum_agreement,
        engine=str(spec),
        precision=precision,
    )


def compare(
    expected: np.ndarray,
    actual: np.ndarray,
    *,
    tolerance: float,
    minimum_agreement: float,
    engine: str = "",
    precision: str = "fp32",
) -> Verification:
    """Compare two sets of logits (``n classes`` or ``n classes ...``) as `verify` does."""
    error = float(np.abs(actual - expected).max())
    scale = float(np.abs(expected).max()) or 1.0
    best = expected.argmax(axis=1, keepdims=True)
    picked = actual.argmax(axis=1, keepdims=True)
    margin = np.take_along_axis(expected, best, axis=1) - np.take_along_axis(expected, picked, axis=1)
    agreement = float((best == picked).mean())
    decided = float((margin <= tolerance * scale).mean())
    exact = precision == "fp32"
    return Verification(
        images=len(expected),
        max_abs_error=error,
        max_relative_error=error / scale,
        agreement=agreement,
        decided_agreement=decided,
        tolerance=tolerance,
        minimum_agreement=minimum_agreement,
        passed=error <= tolerance * scale if exact else decided >= minimum_agreement,
        engine=engine,
        precision=precision,
    )


def _default_engine(path: Path) -> EngineSpec:
    reader = "openvino" if path.suffix == ".xml" else "onnxruntime"
    if path.suffix not in ENGINES[reader].formats:
        raise UsageError(f"{path}: only .onnx and .xml files can be verified; export the network first.")
    precision = read_export_metadata(path).get("precision", "fp32")
    return EngineSpec(reader, "cpu", precision if precision in ENGINES[reader].precisions else None)


def _outputs_of_model(model: nn.Module, images: Tensor, batch_size: int) -> np.ndarray:
    parameter = next(model.parameters(), None)
    device = images.device if parameter is None else parameter.device
    with in_eval(model), torch.no_grad():
        parts = [model(part.to(device)).float().cpu() for part in images.split(batch_size)]
    return torch.cat(parts).numpy()


def _refuse_not_finite(outputs: np.ndarray, what: str) -> None:
    bad = ~np.isfinite(outputs).reshape(len(outputs), -1).all(axis=1)
    if bad.any():
        raise ConvetteError(f"{what} gives values that are not finite, first for image {int(bad.argmax())}.")
