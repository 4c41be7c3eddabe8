"""Which engine, in which precision, for this network and batch on this machine: all are measured in one run."""

import contextlib
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from convette._progress import note, progress
from convette.errors import ConvetteError, UsageError
from convette.quantization._int8 import quantize_onnx, quantize_openvino
from convette.runtime import (
    ENGINES,
    Choice,
    EngineSpec,
    Latency,
    Runner,
    export,
    fastest,
    measure_latency,
    missing,
    overlap,
    prepare,
)

RANDOM_IMAGES = 32
REFERENCE = "eager:cpu"


@dataclass(frozen=True)
class EngineSurvey:
    """What every engine of this machine makes of one network.

    - `latency`: by engine and precision (``"openvino:cpu:int8"``), all measured in turns in one run.
    - `agreement`: share of `images` images (0..1) that get the same class as from eager float32. On `random_images` it
      says little about accuracy.
    - `missing`: engines that could not be measured, and why.
    - `choice`: the one to use, and why in one sentence.
    """

    latency: Mapping[str, Latency]
    agreement: Mapping[str, float]
    images: int
    random_images: bool
    choice: Choice
    missing: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "latency": {name: one.to_json() for name, one in self.latency.items()},
            "agreement": dict(self.agreement),
            "images": self.images,
            "random_images": self.random_images,
            "use": self.choice.name,
            "reason": self.choice.reason,
            "missing": dict(self.missing),
        }


def all_engines() -> tuple[str, ...]:
    """Return every engine of `convette.runtime.ENGINES` that measures latency, in each precision by name.

    Those this machine lacks too: `survey_engines` says why. A GPU's only where there is one.
    """
    found = []
    for name, engine in ENGINES.items():
        if not engine.general:
            continue
        for device in engine.devices:
            if device == "cuda" and not torch.cuda.is_available():
                continue
            precisions = [one for one in engine.precisions if one != "default"]
            found += [
                f"{name}:{device}" if one == "fp32" and "default" not in engine.precisions else f"{name}:{device}:{one}"
                for one in precisions
            ]
    return tuple(found)


def survey_engines(
    model: nn.Module,
    example: Tensor,
    *,
    calibration: Sequence[Tensor] | None = None,
    images: Tensor | None = None,
    engines: Sequence[str] | None = None,
    threads: int | None = None,
    time_limit: float | int = 3.0,
    max_disagreement: float = 0.02,
) -> EngineSurvey:
    """Measure `model` on every engine and precision this machine has, interleaved, and say which to use for `example`.

    With real images the choice is the fastest whose answers agree with eager float32 on all but `max_disagreement` of
    `images`. With none, int8 files are calibrated on random images of natural spectrum (`random_images`), good enough
    to measure time but not accuracy: the choice is then among the float precisions, and it says what int8 would take.

    Args:
        model: the network, left as it is.
        example: the batch to measure, ``n c h w`` float, preprocessed.
        calibration: batches of preprocessed training images for int8; None: random ones.
        images: preprocessed images to compare answers on; None: the calibration images.
        engines: None: `all_engines`. An engine that fails is left out and told in `EngineSurvey.missing`.
        threads: CPU threads of every engine; None: those of torch.
        time_limit: seconds of measuring for each.

    Raises `UsageError` if none can be measured. Costs seconds of export and (for ``compiled``) up to a minute of
    compilation besides.
    """
    names = [str(EngineSpec.parse(name)) for name in (engines or all_engines())]
    random = calibration is None
    batches = list(calibration) if calibration is not None else random_images(tuple(example.shape[1:]), RANDOM_IMAGES)
    if random and any(name.endswith("int8") for name in names):
        note("int8 is calibrated on random images: its time is right, its accuracy is not known; give images (--data).")
    judged = images if images is not None else torch.cat(batches)
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="convette-") as folder, contextlib.ExitStack() as stack:
        files = _Files(model, example, batches, Path(folder))
        runners: dict[str, Runner] = {}
        with progress("engines", len(names), "engine") as advance:
            for name in dict.fromkeys(names):
                try:
                    runners[name] = stack.enter_context(_prepared(name, files, threads))
                except ConvetteError as error:
                    failed[name] = str(error)
                advance(detail=name)
        if not runners:
            raise UsageError(f"no engine could be measured: {'; '.join(f'{k}: {v}' for k, v in failed.items())}")
        latency = measure_latency(runners, example, time_limit=time_limit)
        agreement = _agreement(model, runners, judged)
    choice = _choose(latency, agreement, random, max_disagreement)
    return EngineSurvey(latency, agreement, len(judged), random, choice, failed)


