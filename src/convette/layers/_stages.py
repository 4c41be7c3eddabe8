"""Where the stages of a network end, of convette, timm and torchvision: by names and by where maps get smaller."""

import re
from dataclasses import dataclass

from torch import nn

from convette.errors import UsageError

_NUMBERED = re.compile(r"(layer|stage|block|conv_block|denseblock|s)_?\d+")
_HOLDERS = ("stages", "layers", "blocks", "features")
# What detection and segmentation networks call the classifier inside them.
_BACKBONES = ("backbone", "encoder", "trunk", "body")


@dataclass(frozen=True)
class Stage:
    """A part of a network whose maps have one size: the names of its modules in order, the last one its end."""

    modules: tuple[str, ...]

    @property
    def end(self) -> str:
        """The module whose result the next stage reads."""
        return self.modules[-1]

    def holds(self, name: str) -> bool:
        """Return whether the module called `name` is one of the stage's or stands within one."""
        return any(f"{name}.".startswith(f"{part}.") for part in self.modules)


def stages(model: nn.Module) -> list[Stage]:
    """Return the stages of `model` in order.

    Children called ``layer1`` ..., ``stages.0`` ..., ``blocks.0`` ... (where those hold several layers) are stages; a
    flat ``features`` is cut where a layer with a stride begins; a ``backbone`` is looked into. Raises `UsageError`
    where none is found.
    """
    named = [name for name, _ in model.named_children() if _NUMBERED.fullmatch(name)]
    if len(named) > 1:
        return [Stage((name,)) for name in named]
    for holder in _HOLDERS:
        child = getattr(model, holder, None)
        if isinstance(child, nn.Sequential | nn.ModuleList) and len(child) > 1:
            return _of_sequence(child, f"{holder}.")
    for inner in _BACKBONES:
        child = getattr(model, inner, None)
        if isinstance(child, nn.Module):
            return [Stage(tuple(f"{inner}.{name}" for name in stage.modules)) for stage in stages(child)]
    if isinstance(model, nn.Sequential) and len(model) > 1:
        return _of_sequence(model, "")
    raise UsageError(
        f"{type(model).__name__}: no stages found (children layer1 ..., stages, blocks or features); name the modules."
    )


def _of_sequence(sequence: nn.Sequential | nn.ModuleList, prefix: str) -> list[Stage]:
    children = [(f"{prefix}{name}", child) for name, child in sequence.named_children()]
    holds = [_holds_blocks(child) for _, child in children]
    # EfficientNet's blocks, ConvNeXt's stages; torchvision's ConvNeXt has convolutions between its stages.
    if sum(holds) > 1 and all(_weighs(child) for _, child in children):
        return [Stage((name,)) for (name, _), held in zip(children, holds, strict=True) if held]
    runs: list[list[tuple[str, nn.Module]]] = [[]]
    for name, child in children:
        if _reduces(child) and runs[-1]:
            runs.append([])
        runs[-1].append((name, child))
    return [Stage(tuple(name for name, _ in run)) for run in runs if any(_weighs(child) for _, child in run)]


def _holds_blocks(module: nn.Module) -> bool:
    """Whether a module is a sequence of blocks, not just a convolution with its norm, or a block itself."""
    if type(module) is not nn.Sequential and not type(module).__name__.endswith("Stage"):
        return False
    return any(len(list(part.children())) > 1 or _holds_blocks(part) for part in module.children())


def _weighs(module: nn.Module) -> bool:
    return any(parameter.ndim > 1 for parameter in module.parameters())


def _reduces(module: nn.Module) -> bool:
    for part in module.modules():
        stride = getattr(part, "stride", 1)
        if isinstance(part, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d) and max(_pair(stride)) > 1:
            return True
    return False


def _pair(value: object) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else (value,)  # type: ignore[return-value]


def place_behind(model: nn.Module, convolution: str) -> str:
    """Return the module behind which something stands after a convolution and its norm, before the activation.

    The norm is the module registered next to the convolution; without one it is the convolution itself. timm's norms
    with an activation of their own have a place between the two.
    """
    owner, _, leaf = convolution.rpartition(".")
    siblings = list(model.get_submodule(owner).named_children())
    index = next(k for k, (name, _) in enumerate(siblings) if name == leaf)
    prefix = f"{owner}." if owner else ""
    if index + 1 == len(siblings):
        return convolution
    name, follower = siblings[index + 1]
    if not _is_norm(follower):
        return convolution
    if isinstance(getattr(follower, "act", None), nn.Module) and isinstance(getattr(follower, "drop", None), nn.Module):
        return f"{prefix}{name}.drop"
    return f"{prefix}{name}"


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower() or isinstance(module, nn.modules.batchnorm._NormBase)
