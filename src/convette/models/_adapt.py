"""Adapting networks of other libraries: a stem for small images, other image channels, another number of classes."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from convette._progress import note
from convette.errors import UsageError
from convette.layers._watching import hooked, in_eval

_POOLS = (nn.MaxPool2d, nn.AvgPool2d)
# A stem's pool comes after at most this many convolutions (deep stems have three); later pools end a stage.
_STEM_CONVOLUTIONS = 3


class _Enough(Exception):
    """Ends a run as soon as the stem has been seen."""


@contextlib.contextmanager
def _calls(model: nn.Module, on_call: Callable[[str, nn.Module], None]) -> Iterator[None]:
    """While open, call ``on_call(name, module)`` before every module without children runs."""
    handles = [
        module.register_forward_pre_hook(lambda m, _, name=name: on_call(name, m))
        for name, module in model.named_modules()
        if not any(module.children()) or isinstance(module, (nn.Conv2d, *_POOLS))
    ]
    with hooked(handles):
        yield


def _run(model: nn.Module, example: Tensor) -> None:
    """One forward in eval mode without gradients; modes are put back."""
    with in_eval(model), torch.no_grad():
        model(example)


def first_convolution(model: nn.Module, example: Tensor) -> str | None:
    """Return the name of the first `Conv2d` that runs on `example` (n c h w), or None if there is none."""
    found: list[str] = []

    def on_call(name: str, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            found.append(name)
            raise _Enough

    with _calls(model, on_call), contextlib.suppress(_Enough):
        _run(model, example)
    return found[0] if found else None


def stem_of(model: nn.Module, example: Tensor) -> tuple[str | None, str | None]:
    """Return the names of the first convolution (if strided) and of the pool that follows it (if any) in `model`.

    Found by running `model` on `example` (n c h w) as far as the stem goes. The pool is the first max or average pool
    after at most three convolutions, with no other strided convolution before it.
    """
    convolution: list[str] = []
    pool: list[str] = []
    seen = 0

    def on_call(name: str, module: nn.Module) -> None:
        nonlocal seen
        if isinstance(module, _POOLS):
            if seen and _strided(module):
                pool.append(name)
            raise _Enough
        if isinstance(module, nn.Conv2d):
            if seen and (_strided(module) or seen == _STEM_CONVOLUTIONS):
                raise _Enough
            if not seen and not _strided(module):
                raise _Enough  # a network that starts at full resolution has stages, not a stem, to reduce it
            if not seen:
                convolution.append(name)
            seen += 1

    with _calls(model, on_call), contextlib.suppress(_Enough):
        _run(model, example)
    return (convolution[0] if convolution else None), (pool[0] if pool else None)


def _strided(module: nn.Module) -> bool:
    stride = getattr(module, "stride", 1)
    return max(stride if isinstance(stride, tuple) else (stride,)) > 1


def use_small_stem(model: nn.Module, example: Tensor, name: str) -> None:
    """Give `model` a stem for small images: the first convolution gets stride 1, the pool after it is taken out.

    `example` is an image batch (n c h w) of the size the network was made for, `name` what messages call it. A network
    that already starts at full resolution is left as it is, with a note.

    Raises:
        UsageError: the network has no convolution to adapt, or no longer runs afterwards (a fixed number of patches).
    """
    convolution, pool = stem_of(model, example)
    if convolution is None:
        if first_convolution(model, example) is None:
            raise UsageError(
                f"{name}: stem 'small' needs a network that starts with a convolution; use stem 'default'."
            )
        note(f"{name}: starts at full resolution already; stem 'small' changes nothing.")
        return
    first = model.get_submodule(convolution)
    assert isinstance(first, nn.Conv2d)
    stride, first.stride = first.stride, (1, 1)
    if pool is not None:
        parent, _, leaf = pool.rpartition(".")
        setattr(model.get_submodule(parent), leaf, nn.Identity())
    side = max(example.shape[-1] // (stride[0] * (2 if pool else 1)), 32)
    try:
        _run(model, example.new_zeros(1, example.shape[1], side, side))
    except Exception as error:
        raise UsageError(
            f"{name}: no stem 'small', for the network is tied to its number of patches; use stem 'default' "
            f"({one_line(error)})."
        ) from error


def use_in_channels(model: nn.Module, example: Tensor, in_channels: int, *, keep: bool) -> None:
    """Replace the first convolution of `model` by one for `in_channels`.

    `example` is an image batch (n c h w) the network accepts now. With `keep`, the old weights are kept: summed for one
    channel, else repeated and scaled so that equal channels give the old response. Without, they are drawn anew with
    the old ones' spread.

    Raises:
        UsageError: the network has no convolution.
    """
    name = first_convolution(model, example)
    if name is None:
        raise UsageError(f"{in_channels} image channels need a network that starts with a convolution.")
    old = model.get_submodule(name)
    assert isinstance(old, nn.Conv2d)
    new = nn.Conv2d(
        in_channels,
        old.out_channels,
        old.kernel_size,  # pyright: ignore[reportArgumentType]
        stride=old.stride,  # pyright: ignore[reportArgumentType]
        padding=old.padding,  # pyright: ignore[reportArgumentType]
        dilation=old.dilation,  # pyright: ignore[reportArgumentType]
        bias=old.bias is not None,
        padding_mode=old.padding_mode,
    )
    with torch.no_grad():
        if keep:
            cycle = torch.arange(in_channels) % old.in_channels
            scale = old.in_channels / in_channels
            new.weight.copy_(old.weight.sum(1, keepdim=True) if in_channels == 1 else old.weight[:, cycle] * scale)
        else:
            new.weight.normal_(std=float(old.weight.std()))
        if new.bias is not None and old.bias is not None:
            new.bias.copy_(old.bias)
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new)


def one_line(error: Exception) -> str:
    """Return the first line of an error's text, shortened."""
    text = str(error).strip().split("\n", 1)[0]
    return text[:120] or type(error).__name__
