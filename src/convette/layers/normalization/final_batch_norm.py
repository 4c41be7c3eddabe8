"""Final batch norm: batch normalization right before the softmax, for imbalanced classes (Kocaman et al. 2020)."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from convette.errors import UsageError
from convette.layers._checks import check_batch
from convette.layers._folding import Stays

Where = Literal["logits", "features"]


class FinalNormLinear(nn.Linear):
    r"""A classifier with batch norm on its logits (or on the features it reads).

    .. math:: o = g \frac{z - \mu}{\sqrt{\sigma^2 + \epsilon}} + b, \quad z = W f + c

    Over a batch every class score has mean b and variance g², so a rare class is not drowned: of two-valued scores with
    a share :math:`\pi` of the rare one, that gets :math:`\sqrt{(1 - \pi) / \pi}` (9.95 at 1:99), the others -0.1005.

    Args:
        in_features: as in `nn.Linear`.
        out_features: classes.
        bias: as in `nn.Linear`; redundant where the norm is on the logits.
        device: of parameters and buffers.
        dtype: of parameters and buffers.
        where: "logits", or "features": batch norm before the linear map.
        momentum: weight of a batch in the running statistics. 0.1; the 0.01 the paper's framework uses leaves them
            unconverged after a few hundred steps: recalibrate before evaluation.
        eps: added to the variance.

    Raises:
        UsageError: an unknown `where`; a batch of one in training.

    Only for softmax losses: with sigmoids there is no effect. Outputs are less confident by design: calibrate before
    thresholds are set. Keep a rare example in every batch, but do not balance batches; leave the scale g without
    weight decay. Cost: 2 parameters a class. Folds to `nn.Linear`, exactly.

    Source: Improving Model Accuracy for Imbalanced Image Classification Tasks by Adding a Final Batch Normalization
    Layer: An Empirical Study, Kocaman, Shir and Bäck 2020, arXiv 2011.06319; follow-up arXiv 2109.09016. The position
    on the logits is our reading of "before the softmax".
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        where: Where = "logits",
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        if where not in ("logits", "features"):
            raise UsageError(f"final batch norm: where {where!r} is none of 'logits', 'features'.")
        self.where: Where = where
        width = out_features if where == "logits" else in_features
        self.norm = nn.BatchNorm1d(width, eps, momentum, device=device, dtype=dtype)

    def forward(self, input: Float[Tensor, "n features"]) -> Float[Tensor, "n classes"]:
        if self.training:
            check_batch(input, "final batch norm")
        if self.where == "features":
            return super().forward(self.norm(input))
        return self.norm(super().forward(input))

    def folded(self) -> nn.Linear:
        """Return the linear layer this is at inference: exact."""
        if self.norm.running_mean is None or self.norm.running_var is None:
            raise Stays("final batch norm without running statistics depends on the batch at inference.")
        plain = self._plain(bias=True)
        scale = self.norm.weight.double() / (self.norm.running_var.double() + self.norm.eps).sqrt()
        shift = self.norm.bias.double() - scale * self.norm.running_mean.double()
        weight = self.weight.double()
        bias = torch.zeros_like(weight[:, 0]) if self.bias is None else self.bias.double()
        with torch.no_grad():
            if self.where == "logits":
                plain.weight.copy_(scale[:, None] * weight)
                plain.bias.copy_(scale * bias + shift)
            else:
                plain.weight.copy_(weight * scale)
                plain.bias.copy_(bias + weight @ shift)
        return plain.eval()

    def dropped(self) -> nn.Linear:
        """Return the linear layer without its norm: another decision boundary, not a fold."""
        plain = self._plain(bias=self.bias is not None)
        with torch.no_grad():
            plain.weight.copy_(self.weight)
            if self.bias is not None:
                plain.bias.copy_(self.bias)
        return plain.train(self.training)

    def _plain(self, bias: bool) -> nn.Linear:
        return nn.Linear(self.in_features, self.out_features, bias, device=self.weight.device, dtype=self.weight.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, where={self.where!r}"


def _classifier(model: nn.Module) -> str:
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name]
    if not names:
        raise UsageError("final batch norm: the network has no linear classifier.")
    return names[-1]


def add_final_norm(
    model: nn.Module, where: Where = "logits", momentum: float = 0.1, *, classifier: str | None = None
) -> nn.Module:
    """Give the classifier of `model` a final batch norm, in place, and return the network; its weights are kept.

    `classifier` names the linear layer; None: the last one. Raises `UsageError` where there is none, or one already.
    """
    name = _classifier(model) if classifier is None else classifier
    linear = dict(model.named_modules()).get(name)
    if not isinstance(linear, nn.Linear) or isinstance(linear, FinalNormLinear):
        raise UsageError(f"final batch norm: {name!r} is {type(linear).__name__}, not a plain linear layer.")
    made = FinalNormLinear(
        linear.in_features,
        linear.out_features,
        linear.bias is not None,
        linear.weight.device,
        linear.weight.dtype,
        where=where,
        momentum=momentum,
    )
    made._parameters.update(linear._parameters)
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, made.train(linear.training))
    return model


def remove_final_norm(model: nn.Module, mode: Literal["fold", "drop"] = "fold") -> nn.Module:
    """Take the final batch norm out of `model`, in place, and return the network.

    "fold" is exact in eval mode. "drop" leaves it out, which keeps what it did to the features and moves the decision
    boundary, often towards the rare class: show balanced accuracy of both. Raises `UsageError` where there is none.
    """
    if mode not in ("fold", "drop"):
        raise UsageError(f"final batch norm: mode {mode!r} is none of 'fold', 'drop'.")
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, FinalNormLinear)]
    if not found:
        raise UsageError("final batch norm: the network has none to remove.")
    for name, module in found:
        owner, _, leaf = name.rpartition(".")
        plain = module.folded().train(module.training) if mode == "fold" else module.dropped()
        setattr(model.get_submodule(owner), leaf, plain)
    return model


def suggests_final_norm(class_counts: Sequence[int] | Tensor) -> bool:
    """Return whether the largest class has at least 20 times the images of the smallest that has any."""
    counts = [int(count) for count in class_counts if int(count) > 0]
    return len(counts) > 1 and max(counts) >= 20 * min(counts)


class ConcatPool2d(nn.Module):
    """Global average and maximum of every channel, side by side: (n, c, h, w) to (n, 2c)."""

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n both"]:
        return torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1)


def concat_pool_head(
    channels: int, num_classes: int, *, hidden: int = 512, final_norm: bool = True, momentum: float = 0.1
) -> nn.Sequential:
    """Return the head of the paper's networks, for feature maps (n, channels, h, w): logits (n, num_classes).

    Average and maximum pooling, batch norm, dropout 0.25, a hidden layer with ReLU and batch norm, dropout 0.5, and
    the classifier, with a final batch norm or without.
    """
    last: nn.Module = nn.Linear(hidden, num_classes)
    if final_norm:
        last = FinalNormLinear(hidden, num_classes, momentum=momentum)
    return nn.Sequential(
        ConcatPool2d(),
        nn.BatchNorm1d(2 * channels),
        nn.Dropout(0.25),
        nn.Linear(2 * channels, hidden),
        nn.ReLU(inplace=True),
        nn.BatchNorm1d(hidden),
        nn.Dropout(0.5),
        last,
    )
