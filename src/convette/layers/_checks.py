"""What every layer asks of its input."""

from torch import Tensor

from convette.errors import UsageError


def check_maps(x: Tensor, channels: int, layer: str) -> None:
    """Raise `UsageError` for an input that is not (n, channels, h, w)."""
    if x.ndim != 4 or x.shape[1] != channels:
        raise UsageError(f"{layer}: expected an input (n, {channels}, h, w), got {tuple(x.shape)}.")


def check_batch_norm(x: Tensor, layer: str, training: bool, values: int | None = None) -> None:
    """Raise `UsageError` for a training batch whose batch norms would see fewer than two values a channel."""
    values = x.numel() // max(x.shape[1], 1) if values is None else values
    if training and values < 2:
        raise UsageError(
            f"{layer}: {values} value a channel in training, input {tuple(x.shape)}; its batch norms need at least 2:"
            " use larger batches or maps."
        )
