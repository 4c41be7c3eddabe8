"""Bilinear normalization and the TABL network, for matrices of features over time (Tran et al. 2018, 2020)."""

import itertools
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from convette.errors import UsageError
from convette.layers._folding import Stays
from convette.layers.normalization._moments import in_full, moments

# Deviations below this count as 1: a constant row stays a row of zeros.
_FLAT = 1e-4
# Widths and lengths (D, T) of the layers after the input, the published templates; the last T becomes the classes'.
TEMPLATES: dict[str, tuple[tuple[int, int], ...]] = {
    "A": (),
    "B": ((120, 5),),
    "C": ((60, 10), (120, 5)),
}


def _standardised(x: Tensor, dim: int) -> Tensor:
    if x.shape[dim] < 2:
        return torch.zeros_like(x)
    mean, var = moments(x, (dim,))
    var = var * (x.shape[dim] / (x.shape[dim] - 1))
    flat = var < _FLAT**2
    # where before the root: its slope at 0 is infinite.
    return (x - mean) * torch.where(flat, 1.0, var).rsqrt()


class BilinearNorm(nn.Module):
    r"""Normalise a matrix along both of its axes and add the results with learned weights.

    .. math:: Y = y_1 (\lambda_1 \odot Z_1 + B_1) + y_2 (\lambda_2 \odot Z_2 + B_2)

    Z_2 standardises every row (a feature) over time, Z_1 every column (a point in time) over features, each with the
    unbiased deviation of this sample; a deviation below 1e-4 counts as 1. :math:`\lambda_1, B_1` have one value a
    column, :math:`\lambda_2, B_2` one a row.

    Args:
        features: rows D of an input (n, D, T).
        steps: columns T.
        init: of both λ: "ones"; "xavier", normal, the published code's, half of whose scales start negative.
        floor: what a negative y is set to, before the next forward pass in training: 0, or 0.01 as published.

    Raises:
        UsageError: an input of another shape, or sizes below 1.

    Cost: 2D + 2T + 2 parameters. Training and inference are the same. Does not fold, as its statistics are the
    sample's; its shifts B fold into a following `BL` (`fold_shift`).

    Source: Data Normalization for Bilinear Structures in High-Frequency Financial Time-series, Tran et al. 2020,
    arXiv 2003.00598.
    """

    def __init__(
        self, features: int, steps: int, *, init: Literal["ones", "xavier"] = "ones", floor: float = 0.0
    ) -> None:
        super().__init__()
        if features < 1 or steps < 1 or init not in ("ones", "xavier"):
            raise UsageError(f"BilinearNorm: features {features}, steps {steps}, init {init!r} ('ones' or 'xavier').")
        self.features, self.steps, self.floor = features, steps, floor
        self.lam1 = nn.Parameter(torch.ones(1, steps))
        self.shift1 = nn.Parameter(torch.zeros(1, steps))
        self.lam2 = nn.Parameter(torch.ones(features, 1))
        self.shift2 = nn.Parameter(torch.zeros(features, 1))
        self.mix = nn.Parameter(torch.full((2,), 0.5))
        if init == "xavier":
            nn.init.xavier_normal_(self.lam1)
            nn.init.xavier_normal_(self.lam2)

    def forward(self, x: Float[Tensor, "n d t"]) -> Float[Tensor, "n d t"]:
        if x.shape[1:] != (self.features, self.steps):
            raise UsageError(
                f"BilinearNorm: expected an input (n, {self.features}, {self.steps}), got {tuple(x.shape)}; files often"
                " hold (n, steps, features): transpose once."
            )
        if self.training:
            self.project()
        values = in_full(x)
        over_features = self.lam1 * _standardised(values, 1) + self.shift1
        over_time = self.lam2 * _standardised(values, 2) + self.shift2
        return (self.mix[0] * over_features + self.mix[1] * over_time).to(x.dtype)

    @torch.no_grad()
    def project(self) -> None:
        """Set negative weights y of the two parts to the floor, in place: the optimiser keeps its parameter."""
        self.mix.copy_(torch.where(self.mix < 0, self.floor, self.mix))

    def folded(self) -> nn.Module:
        """Raise `Stays`: the statistics are the sample's."""
        raise Stays("BilinearNorm normalises with each sample's own statistics; its shifts fold by fold_shift.")

    def extra_repr(self) -> str:
        return f"{self.features}, {self.steps}"


