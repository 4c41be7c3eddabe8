"""Low-bit quantisation from as few as 50 unlabelled images: group-wise ranges, two-stage distillation.

Each layer's output channels are grouped so that channels of one group share a scale with the least squared error. Then
every block learns alone to imitate the float block (stage 1), and the whole network the float network (stage 2).

Source: Y. Yuan, C. Chen, X. Hu, S. Peng, Towards Low-Bit Quantization of Deep Neural Networks with Limited Data, ICPR
2020. The idea is the paper's; quantiser, grouping and schedules are ours (its text gives no formulas).
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from convette._progress import progress
from convette.errors import BudgetError, ConvetteError, StructureError, UsageError
from convette.layers.quantization import BinaryConv2d, pack_binary, packed_bytes
from convette.layers.quantization.edits import calibrate, edits_to_quantize, pack_layers, quantizable
from convette.layers.quantization.fake_quantize import ACTIVATION_BITS, WEIGHT_BITS
from convette.quantization._blocks import blocks_of, relative_error
from convette.quantization._calibration import checked
from convette.quantization._imitation import independent_stage, joint_stage
from convette.quantization._settings import QuantizeSettings
from convette.surgery import apply, file_size, fold_edits, structure_log

# What a recipe's layers may have under a limit on size.
ALL_BITS = (2, 3, 4, 5, 6, 8)


@dataclass(frozen=True)
class LowBitSettings:
    """How to quantise to few bits.

    - `bits` of weights (2 to 8), `activation_bits` of inputs (0: float). First and last layer keep 8 bits if
      `ends_8_bits`.
    - `scale_groups`: scales a layer (depthwise layers always have one a channel); `assignment`: see
      `convette.layers.quantization.group_scales`.
    - `size`: bytes the file may take, header and all (of a network that `convette.save` cannot write: its tensors);
      bits are then chosen per layer from `choices` by exact allocation.
    - `block_steps`, `joint_steps`: steps of stage 1 (for each block) and stage 2; 0: without.
    - `learning_rate` of weights and `step_rate` of scales (Adam); a tenth of both in stage 2.
    - `temperature`, `feature_weight`: of stage 2's loss. `held_out`: share of the images that only says when to stop.
    - `block_inputs`: what a block learns from in stage 1: ``"float"``, the float network's activations (independent of
      the other blocks), or ``"quantized"``, those of the rounded blocks before it (in turn, less drift).
    - `adaptive_rounding`: weights only choose between the two grid points around them, and their scales stay: fewer
      freedoms, for fewer than a hundred images.
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
    block_inputs: str = "float"
    adaptive_rounding: bool = False
    shift: int | None = None
    observer: str = "mse"
    seed: int = 0

    def __post_init__(self) -> None:
        for bits in (self.bits, *self.choices):
            if bits not in WEIGHT_BITS:
                raise UsageError(f"low-bit: {bits} weight bits cannot be; 2 to 8 can.")
        if self.activation_bits not in ACTIVATION_BITS:
            raise UsageError(f"low-bit: {self.activation_bits} activation bits cannot be; 2 to 8 can, 0 for none.")
        if self.block_inputs not in ("float", "quantized"):
            raise UsageError(f"low-bit: block_inputs = {self.block_inputs!r} is neither 'float' nor 'quantized'.")
        if not 0 <= self.held_out < 1 or self.batch_size < 1 or self.block_steps < 0 or self.joint_steps < 0:
            raise UsageError("low-bit: held_out is a share in [0, 1), batch_size 1 or more, steps 0 or more.")


def settings_from(recipe: QuantizeSettings, size: int | None = None) -> LowBitSettings:
    """Return the settings that a recipe's `[quantize]` stands for, with a file of at most `size` bytes."""
    return LowBitSettings(
        bits=recipe.bits or 4,
        activation_bits=recipe.activation_bits,
        scale_groups=recipe.scale_groups,
        block_steps=recipe.block_steps,
        joint_steps=recipe.joint_steps,
        observer="mse" if recipe.observer == "default" else recipe.observer,
        size=size,
        choices=ALL_BITS,
        seed=recipe.seed,
    )


