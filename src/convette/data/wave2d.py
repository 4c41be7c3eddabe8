"""Fields of a 2-D wave equation, by finite differences: a regression task for small networks, made on the spot."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from convette.errors import UsageError

COURANT = 0.5  # waves cross half a cell a step; the scheme is stable up to 1 / sqrt(2)


def _laplacian(field: Tensor) -> Tensor:
    # Walls reflect: the field beyond is the field before.
    wide = functional.pad(field[:, None], (1, 1, 1, 1), mode="replicate")[:, 0]
    rows = wide[:, 2:, 1:-1] + wide[:, :-2, 1:-1]
    return rows + wide[:, 1:-1, 2:] + wide[:, 1:-1, :-2] - 4 * field


def simulate_wave(start: Float[Tensor, "n h w"], steps: int, courant: float = COURANT) -> Float[Tensor, "n t h w"]:
    """Return the fields at times 0 .. `steps` (t = steps + 1) from `start` at rest, walls reflecting.

    ``u'' = c² (u_xx + u_yy)`` with central differences, one cell and one step as units and c = `courant` cells a step.
    Raises `UsageError` for an unstable courant number.
    """
    if not 0 < courant <= 0.7:
        raise UsageError(f"simulate_wave: courant {courant} must be above 0 and at most 0.7 to be stable.")
    before = start
    now = start + courant**2 / 2 * _laplacian(start)
    fields = [before, now]
    for _ in range(steps - 1):
        before, now = now, 2 * now - before + courant**2 * _laplacian(now)
        fields.append(now)
    return torch.stack(fields[: steps + 1], 1)


def wave_energy(fields: Float[Tensor, "n t h w"], courant: float = COURANT) -> Float[Tensor, "n t-1"]:
    """Return the energy between each field and the next: kinetic plus potential, which the scheme conserves."""
    before, now = fields[:, :-1], fields[:, 1:]
    kinetic = (now - before).square().sum((2, 3)) / 2
    potential = (before.diff(dim=2) * now.diff(dim=2)).sum((2, 3)) + (before.diff(dim=3) * now.diff(dim=3)).sum((2, 3))
    return kinetic + courant**2 / 2 * potential


def wave2d(
    count: int, size: int = 32, ahead: int = 20, sources: int = 3, seed: int = 0
) -> tuple[Float[Tensor, "n 2 h w"], Float[Tensor, "n 1 h w"]]:
    """Return `count` pairs (two fields one after the other, the field `ahead` steps later), each standardised as a set.

    Each simulation starts at rest from `sources` Gaussian bumps of random place, width (1.5 to 3 cells) and sign, and
    is seen from a random moment in its first 20 steps. Raises `UsageError` for sizes below 1.
    """
    if min(count, size, ahead, sources) < 1:
        raise UsageError(f"wave2d: count {count}, size {size}, ahead {ahead}, sources {sources} must be 1 or more.")
    generator = torch.Generator().manual_seed(seed)
    draw = torch.rand(count, sources, 4, generator=generator)
    place = torch.arange(size, dtype=torch.float32)
    centre, width = draw[:, :, :2] * (size - 1), 1.5 + 1.5 * draw[:, :, 2]
    height = torch.where(draw[:, :, 3] < 0.5, -1.0, 1.0)
    rows = torch.exp(-((place - centre[:, :, :1]) ** 2) / (2 * width[:, :, None] ** 2))
    columns = torch.exp(-((place - centre[:, :, 1:]) ** 2) / (2 * width[:, :, None] ** 2))
    fields = simulate_wave(torch.einsum("ns,nsh,nsw->nhw", height, rows, columns), 21 + ahead)
    first = torch.randint(20, (count,), generator=generator)
    pick = torch.stack([first, first + 1, first + 1 + ahead], 1)[:, :, None, None]
    chosen = fields.gather(1, pick.expand(-1, -1, size, size))
    inputs, targets = chosen[:, :2], chosen[:, 2:]
    return inputs / inputs.std(), targets / targets.std()
