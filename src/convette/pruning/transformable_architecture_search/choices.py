"""The parts of the search: the sizes there are, how two are drawn and their outputs aligned, what a budget adds."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from convette.errors import UsageError


def width_choices(channels: int) -> tuple[int, ...]:
    """Return the widths a convolution of `channels` outputs may take: 30 % to 100 % in tenths, each at least 1."""
    return tuple(max(1, tenth * channels // 10) for tenth in range(3, 11))


def depth_choices(blocks: int) -> tuple[int, ...]:
    """Return the depths a stage of `blocks` may take: all up to 3, else the odd ones and the whole."""
    if blocks <= 3:
        return tuple(range(1, blocks + 1))
    return tuple(sorted({*range(1, blocks + 1, 2), blocks}))


def channel_interpolation(x: Float[Tensor, "n c h w"], channels: int) -> Float[Tensor, "n k h w"]:
    r"""Bring `x` to another number of channels by adaptive averages over neighbouring ones.

    .. math:: y_o = \mathrm{mean}\, x_i, \quad \lfloor o C / C' \rfloor \le i < \lceil (o + 1) C / C' \rceil

    The identity for as many channels. It mixes unrelated filters: an alignment for the search, nothing more.
    """
    if x.shape[1] == channels:
        return x
    return functional.adaptive_avg_pool3d(x[:, None], (channels, x.shape[2], x.shape[3]))[:, 0]


def two_choices(
    logits: Float[Tensor, " choices"], temperature: float, generator: torch.Generator | None = None
) -> tuple[tuple[int, int], Float[Tensor, " 2"]]:
    r"""Draw two distinct choices and their mixing weights, which carry the gradient to `logits`.

    .. math:: \tilde l = (\log \mathrm{softmax}(A) + g) / \tau, \quad I \sim \mathrm{softmax}(\tilde l)
        \text{ without replacement}, \quad p = \mathrm{softmax}(\tilde l_I)

    with Gumbel noise g. A low temperature makes p nearly one-hot. Raises `UsageError` for fewer than two choices.
    """
    if len(logits) < 2:
        raise UsageError("TAS: a search needs at least two choices.")
    while True:
        noise = -torch.empty(len(logits)).exponential_(generator=generator).log()
        scaled = (logits.log_softmax(0) + noise) / temperature
        chances = scaled.detach().softmax(0)
        if bool(torch.isfinite(chances).all()):
            break
    drawn = torch.multinomial(chances + 1e-7, 2, generator=generator)
    return (int(drawn[0]), int(drawn[1])), scaled[drawn].softmax(0)


def depth_probabilities(logits: Float[Tensor, " choices"], blocks: int) -> Float[Tensor, " blocks"]:
    """Return for every block of a stage the probability that the depth reaches it; 1 up to the first choice."""
    choices, chances = depth_choices(blocks), logits.softmax(0)
    return torch.stack(
        [
            sum((p for p, d in zip(chances, choices, strict=True) if d > block), chances.new_zeros(()))
            for block in range(blocks)
        ]
    )


def budget_loss(expected: Tensor, reached: float | int, target: float | int, whole: float | int) -> Tensor:
    r"""Return :math:`\pm \log E[F]`: plus where the most probable shape costs more than `target`, minus where less.

    0 where it lies within 5 % of `whole` below the target. `expected` carries the gradient, `reached` is the cost of
    the most probable shape (so it swings about the target by design).
    """
    if reached > target:
        return expected.log()
    if reached < target - 0.05 * whole:
        return -expected.log()
    return expected.new_zeros(())
