"""IBN-Net: instance and batch norm side by side, to see through appearance (Pan et al. 2018, arXiv 1807.09441)."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from convette.errors import UsageError
from convette.layers._checks import check_maps
from convette.layers._folding import Stays
from convette.layers._modules import replace_modules
from convette.layers.normalization._moments import (
    Moments,
    batch_moments,
    instance_moments,
    normalise,
    running_factor,
    track,
)
from convette.layers.normalization._residual import TailNormBlock, check_plain, residual_blocks

Kind = Literal["a", "b"]


class IBN(nn.Module):
    r"""Instance norm for the first channels, batch norm for the others: ``[IN(x[:half]) | BN(x[half:])]``.

    Instance norm takes contrast and colour of each image away, batch norm keeps what tells classes apart. It is for the
    first normaliser of the blocks of shallow stages (`to_ibn`).

    Args:
        num_features: channels c of an input (n, c, h, w).
        ratio: share of instance-normalised channels; ``half = int(c · ratio)``. 0 is batch norm, 1 instance norm.
        eps: added to variances.
        momentum: weight of a batch in the running statistics.
        order: "in-first", or "bn-first" as in published DenseNets.
        other: "batch", or "group" for small batches (up to 32 groups).
        device: of parameters and buffers.
        dtype: of parameters and buffers.

    Raises:
        UsageError: a ratio outside 0..1, unknown options, an input of another shape; 1x1 maps, which have no instance
            statistics, where there are instance-normalised channels.

    Parts are named ``IN`` and ``BN`` as in published weights. Cost: the parameters of batch norm; at inference a
    reduction over the instance half, which depends on the input and does not fold. With ratio 0 the layer folds to
    `nn.BatchNorm2d`, with 1 to `nn.InstanceNorm2d`.

    Source: Two at Once: Enhancing Learning and Generalization Capacities via IBN-Net, Pan et al. 2018,
    arXiv 1807.09441.
    """

    def __init__(
        self,
        num_features: int,
        ratio: float = 0.5,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        *,
        order: Literal["in-first", "bn-first"] = "in-first",
        other: Literal["batch", "group"] = "batch",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if not 0 <= ratio <= 1:
            raise UsageError(f"IBN: ratio = {ratio!r} must be in [0, 1].")
        if order not in ("in-first", "bn-first") or other not in ("batch", "group"):
            raise UsageError(f"IBN: order {order!r} and other {other!r}: 'in-first' or 'bn-first', 'batch' or 'group'.")
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.ratio, self.order = ratio, order
        rest = num_features - int(num_features * ratio) if order == "in-first" else int(num_features * (1 - ratio))
        instances = num_features - rest
        self.IN = nn.InstanceNorm2d(instances, eps, affine=True, **where) if instances else None
        self.BN: nn.Module | None = None
        if rest and other == "batch":
            self.BN = nn.BatchNorm2d(rest, eps, momentum, **where)
        elif rest:
            groups = next(number for number in range(min(32, rest), 0, -1) if rest % number == 0)
            self.BN = nn.GroupNorm(groups, rest, eps, **where)

    @property
    def instances(self) -> int:
        """How many channels are instance-normalised; read off the tensors, so that it follows edits."""
        return 0 if self.IN is None else self.IN.weight.shape[0]

    def _width(self, x: Tensor) -> int:
        """How many channels the input must have; any number of others once a batch norm has been folded away."""
        weight = getattr(self.BN, "weight", None)
        if self.BN is not None and not isinstance(weight, Tensor):
            return x.shape[1]
        return self.instances + (0 if weight is None else weight.shape[0])

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        check_maps(x, self._width(x), "IBN", self.training and isinstance(self.BN, nn.BatchNorm2d))
        if self.IN is not None and x.shape[2] * x.shape[3] == 1:
            raise UsageError("IBN: 1x1 maps have no instance statistics; use batch norm there.")
        if x.shape[0] == 0:
            return x  # torch's instance norm refuses an empty batch
        if self.BN is None and self.IN is not None:
            return self.IN(x)
        if self.IN is None and self.BN is not None:
            return self.BN(x)
        assert self.IN is not None and self.BN is not None
        if self.training and isinstance(self.BN, nn.BatchNorm2d):
            return self._one_pass(x, self.IN, self.BN)
        if self.order == "in-first":
            return torch.cat([self.IN(x[:, : self.instances]), self.BN(x[:, self.instances :])], 1)
        rest = x.shape[1] - self.instances
        return torch.cat([self.BN(x[:, :rest]), self.IN(x[:, rest:])], 1)

    def _one_pass(self, x: Tensor, first: nn.InstanceNorm2d, other: nn.BatchNorm2d) -> Tensor:
        """Return what both parts give in training, from one pass for all moments and one to normalise."""
        found = instance_moments(x)
        in_front = self.order == "in-first"
        cut = self.instances if in_front else x.shape[1] - self.instances
        parts = [Moments(found.mean[:, :cut], found.var[:, :cut]), Moments(found.mean[:, cut:], found.var[:, cut:])]
        own, rest = parts if in_front else parts[::-1]
        batch = batch_moments(rest)
        if other.running_mean is not None and other.running_var is not None:
            values = x.shape[0] * x.shape[2] * x.shape[3]
            track(other.running_mean, other.running_var, batch, values, running_factor(other))
        shared = Moments(batch.mean.expand_as(rest.mean), batch.var.expand_as(rest.var))
        one, two = (own, shared) if in_front else (shared, own)
        mean, var = torch.cat([one.mean, two.mean], 1), torch.cat([one.var, two.var], 1)
        norms = (first, other) if in_front else (other, first)
        weight = torch.cat([norm.weight for norm in norms])
        bias = torch.cat([norm.bias for norm in norms])
        return normalise(x, Moments(mean, var), first.eps, weight, bias)

    @torch.no_grad()
    def take_over(self, old: nn.Module) -> None:
        """Take scales, shifts and the batch half's statistics of the batch norm `old`, channel by channel."""
        if not isinstance(old, nn.BatchNorm2d) or old.running_mean is None or old.weight is None:
            return
        rest = old.num_features - self.instances
        first, last = (self.IN, self.BN) if self.order == "in-first" else (self.BN, self.IN)
        size = self.instances if self.order == "in-first" else rest
        for part, channels in ((first, slice(0, size)), (last, slice(size, None))):
            if part is None:
                continue
            state = {
                name: value[channels] if value.ndim else value
                for name, value in old.state_dict().items()
                if name in part.state_dict()
            }
            part.load_state_dict(state)

    def folded(self) -> nn.Module:
        """Return the one normaliser this is at ratio 0 or 1; raises `Stays` between."""
        import copy

        if self.IN is not None and self.BN is not None:
            raise Stays("IBN: its instance-normalised channels depend on the input at inference.")
        only = self.IN if self.BN is None else self.BN
        assert only is not None
        return copy.deepcopy(only).eval()

    def extra_repr(self) -> str:
        return f"instances={self.instances}, order={self.order!r}"


