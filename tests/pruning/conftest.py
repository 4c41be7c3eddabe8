"""Small networks that every test of this room prunes."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from convette.data import MemorySplit, load_data
from convette.surgery import trace


class Residual(nn.Module):
    """A stem, a residual block whose inner layer is free, a wider stage, a hidden linear layer."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.inner = nn.Conv2d(channels, 12, 3, padding=1, bias=False)
        self.inner_norm = nn.BatchNorm2d(12)
        self.outer = nn.Conv2d(12, channels, 3, padding=1, bias=False)
        self.outer_norm = nn.BatchNorm2d(channels)
        self.wide = nn.Conv2d(channels, 16, 3, stride=2, padding=1)
        self.hidden = nn.Linear(16, 20)
        self.head = nn.Linear(20, 10)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        y = F.relu(self.inner_norm(self.inner(x)))
        x = F.relu(self.outer_norm(self.outer(y)) + x)
        x = F.relu(self.wide(x)).mean((2, 3))
        return self.head(F.relu(self.hidden(x)))


class Block(nn.Module):
    """A residual block of one width."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)

    def forward(self, x):
        return F.relu(x + self.norm2(self.second(F.relu(self.norm(self.first(x))))))


class Deep(nn.Module):
    """A stem, residual blocks that can be left out, and a head."""

    def __init__(self, blocks: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.blocks = nn.Sequential(*(Block(8) for _ in range(blocks)))
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        return self.head(self.blocks(F.relu(self.stem(x))).mean((2, 3)))


def lively(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give norms statistics and scales that differ from channel to channel."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
                module.running_mean.copy_(torch.randn(module.num_features, generator=generator) * 0.1)
                module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
    return model.eval()


def plain(data) -> nn.Module:
    """Return a convolution, a norm, a second convolution and a head for `data`, always the same."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(data.preprocessing.channels, 10, 3, padding=1),
        nn.BatchNorm2d(10),
        nn.ReLU(),
        nn.Conv2d(10, 12, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, data.num_classes),
    )


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def digits():
    return load_data("digits")


@pytest.fixture(scope="session")
def few(digits):
    """A hundred digits to score on, and next to nothing to validate on."""

    def first(split, count):
        return MemorySplit(split.name, split.images(torch.arange(count)), split.labels[:count], digits.num_classes)

    return replace(
        digits,
        train=first(digits.train, 96),
        validation=first(digits.validation, 16),
        test=first(digits.test, 16),
    )


@pytest.fixture
def deep() -> Deep:
    torch.manual_seed(0)
    return Deep().eval()


@pytest.fixture
def network() -> nn.Module:
    return lively(Residual())


@pytest.fixture
def example() -> torch.Tensor:
    return torch.randn(1, 1, 9, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def graph(network, example):
    return trace(network, example)


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(2)
    return [
        (torch.randn(6, 1, 9, 8, generator=generator), torch.randint(0, 10, (6,), generator=generator))
        for _ in range(3)
    ]
