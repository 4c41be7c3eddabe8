"""Stage explain: where the networks looked, on test images they got right and wrong, and how far that drifted."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from convette._files import replacing
from convette._progress import note
from convette.explain import EigenCAM, GradCAM, rank_correlation, target_layer
from convette.pipeline._run import Run, Stage
from convette.pipeline.recipe import Recipe
from convette.pipeline.results import ExplainedImage, ExplainResult


def explain(run: Run, folder: Path) -> ExplainResult:
    """Draw class-activation maps of the networks before and after, for the same images."""
    section = run.recipe.explain
    before, after = run.network("train"), run.network(run.final_stage())
    with np.load(run.path / "verify" / "predictions.npz") as arrays:
        table = {name: arrays[name] for name in arrays.files}
    chosen = choose_images(table["labels"], table["after"], table["confidence_after"], section.images)
    images = run.data.test.images(chosen.tolist())
    inputs = run.data.preprocessing(images)
    maps = {
        "before": _maps(section.method, before, inputs, table["before"][chosen]),
        "after": _maps(section.method, after, inputs, table["after"][chosen]),
    }
    correlations = [float(rank_correlation(a, b)) for a, b in zip(maps["before"], maps["after"], strict=True)]
    drift = 1 - sum(correlations) / len(correlations)
    note(f"explain: the maps of {len(chosen)} images drifted by {drift:.2f} (0: the same, 1: unrelated)")
    with replacing(folder / "maps.npz") as temporary:
        np.savez_compressed(
            temporary, images=images.numpy(), before=maps["before"].numpy(), after=maps["after"].numpy()
        )
    layers = [target_layer(network, run.example) for network in (before, after)]
    return ExplainResult(
        method=section.method,
        layer_before=layers[0].name,
        layer_after=layers[1].name,
        reason=layers[1].reason,
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
        drift=drift,
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


def _maps(method: str, network: nn.Module, inputs: Tensor, classes: np.ndarray) -> Tensor:
    if method == "grad_cam":
        return GradCAM(network)(inputs, torch.from_numpy(classes)).detach().float().cpu()
    return EigenCAM(network)(inputs).detach().float().cpu()


def _left_out(recipe: Recipe) -> str | None:
    return "explain.method is off" if recipe.explain.method == "off" else None


STAGE = Stage("explain", explain, _left_out)
