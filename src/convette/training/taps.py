"""Feature taps: inner activations by module name, for losses and distillation."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from convette.errors import UsageError, did_you_mean


class FeatureTaps:
    """Keep the latest output of named modules while the network runs.

    ``taps.request("layer3")`` before the forward pass, ``taps["layer3"]`` after it. Outputs are not detached: losses
    on them train the network. A module nobody asked for costs nothing.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._handles: dict[str, Any] = {}
        self._outputs: dict[str, Any] = {}

    def request(self, *names: str) -> None:
        """Tap the modules `names` (dotted, as in ``named_modules``). Raises `UsageError` for an unknown name."""
        modules = dict(self._model.named_modules())
        for name in names:
            if name not in modules or not name:
                raise UsageError(f"the network has no module {name!r} to tap.{did_you_mean(name, modules)}")
            if name not in self._handles:
                self._handles[name] = modules[name].register_forward_hook(self._keep(name))

    def __getitem__(self, name: str) -> Any:
        """Return the latest output of module `name`."""
        if name not in self._outputs:
            raise UsageError(f"nothing was tapped at {name!r}: request it first, then run the network.")
        return self._outputs[name]

    def clear(self) -> None:
        """Forget the outputs, so that their memory can go."""
        self._outputs.clear()

    def detach(self) -> tuple[str, ...]:
        """Take all hooks off the network; returns the names, for `request` to put them back."""
        names = tuple(self._handles)
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()
        self.clear()
        return names

    def names(self) -> Iterable[str]:
        """Return the tapped names."""
        return tuple(self._handles)

    def _keep(self, name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            self._outputs[name] = output

        return hook
