"""Stage data: read the images, split them, say what was found."""

from pathlib import Path

import numpy as np
import torch

from convette._files import replacing
from convette._progress import note
from convette.data import ImageData
from convette.pipeline._run import Run, Stage
from convette.pipeline.results import BadFile, DataResult, SplitSummary

SAMPLES_PER_CLASS = 4


def find_data(run: Run, folder: Path) -> DataResult:
    """Read the data and write what was found, with some training images of each class."""
    data = run.raw_data
    splits = {"train": data.train, "validation": data.validation, "test": data.test}
    note(
        f"data: {data.source}, {data.num_classes} classes, "
        + ", ".join(f"{len(split)} {name}" for name, split in splits.items())
        + f" images of {data.preprocessing.width}x{data.preprocessing.height}x{data.preprocessing.channels}"
    )
    for text in data.notes:
        note(f"data: {text}")
    _write_samples(data, folder / "samples.npz")
    return DataResult(
        source=data.source,
        fingerprint=data.fingerprint,
        class_names=list(data.class_names),
        channels=data.preprocessing.channels,
        height=data.preprocessing.height,
        width=data.preprocessing.width,
        preprocessing=data.preprocessing.to_json(),
        splits={
            name: SplitSummary(images=len(split), class_counts=split.class_counts.tolist())
            for name, split in splits.items()
        },
        bad=[BadFile(path=str(bad.name), reason=bad.reason) for bad in data.bad],
        notes=list(data.notes),
    )


def _write_samples(data: ImageData, path: Path) -> None:
    labels = data.train.labels
    first = [torch.nonzero(labels == label).flatten()[:SAMPLES_PER_CLASS] for label in range(data.num_classes)]
    indices = torch.cat(first)
    with replacing(path) as temporary:
        np.savez_compressed(temporary, images=data.train.images(indices).numpy(), labels=labels[indices].numpy())


STAGE = Stage("data", find_data)