@dataclass(frozen=True)
class LowBitResult:
    """A network in few bits.

    - `model`: the packed network, in eval mode, which `convette.save` writes and `convette.load` reads.
    - `bits` of each layer; `size` in bytes of all its tensors, `file_size` of the file (None: it cannot be saved,
      having no origin); `float_size` of the folded float network's tensors.
    - `block_errors`: for each block its relative error on held-out images before and after stage 1.
    - `joint_losses`: the loss of stage 2 on held-out images, before it and at every look.
    """

    model: nn.Module
    bits: Mapping[str, int]
    size: int
    float_size: int
    block_errors: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    joint_losses: tuple[float, ...] = ()
    file_size: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Return everything but the model as plain JSON values."""
        return {
            "bits": dict(self.bits),
            "size": self.size,
            "file_size": self.file_size,
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

    Straight-through rounding, learned scales. What is kept of each stage is what does best on held-out images. Binary
    convolutions stay binary and are packed too.

    Args:
        images: ``k c h w`` float, preprocessed, unlabelled; 50 to 2000.
        settings: None: the defaults, 4-bit weights and 8-bit activations.

    Raises `DataError` for images no range can be learnt from, `BudgetError` (with the smallest size) where
    `settings.size` cannot be met, `StructureError` where no layer can be quantised, `ConvetteError` for weights that
    are not finite; `model` is the same afterwards. Costs a forward and backward of each block `block_steps` times and
    of the network `joint_steps` times.
    """
    settings = settings or LowBitSettings()
    images = torch.from_numpy(checked([images]))
    _refuse_broken(model)
    generator = torch.Generator().manual_seed(settings.seed)
    teacher = copy.deepcopy(model).float().cpu().eval()
    apply(teacher, *fold_edits(teacher, images[:2]))
    teacher.requires_grad_(False)
    if not quantizable(teacher):
        raise StructureError(f"{type(model).__name__} has no convolution or linear layer that could be quantised.")
    bits = choose_bits(teacher, images, settings)
    student = rounded(teacher, bits, settings)
    calibrate(student, images, settings.observer, settings.assignment)
    order = torch.randperm(len(images), generator=generator)
    held = max(1, round(settings.held_out * len(images))) if settings.held_out else 0
    used, apart = images[order[held:]], images[order[:held]] if held else images
    errors: dict[str, tuple[float, float]] = {}
    blocks = blocks_of(teacher, list(bits), images[:2])
    if settings.block_steps:
        errors = independent_stage(teacher, student, blocks, used, apart, settings, generator)
    losses: tuple[float, ...] = ()
    if settings.joint_steps:
        losses = joint_stage(teacher, student, blocks, used, apart, settings, generator)
    network = packed(student.requires_grad_(False))
    return LowBitResult(network, bits, _bytes(network), _bytes(teacher), errors, losses, _file_bytes(network))


def rounded(model: nn.Module, bits: Mapping[str, int], settings: LowBitSettings) -> nn.Module:
    """Return a copy of a folded `model` with trainable quantised layers of `bits` bits, in eval mode."""
    student = copy.deepcopy(model)
    apply(student, *edits_to_quantize(student, bits, _activation_bits(model, settings), _groups(model, settings)))
    return student.eval()


def packed(model: nn.Module) -> nn.Module:
    """Return `model` with its quantised and binary layers packed, which is what a file holds."""
    network = pack_layers(model)
    return pack_binary(network) if any(isinstance(layer, BinaryConv2d) for layer in network.modules()) else network


def _refuse_broken(model: nn.Module) -> None:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ConvetteError(
                f"{name} of {type(model).__name__} holds values that are not finite (NaN or infinity); nothing was "
                "quantised. Go back to an earlier checkpoint."
            )


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
    rest = _rest(model, settings)
    errors = sensitivities(model, images[:64], settings)
    chosen = allocate(errors, sizes, settings.size - rest)
    if chosen is None:
        least = int(sizes.min(1).sum()) + rest
        raise BudgetError(
            f"low-bit: {settings.size:,} bytes cannot be met: with {min(settings.choices)} bits the network takes "
            f"{least:,} bytes at the least. Raise the limit, or prune first."
        )
    return {name: settings.choices[index] for name, index in zip(layers, chosen, strict=True)}


def _rest(model: nn.Module, settings: LowBitSettings) -> int:
    """Return the bytes of a packed `model` besides its quantised layers: other tensors, and the header of its file."""
    layers = quantizable(model)
    bits = {name: settings.choices[number % len(settings.choices)] for number, name in enumerate(layers)}
    network = packed(rounded(model, bits, settings))
    rest = _bytes(network) - sum(layer_bytes(layer, bits[name], settings) for name, layer in layers.items())
    on_disk = _file_bytes(network)
    # The header is compressed: other bits in the same places may take some bytes more.
    return rest if on_disk is None else rest + on_disk - _bytes(network) + 32 + 2 * len(layers)


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


def _file_bytes(model: nn.Module) -> int | None:
    return None if structure_log(model).origin is None else file_size(model)


def layers_text(result: LowBitResult) -> str:
    """Return how many layers have how many bits."""
    counts = {bits: list(result.bits.values()).count(bits) for bits in sorted(set(result.bits.values()))}
    return ", ".join(f"{count} layer{'s' * (count > 1)} in {bits} bits" for bits, count in counts.items())


def describe(result: LowBitResult) -> str:
    """Return what was done in one line: how many layers have how many bits, the bytes of the file (or the tensors)."""
    size = result.file_size or result.size
    return f"{layers_text(result)}: {size:,} bytes, {result.float_size / size:.1f} times smaller"
