"""Quadratic convolution: every filter is a full quadratic form of its patch (Mantini and Shah 2020)."""

import math
import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from convette.errors import UsageError
from convette.layers._checks import check_maps, check_plain
from convette.layers._convolutions import pair
from convette.layers._folding import Stays

Init = Literal["normal", "glorot", "linear"]
# Products of a patch matrix with all forms that are held at once, in values; more are computed again for gradients.
_MOST_HELD = 1 << 25
# A filter of more entries than this in a row of its form is warned of: 150² parameters a filter.
WIDE = 150


class WideFormWarning(UserWarning):
    """A full quadratic form was asked for over a large patch."""


class QuadraticConv2d(nn.Module):
    r"""A convolution whose filters are quadratic forms: all products of two values of the patch, and linear terms.

    .. math:: y_o(p) = s\,(v^T Q_o v + b_o^T v) + a_o^T v + c_o, \quad v = \text{patch at } p \in R^m,\; m = k^2 c_{in}

    In the paper's notation :math:`-\tilde v^T A_o \tilde v` with :math:`\tilde v = [v; 1]` and
    A = [[Q, a'], [b^T, c']]: `matrix` and `load_matrix` convert (a = s a', c = s c'). a and b do the same twice, as in
    the paper; with s = -1 a large quadratic energy saturates the ELU that should follow, with s = 1 it grows and
    diverges more easily. Behind it, norms or a small start keep the squares of deep networks in bounds; where there
    are no norms, clip gradients at 1.

    Args:
        in_channels: as in `nn.Conv2d`, like all further arguments up to `dtype`; zeros outside the input, the constant
            term everywhere.
        groups: 1; forms over groups are not built.
        rank: None: the full form, m² + 2 m + 1 parameters a filter. R: Q = sum of R terms s_r u_r u_r^T, which is two
            ordinary convolutions, m (R + 1) + R + 1 parameters; R = m expresses all (ours, not the paper's).
        sign: s, -1 or 1.
        init: "normal": all entries of A of standard deviation 1 / (m + 1), outputs of variance about 1 for unit
            inputs; "glorot": the authors'; "linear": Q and b are 0 and a, c start as in `nn.Conv2d`, for converted
            networks.

    Raises:
        UsageError: groups, padding by name or mode, a rank below 1, an unknown sign or init, an input of another shape.

    Warns `WideFormWarning` for a full form with m + 1 over 150.

    Cost: full, m² + m multiply-accumulates a filter and position, and m element-wise products; low rank m (R + 1) + R.
    In training the full form keeps m values a filter and position (parts of it are computed again where that is much).
    Folding: a batch norm behind it goes in exactly (`absorb`); a quadratic
    form is no plain layer, so it stays. `symmetrized` and `to_low_rank` give the same function in other forms.

    Source: CQNN: Convolutional Quadratic Neural Networks, Mantini and Shah, ICPR 2020,
    doi 10.1109/ICPR48806.2021.9413207.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | str | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        rank: int | None = None,
        sign: Literal[-1, 1] = -1,
        init: Init = "normal",
    ) -> None:
        super().__init__()
        check_plain("QuadraticConv2d", groups=groups, padding=padding, padding_mode=padding_mode)
        if sign not in (-1, 1) or init not in ("normal", "glorot", "linear") or (rank is not None and rank < 1):
            raise UsageError(
                f"QuadraticConv2d: sign {sign}, init {init!r}, rank {rank}: sign is -1 or 1, init 'normal', 'glorot' or"
                " 'linear', rank at least 1 or None."
            )
        self.kernel_size, self.stride = pair(kernel_size), pair(stride)
        self.padding, self.dilation = pair(padding), pair(dilation)
        self.rank = rank
        self.sign: Literal[-1, 1] = sign
        cells = self.kernel_size[0] * self.kernel_size[1]
        if rank is None and cells * in_channels + 1 > WIDE:
            warnings.warn(
                f"QuadraticConv2d({in_channels}, {out_channels}, {kernel_size}): a full form has"
                f" {(cells * in_channels + 1) ** 2:,} parameters a filter; give a rank.",
                WideFormWarning,
                stacklevel=2,
            )
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        shape = (out_channels, in_channels, *self.kernel_size)
        self.weight = nn.Parameter(torch.empty(shape, **where))
        self.bias = nn.Parameter(torch.empty(out_channels, **where)) if bias else None
        if rank is None:
            # Patches flattened, (channel, row, column), as `unfold` gives them: so surgery can follow the channels.
            self.form = nn.Parameter(torch.empty((out_channels, cells * in_channels, cells * in_channels), **where))
            self.row = nn.Parameter(torch.empty((out_channels, cells * in_channels), **where))
        else:
            self.factors = nn.Parameter(torch.empty((out_channels * rank, in_channels, *self.kernel_size), **where))
            self.scale = nn.Parameter(torch.empty((out_channels, rank, 1, 1), **where))
        self._start(init)

    @property
    def in_channels(self) -> int:
        """Channels of the input; read off the weights, so that it follows when channels are removed."""
        return self.weight.shape[1]

    @property
    def out_channels(self) -> int:
        """Filters; read off the weights."""
        return self.weight.shape[0]

    @property
    def patch(self) -> int:
        """m, how many values a filter reads."""
        return self.weight[0].numel()

    @torch.no_grad()
    def _start(self, init: Init) -> None:
        entries = self.patch + 1
        if init == "linear":
            nn.init.kaiming_uniform_(self.weight, math.sqrt(5))
            for parameter in (getattr(self, name, None) for name in ("form", "row", "scale")):
                if parameter is not None:
                    parameter.zero_()
            if self.rank is not None:
                nn.init.normal_(self.factors, std=entries**-0.5)
            if self.bias is not None:
                nn.init.uniform_(self.bias, -((entries - 1) ** -0.5), (entries - 1) ** -0.5)
            return
        if self.rank is not None:
            # Each of R squares of u v has variance 2 |u|^4 for unit inputs: 1 / 2 of the output's in all.
            nn.init.normal_(self.factors, std=(entries - 1) ** -0.5)
            signs = torch.ones(self.rank)
            signs[1::2] = -1
            self.scale.copy_((signs / math.sqrt(4 * self.rank)).view(1, -1, 1, 1))
            nn.init.normal_(self.weight, std=(2 * (entries - 1)) ** -0.5)
            if self.bias is not None:
                nn.init.zeros_(self.bias)
            return
        # Keras takes the first axis of the (out, m + 1, m + 1) tensor for a receptive field.
        bound = math.sqrt(3 / (entries * self.out_channels))
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=1 / entries) if init == "normal" else nn.init.uniform_(
                parameter, -bound, bound
            )

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n out rows columns"]:
        check_maps(x, self.in_channels, "QuadraticConv2d")
        linear = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation)
        quadratic = self._full(x, linear) if self.rank is None else self._low_rank(x)
        return linear + (quadratic if self.sign == 1 else -quadratic)

    def _low_rank(self, x: Tensor) -> Tensor:
        squares = F.conv2d(x, self.factors, None, self.stride, self.padding, self.dilation).square()
        return F.conv2d(squares, self.scale, groups=self.scale.shape[0])

    def _full(self, x: Tensor, like: Tensor) -> Tensor:
        """v^T Q v + b^T v, as (Q v + b) v: the forms of a few filters at a time where that is much."""
        patches = F.unfold(x, self.kernel_size, self.dilation, self.padding, self.stride)
        filters = self.row.shape[0]
        held = patches.numel() * filters
        if held <= _MOST_HELD or torch.compiler.is_compiling():
            return _forms(patches, self.form, self.row).view_as(like)
        count = max(1, filters * _MOST_HELD // held)
        parts = []
        for start in range(0, filters, count):
            form, part = self.form[start : start + count], self.row[start : start + count]
            if torch.is_grad_enabled():
                parts.append(checkpoint(_forms, patches, form, part, use_reentrant=False))
            else:
                parts.append(_forms(patches, form, part))
        return torch.cat(parts, 1).view_as(like)

    # The same function in other forms ---------------------------------------------------------------------------------

    @torch.no_grad()
    def matrix(self) -> Float[Tensor, "out m1 m1"]:
        """Return A, (out, m + 1, m + 1), patches in PyTorch's order (channel, row, column): y = sign * v~^T A v~."""
        out, m = self.out_channels, self.patch
        a = torch.zeros(out, m + 1, m + 1, dtype=self.weight.dtype, device=self.weight.device)
        if self.rank is None:
            a[:, :m, :m] = self.form
            a[:, m, :m] = self.row
        else:
            u = self.factors.reshape(out, self.rank, m)
            a[:, :m, :m] = torch.einsum("or,ori,orj->oij", self.scale[:, :, 0, 0], u, u)
        a[:, :m, m] = self.weight.reshape(out, m) * self.sign
        a[:, m, m] = 0 if self.bias is None else self.bias * self.sign
        return a

    @torch.no_grad()
    def load_matrix(self, a: Float[Tensor, "out m1 m1"], order: Literal["channel", "position"] = "channel") -> None:
        """Set the filters to A, (out, m + 1, m + 1); full forms with a constant only.

        `order`: of the patch, "channel" (channel, row, column) as PyTorch's, or "position" (row, column, channel) as
        the authors' code has it. Raises `UsageError` for another shape, a low rank or no bias.
        """
        out, m = self.out_channels, self.patch
        if self.rank is not None or self.bias is None or tuple(a.shape) != (out, m + 1, m + 1):
            raise UsageError(
                f"QuadraticConv2d: {tuple(a.shape)} does not fit: a full form with bias takes {(out, m + 1, m + 1)}."
            )
        if order == "position":
            index = torch.arange(m).view(*self.kernel_size, self.in_channels).permute(2, 0, 1).flatten()
            index = torch.cat([index, torch.tensor([m])])
            a = a[:, index][:, :, index]
        self.form.copy_(a[:, :m, :m])
        self.row.copy_(a[:, m, :m])
        self.weight.copy_(a[:, :m, m].reshape(self.weight.shape) * self.sign)
        self.bias.copy_(a[:, m, m] * self.sign)

    @torch.no_grad()
    def take_over(self, old: nn.Module) -> None:
        """Compute what a convolution `old` does: its weight and bias are the linear terms, the quadratic ones 0."""
        if not isinstance(old, nn.Conv2d) or old.weight.shape != self.weight.shape or old.groups != 1:
            return
        self._start("linear")
        self.weight.copy_(old.weight)
        if self.bias is not None:
            self.bias.zero_() if old.bias is None else self.bias.copy_(old.bias)

    @torch.no_grad()
    def symmetrized(self) -> "QuadraticConv2d":
        """Return the same function with symmetric Q and all linear terms in `weight`; a full form only."""
        if self.rank is not None:
            raise UsageError("QuadraticConv2d: a low-rank form is symmetric already.")
        made = self._like(None)
        made.form.copy_((self.form + self.form.mT) / 2)
        made.row.zero_()
        made.weight.copy_(self.weight + self.sign * self.row.view_as(self.weight))
        if made.bias is not None and self.bias is not None:
            made.bias.copy_(self.bias)
        return made

    @torch.no_grad()
    def to_low_rank(self, rank: int | None = None) -> "QuadraticConv2d":
        """Return the nearest form of `rank` terms a filter, from the eigenvalues of its symmetric Q; None or the patch
        size: exact. Those of largest size stay."""
        full = self.matrix()
        m = self.patch
        rank = m if rank is None else rank
        q = full[:, :m, :m]
        values, vectors = torch.linalg.eigh(((q + q.mT) / 2).double())
        best = values.abs().argsort(1, descending=True)[:, :rank]
        made = self._like(min(rank, m))
        chosen = torch.gather(vectors, 2, best[:, None].expand(-1, m, -1)).mT
        kept = torch.gather(values, 1, best)
        made.factors.copy_((chosen * kept.abs().sqrt()[..., None]).reshape(made.factors.shape))
        made.scale.copy_(kept.sign().view(made.scale.shape))
        made.weight.copy_(((full[:, :m, m] + full[:, m, :m]) * self.sign).reshape(made.weight.shape))
        if made.bias is not None and self.bias is not None:
            made.bias.copy_(self.bias)
        return made

    def _like(self, rank: int | None, bias: bool | None = None) -> "QuadraticConv2d":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", WideFormWarning)
            made = QuadraticConv2d(
                self.in_channels,
                self.out_channels,
                self.kernel_size,
                self.stride,
                self.padding,
                self.dilation,
                bias=self.bias is not None if bias is None else bias,
                rank=rank,
                sign=self.sign,
                init="linear",
            )
        return made.to(self.weight).train(self.training)  # type: ignore[arg-type]

    @torch.no_grad()
    def absorb(self, norm: nn.BatchNorm2d) -> "QuadraticConv2d":
        """Return the quadratic convolution that does what this and the batch norm behind it do in eval mode: exact.

        Raises `UsageError` for a norm without running statistics or of another width.
        """
        if norm.running_mean is None or norm.running_var is None or norm.num_features != self.out_channels:
            raise UsageError(
                f"QuadraticConv2d: cannot absorb {norm}: {self.out_channels} running statistics are needed."
            )
        made = self._like(self.rank, bias=True)
        gain = torch.rsqrt(norm.running_var + norm.eps)
        gain = gain if norm.weight is None else gain * norm.weight
        shift = -norm.running_mean * gain + (0 if norm.bias is None else norm.bias)
        for name in ("weight", "form", "row", "scale"):
            own = getattr(self, name, None)
            if own is not None:
                getattr(made, name).copy_(own * gain.view(-1, *[1] * (own.ndim - 1)))
        if self.rank is not None:
            made.factors.copy_(self.factors)
        assert made.bias is not None
        made.bias.copy_(shift if self.bias is None else shift + gain * self.bias)
        return made

    def folded(self) -> nn.Module:
        """Raises `Stays`: a quadratic form is no plain layer."""
        raise Stays(
            "QuadraticConv2d: a quadratic form of the patch is no plain layer; `absorb` takes in the norm behind it and"
            " `to_low_rank` makes it of ordinary convolutions."
        )

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride},"
            f" padding={self.padding}, rank={self.rank}, sign={self.sign}"
        )


