"""MixStyle: mix the feature statistics of images in shallow layers, which makes new styles (Zhou et al. 2021)."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.data import Sampler

from convette.errors import UsageError
from convette.layers.normalization._moments import in_full, instance_moments

Mix = Literal["random", "crossdomain"]


def mix_style(x: Float[Tensor, "n c h w"], order: Tensor, lam: Tensor, eps: float = 1e-6) -> Float[Tensor, "n c h w"]:
    r"""Return `x` with each image's channel statistics mixed with those of image ``order[i]``.

    .. math:: y = \frac{x - \mu}{\sigma} (\lambda \sigma + (1 - \lambda) \sigma') + \lambda \mu + (1 - \lambda) \mu'

    :math:`\sigma^2` is the unbiased variance plus `eps`; statistics carry no gradient and are in float32 for half
    precision. `order` (n,) holds indices, `lam` numbers in 0..1 that broadcast against (n, 1, 1, 1).
    """
    values = in_full(x)
    mean, var = instance_moments(values.detach())
    space = x.shape[2] * x.shape[3]
    deviation = (var * (space / (space - 1)) + eps).sqrt()
    lam = lam.to(values.dtype)
    mixed_mean = lam * mean + (1 - lam) * mean[order]
    mixed_deviation = lam * deviation + (1 - lam) * deviation[order]
    return torch.addcmul(mixed_mean, values - mean, mixed_deviation / deviation).to(x.dtype)


class MixStyle(nn.Module):
    r"""Mix channel means and deviations across a batch, sometimes, in training; nothing else and nothing at inference.

    With probability `p`, one draw a call, `mix_style` with :math:`\lambda \sim \mathrm{Beta}(\alpha, \alpha)` for each
    image and partners at random, or from another domain. For shallow stages: after ``layer1`` and ``layer2`` of a
    ResNet (`insert_mixstyle`), never after the last stage, never right before instance norm, which undoes it.

    Args:
        p: probability, in 0..1; above 0.5 a following batch norm sees too few clean statistics.
        alpha: of the Beta distribution, above 0; at 0.1 styles are swapped or left rather than blended.
        eps: added to variances.
        mix: "random": any partner; "crossdomain": the batch is half one domain, half another, and partners are from
            the other half (`DomainSampler` makes such batches).

    Raises:
        UsageError: values out of range; an odd batch for "crossdomain"; 1x1 maps in training, which have no deviation.

    `active` switches it off (`run_without_mixstyle`). No parameters, no state. Cost: two reductions in training. Folds
    to `nn.Identity`, exactly. Random numbers are torch's; compiled, the draw is a tensor and breaks no graph.

    Source: Domain Generalization with MixStyle, Zhou et al. 2021; extended in arXiv 2107.02053.
    """

    def __init__(self, p: float = 0.5, alpha: float = 0.1, eps: float = 1e-6, mix: Mix = "random") -> None:
        super().__init__()
        if not 0 <= p <= 1 or not alpha > 0:
            raise UsageError(f"MixStyle: p = {p!r} must be in [0, 1] and alpha = {alpha!r} above 0.")
        _check_mix(mix)
        self.p, self.alpha, self.eps, self.active = p, alpha, eps, True
        self.mix: Mix = mix

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        if not self.training or not self.active or self.p == 0 or x.shape[0] == 0:
            return x
        if x.shape[2] * x.shape[3] == 1:
            raise UsageError("MixStyle: 1x1 maps have no deviation; insert it in an earlier stage.")
        compiling = torch.compiler.is_compiling()
        coin = torch.rand((), device=x.device if compiling else None) < self.p
        if not compiling and not bool(coin):
            return x
        lam = torch.distributions.Beta(
            x.new_full((), self.alpha, dtype=torch.float32),
            x.new_full((), self.alpha, dtype=torch.float32),
            validate_args=False,
        ).sample((x.shape[0], 1, 1, 1))
        mixed = mix_style(x, self.partners(x.shape[0], x.device), lam, self.eps)
        return torch.where(coin, mixed, x) if compiling else mixed

    def partners(self, count: int, device: torch.device | None = None) -> Tensor:
        """Return whose statistics each of `count` images gets a share of: a permutation, (count,)."""
        if self.mix == "random":
            return torch.randperm(count, device=device)
        if count % 2:
            raise UsageError(f"MixStyle: 'crossdomain' pairs halves of a batch; {count} images have no halves.")
        half = count // 2
        first, second = torch.randperm(half, device=device), torch.randperm(half, device=device)
        return torch.cat([first + half, second])

    def folded(self) -> nn.Identity:
        """Return what this is at inference: nothing."""
        return nn.Identity()

    def extra_repr(self) -> str:
        return f"p={self.p}, alpha={self.alpha}, mix={self.mix!r}, active={self.active}"


def _check_mix(mix: str) -> None:
    if mix not in ("random", "crossdomain"):
        raise UsageError(f"MixStyle: mix {mix!r} is none of 'random', 'crossdomain'.")


def insert_mixstyle(
    model: nn.Module, after: Sequence[str] = ("layer1", "layer2"), mixstyle: MixStyle | None = None
) -> nn.Module:
    """Put MixStyle behind the named modules of `model`, in place, and return the network.

    A `nn.Sequential` gets it appended, so that all names stay; any other module becomes a sequential of both. Behind
    each module the same instance is called, which draws anew each time. Raises `UsageError` for an unknown name.
    """
    mixstyle = (MixStyle() if mixstyle is None else mixstyle).train(model.training)
    names = dict(model.named_modules())
    for name in after:
        if name not in names or not name:
            raise UsageError(f"insert_mixstyle: the network has no module {name!r}.")
    for name in after:
        module = names[name]
        if isinstance(module, nn.Sequential):
            module.append(mixstyle)
        else:
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, nn.Sequential(module, mixstyle))
    return model


@contextlib.contextmanager
def _switched(model: nn.Module, active: bool, mix: Mix | None) -> Iterator[None]:
    if mix is not None:
        _check_mix(mix)
    layers = [module for module in model.modules() if isinstance(module, MixStyle)]
    before: list[tuple[bool, Mix]] = [(layer.active, layer.mix) for layer in layers]
    try:
        for layer in layers:
            layer.active, layer.mix = active, layer.mix if mix is None else mix
        yield
    finally:
        for layer, (was_active, was_mix) in zip(layers, before, strict=True):
            layer.active, layer.mix = was_active, was_mix


def run_with_mixstyle(model: nn.Module, mix: Mix | None = None) -> contextlib.AbstractContextManager[None]:
    """Return a context in which MixStyle acts in `model`, with partners as `mix` says (None: as each layer says)."""
    return _switched(model, True, mix)


def run_without_mixstyle(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Return a context in which MixStyle does nothing in `model`."""
    return _switched(model, False, None)


class DomainSampler(Sampler[list[int]]):
    """Batches that are half one domain, half another, for ``mix="crossdomain"``.

    Each batch draws two different domains and ``batch_size / 2`` images of each; a domain is gone through in random
    order and begun anew when it is used up. Yields lists of indices, ``len(domains) // batch_size`` a pass.

    Args:
        domains: the domain of every image.
        batch_size: even.
        seed: of the order; pass number e of the sampler uses ``seed + e``.

    Raises:
        UsageError: an odd batch size, or fewer than two domains.
    """

    def __init__(self, domains: Sequence[int] | Tensor, batch_size: int, seed: int = 0) -> None:
        labels = torch.as_tensor(domains)
        self.indices = [torch.nonzero(labels == domain).flatten() for domain in labels.unique().tolist()]
        if batch_size < 2 or batch_size % 2 or len(self.indices) < 2:
            raise UsageError(
                f"DomainSampler: batch size {batch_size} must be even and {len(self.indices)} domain(s) at least 2."
            )
        self.batch_size, self.seed, self.passes, self.count = batch_size, seed, 0, len(labels)

    def __len__(self) -> int:
        return self.count // self.batch_size

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed + self.passes)
        self.passes += 1
        waiting: list[list[int]] = [[] for _ in self.indices]
        for _ in range(len(self)):
            batch: list[int] = []
            for domain in torch.randperm(len(self.indices), generator=generator)[:2].tolist():
                while len(waiting[domain]) < self.batch_size // 2:
                    own = self.indices[domain]
                    waiting[domain] += own[torch.randperm(len(own), generator=generator)].tolist()
                batch += waiting[domain][: self.batch_size // 2]
                del waiting[domain][: self.batch_size // 2]
            yield batch


def semi_mixstyle_loss(
    model: Callable[[Tensor], Tensor],
    labelled: tuple[Tensor, Tensor],
    labels: Tensor,
    unlabelled: tuple[Tensor, Tensor],
    *,
    threshold: float = 0.95,
    weight: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Return the supervised loss and the weighted loss on pseudo-labels of SemiMixStyle; their sum is trained on.

    Pseudo-labels come from the weak views of labelled and unlabelled images without MixStyle; those at least
    `threshold` sure are learned on the strong views with MixStyle, statistics crossing between the labelled and the
    unlabelled half. The second loss is a mean over all images, sure or not.

    Args:
        model: a network with `MixStyle` inside, in train mode.
        labelled: weak and strong view of n labelled images.
        labels: their classes, (n,).
        unlabelled: weak and strong view of n others.
        threshold: least probability of a pseudo-label.
        weight: of the second loss.

    Raises:
        UsageError: different numbers of labelled and unlabelled images.

    Source: MixStyle Neural Networks for Domain Generalization and Adaptation, Zhou et al., arXiv 2107.02053.
    """
    (weak_x, strong_x), (weak_u, strong_u) = labelled, unlabelled
    if len(weak_x) != len(weak_u):
        raise UsageError(f"SemiMixStyle: {len(weak_x)} labelled and {len(weak_u)} unlabelled images must be as many.")
    assert isinstance(model, nn.Module)
    with run_without_mixstyle(model):
        with torch.no_grad():
            sure, pseudo = torch.softmax(model(torch.cat([weak_x, weak_u])).float(), 1).max(1)
        supervised = F.cross_entropy(model(weak_x), labels)
    with run_with_mixstyle(model, "crossdomain"):
        each = F.cross_entropy(model(torch.cat([strong_x, strong_u])), pseudo, reduction="none")
    return supervised, weight * (each * (sure >= threshold)).mean()
