"""What the residual networks of published layers share: three stages of blocks, and the depths they come in."""

from collections.abc import Callable, Sequence

from torch import nn

from convette.errors import UsageError


def blocks_of(depth: int, besides: int, network: str) -> int:
    """Return n of a network of depth ``6 n + besides``; raises `UsageError` for another depth."""
    blocks, rest = divmod(depth - besides, 6)
    if rest or blocks < 1:
        known = ", ".join(str(6 * n + besides) for n in (1, 2, 3, 4))
        raise UsageError(f"{network}: depth {depth} must be 6 n + {besides} ({known}, ...).")
    return blocks


def residual_stages(
    channels: int, widths: Sequence[int], blocks: int, make: Callable[[int, int, int], nn.Module]
) -> list[nn.Sequential]:
    """Return stages of `blocks` blocks ``make(in_channels, channels, stride)``, the first behind `channels` channels.

    The first block of every stage but the first has stride 2.
    """
    stages = []
    for number, width in enumerate(widths):
        layers = []
        for index in range(blocks):
            layers.append(make(channels, width, 2 if number and index == 0 else 1))
            channels = width
        stages.append(nn.Sequential(*layers))
    return stages
