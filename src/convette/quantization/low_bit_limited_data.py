"""Low-bit quantisation from as few as 50 unlabelled images: group-wise ranges, two-stage distillation.

Each layer's output channels are grouped so that channels of one group share a scale with the least squared error. Then
every block learns alone to imitate the float block (stage 1), and the whole network the float network (stage 2).

Source: Y. Yuan, C. Chen, X. Hu, S. Peng, Towards Low-Bit Quantization of Deep Neural Networks with Limited Data, ICPR
2020. The idea is the paper's; quantiser, grouping and schedules are ours (its text gives no formulas).
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from convette._progress import progress
from convette.errors import BudgetError, StructureError, UsageError
from convette.layers.quantization import packed_bytes
from convette.layers.quantization.edits import calibrate, edits_to_quantize, pack_layers, quantizable
from convette.layers.quantization.fake_quantize import ACTIVATION_BITS, WEIGHT_BITS
from convette.quantization._blocks import Block, blocks_of, relative_error, run_block
from convette.quantization._calibration import checked
from convette.quantization._settings import QuantizeSettings
from convette.surgery import apply, fold_edits
from convette.training import distillation_loss

_LOOK_EVERY = 50
_COPIES = 4  # augmented copies of each image in stage 1


@dataclass(frozen=True)
class LowBitSettings:
    """How to quantise to few bits.

    - `bits` of weights (2 to 8), `activation_bits` of inputs (0: float). First and last layer keep 8 bits if
      `ends_8_bits`.
    - `scale_groups`: scales a layer (depthwise layers always have one a channel); `assignment`: see
      `convette.layers.quantization.group_scales`.
    - `size`: bytes the weights may take; bits are then chosen per layer from `choices` by exact allocation.
    - `block_steps`, `joint_steps`: steps of stage 1 (for each block) and stage 2; 0: without.
    - `learning_rate` of weights and `step_rate` of scales (Adam); a tenth of both in stage 2.
    - `temperature`, `feature_weight`: of stage 2's loss. `held_out`: share of the images that only says when to stop.
    - `shift`: pixels images are moved by at random, so that few say more; None: a sixteenth of the height.

    Raises `UsageError` for values out of range.
    """

    bits: int = 4
    activation_bits: int = 8
    scale_groups: int | None = 8
    assignment: str = "sorted"
    ends_8_bits: bool = True
    size: int | None = None
    choices: tuple[int, ...] = (2, 3, 4, 8)
    block_steps: int = 300
    joint_steps: int = 300
    batch_size: int = 32
    learning_rate: float | int = 1e-4
    step_rate: float | int = 1e-3
    temperature: float | int = 4.0
    feature_weight: float | int = 1.0
    held_out: float | int = 0.2
    shift: int | None = None
    observer: str = "mse"
    seed: int = 0

    def __post_init__(self) -> None:
        for bits in (self.bits, *self.choices):
            if bits not in WEIGHT_BITS:
                raise UsageError(f"low-bit: {bits} weight bits cannot be; 2 to 8 can.")
        if self.activation_bits not in ACTIVATION_BITS:
            raise UsageError(f"low-bit: {self.activation_bits} activation bits cannot be; 2 to 8 can, 0 for none.")
        if not 0 <= self.held_out < 1 or self.batch_size < 1 or self.block_steps < 0 or self.joint_steps < 0:
            raise UsageError("low-bit: held_out is a share in [0, 1), batch_size 1 or more, steps 0 or more.")


def settings_from(recipe: QuantizeSettings, size: int | None = None) -> LowBitSettings:
    """Return the settings that a recipe's `[quantize]` stands for, with the weights in at most `size` bytes."""
    return LowBitSettings(
        bits=recipe.bits,
        activation_bits=recipe.activation_bits,
        scale_groups=recipe.scale_groups,
        block_steps=recipe.block_steps,
        joint_steps=recipe.joint_steps,
        size=size,
        seed=recipe.seed,
    )


