"""How dense a pruning mask at initialisation leaves each layer: what PreCrop takes from such masks (arXiv 2203.02549).

SNIP (arXiv 1810.02340), GraSP (arXiv 2002.07376) and SynFlow (arXiv 2006.05467) pick single weights; magnitude, equal
shares and Erdos-Renyi-Kernel (arXiv 1911.11134) are what they are compared with. Only the share that stays of each
layer is used here. Their masks and weights are of a copy: the network is left bit for bit as it was.
"""

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from convette.errors import UsageError
from convette.layers._watching import call
from convette.pruning.criteria._observing import batches_of, run
from convette.pruning.criteria.magnitude import check_choice

SOURCES = ("synflow", "snip", "grasp", "magnitude", "uniform", "erk")
NEED_BATCHES = ("snip", "grasp")


def mask_densities(
    model: nn.Module,
    example: Any,
    share: float | int,
    source: str = "synflow",
    *,
    calibration: Iterable[Any] | None = None,
    steps: int = 100,
) -> dict[str, float]:
    r"""Return the share of its weights that each convolution and linear layer keeps where `share` of all stay.

    The weights with the largest scores of the whole network stay, by `source`:

    - "synflow": :math:`|w\,\partial R / \partial w|` with :math:`R = 1^\top f_{|W|}(1)`: all weights by size, an image
      of ones, no data; in `steps` rounds with the densities :math:`share^{k/steps}`, in float64 (in one round whole
      layers go);
    - "snip": :math:`|w\,\partial L / \partial w|`; "grasp": :math:`w\,(H g)_w`, which keeps gradients flowing; both on
      the `calibration` batches ``(images, labels)``;
    - "magnitude": :math:`|w|`; "uniform": the same share everywhere; "erk": shares in proportion to
      :math:`1 - (C_{in} + C_{out} + k_h + k_w) / (C_{in} C_{out} k_h k_w)`, none above 1.

    Raises `UsageError` for another source, a share that is none, and "snip" or "grasp" without data. Costs a copy in
    float64 and `steps` passes (synflow), a pass with gradients a batch (snip; grasp: two of them).
    """
    check_choice("source", source, SOURCES)
    if not 0 < share <= 1 or steps < 1:
        raise UsageError(f"densities: share={share} must be above 0 and at most 1, steps={steps} at least 1.")
    weights = prunable_weights(model)
    if not weights:
        raise UsageError("densities: the network has no convolution or linear layer.")
    if source == "uniform":
        return dict.fromkeys(weights, float(share))
    if source == "erk":
        return _erdos_renyi(weights, float(share))
    if source == "magnitude":
        scores = {name: weight.detach().abs().double() for name, weight in weights.items()}
        return _kept(_global_mask(scores, float(share)))
    if source == "synflow":
        return _kept(synflow_masks(model, example, float(share), steps))
    return _kept(_global_mask(_gradient_scores(model, batches_of(calibration, source), source), float(share)))


def prunable_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights of convolutions and linear layers, by the name of the module."""
    kinds = (nn.modules.conv._ConvNd, nn.Linear)
    return {name: module.weight for name, module in model.named_modules() if isinstance(module, kinds)}


def synflow_masks(model: nn.Module, example: Any, share: float, steps: int = 100) -> dict[str, Tensor]:
    """Return which weights SynFlow keeps (bool, by module); the network is left alone, and no image is looked at."""
    network = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        for tensor in network.state_dict().values():
            if tensor.is_floating_point():
                tensor.abs_()
    ones = _ones(example)
    weights = prunable_weights(network)
    whole = {name: weight.detach().clone() for name, weight in weights.items()}
    masks = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in whole.items()}
    for step in range(1, steps + 1):
        found = call(network, ones)
        total = sum(one.sum() for one in (found if isinstance(found, list | tuple) else [found]))
        slopes = torch.autograd.grad(total, list(weights.values()), materialize_grads=True)  # type: ignore[arg-type]
        scores = {n: (w * s).detach().abs() for (n, w), s in zip(weights.items(), slopes, strict=True)}
        # What is gone stays gone, behind all that is left.
        scores = {name: score.masked_fill(~masks[name], -1.0) for name, score in scores.items()}
        masks = _global_mask(scores, share ** (step / steps))
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(whole[name] * masks[name])
    return masks


def _gradient_scores(model: nn.Module, batches: Any, source: str) -> dict[str, Tensor]:
    network = copy.deepcopy(model).train()
    weights = prunable_weights(network)
    for weight in weights.values():
        weight.requires_grad_(True)
    first = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    second = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    mean: list[Tensor] = []
    with torch.enable_grad():
        for images, labels in batches:
            slopes = torch.autograd.grad(_loss(network, images, labels), list(weights.values()), materialize_grads=True)
            for total, slope in zip(first.values(), slopes, strict=True):
                total += slope.detach() / len(batches)
        if source == "snip":
            return {name: (weight * first[name]).detach().abs().double() for name, weight in weights.items()}
        mean = list(first.values())
        for images, labels in batches:
            slopes = torch.autograd.grad(
                _loss(network, images, labels), list(weights.values()), create_graph=True, materialize_grads=True
            )
            flow = sum(((a * b).sum() for a, b in zip(slopes, mean, strict=True)), torch.zeros(()))
            products = torch.autograd.grad(flow, list(weights.values()), materialize_grads=True)
            for total, product in zip(second.values(), products, strict=True):
                total += product.detach() / len(batches)
    return {name: (weight * second[name]).detach().double() for name, weight in weights.items()}


def _loss(network: nn.Module, images: Any, labels: Tensor) -> Tensor:
    return functional.cross_entropy(run(network, images), labels)


def _ones(example: Any) -> Any:
    if isinstance(example, Tensor):
        return torch.ones_like(example[:1], dtype=torch.float64)
    if isinstance(example, Mapping):
        return {key: _ones(value) for key, value in example.items()}
    return tuple(_ones(value) for value in example) if isinstance(example, tuple) else example


def _global_mask(scores: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    flat = torch.cat([score.flatten() for score in scores.values()])
    keep = torch.zeros(len(flat), dtype=torch.bool)
    keep[flat.argsort(descending=True, stable=True)[: max(1, round(share * len(flat)))]] = True
    parts = keep.split([score.numel() for score in scores.values()])
    return {name: part.view(score.shape) for (name, score), part in zip(scores.items(), parts, strict=True)}


def _kept(masks: Mapping[str, Tensor]) -> dict[str, float]:
    return {name: float(mask.double().mean()) for name, mask in masks.items()}


def _erdos_renyi(weights: Mapping[str, Tensor], share: float) -> dict[str, float]:
    raw = {name: 1 - min(0.999, sum(w.shape) / w.numel()) for name, w in weights.items()}
    total = share * sum(weight.numel() for weight in weights.values())
    whole: set[str] = set()
    while True:
        left = total - sum(weights[name].numel() for name in whole)
        open_ = {name: raw[name] * weights[name].numel() for name in raw if name not in whole}
        scale = left / max(sum(open_.values()), 1e-12)
        over = {name for name in open_ if scale * raw[name] > 1}
        if not over:
            return {name: 1.0 if name in whole else scale * raw[name] for name in raw}
        whole |= over
