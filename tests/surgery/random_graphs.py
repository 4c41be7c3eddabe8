"""Random small networks out of everything the label rules know, built from a list of operation names and a seed."""

import random

import torch
import torch.nn.functional as F
from torch import nn


class RandomNet(nn.Module):
    """Applies `operations` in turn to a feature map; every layer is made when the network is built."""

    def __init__(self, operations, seed):
        super().__init__()
        self.draw = random.Random(seed)
        self.steps = []
        self.layers = nn.ModuleList()
        self.scales = nn.ParameterList()
        self.width = 6
        self.add("conv")
        for name in operations:
            self.add(name)
        self.head = nn.Linear(self.width, 3)

    def layer(self, module):
        self.layers.append(module)
        return len(self.layers) - 1

    def conv(self, a, b, k=1, **more):
        return self.layer(nn.Conv2d(a, b, k, padding=k // 2, bias=self.draw.random() < 0.5, **more))

    def add(self, name):
        c = self.width
        even = c % 2 == 0
        if name == "conv":
            out = self.draw.randint(4, 10)
            number = self.conv(3 if not self.steps else c, out, self.draw.choice([1, 3]))
            self.step(out, lambda x: self.layers[number](x))
        elif name == "norm":
            kind = self.draw.choice(["batch", "instance", "group"] if even else ["batch", "instance"])
            made = {"batch": nn.BatchNorm2d(c), "instance": nn.InstanceNorm2d(c, affine=True)}
            number = self.layer(made[kind] if kind in made else nn.GroupNorm(2, c))
            self.step(c, lambda x: F.relu(self.layers[number](x)))
        elif name == "layernorm":
            number = self.layer(nn.LayerNorm(c))
            self.step(c, lambda x: self.layers[number](x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
        elif name == "residual":
            a, b = self.conv(c, 2 * c, 3), self.conv(2 * c, c)
            self.step(c, lambda x: x + self.layers[b](F.silu(self.layers[a](x))))
        elif name == "dense":
            a = self.conv(c, 4, 3)
            self.step(c + 4, lambda x: torch.cat([x, F.relu(self.layers[a](x))], 1))
        elif name == "twice":
            self.step(2 * c, lambda x: torch.cat([x, x], 1))
        elif name == "split" and c >= 4:
            k = self.draw.randint(2, c - 2)
            a = self.conv(k, k, 3)

            def split(x):
                left, right = x.split([k, c - k], 1)
                return torch.cat([right, self.layers[a](left)], 1)

            self.step(c, split)
        elif name == "gate" and even:

            def gate(x):
                left, right = x.chunk(2, 1)
                return left * right.sigmoid()

            self.step(c // 2, gate)
        elif name == "shuffle" and even:

            def shuffle(x):
                n, c, h, w = x.shape
                return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)

            self.step(c, shuffle)
        elif name == "squeeze":
            a, b = self.conv(c, 4), self.conv(4, c)
            self.step(c, lambda x: x * self.layers[b](F.relu(self.layers[a](x.mean((2, 3), keepdim=True)))).sigmoid())
        elif name == "grouped" and even:
            a = self.conv(c, c, 3, groups=2)
            self.step(c, lambda x: self.layers[a](x))
        elif name == "depthwise":
            m = self.draw.choice([1, 2])
            a = self.conv(c, c * m, 3, groups=c)
            self.step(c * m, lambda x: self.layers[a](x))
        elif name == "shared":
            a = self.conv(c, c, 3)
            self.step(c, lambda x: self.layers[a](F.relu(self.layers[a](x))))
        elif name == "pixels":
            a = self.conv(c, 8)
            self.step(2, lambda x: F.max_pool2d(F.pixel_shuffle(self.layers[a](x), 2), 2))
        elif name == "attention":
            a, b = self.layer(nn.Linear(c, 24)), self.layer(nn.Linear(8, c))

            def attention(x):
                n, _, h, w = x.shape
                t = self.layers[a](x.flatten(2).transpose(1, 2))
                q, k, v = t.reshape(n, h * w, 3, 2, 4).permute(2, 0, 3, 1, 4)
                y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
                return x + self.layers[b](y).transpose(1, 2).reshape(n, -1, h, w)

            self.step(c, attention)
        elif name == "scale":
            self.scales.append(torch.rand(c))
            number = len(self.scales) - 1
            self.step(c, lambda x: x * self.scales[number][:, None, None])
        elif name == "pad":
            k = self.draw.randint(1, 3)
            a = self.conv(c, c + 2 * k)
            self.step(c + 2 * k, lambda x: F.pad(x, (0, 0, 0, 0, k, k)) + self.layers[a](x))
        elif name == "flat":
            a = self.layer(nn.Linear(16 * c, 12))
            self.step(3, lambda x: self.layers[a](F.adaptive_avg_pool2d(x, 4).flatten(1)).view(-1, 3, 2, 2))

    def step(self, width, function):
        self.steps.append(function)
        self.width = width

    def forward(self, x):
        for step in self.steps:
            x = step(x)
        return self.head(x.mean((2, 3)))


OPERATIONS = [
    "conv",
    "norm",
    "layernorm",
    "residual",
    "dense",
    "twice",
    "split",
    "gate",
    "shuffle",
    "squeeze",
    "grouped",
    "depthwise",
    "shared",
    "pixels",
    "attention",
    "scale",
    "pad",
    "flat",
]
