"""What a fold has left, and why: the other half of what `fold` did."""

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from convette.layers import Stays, folded_form


def what_stays(model: nn.Module) -> dict[str, str]:
    """Return the layers of a folded `model` that are no plain ones yet, by name, each with the reason.

    Layers that know what they are at inference say it themselves; norms that stand alone are told by what they read.
    """
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        if any(name.startswith(f"{outer}.") for outer in found):
            continue
        try:
            form = folded_form(module)
        except Stays as reason:
            found[name] = str(reason)
            continue
        if form is not None:
            found[name] = f"{type(module).__name__} does not give the same when folded here; it stays as it is."
        elif isinstance(module, _BatchNorm) and module.running_mean is not None:
            found[name] = (
                f"{type(module).__name__} has no convolution or linear layer beside it that alone it reads, or that"
                " alone reads it without padding."
            )
        elif isinstance(module, _InstanceNorm | nn.GroupNorm | nn.LayerNorm | nn.RMSNorm | _BatchNorm):
            found[name] = f"{type(module).__name__} normalises with statistics of its input."
    return found
