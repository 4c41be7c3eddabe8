"""BNET: batch norm that recovers with a depthwise k x k convolution instead of one scale a channel (Xu et al. 2020)."""

from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from convette.errors import UsageError
from convette.layers._checks import check_maps
from convette.layers._folding import Stays
from convette.layers.normalization._residual import last_norms


class BNET2d(nn.Module):
    r"""Batch norm with an enhanced linear transformation: standardise, then a depthwise convolution with bias.

    .. math:: y_{c,i,j} = b_c + \sum_{u,v} w_{c,u,v}\, \hat x_{c,i+u,j+v}, \quad
              \hat x = \frac{x - \mu_c}{\sqrt{\sigma_c^2 + \epsilon}}

    with zeros around :math:`\hat x`. k = 1 is batch norm with scale w.

    Args:
        num_features: channels c of an input (n, c, h, w).
        k: side of the kernel, odd; 3 for classification, 5 for detection backbones.
        eps: added to the variance.
        momentum: weight of a batch in the running statistics.
        init: "dirac" starts as batch norm with scale 1; "zero" (the authors') starts a residual branch at 0 and is
            only for the last normaliser of one: without a shortcut around it, nothing would pass.
        device: of parameters and buffers.
        dtype: of parameters and buffers.

    Raises:
        UsageError: k even, an unknown init, an input of another shape, fewer than two values a channel in training.

    Cost: (k² + 1) c parameters and k² c h w MACs, against 2 c and none counted. Folding: the standardisation goes into
    the convolution before it, exactly; the depthwise convolution stays, as a zero of :math:`\hat x` at the border is
    no constant before it. With k = 1 the whole layer is `nn.BatchNorm2d`, and folds as one.

    Source: Batch Normalization with Enhanced Linear Transformation, Xu et al. 2020, arXiv 2011.14150.
    """

    def __init__(
        self,
        num_features: int,
        k: int = 3,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        *,
        init: Literal["dirac", "zero"] = "dirac",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if k < 1 or k % 2 == 0:
            raise UsageError(f"BNET2d: k = {k} must be odd, so that the result keeps its size.")
        if init not in ("dirac", "zero"):
            raise UsageError(f"BNET2d: init {init!r} is none of 'dirac', 'zero'.")
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.k = k
        self.norm: nn.Module = nn.BatchNorm2d(num_features, eps, momentum, affine=False, **where)
        self.conv = nn.Conv2d(num_features, num_features, k, padding=k // 2, groups=num_features, **where)
        with torch.no_grad():
            self.conv.weight.zero_()
            if init == "dirac":
                self.conv.weight[:, 0, k // 2, k // 2] = 1
            nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]

    @classmethod
    def from_batch_norm(cls, norm: nn.BatchNorm2d, k: int = 3) -> "BNET2d":
        """Return the BNET that computes what `norm` does: scale in the centre of the kernel, shift, statistics."""
        made = cls(norm.num_features, k, norm.eps, norm.momentum)
        if norm.running_mean is None:
            raise UsageError("BNET2d: a batch norm without running statistics cannot be taken over.")
        made.to(norm.running_mean)  # type: ignore[arg-type]
        made.take_over(norm)
        return made.train(norm.training)

    @torch.no_grad()
    def take_over(self, old: nn.Module) -> None:
        """Compute what the batch norm `old` does: its scale in the centre of a Dirac kernel, its shift, statistics."""
        if not isinstance(old, nn.BatchNorm2d) or old.num_features != self.num_features or old.running_mean is None:
            return
        self.conv.weight.zero_()
        self.conv.weight[:, 0, self.k // 2, self.k // 2] = old.weight if old.affine else 1.0
        if old.affine:
            self.conv.bias.copy_(old.bias)  # type: ignore[union-attr]
        statistics = {name: value for name, value in old.state_dict().items() if name not in ("weight", "bias")}
        self.norm.load_state_dict(statistics, strict=False)

    @property
    def num_features(self) -> int:
        """Channels of the input; read off the tensors, so that it follows when channels are removed."""
        return self.conv.weight.shape[0]

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        check_maps(x, self.num_features, "BNET2d", self.training)
        return self.conv(self.norm(x))

    def importance(self) -> Float[Tensor, " c"]:
        """Return the norm of each channel's kernel, which stands where batch norm has the size of its scale."""
        return self.conv.weight.flatten(1).norm(dim=1)

    def freeze(self, frozen: bool = True) -> None:
        """Stop (or go on) learning the recovery, kernel and bias."""
        self.conv.requires_grad_(not frozen)

    def folded(self) -> nn.BatchNorm2d:
        """Return the batch norm this is with k = 1; raises `Stays` for larger kernels."""
        if self.k > 1:
            raise Stays(
                f"BNET2d with k = {self.k} keeps its depthwise convolution: zeros around the standardised map are no"
                " constant in the map before it (the standardisation itself folds into the convolution before it)."
            )
        if not isinstance(self.norm, nn.BatchNorm2d):
            raise Stays("BNET2d: its standardisation is folded already; what is left is a depthwise convolution.")
        plain = nn.BatchNorm2d(self.num_features, self.norm.eps, self.norm.momentum)
        plain.to(self.conv.weight)  # type: ignore[arg-type]
        state = dict(self.norm.state_dict())
        state |= {"weight": self.conv.weight.detach().flatten(), "bias": self.conv.bias.detach()}  # type: ignore[union-attr]
        plain.load_state_dict(state)
        return plain.eval()

    def extra_repr(self) -> str:
        return f"{self.num_features}, k={self.k}"


def upgrade_norm(
    model: nn.Module,
    where: Literal["branch_end", "all"] = "branch_end",
    k: int = 3,
    *,
    keep_function: bool = True,
) -> nn.Module:
    """Replace batch norms of `model` by `BNET2d`; in place, returns the network.

    Args:
        model: any network; for "branch_end" one made of residual or inverted residual blocks.
        where: "branch_end" (the paper's): the last batch norm of every block, not those of its shortcut; "all".
        k: side of the kernels.
        keep_function: start from what each batch norm computes. False: start anew, at 0 where a shortcut goes around
            (the authors'), as batch norm elsewhere.

    Raises:
        UsageError: nothing to replace, or an unknown `where`.
    """
    if where == "branch_end":
        chosen = {id(norm): around for norm, around in last_norms(model)}
    elif where == "all":
        chosen = {id(module): False for module in model.modules() if type(module) is nn.BatchNorm2d}
    else:
        raise UsageError(f"upgrade_norm: where {where!r} is none of 'branch_end', 'all'.")
    if not chosen:
        raise UsageError(f"upgrade_norm: found no batch norm to replace ({where}).")
    for owner in list(model.modules()):
        for name, child in list(owner.named_children()):
            if id(child) not in chosen or not isinstance(child, nn.BatchNorm2d):
                continue
            new = BNET2d.from_batch_norm(child, k)
            if not keep_function:
                init = "zero" if chosen[id(child)] else "dirac"
                fresh = BNET2d(child.num_features, k, child.eps, child.momentum, init=init)
                new = fresh.to(new.conv.weight).train(child.training)  # type: ignore[arg-type]
            setattr(owner, name, new)
    return model
