"""Networks with one hard construction each. `CASES` maps a name to (maker, input shape, frozen operators allowed)."""

import math

import torch
import torch.nn.functional as F
from torch import nn


class Wrap(nn.Module):
    """stem -> part -> mean -> head, so that every part sits between convolutions."""

    def __init__(self, part, inside, outside):
        super().__init__()
        self.stem = nn.Conv2d(3, inside, 3, 1, 1)
        self.part = part
        self.head = nn.Linear(outside, 5)

    def forward(self, x):
        return self.head(self.part(F.relu(self.stem(x))).mean((2, 3)))


class Lambda(nn.Module):
    def __init__(self, function, **modules):
        super().__init__()
        self.function = function
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.function(self, x)


def conv(a, b, k=1, **more):
    return nn.Conv2d(a, b, k, padding=k // 2, **more)


class Res2(nn.Module):
    def __init__(self):
        super().__init__()
        self.width = 4
        self.convs = nn.ModuleList(conv(4, 4, 3) for _ in range(3))
        self.out = conv(16, 16)

    def forward(self, x):
        parts = torch.split(x, self.width, 1)
        done = [parts[0]]
        for number, layer in enumerate(self.convs):
            done.append(layer(parts[number + 1] + (done[-1] if number else 0)))
        return self.out(torch.cat(done, 1)) + x


def shuffle(x, groups=2):
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


class SqueezeExcite(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.fc1, self.fc2 = conv(c, 4), conv(4, c)

    def forward(self, x):
        return x * self.fc2(F.relu(self.fc1(x.mean((2, 3), keepdim=True)))).sigmoid()


class Attention(nn.Module):
    """A ViT attention on a feature map; sizes in Python attributes."""

    def __init__(self, dim=16, heads=4, fused=True):
        super().__init__()
        self.num_heads, self.head_dim, self.fused = heads, dim // heads, fused
        self.scale = self.head_dim**-0.5
        self.norm = nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.gamma = nn.Parameter(torch.rand(dim))

    def forward(self, x):
        n, c, h, w = x.shape
        t = x.flatten(2).transpose(1, 2)
        qkv = self.qkv(self.norm(t)).reshape(n, h * w, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = ((q * self.scale) @ k.transpose(-2, -1)).softmax(-1) @ v
        y = y.transpose(1, 2).reshape(n, h * w, c)
        return (t + self.gamma * self.proj(y)).transpose(1, 2).reshape(n, c, h, w)


class WindowScale(nn.Module):
    """The scale and the head's size are worked out from the width at run time, as in torchvision's Swin."""

    def __init__(self, dim=16, heads=4):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        n, c, h, w = x.shape
        t = x.flatten(2).transpose(1, 2)
        q, k, v = self.qkv(t).reshape(n, h * w, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        y = ((q * (c // self.heads) ** -0.5) @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.proj(y.transpose(1, 2).reshape(n, h * w, c)).transpose(1, 2).reshape(n, c, h, w)


class TorchAttention(nn.Module):
    def __init__(self, dim=16, heads=4, batch_first=True):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=batch_first)
        self.batch_first = batch_first

    def forward(self, x):
        t = x.flatten(2).transpose(1, 2)
        t = t if self.batch_first else t.transpose(0, 1)
        y = self.norm(t)
        t = t + self.attention(y, y, y, need_weights=False)[0]
        t = t if self.batch_first else t.transpose(0, 1)
        return t.transpose(1, 2).reshape(x.shape)


class EncoderLayer(nn.Module):
    """PyTorch's own encoder layer, which runs as one operator where it may."""

    def __init__(self, dim=16, heads=4, batch_first=True):
        super().__init__()
        self.batch_first = batch_first
        self.layer = nn.TransformerEncoderLayer(dim, heads, 2 * dim, batch_first=batch_first)

    def forward(self, x):
        t = x.flatten(2).permute(0, 2, 1) if self.batch_first else x.flatten(2).permute(2, 0, 1)
        t = self.layer(t)
        return t.permute(0, 2, 1).reshape(x.shape) if self.batch_first else t.permute(1, 2, 0).reshape(x.shape)


class SplitAttention(nn.Module):
    """ResNeSt: radix attention over a grouped convolution."""

    def __init__(self, c=8, radix=2):
        super().__init__()
        self.radix, self.c = radix, c
        self.conv = conv(c, c * radix, 3, groups=radix)
        self.fc1, self.fc2 = conv(c, 6), conv(6, c * radix)

    def forward(self, x):
        y = F.relu(self.conv(x))
        n, rc, h, w = y.shape
        y = y.reshape(n, self.radix, rc // self.radix, h, w)
        gap = y.sum(1).mean((2, 3), keepdim=True)
        a = self.fc2(F.relu(self.fc1(gap))).view(n, 1, self.radix, -1).transpose(1, 2).softmax(1).reshape(n, -1, 1, 1)
        return (y * a.reshape(n, self.radix, rc // self.radix, 1, 1)).sum(1)


class SelectiveKernel(nn.Module):
    def __init__(self, c=8):
        super().__init__()
        self.paths = nn.ModuleList([conv(c, c, 3), conv(c, c, 3, dilation=1)])
        self.fc1, self.fc2 = conv(c, 4), conv(4, 2 * c)

    def forward(self, x):
        y = torch.stack([path(x) for path in self.paths], 1)
        a = self.fc2(F.relu(self.fc1(y.sum(1).mean((2, 3), keepdim=True))))
        n, c, h, w = a.shape
        return (y * a.view(n, 2, c // 2, h, w).softmax(1)).sum(1)


class DualPath(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = conv(12, 12), conv(16, 12)

    def forward(self, x):
        y = self.a(x)
        dense, residual = torch.cat([x[:, 8:], y[:, 8:]], 1), x[:, :8] + y[:, :8]
        return self.b(torch.cat([residual, dense], 1))


class StandardConv(nn.Conv2d):
    def forward(self, x):
        w = self.weight
        var, mean = torch.var_mean(w, dim=[1, 2, 3], keepdim=True)
        return F.conv2d(x, (w - mean) * (var + 1e-6).rsqrt(), self.bias, self.stride, self.padding, 1, self.groups)


class Scales(nn.Module):
    """Bare parameters: per channel scale, bias map, PReLU, learned gate of a size kept as an attribute."""

    def __init__(self, c=8):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(c))
        self.shift = nn.Parameter(torch.rand(1, c, 1, 1))
        self.shape = (c, 1, 1)
        self.act = nn.PReLU(c)

    def forward(self, x):
        return self.act(x * self.scale.view(self.shape) + self.shift)


class PixelShuffle(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.out = conv(8, 32, 3), conv(8, 8)
        self.shuffle = nn.PixelShuffle(2)

    def forward(self, x):
        return self.out(self.shuffle(self.up(x)))


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = conv(8, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x):
        for _ in range(2):
            x = F.relu(self.bn(self.conv(x)))
        return x


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = conv(8, 8, 3), conv(8, 8, 3)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(F.relu(self.a(x)))


class FlattenLinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.a, self.b = nn.Conv2d(3, 6, 3, 2, 1), nn.Linear(6 * 16, 32), nn.Linear(32, 6 * 16)
        self.up, self.head = nn.ConvTranspose2d(6, 10, 2, 2), nn.Conv2d(10, 3, 1)

    def forward(self, x):
        y = F.relu(self.b(F.relu(self.a(torch.flatten(self.conv(x), 1)))))
        return self.head(self.up(y.view(-1, 6, 4, 4)))


class Conv1d3d(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm = nn.Conv3d(3, 8, 3, padding=1), nn.BatchNorm3d(8)
        self.b = nn.Conv1d(8, 6, 3, padding=1)
        self.t = nn.ConvTranspose1d(6, 8, 2, 2, groups=2)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        y = F.relu(self.norm(self.a(x))).mean((3, 4))
        return self.head(self.t(F.relu(self.b(y))).mean(2))


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.d1, self.d2, self.d3 = conv(3, 6, 3), conv(6, 8, 3), conv(8, 10, 3)
        self.up2, self.u2 = nn.ConvTranspose2d(10, 8, 2, 2), conv(16, 8, 3)
        self.u1, self.head = conv(14, 6, 3), conv(6, 2)

    def forward(self, x):
        a = F.relu(self.d1(x))
        b = F.relu(self.d2(F.max_pool2d(a, 2)))
        c = F.relu(self.d3(F.max_pool2d(b, 2)))
        y = F.relu(self.u2(torch.cat([b, self.up2(c)], 1)))
        return self.head(F.relu(self.u1(torch.cat([a, F.interpolate(y, scale_factor=2, mode="bilinear")], 1))))


class Pyramid(nn.Module):
    """FPN with a shared head; outputs in a dict."""

    def __init__(self):
        super().__init__()
        self.c1, self.c2 = conv(3, 6, 3, stride=2), conv(6, 10, 3, stride=2)
        self.l1, self.l2, self.head = conv(6, 8), conv(10, 8), nn.Sequential(conv(8, 8, 3), nn.ReLU(), conv(8, 4))

    def forward(self, x):
        a = F.relu(self.c1(x))
        b = F.relu(self.c2(a))
        top = self.l2(b)
        low = self.l1(a) + F.interpolate(top, size=a.shape[-2:])
        return {"low": self.head(low), "top": [self.head(top)]}


class C2f(nn.Module):
    """The YOLO building block: chunk, a growing list, one concat."""

    def __init__(self, c=12):
        super().__init__()
        self.c = c // 2
        self.a, self.b = conv(c, c), conv(c * 2, c)
        self.m = nn.ModuleList(conv(c // 2, c // 2, 3) for _ in range(2))

    def forward(self, x):
        y = list(self.a(x).split((self.c, self.c), 1))
        y.extend(m(y[-1]) for m in self.m)
        return self.b(torch.cat(y, 1))


class InPlacePartial(nn.Module):
    """FasterNet's partial convolution, written in place."""

    def __init__(self, c=12):
        super().__init__()
        self.part = c // 4
        self.conv = conv(self.part, self.part, 3)

    def forward(self, x):
        x = x.clone()
        x[:, : self.part] = self.conv(x[:, : self.part].clone())
        return x


class GroupNorms(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.n1 = conv(8, 24), nn.GroupNorm(12, 24)
        self.b, self.n2 = conv(24, 12), nn.GroupNorm(2, 12)
        self.c = conv(12, 8)

    def forward(self, x):
        return self.c(F.relu(self.n2(self.b(F.relu(self.n1(self.a(x)))))))


def einsum_attention(self, x):
    q, k, v = self.q(x).flatten(2), self.k(x).flatten(2), self.v(x).flatten(2)
    a = torch.einsum("bcn,bcm->bnm", q, k).div(math.sqrt(4)).softmax(-1)
    return torch.einsum("bcm,bnm->bcn", v, a).view(x.shape[0], -1, *x.shape[2:])


def padded_by_zeros(self, x):
    zeros = torch.zeros(x.shape[0], 4, *x.shape[2:])
    return self.c(torch.cat([x, zeros], 1)) + torch.cat([zeros, x], 1)


def part(function, inside, outside, **modules):
    return lambda: Wrap(Lambda(function, **modules), inside, outside)


IMAGE = (2, 3, 8, 8)
CASES = {
    "cat with itself": (part(lambda m, x: m.c(torch.cat([x, x], 1)), 8, 6, c=conv(16, 6)), IMAGE),
    "glu": (part(lambda m, x: F.glu(m.c(x), 1), 8, 6, c=conv(8, 12)), IMAGE),
    "gate by chunk": (
        part(lambda m, x: (lambda a, b: m.d(a * b.sigmoid()))(*m.c(x).chunk(2, 1)), 8, 6, c=conv(8, 12), d=conv(6, 6)),
        IMAGE,
    ),
    "chunk and cat": (
        part(
            lambda m, x: (lambda a, b: m.d(torch.cat([a, m.c(b), b], 1)))(*x.chunk(2, 1)),
            8,
            6,
            c=conv(4, 5),
            d=conv(13, 6),
        ),
        IMAGE,
    ),
    "res2net": (lambda: Wrap(Res2(), 16, 16), IMAGE),
    "channel shuffle": (part(lambda m, x: m.d(shuffle(m.c(x))), 8, 6, c=conv(8, 12), d=conv(12, 6)), IMAGE),
    "shuffle of two branches": (
        part(
            lambda m, x: (lambda a, b: m.d(shuffle(torch.cat([a, m.c(b)], 1))))(*x.chunk(2, 1)),
            12,
            6,
            c=conv(6, 6),
            d=conv(12, 6),
        ),
        IMAGE,
    ),
    "pixel shuffle": (lambda: Wrap(PixelShuffle(), 8, 8), IMAGE),
    "grouped, many groups": (part(lambda m, x: m.d(m.c(x)), 12, 6, c=conv(12, 12, 3, groups=6), d=conv(12, 6)), IMAGE),
    "grouped, few groups": (part(lambda m, x: m.d(m.c(x)), 12, 6, c=conv(12, 16, 3, groups=2), d=conv(16, 6)), IMAGE),
    "depthwise with multiplier": (
        part(lambda m, x: m.d(m.c(x)), 6, 6, c=conv(6, 18, 3, groups=6), d=conv(18, 6)),
        IMAGE,
    ),
    "transposed, grouped": (
        part(lambda m, x: m.d(m.c(x)), 12, 6, c=nn.ConvTranspose2d(12, 8, 2, 2, groups=2), d=conv(8, 6)),
        IMAGE,
    ),
    "squeeze and excite": (lambda: Wrap(SqueezeExcite(8), 8, 8), IMAGE),
    "attention, fused": (lambda: Wrap(Attention(), 16, 16), IMAGE),
    "attention, by hand": (lambda: Wrap(Attention(fused=False), 16, 16), IMAGE),
    "attention, sizes from the width": (lambda: Wrap(WindowScale(), 16, 16), IMAGE),
    "nn.MultiheadAttention": (lambda: Wrap(TorchAttention(), 16, 16), IMAGE),
    "nn.MultiheadAttention, sequence first": (lambda: Wrap(TorchAttention(batch_first=False), 16, 16), IMAGE),
    "nn.TransformerEncoderLayer": (lambda: Wrap(EncoderLayer(), 16, 16), IMAGE),
    "nn.TransformerEncoderLayer, sequence first": (lambda: Wrap(EncoderLayer(batch_first=False), 16, 16), IMAGE),
    "einsum attention": (
        part(einsum_attention, 8, 8, q=conv(8, 4), k=conv(8, 4), v=conv(8, 8)),
        IMAGE,
    ),
    "radix attention": (lambda: Wrap(SplitAttention(), 8, 8), IMAGE),
    "selective kernel": (lambda: Wrap(SelectiveKernel(), 8, 8), IMAGE),
    "dual path": (lambda: Wrap(DualPath(), 12, 12), IMAGE),
    "standardised convolution": (part(lambda m, x: m.c(x), 8, 6, c=StandardConv(8, 6, 3, padding=1)), IMAGE),
    "bare parameters": (lambda: Wrap(Scales(), 8, 8), IMAGE),
    "shared module": (lambda: Wrap(Shared(), 8, 8), IMAGE),
    "tied weights": (lambda: Wrap(Tied(), 8, 8), IMAGE),
    "flatten to linear and back": (FlattenLinear, IMAGE),
    "one and three dimensions": (Conv1d3d, (2, 3, 6, 4, 4)),
    "u-net": (UNet, IMAGE),
    "pyramid": (Pyramid, IMAGE),
    "c2f": (lambda: Wrap(C2f(), 12, 12), IMAGE),
    "in-place partial convolution": (lambda: Wrap(InPlacePartial(), 12, 12), IMAGE),
    "group norm": (lambda: Wrap(GroupNorms(), 8, 8), IMAGE),
    "instance norm": (part(lambda m, x: m.n(x), 8, 8, n=nn.InstanceNorm2d(8, affine=True)), IMAGE),
    "rolled rows": (part(lambda m, x: m.c(torch.roll(x, (1, 2), (2, 3))), 8, 6, c=conv(8, 6)), IMAGE),
    "rolled channels": (part(lambda m, x: m.c(torch.roll(x, 3, 1) + x.flip(1)), 8, 6, c=conv(8, 6)), IMAGE),
    "zeros concatenated": (part(padded_by_zeros, 8, 12, c=conv(12, 12)), IMAGE),
    "spatial attention": (
        part(lambda m, x: x * m.c(torch.cat([x.mean(1, True), x.amax(1, True)], 1)).sigmoid(), 8, 8, c=conv(2, 1, 3)),
        IMAGE,
    ),
    "normalised features": (part(lambda m, x: m.c(F.normalize(x, dim=1)), 8, 6, c=conv(8, 6)), IMAGE),
}
