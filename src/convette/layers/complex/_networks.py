"""Whole complex networks, and the real ones they must be compared with: of as many and of twice as many parameters."""

import copy
import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from convette.errors import UsageError
from convette.layers._modules import TakesOver, replace_modules
from convette.layers.complex._parts import (
    Cardioid,
    ComplexBatchNorm2d,
    ComplexDropout,
    ComplexMaxPool2d,
    ModReLU,
    OnParts,
    ZReLU,
)
from convette.layers.complex.complex_convolution import (
    ComplexConv2d,
    ComplexConvTranspose2d,
    ComplexHead,
    ComplexLinear,
)

ACTIVATIONS: dict[str, Callable[[], nn.Module] | None] = {
    "crelu": None,  # ReLU of pairs of channels is that of both parts
    "zrelu": ZReLU,
    "modrelu": ModReLU,
    "cardioid": Cardioid,
}
_DROPOUTS = (nn.Dropout, nn.Dropout2d)


def to_complex(
    model: nn.Module,
    head: str = "abs",
    complexify: str = "zero",
    *,
    activation: str = "crelu",
    norm: str = "whiten",
    init: str = "kaiming",
    keep: bool = False,
) -> nn.Module:
    """Make a real network complex, of as many complex channels, with real logits; in place, returns the network.

    Convolutions, linear layers and batch norms become complex, max pooling goes by magnitude, dropout takes both parts;
    what works element by element or averages stays as it is. The last linear layer becomes the head. Source: Chatterjee
    et al. 2022, arXiv 2302.04584.

    Args:
        model: any network of convolutions, batch norms, linear layers and layers without weights.
        head: "abs", "real" or "concat", see `ComplexHead`.
        complexify: what makes the images complex: "zero", "fft", "analytic", or "pair" for images whose channels are
            real and imaginary parts in turns (the first layer then reads half as many complex ones).
        activation: what ReLU layers become: "crelu" (stays), "zrelu", "modrelu", "cardioid"; functions called in a
            forward stay ReLU of both parts.
        norm: mode of `ComplexBatchNorm2d`.
        init: of the weights, see `ComplexConv2d`.
        keep: take the weights over as real parts: with "zero" images and "crelu" the network computes what it did. The
            imaginary parts then get no gradient through magnitudes, as their slope at 0 is 0.

    Raises:
        UsageError: a layer with weights of another kind (by name), an unknown word, no linear layer for the head.
    """
    if activation not in ACTIVATIONS:
        raise UsageError(f"to_complex: activation {activation!r} is none of {', '.join(ACTIVATIONS)}.")
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    convs = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    if not linears or not convs:
        raise UsageError(f"to_complex: {type(model).__name__} needs a convolution and a linear layer for its logits.")
    options = {"complexify": complexify, "norm": norm, "init": init, "head": head, "activation": activation}

    def form(name: str, module: nn.Module) -> nn.Module | None:
        new = _complex_form(module, name == convs[0], name == linears[-1], options)
        if new is None or isinstance(module, nn.ReLU):
            return new
        weight = next((p for p in module.parameters()), None)
        if weight is not None:
            new.to(device=weight.device, dtype=weight.dtype)
        if keep and isinstance(new, TakesOver):
            new.take_over(module)
        return new.train(module.training)

    _refuse_others(model)
    return replace_modules(model, form)


def _complex_form(module: nn.Module, first: bool, last: bool, options: dict[str, Any]) -> nn.Module | None:
    if isinstance(module, nn.Conv2d):
        pairs = first and options["complexify"] == "pair"
        if pairs and module.in_channels % 2:
            raise UsageError(f"to_complex: {module.in_channels} channels of the images are no pairs.")
        if module.padding_mode != "zeros":
            raise UsageError(f"to_complex: {module} pads with {module.padding_mode!r}; complex ones pad with zeros.")
        return ComplexConv2d(
            module.in_channels // 2 if pairs else module.in_channels,
            module.out_channels,
            module.kernel_size,  # type: ignore[arg-type]
            module.stride,  # type: ignore[arg-type]
            module.padding,  # type: ignore[arg-type]
            module.dilation,  # type: ignore[arg-type]
            module.groups,
            module.bias is not None,
            init=options["init"],
            complexify=options["complexify"] if first else "pair",
        )
    if isinstance(module, nn.ConvTranspose2d):
        place = (module.kernel_size, module.stride, module.padding, module.output_padding)
        return ComplexConvTranspose2d(module.in_channels, module.out_channels, *place, module.bias is not None)  # type: ignore[arg-type]
    if isinstance(module, nn.BatchNorm2d):
        return ComplexBatchNorm2d(module.num_features, module.eps, module.momentum or 0.1, mode=options["norm"])
    if isinstance(module, nn.Linear):
        size = (module.in_features, module.out_features, module.bias is not None)
        return ComplexHead(*size, head=options["head"]) if last else ComplexLinear(*size, init=options["init"])
    if isinstance(module, nn.ReLU):
        make = ACTIVATIONS[options["activation"]]
        return None if make is None else make()
    if isinstance(module, nn.MaxPool2d):
        place = (module.kernel_size, module.stride, module.padding, module.dilation, module.ceil_mode)
        return ComplexMaxPool2d(*place)  # type: ignore[arg-type]
    if isinstance(module, _DROPOUTS):
        return ComplexDropout(module.p, maps=isinstance(module, nn.Dropout2d))
    # Somebody's own layer without weights (a shortcut that pads channels): each part by itself.
    own = not type(module).__module__.startswith(("torch.nn", "timm.layers"))
    return OnParts(module) if own and not list(module.children()) else None


