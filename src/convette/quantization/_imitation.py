"""The two stages in which a network of few bits learns to imitate the float one; see `low_bit_limited_data`."""

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from convette._progress import progress
from convette.layers._watching import keeping_outputs
from convette.layers.quantization.fake_quantize import QuantConv2d, QuantLinear
from convette.quantization._blocks import Block, relative_error, run_block
from convette.training import distillation_loss

if TYPE_CHECKING:
    from convette.quantization.low_bit_limited_data import LowBitSettings

_LOOK_EVERY = 50
_SIDES = "_rounding_sides"
_COPIES = 4  # augmented copies of each image in stage 1


def independent_stage(
    teacher: nn.Module,
    student: nn.Module,
    blocks: Sequence[Block],
    used: Tensor,
    apart: Tensor,
    settings: "LowBitSettings",
    generator: torch.Generator,
) -> dict[str, tuple[float, float]]:
    """Train each block of `student` alone to imitate the teacher's on the teacher's activations."""
    errors = {}
    shown = torch.cat([_moved(used, settings, generator) for _ in range(max(1, min(_COPIES, 512 // len(used))))])
    with progress("low-bit: blocks", len(blocks), "block") as advance:
        for block in blocks:
            inputs, targets = run_block(teacher, block.name, shown)
            held_inputs, held_targets = run_block(teacher, block.name, apart)
            if settings.block_inputs == "quantized":
                # What the blocks before it, already rounded and trained, really give.
                inputs, held_inputs = (run_block(student, block.name, part)[0] for part in (shown, apart))
            module = student.get_submodule(block.name)

            def loss(chosen: Tensor, module: Any = module, inputs: Any = inputs, targets: Any = targets) -> Tensor:
                return relative_error(module(inputs[chosen]), targets[chosen])

            def judged(module: Any = module, inputs: Any = held_inputs, targets: Any = held_targets) -> float:
                return float(relative_error(module(inputs), targets))

            looks = _optimise(module, loss, judged, len(inputs), settings.block_steps, 1.0, settings, generator)
            errors[block.name] = (looks[0], min(looks))
            advance(detail=block.name)
    return errors


def joint_stage(
    teacher: nn.Module,
    student: nn.Module,
    blocks: Sequence[Block],
    used: Tensor,
    apart: Tensor,
    settings: "LowBitSettings",
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
    teacher: nn.Module,
    student: nn.Module,
    names: Sequence[str],
    images: Tensor,
    settings: "LowBitSettings",
    beta: float,
) -> Tensor:
    kept = names if beta else ()
    with keeping_outputs(teacher, kept) as theirs, keeping_outputs(student, kept) as ours:
        with torch.no_grad():
            expected = teacher(images)
        found = student(images)
    if found.ndim == 2:
        total = distillation_loss(found, expected, settings.temperature)
    else:
        total = relative_error(found, expected)
    for name in kept:
        total = total + beta * relative_error(ours[name], theirs[name]) / len(names)
    return total


def _optimise(
    module: nn.Module,
    loss: Callable[[Tensor], Tensor],
    judged: Callable[[], float],
    count: int,
    steps: int,
    factor: float,
    settings: "LowBitSettings",
    generator: torch.Generator,
    advance: Callable[..., None] = lambda *_, **__: None,
) -> list[float]:
    """Adam on weights and steps of `module`, cosine to 0; keeps what `judged` likes best, the start included."""
    scales, weights = [], []
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(True)
        (scales if name.endswith("log_scale") else weights).append(parameter)
    if settings.adaptive_rounding:
        for name, parameter in module.named_parameters():
            # The grid stays, only the sides of weights are learned; biases and the steps of inputs learn as ever.
            if name.endswith("log_scale") and not name.endswith("activation.log_scale"):
                parameter.requires_grad_(False)
        scales = [parameter for parameter in scales if parameter.requires_grad]
    sides = rounding_sides(module) if settings.adaptive_rounding else []
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
        for layer, low, high in sides:
            layer.weight.data.clamp_(low, high)
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


@torch.no_grad()
def rounding_sides(module: nn.Module) -> list[tuple[Any, Tensor, Tensor]]:
    """Return the quantised layers of `module` with the grid points below and above each of their float weights.

    The float weights are those a layer had when it was first asked, so that a second stage has the same choice.
    """
    found = []
    for layer in module.modules():
        if isinstance(layer, QuantConv2d | QuantLinear):
            if not hasattr(layer, _SIDES):
                scale = layer.scales().reshape(-1, *[1] * (layer.weight.ndim - 1))
                raw = (layer.weight / scale).clamp(-layer.highest, layer.highest)
                setattr(layer, _SIDES, (raw.floor() * scale, raw.ceil() * scale))
            found.append((layer, *getattr(layer, _SIDES)))
    return found


def _moved(images: Tensor, settings: "LowBitSettings", generator: torch.Generator) -> Tensor:
    """Move each image by a few pixels at random; its border is repeated."""
    reach = settings.shift if settings.shift is not None else round(images.shape[-2] / 16)
    if not reach:
        return images
    wide = F.pad(images, (reach,) * 4, mode="replicate")
    height, width = images.shape[-2:]
    rows, columns = torch.randint(0, 2 * reach + 1, (2, len(images)), generator=generator).tolist()
    return torch.stack([one[:, r : r + height, c : c + width] for one, r, c in zip(wide, rows, columns, strict=True)])
