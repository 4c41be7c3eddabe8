"""TCC: convolutions whose kernels are sums of one-way filters from the start of training (Boukraichi et al. 2023)."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from convette.errors import UsageError
from convette.layers._convolutions import plain_convolution
from convette.layers._folding import Stays
from convette.layers.convolution._decomposition import compose, decompose

FORMS = ("per_filter", "svd", "cp")
_CONVS = {2: nn.Conv2d, 3: nn.Conv3d}


def factor_parameters(
    in_channels: int, out_channels: int, kernel_size: tuple[int, ...], rank: int, form: str = "per_filter"
) -> int:
    """Return the parameters of the factors (without bias); `in_channels` are those one filter reads."""
    ways = sum(kernel_size)
    if form == "cp":
        return rank * (in_channels + out_channels + ways)
    each = in_channels * ways if form == "svd" else in_channels + ways
    return rank * out_channels * each


def rank_for(
    parameters: int | float, in_channels: int, out_channels: int, kernel_size: tuple[int, ...], form: str = "per_filter"
) -> int:
    """Return the largest rank whose factors hold at most `parameters`, 1 at least."""
    return max(1, int(parameters // factor_parameters(in_channels, out_channels, kernel_size, 1, form)))


def break_even(in_channels: int, out_channels: int, kernel_size: tuple[int, ...], form: str = "per_filter") -> float:
    """Return the rank at which the factors hold as much as the dense kernel."""
    dense = in_channels * out_channels * math.prod(kernel_size)
    return dense / factor_parameters(in_channels, out_channels, kernel_size, 1, form)


class _SlicedKernel(nn.Module):
    """The kernel ``W[o, i] = sum_r rows[o, i, r] columns[o, i, r]^T``: every 2-D slice of rank R."""

    def __init__(self, out_channels: int, in_channels: int, rank: int, kernel: tuple[int, ...], where: Any) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.empty(out_channels, in_channels, rank, kernel[0], **where))
        self.columns = nn.Parameter(torch.empty(out_channels, in_channels, rank, kernel[1], **where))

    def forward(self) -> Float[Tensor, "out fan rows columns"]:
        return torch.einsum("oiru,oirv->oiuv", self.rows, self.columns)


class _FactorizedConv(nn.Module):
    """What factorised convolutions of maps and of volumes have in common."""

    dimensions = 2
    # By form: one-way filters, or vectors whose kernel is composed.
    channel: Any
    ways: Any
    kernel: Any

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: int | str | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        rank: int = 2,
        form: str = "per_filter",
        init: str = "normal",
        adopt: bool = True,
        deploy: str = "dense",
    ) -> None:
        super().__init__()
        self.kernel_size, self.stride, self.dilation = map(self._each, (kernel_size, stride, dilation))
        self.padding = padding if isinstance(padding, str) else self._each(padding)
        self.padding_mode, self.form, self.init = padding_mode, form, init
        self.adopt, self.deploy = adopt, deploy
        self._check(in_channels, out_channels, groups, rank)
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        if form == "svd":
            self.kernel = _SlicedKernel(out_channels, in_channels // groups, rank, self.kernel_size, where)
            self.bias = nn.Parameter(torch.zeros(out_channels, **where)) if bias else None
            self.groups = groups
        else:
            wide = out_channels * rank if form == "per_filter" else rank
            conv: Any = _CONVS[self.dimensions]
            self.channel = conv(in_channels, wide, 1, groups=groups, bias=False, **where)
            last = self.dimensions - 1 if form == "per_filter" else self.dimensions
            ways = [conv(wide, wide, groups=wide, bias=False, **self._way(axis), **where) for axis in range(last)]
            if form == "per_filter":
                # The last one-way filters and the sum over terms are one grouped convolution.
                ways.append(conv(wide, out_channels, groups=out_channels, bias=bias, **self._way(last), **where))
            else:
                ways.append(conv(wide, out_channels, 1, bias=bias, **where))
            self.ways = nn.ModuleList(ways)
        self.reset_parameters()

    def _each(self, value: int | tuple[int, ...]) -> tuple[int, ...]:
        return (value,) * self.dimensions if isinstance(value, int) else tuple(value)

    def _way(self, axis: int) -> dict[str, Any]:
        """Return kernel, stride, padding and dilation of the filter along one axis."""

        def only(values: tuple[int, ...], other: int) -> tuple[int, ...]:
            return tuple(value if k == axis else other for k, value in enumerate(values))

        padding = self.padding if isinstance(self.padding, str) else only(self.padding, 0)
        return {
            "kernel_size": only(self.kernel_size, 1),
            "stride": only(self.stride, 1),
            "dilation": only(self.dilation, 1),
            "padding": padding,
            "padding_mode": self.padding_mode,
        }

    def _check(self, in_channels: int, out_channels: int, groups: int, rank: int) -> None:
        name = type(self).__name__
        if self.form not in FORMS or self.init not in ("normal", "svd"):
            raise UsageError(f"{name}: form {self.form!r} (of {', '.join(FORMS)}), init {self.init!r} (normal, svd).")
        if self.deploy not in ("dense", "factors"):
            raise UsageError(f"{name}: deploy {self.deploy!r} is 'dense' or 'factors'.")
        if rank < 1 or min(in_channels, out_channels) < 1 or in_channels % groups or out_channels % groups:
            raise UsageError(f"{name}: rank {rank}, {in_channels}->{out_channels} channels in {groups} groups.")
        if self.form == "cp" and groups > 1:
            raise UsageError(
                f"{name}: form 'cp' shares its filters among all channels; groups must be 1, not {groups}."
            )
        if self.form == "svd" and (self.dimensions != 2 or self.padding_mode != "zeros"):
            raise UsageError(f"{name}: form 'svd' is for 2-D kernels and zero padding.")

    # What follows is read off the tensors, so that it holds after channels were removed.

    @property
    def in_channels(self) -> int:
        """Channels of the input."""
        return self.kernel.rows.shape[1] * self.groups if self.form == "svd" else self.channel.in_channels

    @property
    def out_channels(self) -> int:
        """Channels of the output."""
        return len(self.kernel.rows) if self.form == "svd" else len(self.ways[-1].weight)  # type: ignore[arg-type]

    @property
    def rank(self) -> int:
        """Terms of every filter (of the whole kernel in form "cp")."""
        if self.form == "svd":
            return self.kernel.rows.shape[2]
        return len(self.channel.weight) // (self.out_channels if self.form == "per_filter" else 1)

    def factors(self) -> list[Float[Tensor, "batch rank size"]]:
        """Return the vectors: a, b, c (out, rank, size) a filter; form "cp": p, a, b, c (1, rank, size); form "svd":
        rows and columns (out x in, rank, size)."""
        if self.form == "svd":
            return [self.kernel.rows.flatten(0, 1), self.kernel.columns.flatten(0, 1)]
        if self.form == "cp":
            one_way = [self.channel.weight, *[way.weight for way in list(self.ways)[:-1]]]
            return [self.ways[-1].weight.flatten(1).T[None], *[w.flatten(1)[None] for w in one_way]]  # type: ignore
        weights: list[Any] = [self.channel.weight, *[way.weight for way in self.ways]]
        return [weight.reshape(self.out_channels, self.rank, -1) for weight in weights]

    def dense_weight(self) -> Float[Tensor, "out fan *kernel"]:
        """Return the kernel that the factors stand for."""
        if self.form == "svd":
            return self.kernel()
        full = compose(self.factors())
        return full if self.form == "per_filter" else full[0]

    def term_norms(self) -> Float[Tensor, "batch rank"]:
        """Return ``|a| |b| |c|`` of every term, the size of what it adds to the kernel."""
        return math.prod(factor.detach().norm(dim=2) for factor in self.factors())  # type: ignore[return-value]

    @torch.no_grad()
    def set_factors(self, factors: Iterable[Tensor]) -> None:
        """Write factors as `factors` returns them."""
        for own, new in zip(self.factors(), factors, strict=True):
            own.copy_(new)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the factors so that the kernel has He's variance, ``2 / fan_in``."""
        fan = self.in_channels // self._groups() * math.prod(self.kernel_size)
        if self.init == "svd":
            dense = torch.randn(self.out_channels, fan) * math.sqrt(2 / fan)
            shape = (self.out_channels, self.in_channels // self._groups(), *self.kernel_size)
            self._adopt(dense.view(shape))
        else:
            # Var(W) = rank times the product of the factors' variances.
            first = math.sqrt(2 / (self.rank * fan))
            for index, factor in enumerate(self.factors()):
                if self.form == "per_filter":
                    deviation = first if index == 0 else 1.0
                else:
                    deviation = math.sqrt(first) if index < 2 else 1.0
                factor.normal_(0, deviation)
        bias = self._bias()
        if bias is not None:
            bias.zero_()

    def _groups(self) -> int:
        return self.groups if self.form == "svd" else self.channel.groups

    def _bias(self) -> nn.Parameter | None:
        return self.bias if self.form == "svd" else self.ways[-1].bias  # type: ignore[return-value]

    def _adopt(self, weight: Tensor, sweeps: int = 30) -> None:
        if self.form == "svd":
            weight = weight.flatten(0, 1)
        elif self.form == "cp":
            weight = weight[None]
        self.set_factors(decompose(weight.double(), self.rank, sweeps))

    @torch.no_grad()
    def take_over(self, old: nn.Module) -> None:
        """Decompose the kernel of the convolution `old` and take its bias; another layer is left alone.

        With ``adopt=False`` (compression from the start of training) the fresh factors stay.
        """
        shape = (self.out_channels, self.in_channels // self._groups(), *self.kernel_size)
        given: Any = old
        if not self.adopt or type(old) is not _CONVS[self.dimensions] or tuple(given.weight.shape) != shape:
            return
        self._adopt(given.weight)
        bias = self._bias()
        if bias is not None and given.bias is not None:
            bias.copy_(given.bias)

    def forward(self, input: Float[Tensor, "n c *space"]) -> Float[Tensor, "n out *positions"]:
        if input.ndim != self.dimensions + 2 or input.shape[1] != self.in_channels:
            raise UsageError(
                f"{type(self).__name__}: expected an input (n, {self.in_channels}, ...) of {self.dimensions + 2} axes,"
                f" got {tuple(input.shape)}."
            )
        if self.form == "svd":
            return functional.conv2d(
                input, self.kernel(), self.bias, self.stride, self.padding, self.dilation, self.groups
            )
        y = self.channel(input)
        for way in self.ways:
            y = way(y)
        return y

    def folded(self) -> nn.Module:
        """Return the plain convolution with the composed kernel: exact, with the parameters and MACs of a dense one.

        Raises `Stays` with ``deploy="factors"``.
        """
        if self.deploy == "factors":
            raise Stays(
                f"{type(self).__name__} keeps its factors, which are smaller (deploy='factors'); materialize makes them"
                " one dense kernel."
            )
        return self.materialized()

    def materialized(self) -> nn.Module:
        """Return the plain convolution with the composed kernel: exact."""
        return plain_convolution(self, self.dense_weight(), self._bias(), self._groups())

    def truncated(self, rank: int) -> "_FactorizedConv":
        """Return a copy with the `rank` largest terms (by `term_norms`) of every filter."""
        if not 1 <= rank <= self.rank:
            raise UsageError(f"{type(self).__name__}: cannot keep {rank} of {self.rank} terms.")
        made = type(self)(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self._groups(),
            self._bias() is not None,
            self.padding_mode,
            rank=rank,
            form=self.form,
            adopt=self.adopt,
            deploy=self.deploy,
        )
        kept = self.term_norms().topk(rank, dim=1).indices.sort(dim=1).values[:, :, None]
        made.to(kept.device, self.factors()[0].dtype)
        made.set_factors([factor.gather(1, kept.expand(-1, -1, factor.shape[2])) for factor in self.factors()])
        mine, theirs = self._bias(), made._bias()
        if mine is not None and theirs is not None:
            theirs.data.copy_(mine.data)
        return made.train(self.training)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"rank={self.rank}, form={self.form!r}"
        )


class FactorizedConv2d(_FactorizedConv):
    r"""A convolution whose kernels are sums of R outer products of vectors, trained in that form.

    .. math:: W_{o,i,u,v} = \sum_{r=1}^R a_{o,r,i}\, b_{o,r,u}\, c_{o,r,v}

    Form "per_filter" (the paper's) is carried out as one-way filters: a 1x1 convolution (a), a depthwise kh x 1 one (b)
    and a 1 x kw one that also adds the terms up (c), nothing but sums in between. Form "svd": every 2-D slice of the
    kernel has rank R, ``W[o,i] = sum_r b[o,i,r] c[o,i,r]^T``; the kernel is composed and used as it is (for k of 7 and
    more). Form "cp": all filters share their vectors, ``W[o,i,u,v] = sum_r p[o,r] a[r,i] b[r,u] c[r,v]`` (ours).

    Args:
        in_channels: as in `nn.Conv2d`, like all further arguments up to `dtype`.
        rank: terms R, of a filter or (form "cp") of the kernel; `rank_for` finds it from a budget.
        form: "per_filter", "svd" or "cp".
        init: "normal": factors drawn so that ``Var(W) = 2 / fan_in``; "svd": a kernel drawn like that, decomposed.
        adopt: decompose the kernel of a convolution this one replaces (`take_over`); False: begin anew.
        deploy: what folding makes of it: "dense" (one layer instead of three, often faster) or "factors" (smaller).

    Raises:
        UsageError: an unknown form, rank below 1, groups with "cp", another input.

    Cost: ``R out (in + kh + kw)`` parameters and about as many MACs a position, against ``out in kh kw``; break-even
    at R = ``in kh kw / (in + kh + kw)`` (`break_even`). Three convolutions instead of one and maps of R out channels
    in between: on a CPU slower than a dense 3x3 from R = 2 on. Folds, exactly, to the `nn.Conv2d` with the
    composed kernel (`folded`, unless it is to stay small: `deploy`). Ranks and initialisation are reconstructed.

    Source: A priori compression of convolutional neural networks for wave simulators, Boukraichi et al. 2023,
    arXiv 2304.04964.
    """


class FactorizedConv3d(_FactorizedConv):
    """`FactorizedConv2d` for volumes (n, c, t, h, w), with one more vector a term; forms "per_filter" and "cp"."""

    dimensions = 3
