"""OPTIN: a unit is worth what its removal does to all later features and to the output.

Khaki and Plataniotis, The Need for Speed: Pruning Transformers with One Recipe, ICLR 2024, arXiv 2403.17921. The terms
of the loss and their balance follow the authors' code for language models; its multiplication of scores by a ramp over
the components' index is left out (no part of the method), the temperature stands inside of the softmax, and one scale
balances both terms for the whole model, so that scores compare. Nothing is trained, no gradient is taken.
"""

from collections.abc import Iterable
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from convette.errors import UsageError
from convette.layers._watching import hooked
from convette.pruning._options import check_values
from convette.pruning._units import finite_scores
from convette.pruning.criteria._observing import batches_of, run, scoring
from convette.pruning.criteria.loss_increase import zeroed
from convette.surgery import ChannelGraph


def trajectory(
    model: nn.Module,
    graph: ChannelGraph,
    calibration: Iterable[Any] | None = None,
    *,
    balance: float | int = 10.0,
    temperature: float | int = 4.0,
    rows: int = 768,
    relation: Literal["sampled", "patch", "mean"] = "sampled",
    reduce: Literal["sum", "mean"] = "sum",
    own: bool = True,
    block: int = 1,
    images: int = 32,
    head_weight: float | int = 0.5,
    last_weight: float | int = 1.0,
    seed: int = 0,
) -> dict[str, Tensor]:
    r"""Score units by how far their removal bends the trajectory of features and output on one batch.

    .. math:: I_u = \sum_m \lVert R_m - R'_m \rVert_F^2 + s\, \tau^2\, KL(p_\tau \,\|\, p'_\tau), \qquad
        R_m = F_m F_m^\top

    F_m are up to `rows` of the features behind block m (tokens or positions as rows, of unit length; the same rows with
    and without u), p the class probabilities at the temperature :math:`\tau`, a dash what they are without unit u.
    Blocks that run before the unit do not change and add nothing. s puts the two terms at `balance` to 1: the median
    over the units of their ratio, one power of ten for the whole model.

    - `relation`: "sampled" (default) between rows of all images and places; "patch" between the images at each place
      alone, a mean over places; "mean", for convolutional networks: the squared distance of the features' means over
      the images.
    - `own`: count the block that the unit is in as well. False, as published, counts later blocks only (the last block
      counts its own).
    - `reduce`: "sum" over blocks (as published; early layers have more of them), or "mean".
    - `block`: units of a group are masked this many at a time and share the result: for the thousands of neurons of a
      transformer. `images`: how many calibration images are used.
    - `head_weight`: factor for groups whose units are whole attention heads (0.5 in the authors' code); `last_weight`
      for those whose removal changes the last block only (0.5 there, 1 here).

    Returns one score a unit, at least 0, CPU float32, larger = keep. Raises `UsageError` without calibration data or
    for an output that is not (images, classes). Costs a forward pass of one batch a unit (or block of them): minutes
    for networks with thousands of channels.
    """
    check_values("criterion trajectory", trajectory, relation=relation, reduce=reduce)
    if block < 1 or rows < 1 or images < 1 or temperature <= 0 or balance <= 0:
        raise UsageError("criterion trajectory: block, rows, images, temperature and balance must be positive.")
    batch = _one_batch(batches_of(calibration, "trajectory"), images)
    bends: dict[str, Tensor] = {}
    shifts: dict[str, Tensor] = {}
    last: set[str] = set()
    with scoring(model), torch.no_grad():
        watched = _Features(model, rows, seed, relation)
        features, output = watched.run(batch)
        if not isinstance(output, Tensor) or output.ndim != 2:
            raise UsageError("criterion trajectory needs a network with one output of (images, classes).")
        for group in graph.groups:
            bend, shift = torch.zeros(2, group.size, dtype=torch.float64)
            for units in torch.arange(group.size).split(block):
                kept = torch.ones(group.size, dtype=torch.bool)
                kept[units] = False
                with zeroed(model, graph, group, kept):
                    moved, changed = watched.run(batch)
                each = torch.stack([_DISTANCES[relation](f, g) for f, g in zip(features, moved, strict=True)])
                first = int((each > 0).nonzero()[0]) if bool((each > 0).any()) else 0
                if first == len(each) - 1 and len(each) > 1:
                    last.add(group.name)
                elif not own:
                    each[first] = 0
                bend[units] = (each.sum() if reduce == "sum" else each.mean()).cpu()
                shift[units] = distillation(output, changed, float(temperature)).cpu()
            if group.size:
                bends[group.name], shifts[group.name] = bend, shift
    scale = balancing_scale(torch.cat(list(bends.values())), torch.cat(list(shifts.values())), float(balance))
    heads = {group.name for group in graph.groups if _of_heads(model, graph, group.name)}
    weights = {n: (head_weight if n in heads else 1) * (last_weight if n in last else 1) for n in bends}
    scores = {n: (bends[n] + scale * shifts[n]) * float(weights[n]) for n in bends}
    return finite_scores(scores, "trajectory", graph)


