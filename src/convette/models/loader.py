"""Making networks by name: ours, ``timm:NAME``, ``torchvision:NAME``, ``module:callable``, or a saved file."""

import contextlib
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from convette.errors import FileFormatError, UsageError, did_you_mean
from convette.models import _weights
from convette.models._libraries import from_callable, from_timm, from_torchvision
from convette.models._origin import check_arguments
from convette.surgery import Origin, build_stitched, load_model, save_model, structure_log

Stem = Literal["default", "small"]

# Constructor (as in a file's origin, "convette:NAME") -> the module of this room that defines it.
CONSTRUCTORS: dict[str, str] = {
    "resnet8": "cifar_resnet",
    "resnet20": "cifar_resnet",
    "resnet32": "cifar_resnet",
    "resnet44": "cifar_resnet",
    "resnet56": "cifar_resnet",
    "resnet110": "cifar_resnet",
    "simplenet_cifar_310k": "simplenet",
    "simplenet_cifar_460k": "simplenet",
    "simplenet_cifar_5m": "simplenet",
    "simplenet_cifar_5m_extra_pool": "simplenet",
    "simplenet_5m": "simplenet",
    "simplenet_9m": "simplenet",
    "mobilenet_v2": "mobilenet_v2",
    "ssdlite_mobilenet_v2": "mobilenet_v2",
    "deeplabv3_mobilenet_v2": "mobilenet_v2",
    "poincare_resnet": "poincare_resnet",
    "atac_resnet": "layer_networks",
    "wide_resnet": "layer_networks",
    "autonl_s": "layer_networks",
    "quadratic_resnet": "layer_networks",
    "quadratic_alexnet": "layer_networks",
    "binary_nin": "binary_networks",
    "binary_vgg11": "binary_networks",
    "birealnet": "binary_networks",
    "shaped_resnet": "shaped_resnet",
    "cell_network": "cell_network",
}
_MODES = ("m1", "m2", "m3", "m4")
_BINARY: dict[str, tuple[str, dict[str, Any]]] = {
    "binary_nin": ("binary_nin", {}),
    "binary_vgg11": ("binary_vgg11", {}),
    "birealnet18": ("birealnet", {"depth": 18}),
    "birealnet34": ("birealnet", {"depth": 34}),
}
_NARROW: dict[str, dict[str, Any]] = {"": {}, "_025": {"width": 0.25}}
_TWINS: dict[str, dict[str, Any]] = {"": {}, "_real": {"kind": "real"}}
# Name of a model -> its constructor and the arguments the name stands for. Published variants have names of their own.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in CONSTRUCTORS},
    **{f"simplenet_5m_{mode}": ("simplenet_5m", {"mode": mode}) for mode in _MODES},
    **{f"simplenet_9m_{mode}": ("simplenet_9m", {"mode": mode}) for mode in _MODES},
    **{
        f"simplenet_5m_{mode}_{percent:03d}": ("simplenet_5m", {"mode": mode, "scale": percent / 100})
        for mode in _MODES
        for percent in (50, 75)
    },
    **{
        f"mobilenet_v2_{percent:03d}": ("mobilenet_v2", {"width": percent / 100})
        for percent in (35, 50, 75, 100, 130, 140)
    },
    # Depth and, where it is not 8, the width of the first group.
    **{f"poincare_resnet{depth}": ("poincare_resnet", {"depth": depth}) for depth in (8, 20, 32)},
    **{f"poincare_resnet{depth}_16": ("poincare_resnet", {"depth": depth, "width": 16}) for depth in (20, 32)},
    **{f"atac_resnet{6 * blocks + 2}": ("atac_resnet", {"blocks": blocks}) for blocks in (1, 2, 3, 5)},
    "wide_resnet28_10": ("wide_resnet", {}),
    "wide_resnet16_4": ("wide_resnet", {"depth": 16, "width": 4}),
    "quadratic_resnet20": ("quadratic_resnet", {}),
    "quadratic_resnet20_rank2": ("quadratic_resnet", {"rank": 2}),
    "poincare_resnet8_4": ("poincare_resnet", {"depth": 8, "width": 4}),
    # Binary networks, the same without signs, and both of a quarter of the width for small work.
    **{
        f"{name}{narrow}{twin}": (constructor, {**given, **_NARROW[narrow], **_TWINS[twin]})
        for name, (constructor, given) in _BINARY.items()
        for narrow in _NARROW
        for twin in _TWINS
    },
}


