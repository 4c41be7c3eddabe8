"""An input for a network that came without one."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from convette.errors import StructureError
from convette.layers._watching import call
from convette.surgery._trace import evaluating

# Rows and columns tried where nothing is asked but how many channels each layer reads: small images first.
_SIDES = (64, 224, 256, 299, 384)


def first_that_runs(model: nn.Module, shapes: Iterable[tuple[int, ...]]) -> Tensor:
    """Return noise of the first of `shapes` (without the batch, which is 1) that `model` runs on, in evaluation mode.

    The same noise every time; the model is left as it was. Raises `StructureError` with what the network says to the
    first shape where it runs on none.
    """
    generator = torch.Generator().manual_seed(0)
    reason = "no shape was given"
    place = next(model.parameters(), torch.empty(0)).device
    for number, shape in enumerate(dict.fromkeys(shapes)):
        example = torch.randn(1, *shape, generator=generator).to(place)
        try:
            with torch.no_grad(), evaluating(model):
                call(model, example)
            return example
        except Exception as error:  # The network's own: whatever it does not run on.
            reason = (str(error) or type(error).__name__).splitlines()[0] if number == 0 else reason
    raise StructureError(f"{type(model).__name__} runs on no image that was tried: {reason}")


def guessed_image(model: nn.Module) -> Tensor | None:
    """Return an image that `model` runs on, with the channels its first convolution reads; None if none is found."""
    first = next((layer for layer in model.modules() if isinstance(layer, _ConvNd)), None)
    if first is None:
        return None
    try:
        return first_that_runs(model, [(first.in_channels, *[side] * len(first.kernel_size)) for side in _SIDES])
    except StructureError:
        return None
