"""CV-CNN: complex-valued convolutions and linear maps as real ones on pairs of channels (Chatterjee et al. 2022).

A complex map of C channels is a real tensor of 2C: channel 2c is the real part of channel c, 2c + 1 its imaginary part.
Groups, concatenation and everything that works element by element or on rows and columns then keep their meaning, half
precision works, and exporters see real convolutions. Layers also take tensors of a complex type and give such back.
"""

import math
from typing import Any

import torch
from jaxtyping import Float, Inexact
from torch import Tensor, nn
from torch.nn import functional

from convette.errors import UsageError
from convette.layers._convolutions import pair, plain_convolution

INITS = ("kaiming", "rayleigh")
METHODS = ("block", "karatsuba")
INPUTS = ("pair", "zero", "fft", "analytic")
HEADS = ("abs", "real", "concat")


def as_pairs(z: Inexact[Tensor, "n c *rest"]) -> Float[Tensor, "n pairs *rest"]:
    """Return a complex tensor as pairs of channels; a real one as it is."""
    return torch.view_as_real(z).movedim(-1, 2).flatten(1, 2) if z.is_complex() else z


def as_complex(x: Float[Tensor, "n pairs *rest"]) -> Inexact[Tensor, "n c *rest"]:
    """Return pairs of channels as a complex tensor."""
    return torch.view_as_complex(x.unflatten(1, (-1, 2)).movedim(2, -1).contiguous())


def parts(x: Float[Tensor, "n pairs *rest"]) -> tuple[Float[Tensor, "n c *rest"], Float[Tensor, "n c *rest"]]:
    """Return real and imaginary parts of pairs of channels."""
    real, imaginary = x.unflatten(1, (-1, 2)).unbind(2)
    return real, imaginary


def joined(real: Float[Tensor, "n c *rest"], imaginary: Float[Tensor, "n c *rest"]) -> Float[Tensor, "n pairs *rest"]:
    """Return the pairs of channels of two parts."""
    return torch.stack([real, imaginary], 2).flatten(1, 2)


def magnitude(x: Float[Tensor, "n pairs *rest"]) -> Float[Tensor, "n c *rest"]:
    """Return ``sqrt(a² + b² + 1e-12)`` of every pair: its slope at 0 is finite."""
    real, imaginary = parts(x)
    return (real.square() + imaginary.square() + 1e-12).sqrt()


def complexified(x: Float[Tensor, "n c *space"], mode: str) -> Float[Tensor, "n pairs *space"]:
    """Return real maps as complex ones, in pairs of channels.

    "zero": imaginary part 0; "fft": the orthonormal 2-D Fourier transform; "analytic": the Hilbert transform along
    columns as imaginary part, so that the magnitude is a local amplitude; "pair": they are pairs already.
    """
    if mode == "pair":
        return x
    if mode == "zero":
        return joined(x, torch.zeros_like(x))
    if mode == "fft":
        return as_pairs(torch.fft.fft2(x, norm="ortho"))
    frequencies = torch.fft.fft(x)
    side = torch.fft.fftfreq(x.shape[-1], device=x.device).sign()
    return joined(x, torch.fft.ifft(-1j * side * frequencies).real)


def block_kernel(real: Float[Tensor, "o i *k"], imaginary: Float[Tensor, "o i *k"]) -> Float[Tensor, "oo ii *k"]:
    """Return the real kernel of a complex one on pairs of channels: a block ``[[A, -B], [B, A]]`` for each entry."""
    rows = [torch.stack([real, -imaginary], 2), torch.stack([imaginary, real], 2)]
    return torch.stack(rows, 1).flatten(0, 1).flatten(1, 2)


def _checked_words(name: str, init: str, method: str = "block", complexify: str = "pair") -> None:
    for word, known in ((init, INITS), (method, METHODS), (complexify, INPUTS)):
        if word not in known:
            raise UsageError(f"{name}: {word!r} is none of {', '.join(known)}.")


class _ComplexLayer(nn.Module):
    """Real and imaginary weights, and a bias of pairs (2 out)."""

    real: nn.Parameter
    imaginary: nn.Parameter
    bias: nn.Parameter | None

    def _make(self, shape: tuple[int, ...], out: int, bias: bool, init: str, where: dict[str, Any]) -> None:
        self.init = init
        self.real = nn.Parameter(torch.empty(shape, **where))
        self.imaginary = nn.Parameter(torch.empty(shape, **where))
        self.bias = nn.Parameter(torch.zeros(2 * out, **where)) if bias else None
        self.reset_parameters()

    def _fan_in(self) -> int:
        return self.real[0].numel()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw both parts with variance ``1 / fan_in``: He's for the two together."""
        deviation = self._fan_in() ** -0.5
        if self.init == "rayleigh":
            size = deviation * (-2 * torch.rand_like(self.real).clamp_min(1e-12).log()).sqrt()
            phase = 2 * math.pi * torch.rand_like(self.real)
            self.real.copy_(size * phase.cos())
            self.imaginary.copy_(size * phase.sin())
        else:
            self.real.normal_(0, deviation)
            self.imaginary.normal_(0, deviation)
        if self.bias is not None:
            self.bias.zero_()

    def dense_weight(self) -> Tensor:
        """Return the real kernel on pairs of channels."""
        return block_kernel(self.real, self.imaginary)

    def importance(self) -> Float[Tensor, " out"]:
        """Return the norm ``|W|`` of each complex filter, both parts together."""
        return (self.real.square() + self.imaginary.square()).flatten(1).sum(1).sqrt()

    @torch.no_grad()
    def _take(self, weight: Tensor, bias: Tensor | None) -> None:
        if weight.shape != self.real.shape:
            return
        self.real.copy_(weight)
        self.imaginary.zero_()
        if self.bias is not None and bias is not None:
            self.bias.zero_()
            self.bias[0::2].copy_(bias)

    @torch.no_grad()
    def _folded(self, plain: Any) -> nn.Module:
        plain.to(self.real)
        plain.weight.copy_(self.dense_weight())
        if self.bias is not None:
            plain.bias.copy_(self.bias)
        return plain.eval()