def create_model(
    name: str,
    *,
    num_classes: int | None = None,
    in_channels: int | None = None,
    pretrained: bool = False,
    stem: Stem = "default",
    weights: Path | str | None = None,
    seed: int | None = None,
) -> nn.Module:
    """Return the network `name`, on the CPU, knowing its origin; in training mode, or in eval mode when from a file.

    Args:
        name: one of `MODELS`; ``timm:NAME``; ``torchvision:NAME``; ``package.module:callable`` (called with
            `num_classes` and `in_channels` if it takes them); or the path of a convette ``.safetensors`` file.
        num_classes: outputs; None: 10, or what the file has.
        in_channels: channels of the images; None: 3, or what the file has.
        pretrained: fetch the published weights (timm and torchvision only).
        stem: "small" for images of about 16-96 px: the stem keeps the resolution (first stride 1, no first pool).
        weights: a file of weights to load, strictly, as by `load_weights`.
        seed: seed of the initial weights; the global random state is then left alone. None: draw from that.

    Raises:
        UsageError: an unknown name (the nearest one is offered), arguments that the network cannot take, or a pickle
            given as a model (never unpickled).
        FileFormatError: a damaged or tampered file, or weights that do not fit.
    """
    _check_counts(name, num_classes, in_channels)
    if stem not in ("default", "small"):
        raise UsageError(f"stem {stem!r}: 'default' or 'small'.")
    if _is_path(name):
        if pretrained or stem == "small":
            raise UsageError(
                f"{name}: a saved model keeps its weights and its stem; leave 'pretrained' and 'stem' out."
            )
        model = _from_file(Path(name), num_classes, in_channels)
    else:
        with _seeded(seed):
            model = _from_name(name, num_classes or 10, in_channels or 3, pretrained, stem)
    if weights is not None:
        _weights.load_weights(model, weights)
    return model


def build_from_origin(origin: Origin) -> nn.Module:
    """Return a fresh network from an origin read from a file; the global random state is left alone.

    Only constructors of convette, timm and torchvision are called, with arguments of the types they take.

    Raises:
        FileFormatError: any other constructor, an argument it does not have, or one of the wrong type or size.
    """
    with _seeded(0):
        try:
            return _rebuild(origin.constructor, dict(origin.arguments))
        except FileFormatError:
            raise
        except UsageError as error:
            raise FileFormatError(f"origin {origin.constructor!r:.80}: {error}") from error


def _rebuild(constructor: str, arguments: dict[str, Any]) -> nn.Module:
    source, _, name = constructor.partition(":")
    if source == "convette":
        if name == "stitch":
            return build_stitched(arguments, build_from_origin)
        if name not in CONSTRUCTORS:
            raise FileFormatError(f"origin {constructor!r:.80}: unknown.{did_you_mean(name, CONSTRUCTORS)}")
        function = _constructor(name)
        return function(**check_arguments(constructor, function, arguments))
    if source in ("timm", "torchvision"):
        num_classes, in_channels, stem = _library_arguments(
            **check_arguments(constructor, _library_arguments, arguments)
        )
        library = from_timm if source == "timm" else from_torchvision
        return library(name, num_classes, in_channels, False, stem)
    raise FileFormatError(
        f"origin {constructor!r:.80}: a file may only name networks of convette, timm and torchvision. If you trust it,"
        " type it yourself: load(path, constructor=...)."
    )


def _library_arguments(num_classes: int = 10, in_channels: int = 3, stem: Stem = "default") -> tuple[int, int, Stem]:
    return num_classes, in_channels, stem


def load(path: Path | str, *, constructor: str | None = None) -> nn.Module:
    """Return the model saved in the convette file `path`, in eval mode, outputs bit-identical to those when saved.

    Args:
        path: a ``.safetensors`` file written by `save`.
        constructor: ``module:callable``, for a file whose origin is a function of yours. It is typed here because a
            file alone must not choose what is run.

    Raises:
        UsageError: no such file, or not a convette file.
        FileFormatError: a damaged or tampered file.
    """
    path = Path(path)
    _refuse_other_files(path)

    def build(origin: Origin) -> nn.Module:
        if constructor is None or origin.constructor != constructor:
            return build_from_origin(origin)
        arguments = check_arguments(constructor, _library_arguments, origin.arguments)
        with _seeded(0):
            return from_callable(constructor, *_library_arguments(**arguments))

    return load_model(path, build)