class BilinearNorm2d(nn.Module):
    """`BilinearNorm` of feature maps (n, c, h, w): over the rows and the columns of each channel's map (our reading).

    `rows` and `columns` are the size of the maps; the parameters are shared by all channels.
    """

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.norm = BilinearNorm(rows, columns)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        return self.norm(x.flatten(0, 1)).view_as(x)

    def folded(self) -> nn.Module:
        """Raise `Stays`, as `BilinearNorm` does."""
        return self.norm.folded()


@torch.no_grad()
def limit_norm(weight: Tensor, largest: float = 10.0) -> None:
    """Scale `weight` in place so that its Frobenius norm is at most `largest`."""
    norm = torch.linalg.vector_norm(weight)
    weight.mul_((largest / norm.clamp_min(largest)).to(weight.dtype))


class BL(nn.Module):
    r"""Bilinear layer: :math:`\mathrm{ReLU}(W_1 X W_2 + B)` of matrices X (n, D1, T1), giving (n, D2, T2).

    Weights are He-uniform, B is 0; ``activation=False`` leaves ReLU out. In training the Frobenius norms of W1 and W2
    are kept at `max_norm` or below. Cost: D1 D2 + T1 T2 + D2 T2 parameters, D2 T1 (D1 + T2) MACs. Source:
    Tran et al. 2018, arXiv 1712.00975.
    """

    def __init__(
        self,
        in_shape: tuple[int, int],
        out_shape: tuple[int, int],
        *,
        max_norm: float = 10.0,
        activation: bool = True,
    ) -> None:
        super().__init__()
        (d1, t1), (d2, t2) = in_shape, out_shape
        self.in_shape, self.out_shape, self.max_norm, self.activation = in_shape, out_shape, max_norm, activation
        self.w1 = nn.Parameter(torch.empty(d2, d1))
        self.w2 = nn.Parameter(torch.empty(t1, t2))
        self.bias = nn.Parameter(torch.zeros(d2, t2))
        nn.init.kaiming_uniform_(self.w1, nonlinearity="relu")
        nn.init.kaiming_uniform_(self.w2, mode="fan_out", nonlinearity="relu")  # stored transposed: in is dimension 0

    def forward(self, x: Float[Tensor, "n d t"]) -> Float[Tensor, "n e f"]:
        if self.training:
            limit_norm(self.w1, self.max_norm)
            limit_norm(self.w2, self.max_norm)
        y = self.w1 @ x @ self.w2 + self.bias
        return y.relu() if self.activation else y

    def extra_repr(self) -> str:
        return f"{self.in_shape} -> {self.out_shape}"


class TABL(nn.Module):
    r"""Bilinear layer with temporal attention.

    .. math:: \bar X = W_1 X, \quad A = \mathrm{softmax}_t(\bar X \tilde W), \quad
              Y = (\lambda \bar X + (1 - \lambda) \bar X \odot A) W_2 + B

    :math:`\tilde W` is W (T1, T1, starting at 1/T1) with 1/T1 on its diagonal for good; λ, 0.5 at the start, is kept
    in 0..1. `attention` returns A, which says which moments counted. Norms are limited as in `BL`. Source: Tran et
    al. 2018, arXiv 1712.00975.
    """

    diagonal: Tensor

    def __init__(self, in_shape: tuple[int, int], out_shape: tuple[int, int], *, max_norm: float = 10.0) -> None:
        super().__init__()
        (d1, t1), (d2, t2) = in_shape, out_shape
        self.in_shape, self.out_shape, self.max_norm = in_shape, out_shape, max_norm
        self.w1 = nn.Parameter(torch.empty(d2, d1))
        self.w = nn.Parameter(torch.full((t1, t1), 1 / t1))
        self.w2 = nn.Parameter(torch.empty(t1, t2))
        self.bias = nn.Parameter(torch.zeros(d2, t2))
        self.lam = nn.Parameter(torch.tensor(0.5))
        self.register_buffer("diagonal", torch.eye(t1), persistent=False)
        nn.init.kaiming_uniform_(self.w1, nonlinearity="relu")
        nn.init.kaiming_uniform_(self.w2, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Float[Tensor, "n d t"]) -> Float[Tensor, "n e f"]:
        if self.training:
            self.project()
        mapped = self.w1 @ x
        attended = self.lam * mapped + (1 - self.lam) * (mapped * self._attention(mapped))
        return attended @ self.w2 + self.bias

    def attention(self, x: Float[Tensor, "n d t"]) -> Float[Tensor, "n e t"]:
        """Return how much each moment counts for each row of the result; rows sum to 1."""
        return self._attention(self.w1 @ x)

    def _attention(self, mapped: Tensor) -> Tensor:
        fixed = self.w * (1 - self.diagonal) + self.diagonal / self.w.shape[0]
        return torch.softmax(mapped @ fixed, -1)

    @torch.no_grad()
    def project(self) -> None:
        """Put λ back into 0..1 and the norms of the weights under their limit, in place."""
        self.lam.clamp_(0, 1)
        for weight in (self.w1, self.w, self.w2):
            limit_norm(weight, self.max_norm)

    def extra_repr(self) -> str:
        return f"{self.in_shape} -> {self.out_shape}"


