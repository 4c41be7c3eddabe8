"""Stage explain: where the networks looked, on test images they got right and wrong, and how far that drifted."""

import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from convette._files import replacing
from convette._progress import note
from convette.explain import (
    EigenCAM,
    Explanation,
    ExplanationWarning,
    GradCAM,
    explanation_drift,
    rank_correlation,
    target_layer,
)
from convette.pipeline._run import Run, Stage
from convette.pipeline.recipe import Recipe
from convette.pipeline.results import ExplainedImage, ExplainResult

DRIFT_IMAGES = 256


def explain(run: Run, folder: Path) -> ExplainResult:
    """Draw class-activation maps of the networks before and after, for the same images, and measure their drift."""
    method = run.recipe.explain.method
    assert method != "off"
    before, after = run.network("train"), run.network(run.final_stage())
    test = run.data.test
    drift = explanation_drift(
        before, after, run.data.preprocessing(test.images(range(min(DRIFT_IMAGES, len(test))))), method=method
    )
    note(f"explain: over {drift.images} test images the maps correlate {drift.correlation:.2f} with those before")
    with np.load(run.path / "verify" / "predictions.npz") as arrays:
        table = {name: arrays[name] for name in arrays.files}
    chosen = choose_images(table["labels"], table["after"], table["confidence_after"], run.recipe.explain.images)
    images = test.images(chosen.tolist())
    inputs = run.data.preprocessing(images)
    classes = torch.from_numpy(table["before"][chosen])
    maps = [
        _maps(method, network, layer, inputs, classes)
        for network, layer in ((before, drift.layer_before), (after, drift.layer_after))
    ]
    correlations = rank_correlation(maps[0].maps, maps[1].maps).tolist()
    with replacing(folder / "maps.npz") as temporary:
        np.savez_compressed(temporary, images=images.numpy(), before=maps[0].maps.numpy(), after=maps[1].maps.numpy())
    return ExplainResult(
        method=method,
        layer_before=drift.layer_before,
        layer_after=drift.layer_after,
        reason=target_layer(before, inputs).reason,
        images=[
            ExplainedImage(
                index=int(index),
                label=int(table["labels"][index]),
                prediction_before=int(table["before"][index]),
                prediction_after=int(table["after"][index]),
                confidence_after=float(table["confidence_after"][index]),
                right=bool(table["after"][index] == table["labels"][index]),
                correlation=correlation,
            )
            for index, correlation in zip(chosen, correlations, strict=True)
        ],
        drift=1 - drift.correlation,
        drift_interval=(1 - drift.high, 1 - drift.low),
        drift_images=drift.images,
    )


def choose_images(labels: np.ndarray, predictions: np.ndarray, confidence: np.ndarray, count: int) -> np.ndarray:
    """Return up to `count` images that were got right (class after class) and up to `count` surest mistakes."""
    hits = np.nonzero(predictions == labels)[0]
    # The place of an image within its class, so that one of every class comes before the second of any.
    place = np.array([np.sum(labels[hits[:number]] == labels[index]) for number, index in enumerate(hits)])
    right = hits[np.lexsort((labels[hits], place))][:count] if len(hits) else hits
    misses = np.nonzero(predictions != labels)[0]
    wrong = misses[np.argsort(-confidence[misses], kind="stable")][:count]
    return np.concatenate([right, wrong])


def _maps(method: str, network: nn.Module, layer: str, inputs: Tensor, classes: Tensor) -> Explanation:
    if method == "grad_cam":
        # For both networks the class that the first one saw, as in the drift.
        return GradCAM(network, layer).explain(inputs, classes)
    return EigenCAM(network, layer).explain(inputs)


def _left_out(recipe: Recipe) -> str | None:
    return "explain.method is off" if recipe.explain.method == "off" else None


def _noted(run: Run, folder: Path) -> ExplainResult:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ExplanationWarning)
        result = explain(run, folder)
    # What a map does not say is worth a line, once, without the place in the code.
    for text in dict.fromkeys(str(one.message) for one in caught if one.category is ExplanationWarning):
        note(f"explain: {text}")
        break
    return result


STAGE = Stage("explain", _noted, _left_out)