class ComplexConv2d(_ComplexLayer):
    r"""A convolution of complex maps with complex kernels.

    .. math:: (a + ib) * (A + iB) = (a * A - b * B) + i\,(a * B + b * A), \qquad y = z * W + c

    on pairs of channels (n, 2 in, h, w) -> (n, 2 out, h, w), or complex tensors (n, in, h, w) -> (n, out, h, w).

    Args:
        in_channels: complex channels; as in `nn.Conv2d`, like all further arguments up to `dtype`.
        init: "kaiming", both parts normal; "rayleigh", magnitudes and uniform phases. Same variance, ``2 / fan_in``.
        method: "block", one real convolution with the kernel ``[[A, -B], [B, A]]``; "karatsuba", three of half the
            channels, with a quarter fewer MACs and more maps in between.
        complexify: what makes an input complex: "pair" (it is), "zero", "fft" or "analytic" of (n, in, h, w) real maps,
            see `complexified`.

    Raises:
        UsageError: unknown words, another input.

    Cost: twice the parameters and four times the MACs of a real layer of as many channels (three with "karatsuba").
    Folds, exactly, to an `nn.Conv2d` on 2C channels (`folded`). The bias is added once, ``c = cr + i ci``; the
    published library adds ``(cr - ci) + i (cr + ci)``.

    Source: Complex Network for Complex Problems: A comparative study of CNN and Complex-valued CNN, Chatterjee et al.
    2022, arXiv 2302.04584.
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
        device: Any = None,
        dtype: Any = None,
        *,
        init: str = "kaiming",
        method: str = "block",
        complexify: str = "pair",
    ) -> None:
        super().__init__()
        _checked_words("ComplexConv2d", init, method, complexify)
        if in_channels % groups or out_channels % groups:
            raise UsageError(f"ComplexConv2d: {in_channels} -> {out_channels} channels in {groups} groups.")
        size = pair(kernel_size)
        self.kernel_size, self.stride, self.padding, self.dilation = size, stride, padding, dilation
        self.groups, self.method, self.complexify = groups, method, complexify
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self._make((out_channels, in_channels // groups, *size), out_channels, bias, init, where)

    @property
    def in_channels(self) -> int:
        """Complex channels of the input."""
        return self.real.shape[1] * self.groups

    @property
    def out_channels(self) -> int:
        """Complex channels of the output."""
        return self.real.shape[0]

    def forward(self, input: Inexact[Tensor, "n c h w"]) -> Inexact[Tensor, "n out rows columns"]:
        if input.is_complex():
            return as_complex(self._pairs(as_pairs(input)))
        return self._pairs(complexified(input, self.complexify))

    def _pairs(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != 2 * self.in_channels:
            raise UsageError(
                f"ComplexConv2d: expected pairs (n, 2 x {self.in_channels}, h, w) or a complex tensor, got"
                f" {tuple(x.shape)}."
            )
        place: Any = (self.stride, self.padding, self.dilation, self.groups)
        if self.method == "block":
            return functional.conv2d(x, self.dense_weight(), self.bias, *place)
        a, b = parts(x)
        one = functional.conv2d(a + b, self.real, None, *place)
        two = functional.conv2d(a, self.imaginary - self.real, None, *place)
        three = functional.conv2d(b, self.real + self.imaginary, None, *place)
        y = joined(one - three, one + two)
        return y if self.bias is None else y + self.bias.view(-1, 1, 1)

    def take_over(self, old: nn.Module) -> None:
        """Take the weights of the convolution `old` as real parts: with imaginary inputs of 0 it computes the same."""
        if isinstance(old, nn.Conv2d):
            self._take(old.weight, old.bias)

    def folded(self) -> nn.Module:
        """Return the `nn.Conv2d` on pairs of channels, behind the step that makes inputs complex where there is one."""
        plain = plain_convolution(self, self.dense_weight(), self.bias)
        return plain if self.complexify == "pair" else nn.Sequential(Complexify(self.complexify), plain).eval()

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"complexify={self.complexify!r}"
        )


class ComplexConvTranspose2d(_ComplexLayer):
    """`nn.ConvTranspose2d` of complex maps, by the rule of `ComplexConv2d`; folds to a real one on pairs."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        output_padding: int | tuple[int, int] = 0,
        bias: bool = True,
        *,
        init: str = "kaiming",
    ) -> None:
        super().__init__()
        _checked_words("ComplexConvTranspose2d", init)
        size = pair(kernel_size)
        self.kernel_size, self.stride, self.padding, self.output_padding = size, stride, padding, output_padding
        self._make((in_channels, out_channels, *size), out_channels, bias, init, {})

    def _fan_in(self) -> int:
        return self.real.shape[0] * math.prod(self.kernel_size)

    def dense_weight(self) -> Tensor:
        """Return the real kernel on pairs of channels (in, out, ...): outputs are its second axis."""
        return block_kernel(self.real.transpose(0, 1), self.imaginary.transpose(0, 1)).transpose(0, 1)

    def forward(self, input: Inexact[Tensor, "n c h w"]) -> Inexact[Tensor, "n out rows columns"]:
        y = functional.conv_transpose2d(
            as_pairs(input),
            self.dense_weight(),
            self.bias,
            self.stride,  # type: ignore[arg-type]
            self.padding,  # type: ignore[arg-type]
            self.output_padding,  # type: ignore[arg-type]
        )
        return as_complex(y) if input.is_complex() else y

    def take_over(self, old: nn.Module) -> None:
        """Take the weights of `old` as real parts."""
        if isinstance(old, nn.ConvTranspose2d):
            self._take(old.weight, old.bias)

    def folded(self) -> nn.Module:
        """Return the real transposed convolution on pairs of channels."""
        into, out = 2 * self.real.shape[0], 2 * self.real.shape[1]
        place = (self.kernel_size, self.stride, self.padding, self.output_padding, 1, self.bias is not None)
        return self._folded(nn.ConvTranspose2d(into, out, *place))  # type: ignore[arg-type]


