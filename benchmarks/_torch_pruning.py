"""Torch-Pruning's criteria as scores of units: taken once a network, ranked as its `BasePruner` ranks them."""

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

# Images a backward pass of their own is made for, of each calibration batch, where a criterion asks for that.
_IMAGES_ALONE = 16


def importances() -> dict[str, Any]:
    """Return the constructor of each of its criteria by our name for it."""
    import torch_pruning as tp

    return {
        "tp_l1": lambda: tp.importance.GroupMagnitudeImportance(p=1),
        "tp_l2": lambda: tp.importance.GroupMagnitudeImportance(p=2),
        "tp_lamp": tp.importance.LAMPImportance,
        "tp_geometric_median": tp.importance.FPGMImportance,
        "tp_bn_scale": tp.importance.BNScaleImportance,
        "tp_taylor": tp.importance.GroupTaylorImportance,
        "tp_hessian": tp.importance.GroupHessianImportance,
        "tp_random": tp.importance.RandomImportance,
    }


def their_scores(
    criterion: str,
    parent: nn.Module,
    example: Tensor,
    calibration: Sequence[tuple[Tensor, Tensor]],
    whole: Sequence[str],
    seed: int,
) -> dict[str, Tensor]:
    """Return the importance of every unit of every layer that Torch-Pruning may cut, by the layer's name.

    The layers named in `whole` and all that is coupled with them are left out. `parent` stays as it is.
    """
    import torch_pruning as tp

    torch.manual_seed(seed)
    network = copy.deepcopy(parent)
    modules = dict(network.named_modules())
    importance = importances()[criterion]()
    pruner = tp.pruner.BasePruner(
        network, example, importance=importance, pruning_ratio=0.5, ignored_layers=[modules[name] for name in whole]
    )
    _leave_gradients(network, importance, criterion, calibration)
    names = {id(module): name for name, module in modules.items()}
    found = {}
    groups = pruner.DG.get_all_groups(ignored_layers=pruner.ignored_layers, root_module_types=pruner.root_module_types)
    with torch.no_grad():
        for group in groups:
            scores = pruner.estimate_importance(group)
            if scores is not None:
                found[names[id(group[0].dep.target.module)]] = scores.detach()
    return found


def their_choice(scores: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """Return what stays of every layer when `share` of each goes, as `BasePruner` rounds and ranks."""
    kept = {}
    for name, values in scores.items():
        gone = torch.topk(values, len(values) - math.floor(len(values) * (1 - share)), largest=False).indices
        stays = torch.ones(len(values), dtype=torch.bool)
        stays[gone.cpu()] = False
        kept[name] = stays.nonzero().flatten()
    return kept


def _leave_gradients(
    network: nn.Module, importance: Any, criterion: str, calibration: Sequence[tuple[Tensor, Tensor]]
) -> None:
    """Leave the gradients that some of their criteria read, on the calibration images."""
    if criterion not in ("tp_taylor", "tp_hessian"):
        return
    network.zero_grad()
    if criterion == "tp_hessian":
        importance.zero_grad()
    for images, labels in calibration:
        if criterion == "tp_taylor":
            nn.functional.cross_entropy(network(images), labels, reduction="sum").backward()
            continue
        for image, label in zip(images[:_IMAGES_ALONE], labels[:_IMAGES_ALONE], strict=True):
            network.zero_grad()
            nn.functional.cross_entropy(network(image[None]), label[None]).backward()
            importance.accumulate_grad(network)
