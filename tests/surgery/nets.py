"""Small networks with one hard thing each, and helpers to damage them reproducibly."""

import torch
import torch.nn.functional as F
from torch import nn


def randomise(model, seed=1):
    """Give norms and statistics values a fresh network has not, so that mistakes show."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.rand(parameter.shape, generator=draw) * 0.5 + 0.1)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(torch.randn(buffer.shape, generator=draw) * 0.1)
            if name.endswith("running_var"):
                buffer.copy_(torch.rand(buffer.shape, generator=draw) + 0.5)
    return model.eval()


def half(graph, seed=0):
    """Keep each unit with probability one half, at least one a group."""
    draw = torch.Generator().manual_seed(seed)
    selection = {}
    for group in graph.groups:
        kept = (torch.rand(group.size, generator=draw) < 0.5).nonzero().view(-1)
        selection[group.name] = kept if len(kept) else torch.tensor([int(seed) % group.size])
    return selection


class OptionABlock(nn.Module):
    def __init__(self, inside, outside, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.pad = (outside - inside) // 2
        self.stride = stride

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.pad:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(y + x)


class OptionAResNet(nn.Module):
    """A CIFAR ResNet-20 with option-A shortcuts."""

    def __init__(self, blocks=3, width=16, num_classes=10):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        inside = width
        for stage in range(3):
            outside = width << stage
            layer = []
            for block in range(blocks):
                layer.append(OptionABlock(inside, outside, 2 if stage and not block else 1))
                inside = outside
            setattr(self, f"layer{stage + 1}", nn.Sequential(*layer))
        self.linear = nn.Linear(inside, num_classes)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))
