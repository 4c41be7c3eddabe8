"""Looking at one network outside a run: open it by name or file, find the input it takes, measure it, draw its maps."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from convette import data, models, surgery
from convette._files import replacing, write_text
from convette.cost import Budget, Cost, LimitStatus, count, format_bytes, format_count, format_milliseconds, status_text
from convette.data import Preprocessing
from convette.errors import ConvetteError, UsageError, did_you_mean
from convette.layers._watching import in_eval
from convette.pipeline._latency import measure_runs, samples_for
from convette.pipeline._run import MODEL_FILE
from convette.pipeline.results import RUN_FILE, ExportResult, read_result
from convette.runtime import EngineSpec, missing
from convette.training.guards import first_not_finite

CIFAR_SIDE, IMAGENET_SIDE = 32, 224
PICTURE_SIDE = 320
_IMAGENET_NORMALISATION = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def open_model(
    name: str,
    *,
    weights: str | None = None,
    pretrained: bool = False,
    num_classes: int | None = None,
    in_channels: int | None = None,
    seed: int = 0,
) -> nn.Module:
    """Return the network `name` in eval mode: a name, a convette file (see `convette.create_model`), a run folder."""
    if is_run(name):
        name = str(network_of_run(name))
    return models.create_model(
        name, num_classes=num_classes, in_channels=in_channels, pretrained=pretrained, weights=weights, seed=seed
    ).eval()


@torch.no_grad()
def check_network(model: nn.Module, name: str, example: torch.Tensor, classes: int | None = None) -> None:
    """Raise `UsageError` where `model` does not run on images such as `example`, or gives other than `classes` outputs;
    `ConvetteError` where its weights are not finite. `name` is what messages call it."""
    broken = first_not_finite(model)
    if broken:
        raise ConvetteError(f"{name}: {broken} holds values that are not finite (NaN or infinity).")
    size = "x".join(map(str, example.shape[1:]))
    try:
        with in_eval(model):
            found = model(example)
    except Exception as error:
        why = " ".join(str(error).split())
        raise UsageError(
            f"{name} does not run on images of {size}: {why}. Other images, or data.image_size."
        ) from error
    if classes is not None and tuple(found.shape[1:]) != (classes,):
        raise UsageError(
            f"{name} gives {'x'.join(map(str, found.shape[1:]))} outputs, the images have {classes} classes."
        )


def is_run(name: str) -> bool:
    """Return whether `name` is a run folder."""
    return (Path(name) / RUN_FILE).is_file()


def network_of_run(name: str) -> Path:
    """Return the file of the network a run has come to: exported, else cut, else trained. `UsageError` if none is."""
    stages = ("export", "quantize", "compress", "train", "model")
    files = [Path(name) / stage / MODEL_FILE for stage in stages]
    found = next((file for file in files if file.is_file()), None)
    if found is None:
        raise UsageError(f"{name}: this run has no network yet; the command that began it goes on with it.")
    return found


def shipped_files(name: str) -> dict[str, Path]:
    """Return the int8 files that a run folder ships, by the engine that reads them; none for anything else."""
    from convette.pipeline.stages.verify import READERS

    exported: ExportResult | None = read_result(Path(name), "export") if is_run(name) else None
    files = exported.files if exported else []
    return {READERS[file.format]: Path(name) / file.file for file in files if file.precision == "int8"}


def input_of(model: nn.Module, image_size: int | None = None) -> Preprocessing:
    """Return the input a network takes: from its card, from what timm says, else by where it comes from.

    `image_size` overrides the side. A network that says nothing about normalisation gets ImageNet's for three channels.
    """
    card = surgery.card_of(model)
    if card.preprocessing:
        found = Preprocessing.from_json(card.preprocessing)
    else:
        origin = surgery.structure_log(model).origin
        channels = int(origin.arguments.get("in_channels", 3)) if origin else 3
        side = _side(model, origin.constructor if origin else "")
        mean, std = models.known_preprocessing(model) or (
            _IMAGENET_NORMALISATION if channels == 3 else ((0.5,) * channels, (0.5,) * channels)
        )
        found = Preprocessing(channels, side, side, mean, std)
    return replace(found, height=image_size, width=image_size) if image_size else found


def _side(model: nn.Module, constructor: str) -> int:
    config = getattr(model, "pretrained_cfg", None) or {}
    if "input_size" in config:
        return int(config["input_size"][-1])
    name = constructor.partition(":")[2]
    ours = constructor.startswith("convette:")
    if ours and (name.startswith("simplenet_cifar") or models.CONSTRUCTORS.get(name) == "cifar_resnet"):
        return CIFAR_SIDE
    return 299 if name == "inception_v3" else IMAGENET_SIDE


def units_of(model: nn.Module, picture: Path | None = None) -> tuple[dict[str, Any], str]:
    """Return which channels of a network go together, as JSON values and in words; draw them to `picture` (SVG) too.

    Raises `StructureError` where the network does not run on noise of its input's shape.
    """
    size = input_of(model)
    graph = surgery.trace(model, torch.randn(1, size.channels, size.height, size.width))
    if picture is not None:
        if picture.suffix != ".svg":
            raise UsageError(f"{picture}: the picture of the units is an .svg file.")
        write_text(picture, surgery.units_svg(graph))
    groups = [{"name": group.name, "size": group.size, "text": surgery.group_line(group)} for group in graph.groups]
    frozen = [str(operator) for operator in graph.frozen]
    return {"groups": groups, "units": graph.units, "frozen": frozen}, surgery.units_text(graph)


def cost_of(
    model: nn.Module,
    engines: tuple[str, ...] | None = None,
    *,
    batch_size: int = 1,
    image_size: int | None = None,
    budget: str | None = None,
    load: int = 0,
    files: Mapping[str, Path] | None = None,
) -> tuple[Cost, tuple[LimitStatus, ...]]:
    """Return the cost of a network on noise of its input's shape, and how it stands against an (absolute) `budget`.

    `engines`: where to measure latency, besides those the budget names; None: eager, ONNX Runtime and OpenVINO.
    `load`: busy processes beside it, as `convette.fit` measures (``run.contention``). `files`: what to run in place of
    the network on an engine (`shipped_files`).
    """
    limits = Budget.parse(budget).on("eager:cpu") if budget else None
    if limits and any(limit.relative for limit in limits.limits):
        raise UsageError(f"budget {budget!r}: one network has no start to be relative to; give absolute limits.")
    wanted = ("eager:cpu", "onnxruntime:cpu", "openvino:cpu") if engines is None else engines
    if engines is None:
        wanted = tuple(engine for engine in wanted if missing(engine) is None)
    wanted = tuple(dict.fromkeys([*wanted, *(limits.engines if limits else ())]))
    example = noise(input_of(model, image_size), batch_size)
    names = [str(EngineSpec.parse(engine)) for engine in wanted]
    runs = {engine: (engine, (files or {}).get(engine, model)) for engine in names}
    latency = measure_runs(runs, example, load, samples_for(limits)) if runs else {}
    cost = replace(count(model, example), latency=latency)
    return cost, limits.check(cost) if limits else ()


def noise(shape: Preprocessing, batch_size: int) -> torch.Tensor:
    """Return a batch of noise of an input's shape, the same each time."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch_size, shape.channels, shape.height, shape.width, generator=generator)