def _refuse_others(model: nn.Module) -> None:
    known = (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d, nn.Linear)
    for name, module in model.named_modules():
        weighty = bool(list(module.parameters(recurse=False))) and not isinstance(module, known)
        if weighty or (isinstance(module, nn.ConvTranspose2d) and module.groups > 1):
            raise UsageError(
                f"to_complex: {name or 'the model'} is a {type(module).__name__}, which has no complex form."
            )


def match_params(model: nn.Module, example: Tensor, factor: float = 2.0, tolerance: float = 0.02) -> nn.Module:
    """Return a network like `model`, with hidden layers so wide that it has `factor` times the parameters.

    The real twin of a complex network (CNNx2): all hidden widths grow alike (by about sqrt(factor)), the images and the
    outputs keep theirs; weights are drawn anew (He). `model` is left as it is; `example` is an input to trace it on.
    Raises `UsageError` where no widths come within the relative `tolerance`.
    """
    from convette.surgery import apply, grow, trace

    result = copy.deepcopy(model)
    graph = trace(result, example)
    groups = list(graph.groups)
    shapes = {name: tuple(parameter.shape) for name, parameter in result.named_parameters()}

    def count(added: list[int]) -> int:
        sizes = {name: list(shape) for name, shape in shapes.items()}
        for group, more in zip(groups, added, strict=True):
            for member in group.members:
                if member.parameter in sizes:
                    sizes[member.parameter][member.dim] += more * member.index.shape[1]
        return sum(math.prod(shape) for shape in sizes.values())

    target = factor * count([0] * len(groups))
    low, high = 1.0, factor + 1
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if count(_widths(groups, middle)) <= target else (low, middle)
    added = _widths(groups, low)
    # What rounding left: one unit more here and there, as long as that comes closer.
    for index, group in sorted(enumerate(groups), key=lambda pair: -pair[1].size):
        more = added.copy()
        more[index] += group.constraints.parts
        if abs(count(more) - target) < abs(count(added) - target):
            added = more
    if abs(count(added) - target) > tolerance * target:
        raise UsageError(f"match_params: {count(added)} parameters are the nearest to {target:.0f}.")
    plan = {group.name: more for group, more in zip(groups, added, strict=True) if more}
    apply(result, grow(graph, plan))
    return draw_weights(result)


def _widths(groups: list[Any], factor: float) -> list[int]:
    parts = [group.constraints.parts for group in groups]
    return [int((factor - 1) * group.size) // part * part for group, part in zip(groups, parts, strict=True)]


def draw_weights(model: nn.Module) -> nn.Module:
    """Draw the weights of convolutions anew as He does, reset all other layers; in place, returns the network."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif not list(module.children()) and hasattr(module, "reset_parameters"):
            module.reset_parameters()  # type: ignore[operator]
    return model


def study_arms(build: Callable[[], nn.Module], example: Tensor, **options: Any) -> dict[str, nn.Module]:
    """Return the three networks of a fair study: "cnn", "cnn_x2" (real, twice the parameters) and "cv_cnn".

    `build` makes the real network; `options` go to `to_complex`. Print both parameters and MACs of each: equal widths
    are not equal parameters, and equal parameters not equal MACs.
    """
    return {
        "cnn": draw_weights(build()),
        "cnn_x2": match_params(build(), example),
        "cv_cnn": to_complex(build(), **options),
    }
