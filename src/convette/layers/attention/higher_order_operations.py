"""HO: filters that a small network generates from the features around each place, applied there (Hu and Raj 2020)."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from convette.errors import UsageError
from convette.layers._checks import check_batch
from convette.layers._folding import Stays
from convette.layers._stages import stages as stages_of

NORMS = ("none", "softmax", "l2")
STARTS = ("scratch", "identity")
_CONVS: dict[int, Any] = {2: nn.Conv2d, 3: nn.Conv3d}
_BATCH_NORMS: dict[int, Any] = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
# The published placement: after every second block.
EVERY = 2


def local_filter(
    values: Float[Tensor, "n c *space"], filters: Float[Tensor, "n g k *space"], window: tuple[int, ...]
) -> Float[Tensor, "n c *space"]:
    r"""Return :math:`z_{c,p} = \sum_k w_{g(c),k,p}\, v_{c,p+k}`: at every place p its own filter of each group.

    Offsets k run over `window` row by row, with zeros around; channels are in g groups of neighbours. One multiply-add
    an offset over shifted views: nothing of k times the size of `values` is made.
    """
    if (
        torch.is_grad_enabled()
        and (values.requires_grad or filters.requires_grad)
        and not torch.compiler.is_compiling()
    ):
        return _LocalFilter.apply(values, filters.to(values.dtype), window)  # type: ignore[return-value]
    padded, taps = _padded(values, filters, window), filters.unbind(2)
    total: Tensor | None = None
    for tap, corner in zip(taps, itertools.product(*map(range, window)), strict=True):
        weighted = tap.unsqueeze(2) * _shifted(padded, corner, values.shape[2:])
        total = weighted if total is None else total + weighted
    assert total is not None
    return total.flatten(1, 2)


def _padded(values: Tensor, filters: Tensor, window: tuple[int, ...]) -> Tensor:
    """Return the values by groups, (n, g, c / g, ...), with zeros around."""
    edges = [size // 2 for size in reversed(window) for _ in range(2)]
    return functional.pad(values, edges).unflatten(1, (filters.shape[1], -1))


def _shifted(padded: Tensor, corner: tuple[int, ...], space: Sequence[int]) -> Tensor:
    for axis, (start, size) in enumerate(zip(corner, space, strict=True), start=3):
        padded = padded.narrow(axis, start, size)
    return padded


class _LocalFilter(torch.autograd.Function):
    """`local_filter` with sums made in place, forward and backward; only values and filters are kept."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, filters: Tensor, window: tuple[int, ...]) -> Tensor:
        ctx.save_for_backward(values, filters)
        ctx.window = window
        padded, space = _padded(values, filters, window), values.shape[2:]
        total = torch.zeros_like(_shifted(padded, (0,) * len(window), space))
        for tap, corner in zip(filters.unbind(2), itertools.product(*map(range, window)), strict=True):
            total.addcmul_(tap.unsqueeze(2), _shifted(padded, corner, space))
        return total.flatten(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, None]:
        (values, filters), window, space = ctx.saved_tensors, ctx.window, upstream.shape[2:]
        padded, upstream = _padded(values, filters, window), upstream.unflatten(1, (filters.shape[1], -1))
        for_padded, for_filters = torch.zeros_like(padded), torch.empty_like(filters)
        for index, corner in enumerate(itertools.product(*map(range, window))):
            torch.sum(upstream * _shifted(padded, corner, space), 2, out=for_filters.select(2, index))
            _shifted(for_padded, corner, space).addcmul_(filters.select(2, index).unsqueeze(2), upstream)
        inner = _shifted(for_padded, tuple(size // 2 for size in window), space)
        return inner.flatten(1, 2), for_filters, None


class HigherOrderBlock(nn.Module):
    r"""A residual block whose filters are functions of the features: a higher-order operation.

    .. math:: u = \mathrm{ReLU}(\mathrm{BN}(W_u x)), \quad v = W_v x, \quad
              w = W_w\, \mathrm{ReLU}(\mathrm{BN}(C * u)) + \delta, \quad
              y = x + \mathrm{BN}(W_y\, \mathrm{ReLU}(z)), \quad z_{c,p} = \sum_{k \in \Omega} w_{g(c),k,p}\, v_{c,p+k}

    The context convolution C sees the window :math:`\Omega` it will weigh; the generated filters w, one a group of
    channels and place, start near the identity :math:`\delta` on v, but depend on the input.

    Args:
        channels: C of an input (n, C, h, w), or (n, C, t, h, w) with a window of three.
        window: odd sides of Ω, (rows, columns) or (frames, rows, columns).
        groups: filters at a place, a divisor of the reduced channels C/2; None: half of them, an eighth when they are
            more than 32.
        norm: of a filter over Ω: "none" (signed), "softmax" (weights that sum to 1) or "l2".
        context: sides of the context convolution; None: those of the window. Smaller ones are refused.
        hidden: channels between context and filters; None: a quarter of C.
        start: "scratch" (the last BN's gamma is 1) or "identity" (0: for insertion into trained networks).
        frames: read an input (n frames, C, h, w) as clips of so many frames; for a window of three.
        device: of parameters and buffers.
        dtype: of parameters and buffers.

    Raises:
        UsageError: sides that are even or smaller than the window, groups that do not divide, another input, one value
            a channel in training.

    Cost, with C' = C/2, K = ``|Ω|``, G groups and a context of c taps, a place: ``2 C C' + c C' C'/2 + C' G K / 2 +
    C' K + C' C`` MACs (the C' K of the filters run as multiply-adds and are memory bound). Its batch norms fold into
    its convolutions; the filters depend on the input and never fold. Sizes, normalisation and start are reconstructed.

    Source: Learnable Higher-Order Representation for Action Recognition, Hu and Raj 2020, arXiv 1811.07519.
    """

    def __init__(
        self,
        channels: int,
        window: tuple[int, ...] = (3, 3),
        groups: int | None = None,
        norm: str = "none",
        context: tuple[int, ...] | None = None,
        *,
        hidden: int | None = None,
        start: str = "scratch",
        frames: int | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        window, context = tuple(window), tuple(window if context is None else context)
        reduced = max(channels // 2, 1)
        groups = (reduced // 8 if reduced > 32 else max(reduced // 2, 1)) if groups is None else groups
        _check_arguments(channels, window, context, reduced, groups, norm, start, frames)
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        conv, batch_norm = _CONVS[len(window)], _BATCH_NORMS[len(window)]
        hidden = max(reduced // 2, 1) if hidden is None else hidden
        self.window, self.norm, self.frames = window, norm, frames
        self.reduce = conv(channels, reduced, 1, bias=False, **where)
        self.reduce_norm = batch_norm(reduced, **where)
        self.value = conv(channels, reduced, 1, bias=False, **where)
        padding = tuple(size // 2 for size in context)
        self.context = conv(reduced, hidden, context, padding=padding, bias=False, **where)
        self.context_norm = batch_norm(hidden, **where)
        self.generator = conv(hidden, groups * math.prod(window), 1, **where)
        self.output = conv(reduced, channels, 1, bias=False, **where)
        self.output_norm = batch_norm(channels, **where)
        self.reset_parameters(start)

    @torch.no_grad()
    def reset_parameters(self, start: str = "scratch") -> None:
        """Draw the weights as He does; the generated filters start near the identity (its weights times 0.3)."""
        for layer in (self.reduce, self.value, self.context, self.generator, self.output):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        self.generator.weight.mul_(0.3)
        taps = self.generator.bias.view(-1, math.prod(self.window))
        taps.zero_()[:, taps.shape[1] // 2] = 1
        nn.init.constant_(self.output_norm.weight, 0.0 if start == "identity" else 1.0)

    def forward(self, x: Float[Tensor, "n c *space"]) -> Float[Tensor, "n c *space"]:
        if self.frames is None:
            return self._filtered(x)
        if x.ndim != 4 or x.shape[0] % self.frames:
            raise UsageError(f"HigherOrderBlock: {tuple(x.shape)} holds no whole clips of {self.frames} frames.")
        clips = x.unflatten(0, (x.shape[0] // self.frames, self.frames)).transpose(1, 2)
        return self._filtered(clips).transpose(1, 2).flatten(0, 1)

    def _filtered(self, x: Tensor) -> Tensor:
        channels = self.output.out_channels
        if x.ndim != len(self.window) + 2 or x.shape[1] != channels:
            raise UsageError(
                f"HigherOrderBlock with a window of {len(self.window)}: expected an input (n, {channels}, ...) of"
                f" {len(self.window) + 2} axes, got {tuple(x.shape)}."
            )
        check_batch(x, "HigherOrderBlock", self.training)
        z = local_filter(self.value(x), self.filters(x), self.window)
        return x + self.output_norm(self.output(functional.relu(z)))

    def filters(self, x: Float[Tensor, "n c *space"]) -> Float[Tensor, "n g k *space"]:
        """Return the filters generated for every place, for offsets of the window row by row."""
        u = functional.relu(self.reduce_norm(self.reduce(x)))
        h = functional.relu(self.context_norm(self.context(u)))
        filters = self.generator(h).unflatten(1, (-1, math.prod(self.window)))
        if self.norm == "softmax":
            return filters.softmax(2)
        return functional.normalize(filters, dim=2) if self.norm == "l2" else filters

    def folded(self) -> nn.Module:
        """Raise `Stays`: the filters are the input's."""
        raise Stays("HigherOrderBlock filters each place with weights generated from it; its batch norms alone fold.")

    def extra_repr(self) -> str:
        frames = "" if self.frames is None else f", frames={self.frames}"
        return f"{self.output.out_channels}, window={self.window}, norm={self.norm!r}{frames}"


def _check_arguments(
    channels: int,
    window: tuple[int, ...],
    context: tuple[int, ...],
    reduced: int,
    groups: int,
    norm: str,
    start: str,
    frames: int | None,
) -> None:
    if norm not in NORMS or start not in STARTS:
        raise UsageError(
            f"HigherOrderBlock: norm {norm!r} ({', '.join(NORMS)}), start {start!r} ({', '.join(STARTS)})."
        )
    if len(window) not in _CONVS or len(context) != len(window) or any(size % 2 == 0 for size in (*window, *context)):
        raise UsageError(f"HigherOrderBlock: window {window}, context {context} must be two or three odd sides each.")
    if any(seen < size for seen, size in zip(context, window, strict=True)):
        raise UsageError(f"HigherOrderBlock: a context of {context} does not see the window {window} it weighs.")
    if channels < 1 or groups < 1 or reduced % groups:
        raise UsageError(
            f"HigherOrderBlock: {groups} groups do not divide the {reduced} reduced of {channels} channels."
        )
    if frames is not None and (frames < 1 or len(window) != 3):
        raise UsageError(f"HigherOrderBlock: frames {frames} go with a window of three, not {window}.")


def insert_higher_order(
    model: nn.Module,
    stages: Sequence[int] = (2, 3),
    window: tuple[int, ...] = (3, 3),
    *,
    groups: int | None = None,
    norm: str = "none",
    start: str = "identity",
    frames: int | None = None,
) -> nn.Module:
    """Put a `HigherOrderBlock` behind every second block of some stages of a residual network; in place, returns it.

    The placement of Hu and Raj 2020, arXiv 1811.07519.

    Args:
        model: a network whose stages are sequences of blocks (ResNets of convette, timm and torchvision and the like).
        stages: which, from 1; the published 2 and 3 (res3, res4) give five blocks in a ResNet-50.
        window: see `HigherOrderBlock`, like `groups`, `norm` and `frames`; a window of three and `frames` for clips
            whose frames go through the network as images.
        start: "identity" leaves a trained network's function as it is; "scratch" to train from the start.

    Raises:
        UsageError: a stage that is not there or holds no blocks.
    """
    found = stages_of(model)
    for number in stages:
        if not 1 <= number <= len(found):
            raise UsageError(f"insert_higher_order: no stage {number}; {type(model).__name__} has {len(found)}.")
        modules = found[number - 1].modules
        blocks = model.get_submodule(modules[0]) if len(modules) == 1 else None
        if not isinstance(blocks, nn.Sequential):
            raise UsageError(f"insert_higher_order: stage {number} ({modules[0]}) is no sequence of blocks.")
        names = list(blocks._modules)
        # A stage of one block gets its operation behind that.
        for name in names[EVERY - 1 :: EVERY] or names:
            block = blocks._modules[name]
            assert block is not None
            weight, width = _last_width(block)
            made = HigherOrderBlock(width, window, groups, norm, start=start, frames=frames)
            made.to(device=weight.device, dtype=weight.dtype)
            blocks._modules[name] = nn.Sequential(block, made.train(block.training))
    return model


def _last_width(block: nn.Module) -> tuple[Tensor, int]:
    """Return a weight of `block` and how many channels it gives: those of its last convolution or batch norm."""
    result = None
    for module in block.modules():
        if isinstance(module, nn.Conv2d):
            result = module.weight, module.out_channels
        elif isinstance(module, nn.BatchNorm2d) and module.weight is not None:
            result = module.weight, module.num_features
    if result is None:
        raise UsageError(f"insert_higher_order: {type(block).__name__} holds no convolution.")
    return result