def file_bytes(name: str) -> int | None:
    """Return the bytes of the file that `name` is, None where it is no file of a network."""
    path = Path(name)
    return path.stat().st_size if path.suffix == ".safetensors" and path.is_file() else None


def cost_report(cost: Cost, statuses: tuple[LimitStatus, ...], file: int | None = None) -> Any:
    """Return the cost as people read it: layers and totals, engines, the budget; `file`: bytes of its file."""
    from rich.console import Group
    from rich.table import Table

    on_disk = f" (file {format_bytes(file)})" if file is not None else ""
    totals = (
        f"{format_count(cost.parameters)} parameters, {format_count(cost.macs)} MACs, "
        f"weights {format_bytes(cost.size)}{on_disk}, activations at most {format_bytes(cost.memory)}"
    )
    parts: list[Any] = [cost.table(), totals]
    if cost.latency:
        engines = Table(title="Latency, all measured in turns in one run")
        engines.add_column("engine")
        engines.add_column("precision")
        for column in ("p50", "p95", "p99", "cold start", "batch", "threads"):
            engines.add_column(column, justify="right")
        for name, one in sorted(cost.latency.items(), key=lambda item: item[1].p50):
            times = [format_milliseconds(value) for value in (one.p50, one.p95, one.p99, one.cold_start)]
            engines.add_row(name, one.precision, *times, str(one.batch_size), str(one.threads))
        parts.append(engines)
    if statuses:
        parts.append(status_text(statuses))
    return Group(*parts)


def required_name(argument: str | None, option: str | None) -> str:
    """Return the network a verb was given, as its argument or as ``--model``."""
    if argument is not None and option is not None:
        raise UsageError(f"two networks were given, {argument} and {option}; keep one.")
    name = argument or option
    if name is None:
        raise UsageError("name a network: resnet20, timm:NAME, torchvision:NAME or FILE.safetensors.")
    return name


@dataclass(frozen=True)
class ImageExplanation:
    """What a network says of an image (`prediction`, its name, `confidence` in 0..1), and the picture written."""

    prediction: int
    name: str
    confidence: float
    method: str
    layer: str
    reason: str
    file: Path

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**self.__dict__, "file": str(self.file)}


def explain_image(
    model: nn.Module,
    image: Path | str,
    out: Path | str,
    *,
    method: str = "eigen_cam",
    class_index: int | None = None,
    layer: str | None = None,
) -> ImageExplanation:
    """Write a picture of where `model` looks in an image file: the image with the class-activation map over it.

    `method`: ``"eigen_cam"`` (no class needed) or ``"grad_cam"`` (for `class_index`, or the predicted class).
    """
    from convette.explain import EXPLAINERS, EigenCAM, GradCAM, overlay

    if method not in EXPLAINERS:
        raise UsageError(f"--method {method!r} is unknown.{did_you_mean(method, EXPLAINERS)}")
    preprocessing = input_of(model)
    pixels = data.load_image(image, preprocessing)
    inputs = preprocessing(pixels)
    with torch.no_grad():
        probabilities = model(inputs).softmax(1)[0]
    prediction = int(probabilities.argmax())
    found = (GradCAM if method == "grad_cam" else EigenCAM)(model, layer).explain(inputs, class_index)
    scale = max(1, PICTURE_SIDE // max(pixels.shape[-2:]))
    _write_picture(overlay(pixels[0], found.maps[0], scale=scale), Path(out))
    names = surgery.card_of(model).class_names
    return ImageExplanation(
        prediction=prediction,
        name=names[prediction] if prediction < len(names) else str(prediction),
        confidence=float(probabilities[prediction]),
        method=method,
        layer=found.layer,
        reason=found.reason,
        file=Path(out),
    )


def _write_picture(pixels: np.ndarray, path: Path) -> None:
    from PIL import Image

    if path.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise UsageError(f"{path}: a picture is written as .png or .jpg.")
    with replacing(path) as temporary:
        Image.fromarray(pixels).save(temporary)
