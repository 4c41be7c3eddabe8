import pytest
import torch
from torch import nn


class Tiny(nn.Module):
    """Convolutions with and without a shortcut, batch norm with real statistics, a linear head."""

    def __init__(self, channels: int = 8, classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.head = nn.Linear(channels, classes)

    def forward(self, images):
        first = self.norm1(self.stem(images)).relu()
        second = (first + self.norm2(self.conv(first))).relu()
        return self.head(second.mean((2, 3)))


def make_tiny(seed: int = 0, **arguments) -> Tiny:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Tiny(**arguments)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.uniform_(-1, 1)
                module.running_var.uniform_(0.5, 2)
                nn.init.uniform_(module.weight, 0.5, 2)
                nn.init.uniform_(module.bias, -1, 1)
        return model


@pytest.fixture(scope="session")
def tiny():
    """Trained-looking, in training mode (as after training): whoever uses it must not change it."""
    return make_tiny()


@pytest.fixture(scope="session")
def another_tiny():
    return make_tiny(seed=1)


@pytest.fixture(scope="session")
def images():
    return torch.randn(13, 3, 12, 10, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def expected(tiny, images):
    import copy

    with torch.no_grad():
        return copy.deepcopy(tiny).eval()(images).numpy()


@pytest.fixture(scope="session")
def exported(tiny, images, tmp_path_factory):
    """The same network in both formats."""
    from convette.runtime import export

    folder = tmp_path_factory.mktemp("exported")
    return {suffix: export(tiny, images[:1], folder / f"tiny{suffix}") for suffix in (".onnx", ".xml")}
