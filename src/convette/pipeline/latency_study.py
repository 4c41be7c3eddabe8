"""Latency of networks beyond one figure: on every engine, and under background load."""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from convette import data as data_room
from convette.cost import engine_table
from convette.errors import UsageError
from convette.pipeline._latency import threads_beside
from convette.pipeline.inspect import check_network, input_of, noise
from convette.quantization import EngineSurvey, survey_engines
from convette.runtime import Contention, contention, prepare, study, study_table

CALIBRATION_IMAGES, JUDGED_IMAGES = 128, 256


def conditions_of(text: str | None) -> tuple[Contention, ...]:
    """Return the conditions in ``"1"`` or ``"0,1,2"`` (numbers of background processes); None: an idle machine."""
    if text is None:
        return (Contention(0),)
    try:
        return tuple(Contention(int(part)) for part in text.split(","))
    except ValueError:
        raise UsageError(f"--contention {text!r}: write numbers of processes, such as 1 or 0,1,2.") from None


def survey_of(
    model: nn.Module,
    engines: str = "all",
    *,
    data: str | None = None,
    batch_size: int = 1,
    image_size: int | None = None,
    load: int = 0,
) -> EngineSurvey:
    """Measure a network on all engines (or those named with commas) and say which to use; see `survey_engines`.

    `data`: a source of real images: training images for int8 to be calibrated on, validation images to compare the
    engines' answers on. Without it both are random. `load`: busy processes beside it.
    """
    shape = input_of(model, image_size)
    calibration: list[Tensor] | None = None
    judged: Tensor | None = None
    if data is not None:
        source = data_room.load_data(data, channels=shape.channels)  # type: ignore[arg-type]
        chosen = torch.randperm(len(source.train), generator=torch.Generator().manual_seed(0))[:CALIBRATION_IMAGES]
        calibration = [shape(source.train.images(part)) for part in chosen.split(32)]
        judged = shape(source.validation.images(range(min(JUDGED_IMAGES, len(source.validation)))))
    names = None if engines == "all" else [name.strip() for name in engines.split(",")]
    example, threads = noise(shape, batch_size), threads_beside(load)
    with contention(load):
        return survey_engines(model, example, calibration=calibration, images=judged, engines=names, threads=threads)


def cuts_of(model: nn.Module, *, image_size: int | None = None) -> tuple[list[dict[str, Any]], Any]:
    """Return where a network can be cut in two and what crosses there for one image, as JSON values and a table."""
    from rich.table import Table

    from convette.runtime.edge_split import cut_points

    shape = input_of(model, image_size)
    image = shape.channels * shape.height * shape.width
    table = Table(title="Where the network can be cut", caption=f"An image is {image:,} bytes raw.")
    table.add_column("behind")
    for title in ("crosses", "bytes in 8 bits", "of the image"):
        table.add_column(title, justify="right")
    points = cut_points(model, noise(shape, 1))
    for point in points:
        size = "x".join(map(str, point.shape))
        table.add_row(point.name, size, f"{point.bytes:,}", f"{100 * point.bytes / image:.0f} %")
    rows = [{"name": point.name, "shape": list(point.shape), "bytes": point.bytes} for point in points]
    return rows, table


def engine_report(cost: Any, survey: EngineSurvey | None) -> Any:
    """Return the report of a cost with that of the engines below it."""
    if survey is None:
        return cost
    from rich.console import Group

    agreed = ", ".join(f"{name} {100 * share:.1f} %" for name, share in survey.agreement.items() if share < 1)
    kind = "random" if survey.random_images else "real"
    name = survey.choice.name
    lines = [f"Use {name}: {survey.choice.reason.removeprefix(f'{name} is ')}"]
    lines.append(f"Same class as eager float32 on {survey.images} {kind} images: {agreed or 'all engines, always'}.")
    lines += [f"{name} was left out: {reason}" for name, reason in survey.missing.items()]
    return Group(cost, engine_table(survey.latency), *lines)


def study_of(
    networks: Mapping[str, nn.Module],
    conditions: Sequence[Contention],
    engines: Sequence[str] = (),
    *,
    batch_size: int = 1,
    image_size: int | None = None,
    samples: int = 500,
) -> tuple[dict[str, Any], Any]:
    """Measure `networks` on `engines` (None: eager) under each condition; returns JSON values and a table.

    All networks get the input of the first. With several engines each network is measured on each.
    """
    first = next(iter(networks.values()))
    example = noise(input_of(first, image_size), batch_size)
    for name, model in networks.items():
        check_network(model, name, example[:1])
    wanted = list(engines) or ["eager:cpu"]
    with contextlib.ExitStack() as stack:
        runners = {}
        for engine in wanted:
            for name, model in networks.items():
                key = name if len(wanted) == 1 else f"{name} on {engine}"
                runners[key] = stack.enter_context(prepare(engine, model, example))
        found = study(runners, example, conditions, samples=samples)
    return {"engines": wanted, **found.to_json()}, study_table(found)
