"""What quantised layers are while they are exported: integers, and the operators that exporters know."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from convette.layers._modules import replace_modules
from convette.layers.quantization.fake_quantize import ActivationQuantizer, QuantConv2d, QuantLinear
from convette.layers.quantization.packed import PackedConv2d, PackedLinear

_CONVOLUTIONS, _LINEARS = (QuantConv2d, PackedConv2d), (QuantLinear, PackedLinear)


def deployed(model: nn.Module) -> nn.Module:
    """Return a copy of `model` (eval mode) whose quantised layers are written with integers, for exporters.

    Its outputs equal those of `model` but for rounding of the last bit. `quantized_layers` names what was found.
    """
    # Registers the operators that the exporters know.
    import torch.ao.quantization.fx._decomposed  # noqa: F401

    return replace_modules(copy.deepcopy(model).eval(), lambda name, module: _form(module)).eval()


def quantized_layers(model: nn.Module) -> dict[str, Any]:
    """Return the quantised layers of `model` by name."""
    kinds = (*_CONVOLUTIONS, *_LINEARS)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def _form(module: nn.Module) -> nn.Module | None:
    return _Deployed(module) if isinstance(module, (*_CONVOLUTIONS, *_LINEARS)) else None


class _Deployed(nn.Module):
    integers: Tensor
    scales: Tensor
    zeros: Tensor
    bias: Tensor | None

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.register_buffer("integers", layer.integers())
        self.register_buffer("scales", layer.scales().detach().clone().contiguous())
        self.register_buffer("zeros", torch.zeros(len(self.scales), dtype=torch.int64))
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().clone())
        self.convolution = isinstance(layer, _CONVOLUTIONS)
        if self.convolution:
            self.arguments = (layer.stride, layer.padding, layer.dilation, layer.groups)
        quantizer: ActivationQuantizer = layer.activation
        self.levels = 2**quantizer.bits - 1 if quantizer.bits else 0
        self.step = float(quantizer.log_scale.detach().exp()) if quantizer.bits else 1.0
        self.zero = int(quantizer.zero) if quantizer.bits else 0

    def forward(self, x: Tensor) -> Tensor:
        operators = torch.ops.quantized_decomposed
        if self.levels:
            if self.levels < 255:
                # Exporters know whole bytes only: what the narrow range clips is clipped before.
                x = x.clamp(-self.zero * self.step, (self.levels - self.zero) * self.step)
            q = operators.quantize_per_tensor(x, self.step, self.zero, 0, 255, torch.uint8)
            x = operators.dequantize_per_tensor(q, self.step, self.zero, 0, 255, torch.uint8)
        weight = operators.dequantize_per_channel(self.integers, self.scales, self.zeros, 0, -128, 127, torch.int8)
        if self.convolution:
            return F.conv2d(x, weight, self.bias, *self.arguments)
        return F.linear(x, weight, self.bias)