def _forms(patches: Tensor, form: Tensor, row: Tensor) -> Tensor:
    """Return ``(Q v + b) v`` for patches (n, m, positions): (n, out, positions)."""
    products = torch.einsum("oij,njp->noip", form, patches) + row[..., None]
    return (products * patches[:, None]).sum(2)


def to_quadratic(
    model: nn.Module,
    rank: int | None = 1,
    where: Callable[[str, nn.Module], bool] | None = None,
    *,
    sign: Literal[-1, 1] = -1,
) -> nn.Module:
    """Make convolutions of `model` quadratic, in place and logged as edits; at first it computes what it did.

    Args:
        model: any network; grouped convolutions and 1x1 ones are left alone unless `where` asks for the latter.
        rank: of the forms; None: full, for stems and narrow layers only.
        where: ``where(name, module)`` says which convolutions; None: the first (the stem).
        sign: see `QuadraticConv2d`.

    Raises:
        UsageError: no convolution to convert.
    """
    from convette.surgery import Replacement, apply, convert_edits

    fitting = [
        (name, module)
        for name, module in model.named_modules()
        if type(module) is nn.Conv2d and module.groups == 1 and module.padding_mode == "zeros"
    ]
    wanted = fitting[:1] if where is None else [(name, module) for name, module in fitting if where(name, module)]
    if not wanted:
        raise UsageError(f"to_quadratic: {type(model).__name__} has no convolution to convert.")
    options = {"sign": sign, "init": "linear"} | ({} if rank is None else {"rank": rank})
    names = [name for name, _ in wanted]
    apply(model, *convert_edits(model, {nn.Conv2d: Replacement(QuadraticConv2d, options)}, include=names))
    return model


def absorb_norms(model: nn.Module, example: Any) -> nn.Module:
    """Return a copy of `model` in eval mode in which batch norms right behind quadratic convolutions are absorbed.

    Found by a run on `example`: the norm must be all that reads the convolution's result. Outputs stay equal.
    `convette.fold` does this among its other folds.
    """
    import copy

    from convette.surgery import absorb_edits, apply

    model = copy.deepcopy(model).eval()
    apply(model, *absorb_edits(model, example))
    return model