class ComplexLinear(_ComplexLayer):
    """`nn.Linear` of complex features: (n, 2 in) -> (n, 2 out), or complex tensors; folds to a real one on pairs."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, *, init: str = "kaiming") -> None:
        super().__init__()
        _checked_words("ComplexLinear", init)
        self._make((out_features, in_features), out_features, bias, init, {})

    def forward(self, input: Inexact[Tensor, "n c"]) -> Inexact[Tensor, "n out"]:
        y = functional.linear(as_pairs(input), self.dense_weight(), self.bias)
        return as_complex(y) if input.is_complex() else y

    def take_over(self, old: nn.Module) -> None:
        """Take the weights of `old` as real parts."""
        if isinstance(old, nn.Linear):
            self._take(old.weight, old.bias)

    def folded(self) -> nn.Module:
        """Return the real linear layer on pairs."""
        return self._folded(nn.Linear(2 * self.real.shape[1], 2 * self.real.shape[0], self.bias is not None))


class Complexify(nn.Module):
    """The step that makes real maps complex, see `complexified`."""

    def __init__(self, mode: str = "zero") -> None:
        super().__init__()
        _checked_words("Complexify", "kaiming", complexify=mode)
        self.mode = mode

    def forward(self, x: Float[Tensor, "n c *space"]) -> Float[Tensor, "n pairs *space"]:
        return complexified(x, self.mode)

    def extra_repr(self) -> str:
        return f"{self.mode!r}"


class ComplexHead(nn.Module):
    """Real logits of complex features, (n, 2 in) -> (n, out): a real linear map of their magnitudes ("abs", which
    global phase does not change), their real parts ("real"), or both parts ("concat")."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, *, head: str = "abs") -> None:
        super().__init__()
        if head not in HEADS:
            raise UsageError(f"ComplexHead: head {head!r} is none of {', '.join(HEADS)}.")
        self.head = head
        self.linear = nn.Linear(in_features * (2 if head == "concat" else 1), out_features, bias)

    def forward(self, input: Inexact[Tensor, "n c"]) -> Float[Tensor, "n out"]:
        x = as_pairs(input)
        if self.head == "concat":
            return self.linear(x)
        return self.linear(magnitude(x) if self.head == "abs" else parts(x)[0])

    @torch.no_grad()
    def take_over(self, old: nn.Module) -> None:
        """Take the weights of the linear layer `old`, for real parts where the head reads both."""
        if not isinstance(old, nn.Linear) or old.out_features != self.linear.out_features:
            return
        weight = self.linear.weight
        if self.head == "concat" and 2 * old.in_features == weight.shape[1]:
            weight.zero_()
            weight.unflatten(1, (-1, 2))[..., 0].copy_(old.weight)
        elif old.weight.shape == weight.shape:
            weight.copy_(old.weight)
        if old.bias is not None and self.linear.bias is not None:
            self.linear.bias.copy_(old.bias)

    def extra_repr(self) -> str:
        return f"head={self.head!r}"