@dataclass(frozen=True)
class LowBitResult:
    """A network in few bits.

    - `model`: the packed network, in eval mode, which `convette.save` writes and `convette.load` reads.
    - `bits` of each layer; `size` in bytes of all its tensors; `float_size` of the folded float network's.
    - `block_errors`: for each block its relative error on held-out images before and after stage 1.
    - `joint_losses`: the loss of stage 2 on held-out images, before it and at every look.
    """

    model: nn.Module
    bits: Mapping[str, int]
    size: int
    float_size: int
    block_errors: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    joint_losses: tuple[float, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return everything but the model as plain JSON values."""
        return {
            "bits": dict(self.bits),
            "size": self.size,
            "float_size": self.float_size,
            "block_errors": {name: list(pair) for name, pair in self.block_errors.items()},
            "joint_losses": list(self.joint_losses),
        }


def low_bit(model: nn.Module, images: Tensor, settings: LowBitSettings | None = None) -> LowBitResult:
    r"""Quantise a trained network to few bits with the help of a few images; `model` is left as it is.

    Batch norms are folded; weights become symmetric integers with group-wise scales, inputs unsigned ones. Stage 1, for
    each block :math:`m` alone, on the float network's activations :math:`x`:

    .. math:: L_m = \lVert f_m(x) - \hat f_m(x) \rVert^2 / \lVert f_m(x) \rVert^2

    Stage 2, all together, with :math:`\tau` the temperature and :math:`\beta` falling from `feature_weight` to 0:

    .. math:: L = \tau^2\, \mathrm{KL}(\mathrm{softmax}(z/\tau) \,\|\, \mathrm{softmax}(\hat z/\tau)) + \beta \sum_m L_m

    Straight-through rounding, learned scales. What is kept of each stage is what does best on held-out images.

    Args:
        images: ``k c h w`` float, preprocessed, unlabelled; 50 to 2000.
        settings: None: the defaults, 4-bit weights and 8-bit activations.

    Raises `DataError` for images no range can be learnt from, `BudgetError` (with the smallest size) where
    `settings.size` cannot be met, `StructureError` where no layer can be quantised. Costs a forward and backward of
    each block `block_steps` times and of the network `joint_steps` times.
    """
    settings = settings or LowBitSettings()
    images = torch.from_numpy(checked([images]))
    generator = torch.Generator().manual_seed(settings.seed)
    teacher = copy.deepcopy(model).float().cpu().eval()
    apply(teacher, *fold_edits(teacher, images[:2]))
    teacher.requires_grad_(False)
    if not quantizable(teacher):
        raise StructureError(f"{type(model).__name__} has no convolution or linear layer that could be quantised.")
    bits = choose_bits(teacher, images, settings)
    student = copy.deepcopy(teacher)
    apply(student, *edits_to_quantize(student, bits, _activation_bits(teacher, settings), _groups(teacher, settings)))
    student.eval()
    calibrate(student, images, settings.observer, settings.assignment)
    order = torch.randperm(len(images), generator=generator)
    held = max(1, round(settings.held_out * len(images))) if settings.held_out else 0
    used, apart = images[order[held:]], images[order[:held]] if held else images
    errors: dict[str, tuple[float, float]] = {}
    blocks = blocks_of(teacher, list(bits), images[:2])
    if settings.block_steps:
        errors = _independent_stage(teacher, student, blocks, used, apart, settings, generator)
    losses: tuple[float, ...] = ()
    if settings.joint_steps:
        losses = _joint_stage(teacher, student, blocks, used, apart, settings, generator)
    packed = pack_layers(student.requires_grad_(False))
    return LowBitResult(packed, bits, _bytes(packed), _bytes(teacher), errors, losses)


# Bits -----------------------------------------------------------------------------------------------------------------


def choose_bits(model: nn.Module, images: Tensor, settings: LowBitSettings) -> dict[str, int]:
    """Return the bits of each layer of a folded `model`: those of `settings`, or the best under ``settings.size``.

    With a size: the choice that gives the least sum of output errors, each layer's error measured with only that layer
    rounded, of all that fit (exact, by HiGHS). Raises `BudgetError` naming the smallest size in reach.
    """
    layers = quantizable(model)
    if settings.size is None:
        bits = dict.fromkeys(layers, settings.bits)
        if settings.ends_8_bits:
            ends = list(layers)
            bits[ends[0]] = bits[ends[-1]] = max(settings.bits, 8)
        return bits
    sizes = np.array([[layer_bytes(layer, bits, settings) for bits in settings.choices] for layer in layers.values()])
    rest = _bytes(model) - sum(_bytes(layer) for layer in layers.values())
    errors = sensitivities(model, images[:64], settings)
    chosen = allocate(errors, sizes, settings.size - rest)
    if chosen is None:
        least = int(sizes.min(1).sum()) + rest
        raise BudgetError(
            f"low-bit: {settings.size:,} bytes cannot be met: with {min(settings.choices)} bits the weights take "
            f"{least:,} bytes at the least. Raise the limit, or prune first."
        )
    return {name: settings.choices[index] for name, index in zip(layers, chosen, strict=True)}


def allocate(errors: np.ndarray, sizes: np.ndarray, limit: float | int) -> list[int] | None:
    r"""Return the choice of each layer with the least total error within `limit`; None where nothing fits.

    .. math:: \min_x \sum_{lc} e_{lc} x_{lc} \quad \text{s.t.} \quad \sum_c x_{lc} = 1,\ \sum_{lc} s_{lc} x_{lc} \le S

    with `errors` and `sizes` of shape "layer choice": a multiple-choice knapsack, solved exactly by HiGHS.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    layers, choices = errors.shape
    one_each = np.kron(np.eye(layers), np.ones(choices))
    # Errors of layers differ by many orders; the solver wants numbers near one.
    scale = float(errors.max()) or 1.0
    found = milp(
        errors.ravel() / scale,
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(sizes.ravel()[None], -np.inf, limit)],
        integrality=np.ones(errors.size),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0.0},
    )
    if found.x is None:
        return None
    return [int(index) for index in found.x.reshape(layers, choices).argmax(1)]