class TABLNetwork(nn.Module):
    """A chain of `BL` layers with dropout, a `TABL` layer at the end, and a normaliser in front; gives logits.

    Args:
        in_shape: (D, T) of the inputs (n, D, T).
        hidden: (D, T) after each bilinear layer.
        classes: outputs.
        norm: "bin" (`BilinearNorm`), "batch" (`nn.BatchNorm1d` of the features) or None.
        dropout: rate after each bilinear layer.

    Train with Adam at 0.01, class-weighted cross-entropy, on logits: there is no softmax inside.
    """

    def __init__(
        self,
        in_shape: tuple[int, int],
        hidden: Sequence[tuple[int, int]],
        classes: int,
        norm: Literal["bin", "batch"] | None = "bin",
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if norm not in ("bin", "batch", None):
            raise UsageError(f"TABL: norm {norm!r} is none of 'bin', 'batch', None.")
        self.norm: nn.Module = nn.Identity()
        if norm is not None:
            self.norm = BilinearNorm(*in_shape) if norm == "bin" else nn.BatchNorm1d(in_shape[0])
        shapes = [in_shape, *hidden]
        self.layers = nn.Sequential()
        for before, after in itertools.pairwise(shapes):
            self.layers.append(BL(before, after))
            self.layers.append(nn.Dropout(dropout))
        self.head = TABL(shapes[-1], (classes, 1))

    def forward(self, x: Float[Tensor, "n d t"]) -> Float[Tensor, "n classes"]:
        return self.head(self.layers(self.norm(x))).squeeze(2)


def tabl(
    template: Literal["A", "B", "C"] = "C",
    in_shape: tuple[int, int] = (40, 10),
    classes: int = 3,
    norm: Literal["bin", "batch"] | None = "bin",
    dropout: float = 0.1,
) -> TABLNetwork:
    """Return a TABL network by its published template, for windows of limit order books (arXiv 1712.00975, 2003.00598).

    At 40x10 and 3 classes, without and with bilinear normalization: A 234 and 336 parameters, B 5,844 and 5,946,
    C 11,344 and 11,446. Raises `UsageError` for another template.
    """
    if template not in TEMPLATES:
        raise UsageError(f"tabl: template {template!r} is none of {', '.join(TEMPLATES)}.")
    return TABLNetwork(in_shape, TEMPLATES[template], classes, norm, dropout)


@torch.no_grad()
def fold_shift(norm: BilinearNorm, layer: BL) -> None:
    """Move the shifts of `norm` into the bias of the `BL` that alone reads it, in place: exact.

    ``B + W1 (y1 1 B1^T + y2 B2 1^T) W2``; the shifts become 0.
    """
    if (norm.features, norm.steps) != layer.in_shape:
        raise UsageError(
            f"fold_shift: a norm of {norm.features}x{norm.steps} does not feed a layer of {layer.in_shape}."
        )
    shift = norm.mix[0] * norm.shift1 + norm.mix[1] * norm.shift2
    layer.bias.add_(layer.w1 @ shift @ layer.w2)
    norm.shift1.zero_()
    norm.shift2.zero_()
