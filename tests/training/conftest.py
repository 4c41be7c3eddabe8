import pytest
import torch
from torch import nn

from convette.data import ImageData, MemorySplit, Preprocessing


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def small_data(train: int = 96, classes: int = 3, size: int = 6) -> ImageData:
    """Bright squares at a place that depends on the class, plus noise: learnable in a few steps."""
    generator = torch.Generator().manual_seed(0)
    total = train + 2 * (train // 4)
    labels = torch.arange(total) % classes
    pixels = torch.randint(0, 120, (total, 1, size, size), generator=generator)
    for index, label in enumerate(labels.tolist()):
        pixels[index, :, 2 * label : 2 * label + 2] += 100
    pixels = pixels.to(torch.uint8)

    def split(name: str, rows: torch.Tensor) -> MemorySplit:
        return MemorySplit(name, pixels[rows], labels[rows], classes)

    rows = torch.arange(total)
    cut = train + train // 4
    return ImageData(
        source="small",
        class_names=tuple("abc")[:classes],
        train=split("train", rows[:train]),
        validation=split("validation", rows[train:cut]),
        test=split("test", rows[cut:]),
        preprocessing=Preprocessing(1, size, size, (0.3,), (0.3,)),
        bad=(),
        notes=(),
        fingerprint="small",
    )


def small_network(norm: bool = True, dropout: float = 0.0, classes: int = 3) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=not norm),
        nn.BatchNorm2d(8) if norm else nn.Identity(),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Conv2d(8, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d((3, 1)),
        nn.Flatten(),
        nn.Linear(24, classes),
    )


def same(one: nn.Module, other: nn.Module) -> bool:
    """Whether two networks have the same tensors, bit for bit."""
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# Test modules are imported by path and cannot import from here, so the helpers come as fixtures.
@pytest.fixture(scope="session")
def data() -> ImageData:
    return small_data()


@pytest.fixture(scope="session")
def make_data():
    return small_data


@pytest.fixture(scope="session")
def make_network():
    return small_network


@pytest.fixture(scope="session")
def equal():
    return same