@torch.no_grad()
def sensitivities(model: nn.Module, images: Tensor, settings: LowBitSettings) -> np.ndarray:
    """Return how far the outputs move when one layer alone is rounded: relative squared errors "layer choice"."""
    names = list(quantizable(model))
    expected = model(images)
    trial = copy.deepcopy(model)
    found = np.zeros((len(names), len(settings.choices)))
    with progress("low-bit: sensitivity", found.size, "run") as advance:
        for column, bits in enumerate(settings.choices):
            groups = _groups(model, settings)
            rounded = copy.deepcopy(model)
            apply(rounded, *edits_to_quantize(rounded, dict.fromkeys(names, bits), 0, groups))
            for row, name in enumerate(names):
                layer: Any = rounded.get_submodule(name)
                layer.calibrate_weight(settings.assignment)
                weight: Any = trial.get_submodule(name).weight
                before = weight.clone()
                weight.copy_(layer.quantized_weight())
                found[row, column] = float(relative_error(trial(images), expected))
                weight.copy_(before)
                advance()
    return found


def layer_bytes(layer: nn.Module, bits: int, settings: LowBitSettings) -> int:
    """Return the bytes a layer takes once packed: weights, scales, groups, bias, the quantiser of its input."""
    weight: Any = layer.weight
    count = len(weight)
    groups = _groups_of(layer, settings)
    scales = count if groups is None else min(groups, count)
    mapped = count * (1 if scales <= 256 else 4) if 1 < scales < count else 0
    bias = 4 * count if getattr(layer, "bias", None) is not None else 0
    return packed_bytes(weight.numel(), bits) + 4 * scales + mapped + bias + (8 if settings.activation_bits else 0)


def _groups(model: nn.Module, settings: LowBitSettings) -> dict[str, int | None]:
    return {name: _groups_of(layer, settings) for name, layer in quantizable(model).items()}


def _groups_of(layer: nn.Module, settings: LowBitSettings) -> int | None:
    # Each channel of a depthwise layer is a filter of its own: one range for several would be far off.
    return None if getattr(layer, "groups", 1) > 1 else settings.scale_groups


def _activation_bits(model: nn.Module, settings: LowBitSettings) -> dict[str, int]:
    names = list(quantizable(model))
    bits = dict.fromkeys(names, settings.activation_bits)
    if settings.ends_8_bits and settings.activation_bits:
        bits[names[0]] = bits[names[-1]] = 8
    return bits


def _bytes(model: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())


# Stages ---------------------------------------------------------------------------------------------------------------


