"""REINFORCE, as the searches by policy gradient share it: a baseline that follows the rewards, one step a batch."""

from collections.abc import Sequence

import torch
from torch import Tensor


class Reinforce:
    r"""Raise the log-probability of what was rewarded more than usual, lower that of what was rewarded less.

    .. math:: \nabla J \approx \frac1N \sum_n (R_n - b)\, \nabla \log \pi(a_n), \qquad
        b \leftarrow \beta b + (1 - \beta) \bar R

    `baseline_decay` is :math:`\beta`; before the first step b is the mean of the first rewards. Adam at
    `learning_rate`; `entropy` > 0 adds that much of the given entropy, against settling too soon. Source: Williams,
    1992.
    """

    def __init__(
        self, parameters: Sequence[Tensor], learning_rate: float, *, baseline_decay: float = 0.8, entropy: float = 0.0
    ) -> None:
        self.optimizer = torch.optim.Adam(parameters, lr=learning_rate)
        self.decay, self.entropy, self.baseline = baseline_decay, entropy, None

    def step(
        self, log_probabilities: Sequence[Tensor], rewards: Sequence[float], entropy: Tensor | None = None
    ) -> None:
        """Learn from one batch of rollouts: the log-probability of each and what it was worth."""
        mean = sum(rewards) / len(rewards)
        baseline = mean if self.baseline is None else self.baseline
        loss = torch.zeros(())
        for logp, reward in zip(log_probabilities, rewards, strict=True):
            loss = loss - (reward - baseline) * logp / len(rewards)
        if entropy is not None and self.entropy:
            loss = loss - self.entropy * entropy
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.baseline = mean if self.baseline is None else self.decay * self.baseline + (1 - self.decay) * mean