def random_images(shape: tuple[int, ...], count: int, seed: int = 0, batch_size: int = 16) -> list[Tensor]:
    r"""Return batches of random images of `shape` (c h w) with the spectrum of natural ones.

    Amplitudes fall as :math:`1/f` (Field 1987), phases are random, the channels share nine tenths of their power, and
    each channel has mean 0 and variance 1 over the set: the statistics of preprocessed images.
    """
    channels, height, width = shape
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)[None]
    frequency = (rows.square() + columns.square()).sqrt().clamp_min(1 / max(height, width, 2))
    shared = torch.randn(count, 1, height, width, generator=generator)
    white = 0.9**0.5 * shared + 0.1**0.5 * torch.randn(count, channels, height, width, generator=generator)
    images = torch.fft.irfft2(torch.fft.rfft2(white) / frequency, s=(height, width))
    mean, std = images.mean((0, 2, 3), keepdim=True), images.std((0, 2, 3), keepdim=True)
    return list(((images - mean) / std.clamp_min(1e-6)).split(batch_size))


class _Files:
    """The exported and quantised files of a network, each made when first asked for."""

    def __init__(self, model: nn.Module, example: Tensor, calibration: list[Tensor], folder: Path) -> None:
        self.model, self.example, self.calibration, self.folder = model, example, calibration, folder
        self._made: dict[str, Path | ConvetteError] = {}

    def get(self, engine: str, int8: bool) -> Path:
        """Return the file `engine` runs. Raises again what making it raised."""
        name = f"{'int8' if int8 else 'float'}{'.xml' if engine == 'openvino' else '.onnx'}"
        if name not in self._made:
            try:
                self._made[name] = self._make(self.folder / name, int8)
            except ConvetteError as error:
                self._made[name] = error
        found = self._made[name]
        if isinstance(found, ConvetteError):
            raise found
        return found

    def _make(self, path: Path, int8: bool) -> Path:
        if not int8:
            return export(self.model, self.example, path)
        if path.suffix == ".xml":
            return quantize_openvino(self.model, self.example, self.calibration, path)
        return quantize_onnx(self.get("onnxruntime", False), self.calibration, path)


def _prepared(name: str, files: _Files, threads: int | None) -> Runner:
    spec = EngineSpec.parse(name)
    reason = missing(spec)
    if reason:
        raise UsageError(reason)
    source: Any = files.model
    if ENGINES[spec.engine].formats:
        source = files.get(spec.engine, spec.precision == "int8")
    return prepare(spec, source, files.example, threads=threads)


def _agreement(model: nn.Module, runners: Mapping[str, Runner], images: Tensor) -> dict[str, float]:
    with prepare(REFERENCE, model, images[:1]) as plain:
        expected = np.concatenate([plain(part) for part in images.split(16)]).argmax(1)
    # Compiled engines are tuned for one batch size; the runner pads, so the parts need no care here.
    return {
        name: float((np.concatenate([runner(part) for part in images.split(16)]).argmax(1) == expected).mean())
        for name, runner in runners.items()
    }


def _choose(
    latency: Mapping[str, Latency], agreement: Mapping[str, float], random: bool, max_disagreement: float
) -> Choice:
    if not random:
        trusted = {**agreement, "exact": 1.0}
        choice = fastest(latency, trusted, max_accuracy_drop=max_disagreement, reference="exact")
        reason = choice.reason.replace("of accuracy", "of agreement with float32").replace("loses", "disagrees on")
        return Choice(choice.name, reason)
    floats = {name: one for name, one in latency.items() if one.precision != "int8"}
    if not floats:
        return fastest(latency)
    choice = fastest(floats)
    ints = {name: one for name, one in latency.items() if one.precision == "int8"}
    if not ints:
        return choice
    best = min(ints, key=lambda name: ints[name].p50)
    told = f"{best} takes {ints[best].p50:.3g} ms"
    plain = floats[choice.name]
    if ints[best].p50 < plain.p50 and not overlap(ints[best], plain):
        return Choice(choice.name, f"{choice.reason} {told}: worth a try with real images, which tell its accuracy.")
    return Choice(choice.name, f"{choice.reason} int8 is no faster here ({told}).")