def _ibn_from(
    norm: nn.BatchNorm2d,
    ratio: float,
    other: Literal["batch", "group"],
    order: Literal["in-first", "bn-first"] = "in-first",
) -> IBN:
    made = IBN(norm.num_features, ratio, norm.eps, norm.momentum, order=order, other=other)
    if norm.weight is None or norm.running_mean is None:
        raise UsageError("to_ibn: a batch norm without scale or running statistics cannot be taken over.")
    made.to(norm.weight)  # type: ignore[arg-type]
    made.take_over(norm)
    return made.train(norm.training)


def to_ibn(
    model: nn.Module,
    variant: Kind = "a",
    stages: int | None = None,
    *,
    cfg: Sequence[Kind | None] | None = None,
    ratio: float | None = None,
    other: Literal["batch", "group"] = "batch",
) -> nn.Module:
    """Make an IBN-Net of a residual network, in place, and return it; scales, shifts and statistics are taken over.

    Variant "a": the first normaliser of each block of the first three stages becomes `IBN`. Variant "b": an affine
    `nn.InstanceNorm2d` after the addition in the last block of the first two stages, and instance norm in the stem:
    stronger invariance, for other domains. The identity path is not touched. A DenseNet has variant "a" only: the first
    normaliser of each layer of the first three blocks, batch norm's channels first.

    Args:
        model: a residual network with stages ``layer1``, ``layer2`` ... (convette, torchvision, timm).
        variant: "a" or "b".
        stages: how many stages from the first; None: 3 for "a", 2 for "b". Use 2 for "a" on 32 px images.
        cfg: the variant of each stage instead, as ("a", "a", "b", None).
        ratio: share of instance-normalised channels; None: 0.5, in DenseNets 0.4.
        other: what stands beside instance norm; "group" for small batches.

    Raises:
        UsageError: no residual blocks, no batch norms where they are expected, or all stages chosen: instance norm in
            the last one takes the evidence for classes away.
    """
    blocks = residual_blocks(model)
    if not blocks and (dense := _dense_layers(model)):
        return _dense_ibn(model, dense, variant, stages, 0.4 if ratio is None else ratio, other)
    ratio = 0.5 if ratio is None else ratio
    if not blocks:
        raise UsageError("to_ibn: found no residual blocks (modules with conv1, bn1, conv2, bn2 and a shortcut).")
    total = max(block.stage for block in blocks) + 1
    if cfg is None:
        count = stages if stages is not None else min(3 if variant == "a" else 2, total - 1)
        cfg = (variant,) * count
    wanted = [*cfg, *[None] * (total - len(cfg))]
    if len(wanted) > total or wanted[-1] is not None or any(kind not in ("a", "b", None) for kind in wanted):
        raise UsageError(
            f"to_ibn: {wanted} for {total} stages; each is 'a', 'b' or None, and the last stage must stay without."
        )
    last = {block.stage: block for block in blocks}
    chosen: dict[str, nn.Module] = {}
    for block in blocks:
        kind = wanted[block.stage]
        if kind == "a":
            norm = getattr(block.module, block.norms[0])
            if not isinstance(norm, nn.BatchNorm2d):
                raise UsageError(f"to_ibn: {block.name}.{block.norms[0]} is {type(norm).__name__}, no batch norm.")
            chosen[f"{block.name}.{block.norms[0]}"] = _ibn_from(norm, ratio, other)
        elif kind == "b" and last[block.stage] is block:
            check_plain(block, "to_ibn")
            width = getattr(block.module, block.norms[-1]).num_features
            weight = next(block.module.parameters())
            chosen[block.name] = TailNormBlock(block, nn.InstanceNorm2d(width, affine=True).to(weight))  # type: ignore[arg-type]
    if "b" in wanted:
        stem = next((n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)), None)
        norm = model.get_submodule(stem) if stem is not None else None
        if stem is None or not isinstance(norm, nn.BatchNorm2d) or any(stem.startswith(b.name + ".") for b in blocks):
            raise UsageError("to_ibn: variant 'b' found no batch norm in the stem.")
        chosen[stem] = _ibn_from(norm, 1.0, "batch").folded().train(norm.training)
    return replace_modules(model, lambda name, _: chosen.get(name))


