"""Main/subsidiary: a second set of parameters learns which filters of a frozen, binary network stay (arXiv 1812.04210).

A Main/Subsidiary Network Framework for Simplifying Binary Neural Networks, Y. Xu and others, CVPR 2019. All filters of
a binary layer have one norm, so magnitude says nothing; gates learn instead, layer by layer from the bottom up, where
their gradient crosses as few sign functions as possible. It works on real-valued networks too.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from convette._progress import note
from convette.cost import count
from convette.data import ImageData
from convette.errors import StructureError, UsageError
from convette.layers._watching import in_eval, keeping_gradients
from convette.layers.quantization import BinaryConv2d, BinaryLinear
from convette.layers.quantization.binary_networks import padded, sign
from convette.pruning._units import finite_scores
from convette.pruning.recovery import RECOVERY, recalibrate
from convette.surgery import ChannelGraph, apply, trace
from convette.training import TrainSettings, evaluate, train


@dataclass(frozen=True)
class SubsidiarySettings:
    """How masks are learned and the network is retrained between them.

    - `strength` (lambda): the push on every gate. `teaching` (beta): weight of the divergence from the ungated network.
    - `mask_epochs`, `mask_rate`: of Adam on the scores, without weight decay. `retrain_epochs`: of the whole network
      after each layer's cut. `final_epochs`: at the end.
    - `order`: "bottom_up", or "joint" (all gates at once: kept to show the mismatch of gradients).
    - `identity`: what a gate's score is: one number a "filter", or the mean of a tensor of the shape of its "weights",
      as published. `norms`: scale and shift of the batch norm behind a layer learn with its gates.
    - `share`: of each layer's filters stays, those with the largest scores; None: all whose gate is open.
    - `rule`: "learned", or what the paper compares with, for the same `share`: "greedy" (one by one, whatever raises
      the loss least), "l1" (of the latent weights; the same order as by the scale alpha), "random".
    - `least`: filters of a group that stay at least.
    """

    strength: float = 0.2
    teaching: float = 0.0
    mask_epochs: int = 5
    mask_rate: float = 1e-3
    retrain_epochs: int = 2
    final_epochs: int = 2
    order: Literal["bottom_up", "joint"] = "bottom_up"
    identity: Literal["filter", "weights"] = "filter"
    norms: bool = False
    share: float | None = None
    rule: Literal["learned", "greedy", "l1", "random"] = "learned"
    least: int = 1
    batch_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if self.strength < 0 or self.teaching < 0 or self.mask_rate <= 0:
            raise UsageError("main/subsidiary: strength and teaching must be at least 0, mask_rate above 0.")
        if self.share is not None and not 0 < self.share <= 1:
            raise UsageError(f"main/subsidiary: share = {self.share} must be above 0 and at most 1, or None.")
        if self.rule != "learned" and self.share is None:
            raise UsageError(f"main/subsidiary: rule = {self.rule!r} needs a share: it closes no gates by itself.")
        if min(self.mask_epochs, self.least, self.batch_size) < 1 or min(self.retrain_epochs, self.final_epochs) < 0:
            raise UsageError(
                "main/subsidiary: mask_epochs, least and batch_size must be at least 1, epochs at least 0."
            )


@dataclass(frozen=True)
class SubsidiaryResult:
    """The pruned network; filters before and after by group; validation accuracy after each layer's turn."""

    model: nn.Module
    kept: Mapping[str, tuple[int, int]]
    accuracies: tuple[float, ...]

    @property
    def filters(self) -> tuple[int, int]:
        """Filters of all groups that had a turn, before and after."""
        return sum(before for before, _ in self.kept.values()), sum(after for _, after in self.kept.values())


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor) -> Tensor:
        ctx.save_for_backward(scores)
        return (scores > 0).to(scores.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (scores,) = ctx.saved_tensors
        return grads[0] * (scores.abs() <= 1)


def gate(scores: Tensor) -> Tensor:
    r"""Return the hard gate :math:`O = [m > 0]`, whose gradient is passed straight through where :math:`|m| \le 1`."""
    return _Gate.apply(scores)  # type: ignore[return-value]


def main_subsidiary(
    model: nn.Module,
    data: ImageData,
    settings: SubsidiarySettings | None = None,
    *,
    train_settings: TrainSettings | None = None,
    groups: Sequence[str] | None = None,
    device: str | torch.device = "cpu",
) -> SubsidiaryResult:
    r"""Learn for each layer in turn which filters stay, remove the others for real, retrain, go on with the next.

    .. math:: L(M_i) = CE\bigl(y, f(x; W, O_1 .. O_i)\bigr) + \lambda\, \mathrm{mean}_f\, O_i[f]
        + \beta\, \mathrm{KL}(p_{main} \,\|\, p_{gated}), \qquad O = [M > 0]

    Only the scores M_i are trained, from U(0, 0.1): all gates begin open. A gate multiplies what the next layer reads
    (after the sign, so it is 0 and not +1 or -1): exactly what removal does. `groups`: which may be pruned; None: those
    that binary layers make, or all in a network without any. The model is left as it is.

    Raises `StructureError` for a network without such groups, `UsageError` for settings that cannot be. Costs, for each
    layer, `mask_epochs` passes with gradients to one vector, and the retraining.
    """
    settings = settings or SubsidiarySettings()
    network = copy.deepcopy(model)
    example = data.preprocessing(data.train.images(torch.tensor([0])))
    names = list(groups) if groups is not None else prunable_groups(network, trace(network, example))
    if not names:
        raise StructureError(f"{type(model).__name__} has no group of filters that may be pruned.")
    kept: dict[str, tuple[int, int]] = {}
    accuracies = []
    for turn, together in enumerate([names] if settings.order == "joint" else [[name] for name in names]):
        network.eval()
        graph = trace(network, example)
        scores = _scores(network, graph, together, data, settings, turn)
        selection = {name: open_units(score, settings.least, settings.share) for name, score in scores.items()}
        cut = {name: units for name, units in selection.items() if len(units) < graph[name].size}
        kept |= {name: (graph[name].size, len(units)) for name, units in selection.items()}
        if cut:
            apply(network, graph.shrink(cut))
            recalibrate(network, data, seed=settings.seed)
            network = _retrained(network, data, settings.retrain_epochs, train_settings, settings.seed, device)
        accuracies.append(float(evaluate(network, data.validation, data.preprocessing, device=device).accuracy))
        note(f"main/subsidiary: {', '.join(together)}: {kept[together[-1]][1]} of {kept[together[-1]][0]} filters stay")
    network = _retrained(network, data, settings.final_epochs, train_settings, settings.seed, device)
    return SubsidiaryResult(network.eval(), kept, tuple(accuracies))


def subsidiary(
    model: nn.Module,
    graph: ChannelGraph,
    calibration: Iterable[Any] | None = None,
    *,
    strength: float = 0.2,
    epochs: int = 20,
    learning_rate: float = 1e-2,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Score units by gates learned jointly on the calibration batches, the weights frozen: a criterion.

    `strength` pushes every gate towards closing; what the loss holds open scores high. Returns one score a unit of
    every group that convolutions or linear layers read, CPU float32. Raises `UsageError` without calibration data.
    Costs `epochs` passes over the calibration batches.
    """
    batches = list(calibration or ())
    if not batches:
        raise UsageError("criterion subsidiary needs calibration images and labels: give a data set, or use l1.")
    names = [group.name for group in graph.groups if group.size and _readers(model, graph, group.name)]
    scores = learn_gates(
        model, graph, names, lambda epoch: iter(batches), epochs, learning_rate, strength=strength, seed=seed
    )
    return finite_scores(scores, "subsidiary", graph)


def learn_gates(
    model: nn.Module,
    graph: ChannelGraph,
    groups: Sequence[str],
    batches: Callable[[int], Iterator[tuple[Tensor, Tensor]]],
    epochs: int,
    learning_rate: float,
    *,
    strength: float,
    teaching: float = 0.0,
    task: float = 1.0,
    identity: str = "filter",
    norms: bool = False,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Return the learned scores of `groups`; the model's weights, statistics and modes are as before.

    ``batches(epoch)`` yields (images, labels), ready for the network. `task` weighs the cross-entropy. With `norms`
    scales and shifts of the groups' batch norms learn too, in place; `identity`: see `SubsidiarySettings`.
    """
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: _score_shape(model, graph, name, identity) for name in groups}
    raw = {name: (0.1 * torch.rand(shape, generator=generator)).requires_grad_() for name, shape in shapes.items()}
    affine = _norm_parameters(model, graph, groups) if norms else []
    optimizer = torch.optim.Adam([*raw.values(), *affine], learning_rate)
    with in_eval(model), keeping_gradients(model.parameters()):
        model.requires_grad_(False)
        for parameter in affine:
            parameter.requires_grad_(True)
        for epoch in range(epochs):
            for images, labels in batches(epoch):
                scores = {name: score.mean(dim=1) for name, score in raw.items()}
                with gated(model, graph, {name: gate(score) for name, score in scores.items()}):
                    logits = model(images)
                loss = task * functional.cross_entropy(logits, labels)
                loss = loss + strength * sum((gate(score).mean() for score in scores.values()), torch.zeros(()))
                if teaching:
                    with torch.no_grad():
                        taught = model(images).log_softmax(1)
                    loss = loss + teaching * functional.kl_div(
                        logits.log_softmax(1), taught, reduction="batchmean", log_target=True
                    )
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return {name: score.detach().mean(dim=1) for name, score in raw.items()}


def _score_shape(model: nn.Module, graph: ChannelGraph, name: str, identity: str) -> tuple[int, int]:
    """Return a group's units, and how many numbers the score of each is the mean of."""
    makers = [m for m in graph[name].of("producer") if m.parameter.endswith("weight")]
    weight = dict(model.named_parameters())[makers[0].parameter] if makers and identity == "weights" else None
    return graph[name].size, 1 if weight is None else weight.numel() // weight.shape[0]


def _norm_parameters(model: nn.Module, graph: ChannelGraph, groups: Sequence[str]) -> list[nn.Parameter]:
    found = dict(model.named_parameters())
    names = {m.parameter for name in groups for m in graph[name].of("affine") if m.parameter in found}
    return [found[name] for name in sorted(names)]


def open_units(scores: Tensor, least: int = 1, share: float | None = None) -> Tensor:
    """Return the units whose gate is open (with a `share` that many of the best), and the best of the others where
    fewer than `least` are."""
    opened = int((scores > 0).sum()) if share is None else round(share * len(scores))
    return scores.argsort(descending=True, stable=True)[: max(opened, min(least, len(scores)))].sort().values


def prunable_groups(model: nn.Module, graph: ChannelGraph) -> list[str]:
    """Return the groups that only binary layers make, or all where no layer is binary, and that gates can close."""
    modules = dict(model.named_modules())
    binary = any(isinstance(module, BinaryConv2d | BinaryLinear) for module in modules.values())
    found = []
    for group in graph.groups:
        makers = [modules[m.module] for m in group.of("producer") if m.parameter.endswith("weight")]
        ours = not binary or all(isinstance(maker, BinaryConv2d | BinaryLinear) for maker in makers)
        if ours and group.size > 1 and group.constraints.parts == 1 and _readers(model, graph, group.name):
            found.append(group.name)
    return found


@contextmanager
def gated(model: nn.Module, graph: ChannelGraph, gates: Mapping[str, Tensor]) -> Iterator[None]:
    """Run `model` with what its layers read of some groups multiplied by gates (one a unit), as removal would do it.

    In binary layers the gate comes after the sign and after the padding, and their scale is that of the inputs left.
    """
    factors: dict[Any, Tensor] = {}
    for name, values in gates.items():
        for module, index in _readers(model, graph, name):
            channels = module.in_channels if isinstance(module, nn.Conv2d) else module.in_features
            whole = factors[module] if module in factors else torch.ones(channels)
            spread = values[:, None].expand(-1, index.shape[1]).flatten()
            factors[module] = whole.index_put((index.flatten(),), spread)
    try:
        for module, factor in factors.items():
            module.forward = _gated_forward(module, factor)
        yield
    finally:
        for module in factors:
            del module.forward  # the class's own is below it


def _readers(model: nn.Module, graph: ChannelGraph, group: str) -> list[tuple[Any, Tensor]]:
    modules, found = dict(model.named_modules()), []
    for member in graph[group].of("consumer"):
        module = modules[member.module]
        if isinstance(module, nn.Conv2d | nn.Linear) and member.dim == 1 and member.parameter.endswith("weight"):
            groups = module.groups if isinstance(module, nn.Conv2d) else 1
            each = int(module.weight.shape[1])
            found.append((module, torch.cat([member.index + part * each for part in range(groups)], dim=1)))
    return found


def _gated_forward(module: Any, factor: Tensor) -> Callable[[Tensor], Tensor]:
    shape = (1, -1, 1, 1) if isinstance(module, nn.Conv2d) else (-1,)

    def forward(x: Tensor) -> Tensor:
        if isinstance(module, BinaryConv2d | BinaryLinear):
            return _binary(module, x, factor.view(shape), factor)
        return type(module).forward(module, x * factor.view(shape))

    return forward


def _binary(module: Any, x: Tensor, factor: Tensor, channels: Tensor) -> Tensor:
    rounded = module._rounded(x)
    signs = sign(module.weight.detach())
    with torch.no_grad():
        alpha = module.alpha()
        if module.scale != "one" and getattr(module, "groups", 1) == 1:
            size = module.weight.detach().abs()
            left = channels.detach().view(1, -1, *[1] * (size.ndim - 2))
            alpha = (size * left).flatten(1).sum(1) / (left.sum() * size[0, 0].numel()).clamp_min(1)
    if isinstance(module, BinaryConv2d):
        y = padded(rounded, module.padding, module.padding_value) * factor
        y = functional.conv2d(y, signs, None, module.stride, 0, module.dilation, module.groups)
        y = y * alpha.view(1, -1, 1, 1)
        return y if module.bias is None else y + module.bias.view(1, -1, 1, 1)
    y = functional.linear(rounded * factor, signs) * alpha
    return y if module.bias is None else y + module.bias


def greedy_filters(
    model: nn.Module,
    graph: ChannelGraph,
    name: str,
    batches: Sequence[tuple[Tensor, Tensor]],
    keep: int,
) -> Tensor:
    """Return scores of a group's units by the order in which a greedy rule removes them, down to `keep` of them.

    One at a time goes the unit without which, those before it gone too, the loss on `batches` is least. What stays
    shares the highest score. Cost: a pass over `batches` for every unit left at every removal.
    """
    kept = torch.ones(graph[name].size, dtype=torch.bool)
    scores = torch.full((len(kept),), float(len(kept)))
    with in_eval(model), torch.no_grad():
        for turn in range(len(kept) - keep):
            losses = {}
            for unit in kept.nonzero().flatten().tolist():
                kept[unit] = False
                with gated(model, graph, {name: kept.float()}):
                    losses[unit] = sum(
                        float(functional.cross_entropy(model(x), y, reduction="sum")) for x, y in batches
                    )
                kept[unit] = True
            gone = min(losses, key=losses.__getitem__)
            kept[gone], scores[gone] = False, float(turn)
    return scores


def _scores(
    network: nn.Module,
    graph: ChannelGraph,
    names: Sequence[str],
    data: ImageData,
    settings: SubsidiarySettings,
    turn: int,
) -> dict[str, Tensor]:
    if settings.rule == "learned":
        return _learned(network, graph, names, data, settings, turn)
    if settings.rule in ("l1", "random"):
        from convette.pruning.criteria import score_units

        found = score_units(settings.rule, network, graph, None, seed=settings.seed + turn)
        return {name: found[name] for name in names}
    batch = next(data.train.batches(4 * settings.batch_size, shuffle=True, seed=settings.seed))
    batches = [(data.preprocessing(batch.images), batch.labels)]
    share = settings.share or 1.0
    return {n: greedy_filters(network, graph, n, batches, max(1, round(share * graph[n].size))) for n in names}


def _learned(
    network: nn.Module,
    graph: ChannelGraph,
    names: Sequence[str],
    data: ImageData,
    settings: SubsidiarySettings,
    turn: int,
) -> dict[str, Tensor]:
    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in data.train.batches(settings.batch_size, shuffle=True, seed=settings.seed, epoch=epoch):
            yield data.preprocessing(batch.images), batch.labels

    return learn_gates(
        network,
        graph,
        names,
        batches,
        settings.mask_epochs,
        settings.mask_rate,
        strength=settings.strength,
        teaching=settings.teaching,
        identity=settings.identity,
        norms=settings.norms,
        seed=settings.seed + turn,
    )


def _retrained(
    network: nn.Module, data: ImageData, epochs: int, chosen: TrainSettings | None, seed: int, device: Any
) -> nn.Module:
    if not epochs:
        return network
    chosen = replace(chosen or RECOVERY, epochs=epochs, seed=seed)
    return train(network, data, chosen, device=device, title="main/subsidiary").model


def removed_figures(before: nn.Module, after: nn.Module, example: Any) -> dict[str, tuple[int, int]]:
    """Return parameters and MACs before and after: filters kept and parameters kept are not the same share."""
    first, second = count(before, example), count(after, example)
    return {"parameters": (first.parameters, second.parameters), "macs": (first.macs, second.macs)}