def save(model: nn.Module, path: Path | str) -> None:
    """Write `model` with its origin, edits and card to one ``.safetensors`` file, whole or not at all.

    Raises:
        UsageError: the model has no known origin, so that nobody could rebuild it.
    """
    save_model(model, Path(path))


@contextlib.contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    if seed is None:
        yield
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield


def _check_counts(name: str, num_classes: int | None, in_channels: int | None) -> None:
    for what, count in (("num_classes", num_classes), ("in_channels", in_channels)):
        if count is not None and count < 1:
            raise UsageError(f"{name}: {what} {count}: must be at least 1.")


def _from_name(name: str, num_classes: int, in_channels: int, pretrained: bool, stem: Stem) -> nn.Module:
    source, _, rest = name.partition(":")
    if source == "timm" and rest:
        return from_timm(rest, num_classes, in_channels, pretrained, stem)
    if source == "torchvision" and rest:
        return from_torchvision(rest, num_classes, in_channels, pretrained, stem)
    if pretrained:
        raise UsageError(f"{name}: no weights to fetch; only timm: and torchvision: have them. Give a file of weights.")
    if rest and source != "convette":
        return from_callable(name, num_classes, in_channels, stem)
    name = rest or name
    if name not in MODELS:
        raise UsageError(f"unknown model {name!r}.{did_you_mean(name, MODELS) if rest else _nearest(name)}")
    constructor, arguments = MODELS[name]
    function = _constructor(constructor)
    if "stem" in function.__annotations__:
        arguments = {**arguments, "stem": stem}
    return function(num_classes=num_classes, in_channels=in_channels, **arguments)


def _constructor(name: str) -> Callable[..., nn.Module]:
    return getattr(importlib.import_module(f"convette.models.{CONSTRUCTORS[name]}"), name)


def _nearest(name: str) -> str:
    """Say where a name of another library is found, or which of ours is near."""
    import timm
    from torchvision import models

    elsewhere = [f"timm:{name}"] if name.isidentifier() and timm.is_model(name) else []
    if name in models.list_models(module=models):
        elsewhere.append(f"torchvision:{name}")
    if elsewhere:
        return f" Did you mean {' or '.join(map(repr, elsewhere))}?"
    ours = did_you_mean(name, MODELS)
    return ours or " Known: " + ", ".join(CONSTRUCTORS) + ", timm:NAME, torchvision:NAME, module:callable."


def _is_path(name: str) -> bool:
    if name.startswith(("timm:", "torchvision:", "convette:")):
        return False
    suffix = Path(name).suffix
    return suffix == ".safetensors" or suffix in _weights.PICKLE_SUFFIXES or "/" in name or "\\" in name


def _from_file(path: Path, num_classes: int | None, in_channels: int | None) -> nn.Module:
    model = load(path)
    origin = structure_log(model).origin
    arguments = origin.arguments if origin else {}
    for what, wanted in (("num_classes", num_classes), ("in_channels", in_channels)):
        has = arguments.get(what)
        if wanted is not None and has is not None and has != wanted:
            raise UsageError(f"{path}: this model has {what} {has}, the task needs {wanted}.")
    return model


def _refuse_other_files(path: Path) -> None:
    """Refuse what is not a convette file, saying how what it is can be used. No pickle is run to find out."""
    if not path.is_file():
        raise UsageError(f"{path}: no such file.")
    if path.suffix in _weights.PICKLE_SUFFIXES:
        _weights.read_pickled_tensors(path)
        raise UsageError(
            f"{path}: holds tensors but no architecture: name the architecture as the model and give this as weights."
        )
    if path.suffix != ".safetensors":
        raise UsageError(f"{path}: models are read from .safetensors files written by convette.")
    if _weights.safetensors_metadata(path) is not None and not _weights.is_convette_file(path):
        raise UsageError(
            f"{path}: holds weights but no architecture: name the architecture as the model and give this as weights."
        )