def _dense_layers(model: nn.Module) -> list[tuple[str, int]]:
    """Return the first norms of the layers of a DenseNet (torchvision's, timm's) by name, and their block from 0."""
    found: list[tuple[str, int]] = []
    blocks: list[str] = []
    for name, module in model.named_modules():
        if type(module).__name__.endswith("DenseLayer") and isinstance(getattr(module, "norm1", None), nn.BatchNorm2d):
            block = name.rpartition(".")[0]
            blocks += [block] if block not in blocks else []
            found.append((f"{name}.norm1", blocks.index(block)))
    return found


def _dense_ibn(
    model: nn.Module,
    layers: list[tuple[str, int]],
    variant: Kind,
    stages: int | None,
    ratio: float,
    other: Literal["batch", "group"],
) -> nn.Module:
    total = max(block for _, block in layers) + 1
    count = min(3, total - 1) if stages is None else stages
    if variant != "a" or not 0 < count < total:
        raise UsageError(f"to_ibn: a DenseNet of {total} blocks takes variant 'a' in 1 to {total - 1} of them.")
    wanted = {name for name, block in layers if block < count}

    def choose(name: str, module: nn.Module) -> nn.Module | None:
        if name not in wanted or not isinstance(module, nn.BatchNorm2d):
            return None
        made = _ibn_from(module, ratio, other, "bn-first")
        # timm's norms have an activation of their own.
        rest = [part for part in (getattr(module, "drop", None), getattr(module, "act", None)) if part is not None]
        return nn.Sequential(made, *rest) if rest else made

    return replace_modules(model, choose)


def resnet50_ibn_a(num_classes: int = 1000) -> nn.Module:
    """Return ResNet-50-IBN-a: 25,557,032 parameters for 1000 classes, as many as ResNet-50 (arXiv 1807.09441)."""
    return _resnet50("a", num_classes)


def resnet50_ibn_b(num_classes: int = 1000) -> nn.Module:
    """Return ResNet-50-IBN-b: 25,558,568 parameters for 1000 classes (arXiv 1807.09441)."""
    return _resnet50("b", num_classes)


def _resnet50(variant: Kind, num_classes: int) -> nn.Module:
    """Return torchvision's network converted by a logged edit, so that it can be saved and loaded."""
    from torchvision.models import resnet50

    from convette.surgery import Install, Origin, apply, set_origin

    model = resnet50(num_classes=num_classes)
    # As convette.models writes it, which builds the network again from it.
    arguments = {"num_classes": num_classes, "in_channels": 3, "stem": "default"}
    set_origin(model, Origin("torchvision:resnet50", arguments))
    apply(model, Install(f"{__name__}:to_ibn", {"variant": variant}))
    return model
