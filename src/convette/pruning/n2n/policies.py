"""The two policies: a bidirectional one that keeps or removes each layer, an autoregressive one that shrinks it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from convette.errors import UsageError

FACTORS = tuple(round(0.1 * step, 1) for step in range(1, 11))
STATE = 5


@dataclass(frozen=True)
class LayerFacts:
    """What a policy sees of a layer or block: its kind, kernel, stride, channels and padding."""

    kind: int
    kernel: int
    stride: int
    channels: int
    padding: int


def layer_states(layers: Sequence[LayerFacts]) -> Float[Tensor, "layers 5"]:
    """Return the states x_t of a network, scaled to about 0..1 (raw channel counts would saturate the policies)."""
    rows = [
        [layer.kind / 4, layer.kernel / 7, layer.stride / 2, math.log2(max(layer.channels, 1)) / 10, layer.padding / 3]
        for layer in layers
    ]
    return torch.tensor(rows, dtype=torch.float32).view(len(rows), STATE)


class RemovalPolicy(nn.Module):
    """Keep or remove, for all layers at once: a bidirectional LSTM of two layers over the states, a softmax each."""

    def __init__(self, hidden: int = 30) -> None:
        super().__init__()
        self.recurrent = nn.LSTM(STATE, hidden, num_layers=2, bidirectional=True)
        self.head = nn.Linear(2 * hidden, 2)

    def forward(self, states: Float[Tensor, "layers 5"]) -> Float[Tensor, "layers 2"]:
        """Return the log-probabilities of keeping (0) and removing (1)."""
        found, _ = self.recurrent(states[:, None])
        return self.head(found[:, 0]).log_softmax(1)

    def sample(
        self, states: Float[Tensor, "layers 5"], free: Sequence[bool], generator: torch.Generator
    ) -> tuple[list[bool], Tensor]:
        """Return which layers go, and the log-probability of that: only free layers are decided on, and counted."""
        logs = self(states)
        removed, total = [], logs.new_zeros(())
        for log, decides in zip(logs, free, strict=True):
            action = int(torch.multinomial(log.detach().exp(), 1, generator=generator)) if decides else 0
            removed.append(bool(action))
            if decides:
                total = total + log[action]
        return removed, total


class ShrinkPolicy(nn.Module):
    """A factor for each layer in turn: stacked LSTM cells that see, with each state, the factor chosen before it."""

    def __init__(self, hidden: int = 30, factors: Sequence[float] = FACTORS) -> None:
        super().__init__()
        if not factors or not all(0 < factor <= 1 for factor in factors):
            raise UsageError(f"n2n: factors {tuple(factors)} must lie above 0 and at most 1.")
        self.factors = tuple(factors)
        self.cells = nn.ModuleList([nn.LSTMCell(STATE + 1, hidden), nn.LSTMCell(hidden, hidden)])
        self.head = nn.Linear(hidden, len(self.factors))

    def sample(
        self, states: Float[Tensor, "layers 5"], free: Sequence[bool], generator: torch.Generator
    ) -> tuple[list[float], Tensor]:
        """Return the factor of each layer (1 where it is not free) and the log-probability of the free ones."""
        memory: list = [None, None]
        before, total = states.new_ones(1), states.new_zeros(())
        chosen = []
        for state, decides in zip(states, free, strict=True):
            x = torch.cat([state, before])[None]
            for number, cell in enumerate(self.cells):
                memory[number] = cell(x, memory[number])
                x = memory[number][0]
            log = self.head(x)[0].log_softmax(0)
            factor = 1.0
            if decides:
                action = int(torch.multinomial(log.detach().exp(), 1, generator=generator))
                factor, total = self.factors[action], total + log[action]
            chosen.append(factor)
            before = states.new_tensor([factor])
        return chosen, total
