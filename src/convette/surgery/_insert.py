"""Inserting: a layer or block more in a network that goes on computing what it computed."""

import math
import zlib
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from convette.errors import FileFormatError, StructureError, did_you_mean
from convette.layers._watching import call, hooked
from convette.surgery._edits import Change, find_module
from convette.surgery._placing import like_its_place, place
from convette.surgery._trace import evaluating
from convette.surgery._trial import trial_error

FORMS = ("conv", "block")
# Activations that change nothing the second time.
ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "relu6": nn.ReLU6, "hardtanh": nn.Hardtanh}
_MOST_CHANNELS, _LARGEST_KERNEL = 1 << 16, 31


class ZeroGammaBlock(nn.Module):
    """A residual block that starts as the identity, ``x + norm2(conv2(relu(norm1(conv1(x)))))`` with norm2's gamma 0.

    (n, channels, h, w) -> the same shape. Costs two convolutions of `kernel_size`. Gradients reach gamma at once and
    the rest as soon as gamma has moved (Goyal et al., arXiv 1706.02677).
    """

    def __init__(self, channels: int, kernel_size: int = 3, groups: int = 1) -> None:
        """Draw the weights as PyTorch does; `kernel_size` must be odd."""
        super().__init__()
        padding = kernel_size // 2
        self.conv1 = nn.Conv2d(channels, channels, kernel_size, padding=padding, groups=groups, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, kernel_size, padding=padding, groups=groups, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        nn.init.zeros_(self.norm2.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` plus what the branch makes of it."""
        return x + self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))


@dataclass(frozen=True)
class Insert:
    """Put new layers behind `module`, which becomes ``nn.Sequential(module, new layers)``.

    `form` "conv": a convolution that copies its input (Dirac) and, with `norm`, a batch norm whose gamma and beta
    undo its statistics ``(mean, var)`` (Net2Net, arXiv 1511.05641). An `activation` comes last behind a module that
    is one itself, or first (`activation_first`) where the module is followed by one: such an activation changes
    nothing the second time. `form` "block": a `ZeroGammaBlock`, whose random weights follow from `seed` and the name.
    """

    module: str
    channels: int
    form: str = "conv"
    kernel_size: int = 3
    groups: int = 1
    norm: bool = True
    activation: str | None = None
    activation_first: bool = False
    mean: tuple[float, ...] = ()
    var: tuple[float, ...] = ()
    seed: int = 0
    kind: ClassVar[str] = "insert"

    def apply(self, model: nn.Module) -> Change:
        """Put the new layers in place; raises `StructureError`, with the model unchanged, where they do not fit."""
        old = find_module(model, self.module)
        width = next((getattr(old, key) for key in ("out_channels", "num_features") if hasattr(old, key)), None)
        if isinstance(width, int) and width != self.channels:
            raise StructureError(f"{self.module!r} has {width} channels; the edit inserts a layer of {self.channels}.")
        new = [like_its_place(layer, old, model) for layer in self._layers()]
        change = Change()
        with change.all_or_nothing():
            place(model, self.module, nn.Sequential(old, *new).train(old.training), change)
        return change

    def _layers(self) -> list[nn.Module]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed((self.seed + zlib.crc32(self.module.encode())) % (1 << 63))
            if self.form == "block":
                return [ZeroGammaBlock(self.channels, self.kernel_size, self.groups)]
            size, groups = self.kernel_size, self.groups
            conv = nn.Conv2d(self.channels, self.channels, size, 1, size // 2, groups=groups, bias=not self.norm)
        with torch.no_grad():
            nn.init.dirac_(conv.weight, groups)
            if conv.bias is not None:
                conv.bias.zero_()
        layers: list[nn.Module] = [conv]
        if self.norm:
            layers.append(_undoing_norm(self.channels, self.mean, self.var))
        if self.activation is not None:
            layers.insert(0 if self.activation_first else len(layers), ACTIVATIONS[self.activation]())
        return layers

    def to_json(self) -> dict[str, Any]:
        """Return the edit as a JSON object."""
        names = (
            "module",
            "channels",
            "form",
            "kernel_size",
            "groups",
            "norm",
            "activation",
            "activation_first",
            "seed",
        )
        values = {name: getattr(self, name) for name in names}
        return {"kind": self.kind, **values, "mean": list(self.mean), "var": list(self.var)}

    @staticmethod
    def from_json(value: dict[str, Any]) -> "Insert":
        """Read the edit; raises `FileFormatError` where it is malformed."""
        try:
            given = {key: item for key, item in value.items() if key != "kind"}
            fields = {**vars(Insert("?", 1)), **given}
            for key in ("mean", "var"):
                fields[key] = tuple(float(item) for item in fields[key])
            _check(fields)
            return Insert(**fields)
        except (TypeError, ValueError) as error:
            raise FileFormatError(f"an 'insert' edit is malformed: {str(error).splitlines()[0]}.") from error


def _check(values: dict[str, Any]) -> None:
    """Raise `ValueError` for the first of an insert's values that cannot be."""
    for name, most in (("channels", _MOST_CHANNELS), ("kernel_size", _LARGEST_KERNEL), ("groups", _MOST_CHANNELS)):
        number = values[name]
        if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number <= most:
            raise ValueError(f"{name} {number!r} must be a whole number from 1 to {most}")
    if not isinstance(values["module"], str) or not values["module"]:
        raise ValueError("it must name a module")
    if values["form"] not in FORMS:
        raise ValueError(f"form {values['form']!r}:{did_you_mean(str(values['form']), FORMS)}")
    if values["kernel_size"] % 2 == 0 or values["channels"] % values["groups"]:
        raise ValueError("kernel_size must be odd and groups divide the channels")
    activation, seed = values["activation"], values["seed"]
    if activation is not None and (not isinstance(activation, str) or activation not in ACTIVATIONS):
        raise ValueError(f"activation {activation!r}:{did_you_mean(str(activation), ACTIVATIONS)}")
    if not isinstance(values["norm"], bool) or not isinstance(values["activation_first"], bool):
        raise ValueError("norm and activation_first are true or false")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 1 << 63:
        raise ValueError(f"not a seed: {seed!r}")
    for name in ("mean", "var"):
        if len(values[name]) not in (0, values["channels"]) or not all(map(math.isfinite, values[name])):
            raise ValueError(f"{name} holds one number a channel")
    if any(item < 0 for item in values["var"]):
        raise ValueError("a variance is negative")


def _undoing_norm(channels: int, mean: tuple[float, ...], var: tuple[float, ...]) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels)
    assert norm.running_mean is not None and norm.running_var is not None
    with torch.no_grad():
        if mean:
            norm.running_mean.copy_(torch.tensor(mean))
        if var:
            norm.running_var.copy_(torch.tensor(var))
        norm.weight.copy_((norm.running_var + norm.eps).sqrt())
        norm.bias.copy_(norm.running_mean)
    return norm


def insert(
    model: nn.Module,
    module: str,
    example: Any,
    form: str = "conv",
    *,
    kernel_size: int = 3,
    groups: int = 1,
    norm: bool = True,
    tolerance: float = 1e-5,
    seed: int = 0,
) -> Insert:
    """Return the edit that puts a new layer or block behind `module`, proved on the example.

    `form`, `norm`: see `Insert`. An activation goes with a new convolution where it changes nothing: behind a module
    that is a ReLU, ReLU6 or Hardtanh, or in front of one (found by trying); elsewhere the convolution is linear. The
    norm takes its statistics from the example, so that the network starts near the same in training too.
    Raises `StructureError` where the module does not give one map of channels, rows and columns.
    Cost: a run of the network, and two for each activation tried.
    """
    seen = _outputs_of_module(model, module, example)
    if not seen or any(value.ndim != 4 or value.shape[1] != seen[0].shape[1] for value in seen):
        what = f"gives {tuple(seen[0].shape)}" if seen else "never runs, or gives no tensor"
        raise StructureError(f"{module!r} {what}; a layer is inserted behind one that gives (n, channels, h, w).")
    channels = seen[0].shape[1]
    base: dict[str, Any] = {"form": form, "kernel_size": kernel_size, "groups": groups, "norm": norm, "seed": seed}
    own = next((name for name, kind in ACTIVATIONS.items() if type(find_module(model, module)) is kind), None)
    choices: list[tuple[str | None, bool]] = [(None, False)]
    if form == "conv":
        before = [(name, True) for name in ("relu", "relu6")] if own is None else [(own, False)]
        choices = [*before, *choices]
    error = math.inf
    for activation, first in choices:
        given = torch.cat([value.transpose(0, 1).flatten(1) for value in seen], 1).double()
        given = given.relu() if first else given
        mean, var = given.mean(1), given.var(1, correction=0)
        statistics: dict[str, Any] = {"mean": _floats(mean), "var": _floats(var)} if norm and form == "conv" else {}
        edit = Insert(module, channels, activation=activation, activation_first=first, **base, **statistics)
        try:
            _check(vars(edit))
        except ValueError as wrong:
            raise StructureError(f"cannot insert behind {module!r}: {wrong}.") from wrong
        error = trial_error(model, [edit], example, tolerance)
        if error <= tolerance:
            return edit
    raise StructureError(f"inserting behind {module!r} changes the outputs (relative error {error:.1e}).")


def _floats(vector: Tensor) -> tuple[float, ...]:
    return tuple(float(item) for item in vector.float())


def _outputs_of_module(model: nn.Module, name: str, example: Any) -> list[Tensor]:
    seen: list[Tensor] = []

    def note(_: nn.Module, __: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            seen.append(output.detach().clone())

    handle = find_module(model, name).register_forward_hook(note)
    with hooked([handle]), evaluating(model):
        call(model, example)
    return seen
