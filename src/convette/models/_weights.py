"""Weights from files, without running anything that is in them: safetensors, and .pt files of plain tensors."""

import hashlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from convette.errors import FileFormatError, UsageError
from convette.models._normalisation import remember_normalisation
from convette.models.cifar_resnet import NORMALISATION, CifarResNet

PICKLE_SUFFIXES = frozenset({".pt", ".pth", ".th", ".tar", ".bin", ".ckpt", ".pkl", ".pickle"})
# Keys under which training scripts keep the weights among other things, and prefixes wrappers put before every name.
_NESTED = ("state_dict", "model_state_dict", "model_state", "model", "net", "ema")
_PREFIXES = ("module.", "_orig_mod.")
# SHA-256 (first 16 digits) of `conv1.weight` in the published CIFAR ResNet weights -> their normalisation is known.
_PUBLISHED_CIFAR = frozenset({"dd58fff310126506", "b7fcc6061201fcb9", "b6136bfe8df9cc39", "2c839b9bbbcddce3"})


def load_weights(model: nn.Module, path: Path | str) -> None:
    """Load the weights in `path` into `model`, every tensor of the one for every tensor of the other.

    Args:
        model: changed in place; left as it was when anything does not fit.
        path: a ``.safetensors`` file, or a ``.pt`` / ``.pth`` file of plain tensors (read with ``weights_only=True``; a
            ``state_dict`` inside a checkpoint is found; prefixes ``module.`` are taken off).

    Raises:
        UsageError: no such file, or one that could run code when read.
        FileFormatError: the first tensor that is missing, not expected or of another shape.
    """
    path = Path(path)
    tensors = read_weights(path)
    target = model.state_dict()
    _check_fit(path, tensors, target)
    model.load_state_dict(tensors)
    if isinstance(model, CifarResNet) and fingerprint(tensors["conv1.weight"]) in _PUBLISHED_CIFAR:
        remember_normalisation(model, *NORMALISATION, in_channels=3)


def fingerprint(tensor: Tensor) -> str:
    """Return the first 16 hexadecimal digits of the SHA-256 of the values of `tensor`."""
    return hashlib.sha256(tensor.detach().contiguous().cpu().numpy().tobytes()).hexdigest()[:16]


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors in `path` by name, wrappers' prefixes taken off.

    Raises:
        UsageError: no such file, another kind of file, or one that could run code when read.
        FileFormatError: a damaged file, or no tensors in it.
    """
    if not path.is_file():
        raise UsageError(f"{path}: no such file.")
    if path.suffix == ".safetensors":
        return _without_prefix(_read_safetensors(path))
    if path.suffix in PICKLE_SUFFIXES:
        return _without_prefix(_find_tensors(path, read_pickled_tensors(path)))
    raise UsageError(f"{path}: weights are read from .safetensors, or from .pt and .pth files of plain tensors.")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, ValueError, OSError) as error:
        raise FileFormatError(f"{path}: not a readable safetensors file ({error}).") from error


def read_pickled_tensors(path: Path) -> Any:
    """Return what `path` holds if it is plain tensors and containers; anything else is refused, not unpickled.

    Raises:
        UsageError: the file holds more than plain tensors, so that reading it could run code, or it is damaged.
    """
    try:
        with warnings.catch_warnings():
            # PyTorch warns of unusual pickles before it refuses them; the refusal says it all.
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UsageError(
            f"{path}: refused: it holds more than plain tensors (or is damaged), and unpickling it could run code. Save"
            " model.state_dict() from the program that made it, name the architecture and give that file as weights."
        ) from error


def _find_tensors(path: Path, content: Any) -> dict[str, Tensor]:
    for candidate in (content, *(content.get(key) for key in _NESTED if isinstance(content, Mapping))):
        if isinstance(candidate, Mapping):
            tensors = {name: value for name, value in candidate.items() if isinstance(value, Tensor)}
            if tensors and len(tensors) == len(candidate):
                return {str(name): value for name, value in tensors.items()}
    raise FileFormatError(f"{path}: no tensors by name in it, nor under any of {', '.join(_NESTED)}.")


def _without_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in _PREFIXES:
        if tensors and all(name.startswith(prefix) for name in tensors):
            return _without_prefix({name.removeprefix(prefix): tensor for name, tensor in tensors.items()})
    return tensors


def _check_fit(path: Path, tensors: Mapping[str, Tensor], target: Mapping[str, Any]) -> None:
    # Batch norms of before PyTorch 0.4.1 did not count their batches; PyTorch loads them with a count of 0.
    missing = [name for name in target if name not in tensors and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in tensors if name not in target]
    shapes = [name for name in target if name in tensors and tensors[name].shape != target[name].shape]
    for names, what in ((missing, "is missing"), (unexpected, "is not part of the model")):
        if names:
            raise FileFormatError(f"{path}: tensor {names[0]!r} {what}{_more(names)}.{_hint(path)}")
    if shapes:
        have, want = tuple(tensors[shapes[0]].shape), tuple(target[shapes[0]].shape)
        raise FileFormatError(
            f"{path}: tensor {shapes[0]!r} has shape {have}, the model has {want}{_more(shapes)}.{_hint(path)}"
        )


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more like it)" if len(names) > 1 else ""


def _hint(path: Path) -> str:
    if is_convette_file(path):
        return " This file holds a whole model: give it as the model instead."
    return " Name the architecture (and number of classes and channels) the weights were made with."


def is_convette_file(path: Path) -> bool:
    """Return whether `path` is a safetensors file with the origin of a convette model in its metadata."""
    return "convette" in (safetensors_metadata(path) or {})


def safetensors_metadata(path: Path) -> dict[str, str] | None:
    """Return the metadata of a safetensors file; None for other and damaged files."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError):
        return None