def _independent_stage(
    teacher: nn.Module,
    student: nn.Module,
    blocks: Sequence[Block],
    used: Tensor,
    apart: Tensor,
    settings: LowBitSettings,
    generator: torch.Generator,
) -> dict[str, tuple[float, float]]:
    """Train each block of `student` alone to imitate the teacher's on the teacher's activations."""
    errors = {}
    shown = torch.cat([_moved(used, settings, generator) for _ in range(max(1, min(_COPIES, 512 // len(used))))])
    with progress("low-bit: blocks", len(blocks), "block") as advance:
        for block in blocks:
            inputs, targets = run_block(teacher, block.name, shown)
            held_inputs, held_targets = run_block(teacher, block.name, apart)
            module = student.get_submodule(block.name)

            def loss(chosen: Tensor, module: Any = module, inputs: Any = inputs, targets: Any = targets) -> Tensor:
                return relative_error(module(inputs[chosen]), targets[chosen])

            def judged(module: Any = module, inputs: Any = held_inputs, targets: Any = held_targets) -> float:
                return float(relative_error(module(inputs), targets))

            looks = _optimise(module, loss, judged, len(inputs), settings.block_steps, 1.0, settings, generator)
            errors[block.name] = (looks[0], min(looks))
            advance(detail=block.name)
    return errors


def _joint_stage(
    teacher: nn.Module,
    student: nn.Module,
    blocks: Sequence[Block],
    used: Tensor,
    apart: Tensor,
    settings: LowBitSettings,
    generator: torch.Generator,
) -> tuple[float, ...]:
    """Train all of `student` together on the teacher's outputs and, less and less, its features."""
    names = [block.name for block in blocks]
    steps, done = settings.joint_steps, 0

    def loss(chosen: Tensor) -> Tensor:
        nonlocal done
        images = _moved(used[chosen], settings, generator)
        weight = float(settings.feature_weight) * max(0.0, 1 - done / steps)
        done += 1
        return _joint_loss(teacher, student, names, images, settings, weight)

    def judged() -> float:
        return float(_joint_loss(teacher, student, names, apart, settings, 0.0))

    with progress("low-bit: joint", steps, "step") as advance:
        looks = _optimise(student, loss, judged, len(used), steps, 0.1, settings, generator, advance)
    return tuple(looks)


def _joint_loss(
    teacher: nn.Module, student: nn.Module, names: Sequence[str], images: Tensor, settings: LowBitSettings, beta: float
) -> Tensor:
    with _outputs(teacher, names if beta else ()) as theirs, _outputs(student, names if beta else ()) as ours:
        with torch.no_grad():
            expected = teacher(images)
        found = student(images)
    if found.ndim == 2:
        total = distillation_loss(found, expected, settings.temperature)
    else:
        total = relative_error(found, expected)
    for name in names if beta else ():
        total = total + beta * relative_error(ours[name], theirs[name]) / len(names)
    return total


class _outputs:
    """The outputs of named modules while the network runs."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self._model, self._names = model, names

    def __enter__(self) -> dict[str, Any]:
        kept: dict[str, Any] = {}
        self._handles = [
            self._model.get_submodule(name).register_forward_hook(
                lambda module, inputs, output, name=name: kept.__setitem__(name, output)
            )
            for name in self._names
        ]
        return kept

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()


def _optimise(
    module: nn.Module,
    loss: Callable[[Tensor], Tensor],
    judged: Callable[[], float],
    count: int,
    steps: int,
    factor: float,
    settings: LowBitSettings,
    generator: torch.Generator,
    advance: Callable[..., None] = lambda *_, **__: None,
) -> list[float]:
    """Adam on weights and steps of `module`, cosine to 0; keeps what `judged` likes best, the start included."""
    scales, weights = [], []
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(True)
        (scales if name.endswith("log_scale") else weights).append(parameter)
    optimizer = torch.optim.Adam(
        [
            {"params": weights, "lr": factor * settings.learning_rate},
            {"params": scales, "lr": factor * settings.step_rate},
        ]
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with torch.no_grad():
        looks = [judged()]
    best = copy.deepcopy(module.state_dict())
    for step in range(steps):
        chosen = torch.randint(count, (min(settings.batch_size, count),), generator=generator)
        value = loss(chosen)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
        advance()
        if (step + 1) % _LOOK_EVERY == 0 or step + 1 == steps:
            with torch.no_grad():
                looks.append(judged())
            if looks[-1] <= min(looks[:-1]):
                best = copy.deepcopy(module.state_dict())
    module.load_state_dict(best)
    for parameter in module.parameters():
        parameter.grad = None
    return looks


def _moved(images: Tensor, settings: LowBitSettings, generator: torch.Generator) -> Tensor:
    """Move each image by a few pixels at random; its border is repeated."""
    reach = settings.shift if settings.shift is not None else round(images.shape[-2] / 16)
    if not reach:
        return images
    wide = F.pad(images, (reach,) * 4, mode="replicate")
    height, width = images.shape[-2:]
    rows, columns = torch.randint(0, 2 * reach + 1, (2, len(images)), generator=generator).tolist()
    return torch.stack([one[:, r : r + height, c : c + width] for one, r, c in zip(wide, rows, columns, strict=True)])


def describe(result: LowBitResult) -> str:
    """Return what was done in one line: sizes, how many layers have how many bits."""
    counts = {bits: list(result.bits.values()).count(bits) for bits in sorted(set(result.bits.values()))}
    layers = ", ".join(f"{count} layers in {bits} bits" for bits, count in counts.items())
    return f"{layers}: {result.size:,} bytes, {result.float_size / result.size:.1f} times smaller"
