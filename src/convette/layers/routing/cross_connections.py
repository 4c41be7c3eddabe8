"""FDCC: soft, input-dependent connections between the parallel paths of a multi-path network (Tissera et al. 2020)."""

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from convette.errors import UsageError
from convette.layers._checks import check_maps
from convette.layers._folding import Stays
from convette.layers._stages import stages as stages_of
from convette.layers._watching import hooked, in_eval

# Logit of a path's own way at the start: 0.88 of the softmax of two paths.
OWN = 2.0


class CrossConnection(nn.Module):
    r"""Distribute the features of m paths over n paths, with weights that each path computes from its own features.

    .. math:: \alpha_i = \mathrm{softmax}_j(W_{2,i}\, \mathrm{ReLU}(W_{1,i}\, \mathrm{GAP}(X_i) + b_{1,i}) + b_{2,i}),
              \qquad Y_j = \sum_i \alpha_i^j X_i

    The tensors of the paths lie one after the other along the channels: (n, m C, h, w) gives (n, n C, h, w). As each
    path's weights sum to 1, nothing is lost: :math:`\sum_j Y_j = \sum_i X_i`.

    Args:
        channels: C, of one path.
        incoming: m.
        outgoing: n; None: m. With m = 1 it is the expander behind the stem, with n = 1 the sum.
        hidden: d, width of the gate; None: C/4, 8 at least.
        init: "own" starts with each path mostly on its own way (0.88 for two), "uniform" mixes evenly; W2 starts at 0.
        normalize: "out", over the outgoing paths (the paper's); "in", over the incoming ones (an ablation: it does not
            conserve).
        threshold: in eval, ways with less weight are closed and the others rescaled; 0: soft, as in training.
        device: of parameters.
        dtype: of parameters.

    Raises:
        UsageError: sizes below 1, unknown words, a threshold that could close every way, another input.

    Cost: m (C d + d + d n + n) parameters; m n C h w multiply-adds, memory bound. All paths are computed: soft routing
    saves nothing. Does not fold, as it depends on the input; `freeze_routing` replaces it by its mean. Gate sizes and
    placement are reconstructed.

    Source: Feature-Dependent Cross-Connections in Multi-Path Neural Networks, Tissera et al. 2020, arXiv 2006.13904.
    """

    def __init__(
        self,
        channels: int,
        incoming: int = 2,
        outgoing: int | None = None,
        hidden: int | None = None,
        init: str = "own",
        *,
        normalize: str = "out",
        threshold: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        outgoing = incoming if outgoing is None else outgoing
        hidden = max(8, channels // 4) if hidden is None else hidden
        if min(channels, incoming, outgoing, hidden) < 1 or init not in ("own", "uniform"):
            raise UsageError(
                f"CrossConnection: channels {channels}, {incoming} to {outgoing} paths, hidden {hidden} must be 1 or"
                f" more; init {init!r} is 'own' or 'uniform'."
            )
        if normalize not in ("out", "in") or not 0 <= threshold <= 1 / outgoing:
            raise UsageError(
                f"CrossConnection: normalize {normalize!r} is 'out' or 'in'; threshold {threshold} must be 0 to"
                f" 1/{outgoing}, so that a way stays open."
            )
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.incoming, self.outgoing, self.normalize, self.threshold = incoming, outgoing, normalize, threshold
        self.squeeze = nn.Conv2d(incoming * channels, incoming * hidden, 1, groups=incoming, **where)
        self.gate = nn.Conv2d(incoming * hidden, incoming * outgoing, 1, groups=incoming, **where)
        with torch.no_grad():
            nn.init.zeros_(self.gate.weight)
            assert self.gate.bias is not None
            own = torch.eye(incoming, outgoing) if init == "own" and min(incoming, outgoing) > 1 else torch.zeros(1)
            self.gate.bias.copy_((OWN * own.expand(incoming, outgoing)).flatten())

    @property
    def channels(self) -> int:
        """C of one path."""
        return self.squeeze.weight.shape[1]

    def routes(self, x: Float[Tensor, "n mc h w"]) -> Float[Tensor, "n m j"]:
        r"""Return :math:`\alpha`, what share of each incoming path goes to each outgoing one."""
        pooled = x.mean((2, 3), keepdim=True)
        logits = self.gate(functional.relu(self.squeeze(pooled))).flatten(1)
        routes = logits.unflatten(1, (self.incoming, self.outgoing)).softmax(2 if self.normalize == "out" else 1)
        if self.threshold > 0 and not self.training:
            routes = routes * (routes >= self.threshold)
            routes = routes / routes.sum(2, keepdim=True).clamp_min(1e-12)
        return routes

    def forward(self, x: Float[Tensor, "n mc h w"]) -> Float[Tensor, "n jc h w"]:
        check_maps(x, self.incoming * self.channels, "CrossConnection")
        return mix(x, self.routes(x))

    def folded(self) -> nn.Module:
        """Raise `Stays`: the weights are the input's."""
        raise Stays("CrossConnection weighs the paths by each sample's features; freeze_routing replaces it by a mean.")

    def extra_repr(self) -> str:
        return f"{self.channels}, incoming={self.incoming}, outgoing={self.outgoing}, normalize={self.normalize!r}"


def mix(x: Float[Tensor, "n mc h w"], routes: Float[Tensor, "b m j"]) -> Float[Tensor, "n jc h w"]:
    """Return every outgoing path's sum of the incoming ones, by `routes` of each sample (or one for all)."""
    incoming, outgoing = routes.shape[1:]
    paths = x.chunk(incoming, 1)
    weights = routes.to(x.dtype)
    sums = []
    for j in range(outgoing):
        total = paths[0] * weights[:, 0, j].view(-1, 1, 1, 1)
        for i in range(1, incoming):
            total = total + paths[i] * weights[:, i, j].view(-1, 1, 1, 1)
        sums.append(total)
    return sums[0] if outgoing == 1 else torch.cat(sums, 1)


class StaticRouting(nn.Module):
    """Mix the paths with weights (m, n) that are the same for every input: what `freeze_routing` leaves.

    `as_conv` is the same as a 1x1 convolution, `into` puts it into the convolution that reads it; both are exact.
    """

    mixing: Tensor

    def __init__(self, mixing: Float[Tensor, "m j"]) -> None:
        super().__init__()
        self.register_buffer("mixing", mixing.clone())

    def forward(self, x: Float[Tensor, "n mc h w"]) -> Float[Tensor, "n jc h w"]:
        return mix(x, self.mixing.unsqueeze(0))

    @torch.no_grad()
    def as_conv(self, channels: int) -> nn.Conv2d:
        """Return the 1x1 convolution that does the same for paths of `channels`; C times the multiply-adds."""
        m, n = self.mixing.shape
        conv = nn.Conv2d(m * channels, n * channels, 1, bias=False).to(self.mixing)
        conv.weight.copy_(torch.kron(self.mixing.T.contiguous(), torch.eye(channels).to(self.mixing))[:, :, None, None])
        return conv.eval()

    @torch.no_grad()
    def into(self, conv: nn.Conv2d) -> nn.Conv2d:
        """Return one convolution that does what this and then `conv`, which reads all n paths, do."""
        m, n = self.mixing.shape
        if conv.groups != 1 or conv.in_channels % n or conv.padding_mode != "zeros":
            raise UsageError(f"StaticRouting: {conv} does not read {n} whole paths in one group.")
        made = copy.deepcopy(conv)
        made.in_channels = conv.in_channels // n * m
        parts = torch.einsum("ij,ojcuv->oicuv", self.mixing, conv.weight.unflatten(1, (n, -1)))
        made.weight = nn.Parameter(parts.flatten(1, 2))
        return made

    def folded(self) -> nn.Module:
        """Raise `Stays`: as a convolution it would cost more."""
        raise Stays("StaticRouting adds whole maps; as_conv is the same as a convolution, with C times the work.")

    def extra_repr(self) -> str:
        return f"{self.mixing.shape[0]} -> {self.mixing.shape[1]}"


class Paths(nn.ModuleList):
    """Run each of several modules on its part of the channels and put their results side by side."""

    def forward(self, x: Float[Tensor, "n mc h w"]) -> Float[Tensor, "n jc rows columns"]:
        if x.shape[1] % len(self):
            raise UsageError(f"Paths: {x.shape[1]} channels are not those of {len(self)} paths.")
        return torch.cat([path(part) for path, part in zip(self, x.chunk(len(self), 1), strict=True)], 1)


class PathMean(nn.Module):
    """The mean of the paths: (n, m C, h, w) gives (n, C, h, w)."""

    def __init__(self, paths: int) -> None:
        super().__init__()
        self.paths = paths

    def forward(self, x: Float[Tensor, "n mc h w"]) -> Float[Tensor, "n c h w"]:
        parts = x.chunk(self.paths, 1)
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total / self.paths

    def extra_repr(self) -> str:
        return f"{self.paths}"


class _Copies(nn.Module):
    """The expander without gate: every path reads the stem."""

    def __init__(self, paths: int) -> None:
        super().__init__()
        self.paths = paths

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x] * self.paths, 1)


