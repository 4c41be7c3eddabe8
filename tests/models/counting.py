"""A hand counter for these tests: multiply-accumulates of convolutions and linears, from the shapes that run."""

import math

import torch
from torch import nn


def count_parameters(model):
    return sum(p.numel() for p in model.parameters())


def count_macs(model, *shape):
    total = 0

    def add(module, inputs, output):
        nonlocal total
        if isinstance(module, nn.Conv2d):
            total += output.numel() * module.in_channels // module.groups * math.prod(module.kernel_size)
        else:
            total += output.numel() * module.in_features

    handles = [m.register_forward_hook(add) for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    try:
        with torch.no_grad(), torch.device("meta"):
            model.to("meta").eval()(torch.empty(1, *shape))
    finally:
        for handle in handles:
            handle.remove()
    return total
