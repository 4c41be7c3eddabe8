"""Networks of timm, of torchvision, and of the user's own modules, adapted to channels, classes and small images."""

import importlib
import inspect
import os
import sys
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from convette.errors import UsageError, did_you_mean
from convette.models import _adapt
from convette.models._normalisation import remember_normalisation
from convette.models._origin import attach_origin

Stem = Literal["default", "small"]


def from_timm(name: str, num_classes: int, in_channels: int, pretrained: bool, stem: Stem) -> nn.Module:
    """Return the timm network `name`, which adapts to classes and channels itself.

    Raises:
        UsageError: unknown name, weights that cannot be fetched, or no stem to adapt.
    """
    import timm

    # Names with a scheme or a path would make timm read a configuration from the hub or the disk.
    if not name.replace("_", "").replace(".", "").isalnum() or not timm.is_model(name):
        raise UsageError(f"unknown model 'timm:{name}'.{did_you_mean(name, timm.list_models())}")
    try:
        model = timm.create_model(name, pretrained=pretrained, num_classes=num_classes, in_chans=in_channels)
    except Exception as error:
        raise UsageError(_not_built(f"timm:{name}", pretrained, error)) from error
    config: Any = model.pretrained_cfg
    if pretrained:
        remember_normalisation(model, config["mean"], config["std"], in_channels)
    if stem == "small":
        size = config.get("input_size", (3, 224, 224))
        _adapt.use_small_stem(model, torch.zeros(1, in_channels, *size[1:]), f"timm:{name}")
    return _known(model, f"timm:{name}", num_classes, in_channels, stem)


def from_torchvision(name: str, num_classes: int, in_channels: int, pretrained: bool, stem: Stem) -> nn.Module:
    """Return the torchvision classifier `name` with its head and first convolution made for the data.

    Auxiliary classifiers (GoogLeNet, Inception) are left out. Classifiers of clips (``r3d_18``) read
    (n, 3, frames, h, w).

    Raises:
        UsageError: unknown name, weights that cannot be fetched, or no stem or first convolution to adapt.
    """
    from torchvision import models

    clips = models.list_models(module=models.video)
    names = [*models.list_models(module=models), *clips]
    if name not in names:
        hint = "; it is no classifier." if name in models.list_models() else f".{did_you_mean(name, names)}"
        raise UsageError(f"unknown model 'torchvision:{name}'{hint}")
    if name in clips and (in_channels != 3 or stem == "small"):
        raise UsageError(f"torchvision:{name} reads clips of 3 channels and has no small stem.")
    extra = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
    model = models.get_model(name, weights=None, num_classes=num_classes, **extra)
    _leave_out_auxiliary(model)
    side = 299 if name == "inception_v3" else 224
    if pretrained:
        _torchvision_weights(model, name, in_channels)
    if in_channels != 3:
        _adapt.use_in_channels(model, torch.zeros(1, 3, side, side), in_channels, keep=pretrained)
    if stem == "small":
        _adapt.use_small_stem(model, torch.zeros(1, in_channels, side, side), f"torchvision:{name}")
    return _known(model, f"torchvision:{name}", num_classes, in_channels, stem)


def _leave_out_auxiliary(model: nn.Module) -> None:
    if getattr(model, "aux_logits", False):
        setattr(model, "aux_logits", False)  # noqa: B010 (a plain attribute, not a tensor or module)
        for name in ("aux1", "aux2", "AuxLogits"):
            if hasattr(model, name):
                setattr(model, name, None)


def _torchvision_weights(model: nn.Module, name: str, in_channels: int) -> None:
    """Copy the published weights into `model`, but for a head of another size."""
    from torchvision import models

    try:
        trained = models.get_model(name, weights="DEFAULT")
    except Exception as error:
        raise UsageError(_not_built(f"torchvision:{name}", True, error)) from error
    copy_matching(trained.state_dict(), model)
    if getattr(trained, "transform_input", False):
        mean = std = (0.5, 0.5, 0.5)  # what that flag turns ImageNet's normalisation into; ours goes without the flag
    else:
        weights: Any = models.get_model_weights(name)
        transforms = weights.DEFAULT.transforms()
        mean, std = transforms.mean, transforms.std
    remember_normalisation(model, mean, std, in_channels)


def copy_matching(tensors: dict[str, Tensor], model: nn.Module) -> list[str]:
    """Copy the tensors whose name and shape `model` has; return the names in `model` that got none."""
    target = model.state_dict()
    matching = {name: t for name, t in tensors.items() if name in target and target[name].shape == t.shape}
    model.load_state_dict(matching, strict=False)
    return [name for name in target if name not in matching]


def from_callable(name: str, num_classes: int, in_channels: int, stem: Stem) -> nn.Module:
    """Return what the user's ``package.module:callable`` returns, called with what it takes of classes and channels.

    Only for names the user typed: importing a module runs its code.

    Raises:
        UsageError: nothing of that name, an error inside it, or something else than a network returned.
    """
    function = _find_callable(name)
    takes = inspect.signature(function).parameters
    given = {"num_classes": num_classes, "in_channels": in_channels}
    try:
        model = function(**{key: value for key, value in given.items() if key in takes})
    except Exception as error:
        raise UsageError(f"{name}: raised {type(error).__name__}: {_adapt.one_line(error)}") from error
    if not isinstance(model, nn.Module):
        raise UsageError(f"{name}: returned {type(model).__name__}, not a torch.nn.Module.")
    if stem == "small":
        _adapt.use_small_stem(model, torch.zeros(1, in_channels, 64, 64), name)
    return _known(model, name, num_classes, in_channels, stem)


def _find_callable(name: str) -> Callable[..., Any]:
    module_name, _, symbol = name.partition(":")
    hint = did_you_mean(module_name, ("timm", "torchvision", "convette")) if "." not in module_name else ""
    sys.path.insert(0, os.getcwd())  # the user's modules lie where the command is given
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise UsageError(
            f"{name}: module {module_name!r} cannot be imported ({_adapt.one_line(error)}).{hint}"
        ) from error
    finally:
        sys.path.remove(os.getcwd())
    function: Any = module
    for part in symbol.split("."):
        if not hasattr(function, part):
            known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
            raise UsageError(f"{name}: {module_name!r} has no {symbol!r}.{did_you_mean(symbol, known)}")
        function = getattr(function, part)
    if not callable(function):
        raise UsageError(f"{name}: {symbol!r} is not callable.")
    return function


def _known(model: nn.Module, name: str, num_classes: int, in_channels: int, stem: Stem) -> nn.Module:
    return attach_origin(model, name, {"num_classes": num_classes, "in_channels": in_channels, "stem": stem})


def _not_built(name: str, pretrained: bool, error: Exception) -> str:
    if pretrained:
        return (
            f"{name}: the published weights cannot be fetched ({_adapt.one_line(error)}); give a file of weights, or"
            " start untrained."
        )
    return f"{name}: cannot be built ({_adapt.one_line(error)})."
