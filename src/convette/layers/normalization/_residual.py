"""Finding the blocks of residual networks: those of convette, torchvision and timm."""

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional

from convette.errors import UsageError

_INVERTED = (
    "InvertedResidual",
    "DepthwiseSeparableConv",
    "EdgeResidual",
    "UniversalInvertedResidual",
    "MBConv",
    "FusedMBConv",
)
_SKIPS = ("use_res_connect", "has_skip", "residual", "skip")
# What timm's blocks may do besides convolving; a rebuilt block would lose it.
_EXTRAS = ("se", "aa", "drop_block", "drop_path", "attn")


@dataclass(frozen=True)
class ResidualBlock:
    """A block ``act(norm_m(conv_m(... act(norm_1(conv_1(x))))) + shortcut(x))``: where its parts are.

    `stage` counts ``layer1``, ``layer2`` ... from 0; `shortcut` is the attribute's name, None for an identity.
    """

    name: str
    module: nn.Module
    stage: int
    convs: tuple[str, ...]
    norms: tuple[str, ...]
    shortcut: str | None


def residual_blocks(model: nn.Module) -> list[ResidualBlock]:
    """Return the residual blocks of `model` in order: modules with conv1, bn1, conv2, bn2 and a shortcut."""
    found = []
    for name, module in model.named_modules():
        convs = [f"conv{i}" for i in (1, 2, 3) if isinstance(getattr(module, f"conv{i}", None), nn.Module)]
        norms = [f"bn{i}" for i in (1, 2, 3) if isinstance(getattr(module, f"bn{i}", None), nn.Module)]
        shortcuts = [one for one in ("downsample", "shortcut") if hasattr(module, one)]
        if len(convs) < 2 or len(norms) != len(convs) or not shortcuts:
            continue
        value = getattr(module, shortcuts[0])
        identity = value is None or isinstance(value, nn.Identity)
        stages = [part for part in name.split(".") if part.startswith("layer") and part[5:].isdecimal()]
        stage = int(stages[0][5:]) - 1 if stages else 0
        found.append(ResidualBlock(name, module, stage, tuple(convs), tuple(norms), None if identity else shortcuts[0]))
    return found


def last_norms(model: nn.Module) -> list[tuple[nn.BatchNorm2d, bool]]:
    """Return the last batch norm of the branch of every block of `model`, and whether a shortcut goes around it."""
    blocks = residual_blocks(model)
    found = [(getattr(block.module, block.norms[-1]), True) for block in blocks]
    inside = {id(module) for block in blocks for module in block.module.modules()}
    for module in model.modules():
        if type(module).__name__ in _INVERTED and id(module) not in inside:
            norms = [one for one in module.modules() if isinstance(one, nn.BatchNorm2d)]
            around = any(bool(getattr(module, name, False)) for name in _SKIPS)
            found += [(norm, around) for norm in norms[-1:]]
    return [(norm, around) for norm, around in found if isinstance(norm, nn.BatchNorm2d) and not _activates(norm)]


def _activates(norm: nn.Module) -> bool:
    """Whether a norm has an activation or dropout of its own (timm's ``BatchNormAct2d``)."""
    parts = [getattr(norm, name, None) for name in ("act", "drop")]
    return any(isinstance(part, nn.Module) and not isinstance(part, nn.Identity) for part in parts)


def check_plain(block: ResidualBlock, what: str) -> None:
    """Raise `UsageError` for a block that does more than convolve, normalise, activate and add."""
    for name in _EXTRAS:
        value = getattr(block.module, name, None)
        if value is not None and not isinstance(value, nn.Identity):
            raise UsageError(f"{what}: block {block.name!r} has {name!r} ({type(value).__name__}), which is not known.")


class TailNormBlock(nn.Module):
    """A residual block with one more normaliser after its addition: ``relu(tail(branch(x) + shortcut(x)))``.

    Takes over the parts of `block` under the names they had.
    """

    def __init__(self, block: ResidualBlock, tail: nn.Module) -> None:
        super().__init__()
        self.convs, self.norms, self.shortcut_name = block.convs, block.norms, block.shortcut
        for name in (*block.convs, *block.norms, *([block.shortcut] if block.shortcut else [])):
            setattr(self, name, getattr(block.module, name))
        self.tail = tail
        self.train(block.module.training)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for index, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            y = getattr(self, norm)(getattr(self, conv)(y if index == 0 else functional.relu(y)))
        shortcut = x if self.shortcut_name is None else getattr(self, self.shortcut_name)(x)
        return functional.relu(self.tail(y + shortcut))
