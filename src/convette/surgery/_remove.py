"""Removing: a layer or block left out where what comes in has the shape of what goes out."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from convette.errors import FileFormatError, StructureError
from convette.layers._watching import call, hooked
from convette.surgery._edits import Change, find_module
from convette.surgery._placing import is_block, place
from convette.surgery._trace import evaluating
from convette.surgery._trial import output_shapes, with_edits


class NoFeatures(nn.Module):
    """No channels, of the size and type of what it reads: a tensor, or the first of a list of them."""

    def forward(self, x: Tensor | list[Tensor]) -> Tensor:
        """Return a tensor without channels."""
        first = x if isinstance(x, Tensor) else x[0]
        return first[:, :0]


@dataclass(frozen=True)
class Remove:
    """Put ``nn.Identity`` in place of `module`: its input goes on as its output, its parameters are gone.

    The outputs change (a residual block's branch is missing) and keep their shape; `remove` proves it. `gives`
    "nothing" puts a module there that gives no channels, for features that are concatenated (`remove_features`).
    """

    module: str
    gives: str = "input"
    kind: ClassVar[str] = "remove"
    preserves: ClassVar[bool] = False

    def apply(self, model: nn.Module) -> Change:
        """Take the module out; raises `StructureError`, with the model unchanged, where there is none."""
        old = find_module(model, self.module)
        change = Change()
        with change.all_or_nothing():
            new = NoFeatures() if self.gives == "nothing" else nn.Identity()
            place(model, self.module, new.train(old.training), change)
        return change

    def to_json(self) -> dict[str, Any]:
        """Return the edit as a JSON object."""
        gives = {} if self.gives == "input" else {"gives": self.gives}
        return {"kind": self.kind, "module": self.module, **gives}

    @staticmethod
    def from_json(value: dict[str, Any]) -> "Remove":
        """Read the edit; raises `FileFormatError` where it names no module."""
        if not isinstance(value.get("module"), str) or not value["module"]:
            raise FileFormatError("a 'remove' edit must name a module.")
        if value.get("gives", "input") not in ("input", "nothing"):
            raise FileFormatError(f"a 'remove' edit gives 'input' or 'nothing', not {value['gives']!r}.")
        return Remove(value["module"], value.get("gives", "input"))


def remove(model: nn.Module, module: str, example: Any) -> Remove:
    """Return the edit that leaves `module` out, proved by a run on the example; the model is as before.

    Raises `StructureError` where the module reads more than one tensor, gives another shape than it reads, or the
    network does not run without it. Cost: two runs of the network.
    """
    find_module(model, module)
    refusal = _calls(model, example).get(module, "never runs on the example")
    if refusal:
        raise StructureError(f"{module!r} cannot be left out: it {refusal}.")
    edit = Remove(module)
    before = output_shapes(model, example)
    failure = f"the network does not run without {module!r}"
    after = with_edits(model, [edit], lambda: output_shapes(model, example), failure)
    if before != after:
        raise StructureError(f"without {module!r} the outputs are {after}, not {before}.")
    return edit


def removable(model: nn.Module, example: Any) -> tuple[str, ...]:
    """Return the blocks that `remove` could leave out: those that keep the shape of the one tensor they read (numbered
    in a sequence, or with a sibling of their class), blocks within such blocks left aside.

    Cost: one run of the network.
    """
    calls = _calls(model, example)
    found: list[str] = []
    for name, _ in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if calls.get(name) == "" and not inside and is_block(model, name):
            found.append(name)
    return tuple(found)


def _calls(model: nn.Module, example: Any) -> dict[str, str]:
    """Return for every module that runs why it cannot be left out ("" where it can, as far as its own shapes say)."""
    names = {id(module): name for name, module in model.named_modules()}
    result: dict[str, str] = {}

    def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        name = names[id(module)]
        if result.get(name):
            return
        if kwargs or len(args) != 1 or not isinstance(args[0], Tensor):
            result[name] = "reads something else than one tensor"
        elif not isinstance(output, Tensor) or output.shape != args[0].shape:
            gives = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            result[name] = f"reads {tuple(args[0].shape)} and gives {gives}"
        else:
            result[name] = ""

    handles = [module.register_forward_hook(note, with_kwargs=True) for module in model.modules()]
    with hooked(handles), evaluating(model):
        call(model, example)
    return result
