from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional as F


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(16)
        self.conv = nn.Conv2d(16, 32, 3, padding=1, stride=2, bias=False)
        self.norm2 = nn.BatchNorm2d(32)
        self.conv3 = nn.Conv2d(32, 32, 3, padding=1, bias=False)
        self.norm3 = nn.BatchNorm2d(32)
        self.head = nn.Linear(32, 10)

    def forward(self, images):
        first = self.norm2(self.conv(self.norm1(self.stem(images)).relu())).relu()
        second = (first + self.norm3(self.conv3(first))).relu()
        return self.head(second.mean((2, 3)))


@dataclass
class Split:
    """As much of `convette.data.ImageSplit` as quantisation needs."""

    stored: torch.Tensor
    labels: torch.Tensor

    def __len__(self):
        return len(self.labels)

    def images(self, indices):
        return self.stored[indices]


@dataclass
class Data:
    train: Split
    validation: Split

    def preprocessing(self, images):
        return (images.float() / 255 - 0.3) / 0.4


@dataclass
class Evaluation:
    accuracy: float


def evaluate(runner, split, preprocessing):
    logits = torch.from_numpy(runner(preprocessing(split.stored)))
    return Evaluation(float((logits.argmax(1) == split.labels).float().mean()))


@pytest.fixture(scope="session")
def digits():
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(bunch.images * 15.9).to(torch.uint8)[:, None]
    labels = torch.from_numpy(bunch.target)
    return Data(Split(images[:1200], labels[:1200]), Split(images[1200:], labels[1200:]))


@pytest.fixture(scope="session")
def net(digits):
    """A network that tells the digits apart: a few seconds of training."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Net()
        optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
        images, labels = digits.preprocessing(digits.train.stored), digits.train.labels
        for _ in range(8):
            for chosen in torch.randperm(len(labels)).split(64):
                loss = F.cross_entropy(model(images[chosen]), labels[chosen])
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
    return model


@pytest.fixture(scope="session")
def images(digits):
    return digits.preprocessing(digits.validation.stored)


@pytest.fixture(scope="session")
def calibration(digits):
    return list(digits.preprocessing(digits.train.stored[:64]).split(20))


@pytest.fixture(scope="session")
def evaluate_digits():
    return evaluate


@pytest.fixture(scope="session")
def int8_files(net, images, calibration, tmp_path_factory):
    from convette.quantization import quantize_onnx, quantize_openvino
    from convette.runtime import export

    folder = tmp_path_factory.mktemp("int8")
    export(net, images[:1], folder / "float.xml")
    plain = export(net, images[:1], folder / "float.onnx")
    return {
        "openvino": quantize_openvino(net, images[:1], calibration, folder / "int8.xml"),
        "onnxruntime": quantize_onnx(plain, calibration, folder / "int8.onnx"),
    }
