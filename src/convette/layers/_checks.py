"""What layers ask of their input and of arguments they share."""

from typing import Any

from torch import Tensor

from convette.errors import UsageError


def check_maps(x: Tensor, channels: int, layer: str, training: bool = False) -> None:
    """Raise `UsageError` for an input that is not (n, channels, h, w); with `training`, see `check_batch` too."""
    if x.ndim != 4 or x.shape[1] != channels:
        raise UsageError(f"{layer}: expected an input (n, {channels}, h, w), got {tuple(x.shape)}.")
    check_batch(x, layer, training)


def check_batch(x: Tensor, layer: str, training: bool = True) -> None:
    """Raise `UsageError` for a training batch with fewer than two values a channel: those have no variance."""
    values = x.numel() // max(x.shape[1], 1)
    if training and values < 2:
        raise UsageError(
            f"{layer}: {values} value a channel in training, input {tuple(x.shape)}; batch statistics need at least 2:"
            " use larger batches or maps, or a normaliser without them (group norm, WeightAlign)."
        )


def check_plain(
    layer: str, *, groups: int = 1, dilation: Any = 1, padding: Any = 0, padding_mode: str = "zeros"
) -> None:
    """Raise `UsageError` for what a convolution does not have: groups, dilation, padding other than zeros in numbers.

    A layer passes those of the arguments that it cannot do more with.
    """
    refused = []
    if groups != 1:
        refused.append(f"groups {groups} (one)")
    if dilation not in (1, (1, 1)):
        refused.append(f"dilation {dilation} (1)")
    if padding_mode != "zeros" or isinstance(padding, str):
        refused.append(f"padding {padding!r} of {padding_mode!r} (a number of zeros)")
    if refused:
        raise UsageError(f"{layer} does not have {', '.join(refused)}; in brackets what it has.")