def relation_distance(first: Float[Tensor, "k d"], second: Float[Tensor, "k e"]) -> Float[Tensor, ""]:
    r"""Return :math:`\lVert F F^\top - G G^\top \rVert_F^2` of rows of unit length, without forming k x k matrices.

    Invariant to rotations of the features and to the scale of each row.
    """
    f, g = functional.normalize(first.double(), dim=1), functional.normalize(second.double(), dim=1)
    squares = (f.T @ f).square().sum() + (g.T @ g).square().sum() - 2 * (f.T @ g).square().sum()
    return squares.clamp_min(0)


def patch_distance(first: Float[Tensor, "n t d"], second: Float[Tensor, "n t e"]) -> Float[Tensor, ""]:
    """Return `relation_distance` of the n images at each place alone, as a mean over the t places."""
    pairs = zip(first.unbind(1), second.unbind(1), strict=True)
    return torch.stack([relation_distance(f, g) for f, g in pairs]).mean()


def mean_distance(first: Float[Tensor, "n t d"], second: Float[Tensor, "n t d"]) -> Float[Tensor, ""]:
    """Return the squared distance of the means over n images of features of unit length."""
    f, g = functional.normalize(first.double(), dim=2), functional.normalize(second.double(), dim=2)
    return (f.mean(dim=0) - g.mean(dim=0)).square().sum()


_DISTANCES = {"sampled": relation_distance, "patch": patch_distance, "mean": mean_distance}


def distillation(teacher: Float[Tensor, "n c"], student: Float[Tensor, "n c"], temperature: float) -> Float[Tensor, ""]:
    r"""Return :math:`\tau^2` times the mean Kullback-Leibler divergence of the student's probabilities, at least 0."""
    known = (teacher.double() / temperature).log_softmax(dim=1)
    found = (student.double() / temperature).log_softmax(dim=1)
    return temperature**2 * (known.exp() * (known - found)).sum(dim=1).mean().clamp_min(0)


def balancing_scale(bends: Tensor, shifts: Tensor, balance: float) -> float:
    """Return the power of ten that puts the two terms at `balance` to 1, by the median of those that are not 0."""
    both = (bends > 0) & (shifts > 0)
    if not both.any():
        return 1.0
    ratio = float((bends[both].log10() - shifts[both].log10()).median())
    return 10.0 ** round(ratio - torch.log10(torch.tensor(balance)).item())


def _one_batch(batches: Any, count: int) -> Any:
    images = [one for one, _ in batches]
    if not isinstance(images[0], Tensor):
        return images[0]
    return torch.cat(images)[:count]


def _of_heads(model: nn.Module, graph: ChannelGraph, name: str) -> bool:
    """Tell whether a group's units own several rows of what makes them and as many columns of what reads them."""
    group = graph[name]
    makers, readers = group.of("producer"), group.of("consumer")
    parameters = dict(model.named_parameters(remove_duplicate=False))
    flat = all(parameters[m.parameter].ndim <= 2 for m in (*makers, *readers) if m.parameter in parameters)
    return bool(makers and readers) and flat and min(m.index.shape[1] for m in (*makers, *readers)) > 1


class _Features:
    """The features behind each block of a network, in the order in which the blocks run."""

    def __init__(self, model: nn.Module, rows: int, seed: int, relation: str = "sampled") -> None:
        self.model, self.rows, self.seed, self.relation = model, rows, seed, relation
        self.names = block_names(model)
        self.chosen: dict[int, Tensor] = {}

    def run(self, images: Any) -> tuple[list[Tensor], Any]:
        """Return the chosen rows of every block's features, and the output."""
        found: list[Tensor] = []
        modules = dict(self.model.named_modules())

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            value = output[0] if isinstance(output, tuple) else output
            if isinstance(value, Tensor) and value.is_floating_point() and value.ndim >= 2:
                found.append(self._rows(value, len(found)))

        handles = [modules[name].register_forward_hook(keep) for name in self.names]
        with hooked(handles):
            return found, run(self.model, images)

    def _rows(self, value: Tensor, number: int) -> Tensor:
        value = value.movedim(1, -1) if value.ndim >= 4 else value
        if self.relation != "sampled":
            return self._places(value.flatten(1, -2) if value.ndim > 2 else value[:, None], number)
        flat = value.flatten(0, -2)
        if number not in self.chosen:
            generator = torch.Generator().manual_seed(self.seed + number)
            self.chosen[number] = torch.randperm(len(flat), generator=generator)[: self.rows]
        return flat[self.chosen[number].to(flat.device)]

    def _places(self, value: Tensor, number: int) -> Tensor:
        """Return all images at as many places as make up the rows."""
        if number not in self.chosen:
            generator = torch.Generator().manual_seed(self.seed + number)
            count = max(1, self.rows // len(value))
            self.chosen[number] = torch.randperm(value.shape[1], generator=generator)[:count]
        return value[:, self.chosen[number].to(value.device)]


def block_names(model: nn.Module) -> list[str]:
    """Return the blocks of a network: the numbered parts of its sequences and lists, those within others left aside.

    A sequence that only holds sequences is gone into, and so is a network that is nothing but one.
    """
    modules = dict(model.named_modules())
    found: list[str] = []
    for name, module in modules.items():
        leaf = name.rpartition(".")[2]
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if leaf.isdecimal() and not inside and not isinstance(module, nn.Sequential | nn.ModuleList):
            found.append(name)
    if found:
        return found
    return [name for name, module in modules.items() if name and not list(module.children())]