def multipath(
    model: nn.Module,
    paths: int = 2,
    at: Sequence[int] | None = None,
    *,
    hidden: int | None = None,
    init: str = "own",
    normalize: str = "out",
) -> nn.Module:
    """Make the stages of `model` parallel paths with cross-connections between them; in place, returns the network.

    The stem stays one; behind it an expander feeds M copies of every stage, between stages cross-connections exchange
    their features, and behind the last stage their mean goes to the one head. M paths of width w cost M times the
    stages of width w; a single path M times as wide costs M² times. Source: arXiv 2006.13904.

    Args:
        model: any network with stages (see `convette.layers`), not trained yet: the first path keeps the weights, the
            others draw their own (paths alike would stay alike).
        paths: M.
        at: where connections stand: 0 the expander (without it every path reads the stem), k the end of stage k; None:
            the expander and every stage but the last. Empty: independent paths with averaged features.
        hidden: see `CrossConnection`, like `init` and `normalize`.

    Raises:
        UsageError: fewer than one path, stages that are not there, or a stage without convolution.
    """
    found = stages_of(model)
    wanted = tuple(range(len(found))) if at is None else tuple(at)
    if paths < 1 or any(not 0 <= place < len(found) for place in wanted):
        raise UsageError(f"multipath: {paths} paths, connections at {wanted}; stages end at 1 to {len(found) - 1}.")
    widths = [_first_width(model, stage.modules) for stage in found]
    gate: dict[str, Any] = {"hidden": hidden, "init": init, "normalize": normalize}
    for number, stage in enumerate(found):
        # The names of a stage's modules hold until the stage itself is replaced.
        for name in stage.modules:
            part = model.get_submodule(name)
            if list(part.parameters()) or list(part.buffers()):
                copies = [part, *[_redrawn(part) for _ in range(paths - 1)]]
                _put(model, name, Paths(copies).train(part.training))
        first, last = stage.modules[0], stage.end
        if number == 0:
            expander = CrossConnection(widths[0], 1, paths, **gate) if 0 in wanted else _Copies(paths)
            _put(model, first, nn.Sequential(_like(expander, model), model.get_submodule(first)))
        if number + 1 < len(found) and number + 1 in wanted:
            connection = CrossConnection(widths[number + 1], paths, **gate)
            _put(model, last, nn.Sequential(model.get_submodule(last), _like(connection, model)))
        if number + 1 == len(found):
            _put(model, last, nn.Sequential(model.get_submodule(last), PathMean(paths)))
    return model


