"""Whole networks of factorised convolutions: from the start of training, from trained ones, and back to dense."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from convette.errors import UsageError
from convette.layers._modules import replace_modules
from convette.layers.convolution._decomposition import compose, decompose
from convette.layers.convolution.tensor_compressed_convolution import (
    FactorizedConv2d,
    FactorizedConv3d,
    _FactorizedConv,
    break_even,
    rank_for,
)


@dataclass(frozen=True)
class Compression:
    """What `factorize` did, by layer: (parameters before, after, relative error of the kernel).

    `left`: layer -> why it stayed dense.
    """

    layers: dict[str, tuple[int, int, float]] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)


def compress_a_priori(
    model: nn.Module,
    rank: int | None = None,
    *,
    budget: int | float | None = None,
    form: str = "per_filter",
    deploy: str = "factors",
) -> nn.Module:
    """Replace the convolutions of an untrained `model` by factorised ones that begin anew; in place, returns it.

    Compression a priori, Boukraichi et al. 2023, arXiv 2304.04964.

    Args:
        model: any network; its plain `nn.Conv2d` and `nn.Conv3d` layers with kernels above 1x1 are replaced.
        rank: of every layer (2 if neither this nor `budget` is given).
        budget: in place of a rank: the share of each layer's parameters that may stay, 0..1.
        form: see `FactorizedConv2d`, like `deploy`; a network that is compressed stays so when it is folded.

    A layer whose factors would hold as much as its kernel stays dense. Raises `UsageError` for a budget outside 0..1,
    both at once, or nothing to replace.
    """
    ranks = _ranks(model, rank, budget, None, form, None)
    if not any(isinstance(chosen, int) for chosen in ranks.values()):
        raise UsageError(f"compress_a_priori: no convolution of {type(model).__name__} gets smaller.")

    def fresh(name: str, module: nn.Module) -> nn.Module | None:
        chosen = ranks.get(name)
        if not isinstance(chosen, int):
            return None
        assert isinstance(module, nn.Conv2d | nn.Conv3d)
        made = _made(module.weight.ndim - 2)(**_arguments(module), rank=chosen, form=form, adopt=False, deploy=deploy)
        return made.to(module.weight).train(module.training)  # type: ignore[arg-type]

    return replace_modules(model, fresh)


def factorize(
    model: nn.Module,
    rank: int | None = None,
    *,
    budget: int | float | None = None,
    error: int | float | None = None,
    form: str = "per_filter",
    deploy: str = "factors",
    where: Callable[[str, nn.Module], bool] | None = None,
) -> Compression:
    """Replace the convolutions of a trained `model` by their decomposition; in place, in its log, with the errors.

    As `compress_a_priori`, or with `error` the smallest rank whose kernel is within that relative error; layers for
    which no rank under break-even is stay dense. ``where(name, module)`` says which layers; None: all.
    """
    from convette.surgery import Convert, apply  # surgery knows the layers; the other way round only here

    ranks, edits, result = _ranks(model, rank, budget, error, form, where), [], Compression()
    dense: dict[str, Tensor] = {}
    for name, chosen in ranks.items():
        if isinstance(chosen, str):
            result.left[name] = chosen
            continue
        module = model.get_submodule(name)
        assert isinstance(module, nn.Conv2d | nn.Conv3d)
        kind = _made(module.weight.ndim - 2)
        listed = {key: list(item) if isinstance(item, tuple) else item for key, item in _arguments(module).items()}
        edits.append(
            Convert(
                name, f"{kind.__module__}:{kind.__name__}", listed | {"rank": chosen, "form": form, "deploy": deploy}
            )
        )
        dense[name] = module.weight.detach()
    apply(model, *edits)
    for name, weight in dense.items():
        made = model.get_submodule(name)
        assert isinstance(made, _FactorizedConv)
        missed = (made.dense_weight().detach() - weight).norm() / weight.norm().clamp_min(1e-30)
        result.layers[name] = (weight.numel(), sum(factor.numel() for factor in made.factors()), float(missed))
    return result


def _made(dimensions: int) -> type[_FactorizedConv]:
    return FactorizedConv2d if dimensions == 2 else FactorizedConv3d


def _ranks(
    model: nn.Module,
    rank: int | None,
    budget: int | float | None,
    error: int | float | None,
    form: str,
    where: Callable[[str, nn.Module], bool] | None,
) -> dict[str, int | str]:
    """Return for each convolution the rank it gets, or why it stays dense."""
    if sum(value is not None for value in (rank, budget, error)) > 1:
        raise UsageError("give one of rank, budget and error.")
    if budget is not None and not 0 < budget <= 1:
        raise UsageError(f"budget {budget} must be a share of the parameters, above 0 and at most 1.")
    return {
        name: _rank(module, 2 if rank is None else rank, budget, error, form)  # type: ignore[arg-type]
        for name, module in model.named_modules()
        if type(module) in (nn.Conv2d, nn.Conv3d) and (where is None or where(name, module))
    }


def _arguments(module: nn.Conv2d | nn.Conv3d) -> dict[str, Any]:
    return {
        "in_channels": module.in_channels,
        "out_channels": module.out_channels,
        "kernel_size": module.kernel_size,
        "stride": module.stride,
        "padding": module.padding,
        "dilation": module.dilation,
        "groups": module.groups,
        "bias": module.bias is not None,
        "padding_mode": module.padding_mode,
    }


def _rank(
    module: nn.Conv2d | nn.Conv3d, rank: int, budget: int | float | None, error: int | float | None, form: str
) -> int | str:
    """Return the rank a layer gets, or why it stays dense."""
    out, fan = module.weight.shape[:2]
    kernel = tuple(module.kernel_size)
    if math.prod(kernel) == 1:
        return "a 1x1 kernel has nothing to decompose"
    if (form == "cp" and module.groups > 1) or (form == "svd" and (len(kernel) != 2 or module.padding_mode != "zeros")):
        return f"form {form!r} does not go with this layer"
    limit = break_even(fan, out, kernel, form)
    if error is not None:
        largest = math.ceil(limit) - 1
        rank = _smallest_rank(module.weight.detach(), error, largest, form) if largest >= 1 else 0
        return rank or f"no rank below break-even ({limit:.1f}) is within {error:g}"
    if budget is not None:
        rank = rank_for(budget * module.weight.numel(), fan, out, kernel, form)
    return rank if rank < limit else f"rank {rank} holds no less than the kernel (break-even {limit:.1f})"


def _smallest_rank(weight: Tensor, error: float, largest: int, form: str) -> int:
    flat = weight.flatten(0, 1) if form == "svd" else weight[None] if form == "cp" else weight
    norm = float(weight.double().norm())
    low, high = 1, largest + 1  # the error falls with the rank: bisection
    while low < high:
        middle = (low + high) // 2
        missed = float((compose(decompose(flat.double(), middle)) - flat.double()).norm())
        low, high = (low, middle) if missed <= error * norm else (middle + 1, high)
    return low if low <= largest else 0


def materialize(model: nn.Module) -> nn.Module:
    """Replace every factorised convolution of `model` by the dense one it equals, in place; return the network.

    Not in the structure log: `convette.fold` does the same as logged edits where ``deploy`` is "dense".
    """
    return replace_modules(
        model, lambda _, module: module.materialized() if isinstance(module, _FactorizedConv) else None
    )