def _put(model: nn.Module, name: str, new: nn.Module) -> None:
    owner, _, leaf = name.rpartition(".")
    model.get_submodule(owner)._modules[leaf] = new


def _like(new: nn.Module, model: nn.Module) -> nn.Module:
    weight = next(model.parameters())
    return new.to(device=weight.device, dtype=weight.dtype).train(model.training)


def _first_width(model: nn.Module, names: Sequence[str]) -> int:
    """Return how many channels a stage reads: those of its first convolution."""
    for name in names:
        for module in model.get_submodule(name).modules():
            if isinstance(module, nn.Conv2d):
                return module.in_channels
    raise UsageError(f"multipath: stage {names[0]} holds no convolution.")


def _redrawn(part: nn.Module) -> nn.Module:
    """Return a copy with weights of its own: what each layer draws when it is made, in the sizes that were given.

    Convolutions keep the spread of the weights they had, so that a network's own initialisation carries over.
    """
    made = copy.deepcopy(part)
    for module in made.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            with torch.no_grad():
                spread = module.weight.std() if module.weight.numel() > 1 else module.weight.abs().mean()
                module.weight.normal_().mul_(spread)
        elif hasattr(module, "reset_parameters"):
            module.reset_parameters()  # type: ignore[operator]
    return made


@contextmanager
def collect_routes(model: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """Within the block, note the routes (n, m, j) of every `CrossConnection` that runs, by its name."""
    found: dict[str, list[Tensor]] = {}

    names = {id(module): name for name, module in model.named_modules()}

    def note(module: Any, args: Any) -> None:
        found.setdefault(names[id(module)], []).append(module.routes(args[0]))

    handles = [
        module.register_forward_pre_hook(note) for module in model.modules() if isinstance(module, CrossConnection)
    ]
    with hooked(handles):
        yield found


def balance_loss(routes: Float[Tensor, "n m j"], weight: float = 1e-2) -> Float[Tensor, ""]:
    """Return ``weight * J * sum_j mean(p_j)²`` of the paths' shares p_j: least, `weight`, when all are used alike.

    Against the collapse onto one path (ours; add it to the loss where a path gets less than a twentieth).
    """
    shares = routes.mean((0, 1))
    return weight * routes.shape[2] * shares.square().sum()


@torch.no_grad()
def route_report(
    model: nn.Module, batches: Iterable[tuple[Float[Tensor, "n c h w"], Int[Tensor, " n"]]]
) -> dict[str, Float[Tensor, "classes m j"]]:
    """Return the mean routes of each class at every cross-connection, by name; classes not seen are NaN.

    Runs `model` in eval mode on batches of (images, labels). Raises `UsageError` without batches or connections.
    """
    labels: list[Tensor] = []
    with in_eval(model), collect_routes(model) as seen:
        for images, classes in batches:
            model(images)
            labels.append(classes)
    if not labels or not seen:
        raise UsageError("route_report: the network has no cross-connection, or there were no batches.")
    every = torch.cat(labels)
    return {
        name: torch.stack([torch.cat(parts)[every == label].mean(0) for label in range(int(every.max()) + 1)])
        for name, parts in seen.items()
    }


@torch.no_grad()
def freeze_routing(model: nn.Module, batches: Iterable[Float[Tensor, "n c h w"]]) -> nn.Module:
    """Replace every cross-connection of `model` by its mean routing over `batches`; in place, returns the network.

    The function changes: measure the accuracy before and after. Raises `UsageError` without batches or connections.
    """
    with in_eval(model), collect_routes(model) as routes:
        for images in batches:
            model(images)
    if not routes:
        raise UsageError("freeze_routing: the network has no cross-connection, or there were no batches.")
    for name, parts in routes.items():
        _put(model, name, StaticRouting(torch.cat(parts).mean(0)))
    return model
