"""The binary engine: convolutions of signs as XNOR and counts of bits (arXiv 1603.05279), right bit for bit.

Sixty-four channels are one word; a product of signs is ``n - 2 popcount(x xor w)``. Compiled by Numba for this
processor (the extra ``convette[sparse]``); without it NumPy counts the bits, slower. All else runs on PyTorch as it is.
"""

import copy
import time
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from convette.errors import UsageError
from convette.layers import replace_modules
from convette.layers._convolutions import pair
from convette.layers.quantization.binary_networks import BinaryConv2d, PackedBinaryConv2d, _scaled
from convette.runtime import _binary_kernels
from convette.runtime._compiling import compiled
from convette.runtime._torch_engines import _thread_count
from convette.runtime.engines import EngineSpec, Prepared


def make(spec: EngineSpec, source: nn.Module, example: np.ndarray, threads: int) -> Prepared:
    """Return the function that runs `source` with its binary convolutions packed.

    Raises `UsageError` for a network without any. The kernels use one thread, the rest `threads`.
    """
    started = time.perf_counter()
    network = packed_network(source)

    def run(batch: np.ndarray) -> np.ndarray:
        with _thread_count(threads), torch.no_grad():
            return network(torch.from_numpy(batch)).float().numpy()

    return Prepared(run, "binary", started)


def packed_network(network: nn.Module) -> nn.Module:
    """Return a copy of `network` (eval mode) whose binary convolutions count bits; its outputs are the same floats."""

    def form(name: str, module: nn.Module) -> nn.Module | None:
        if isinstance(module, BinaryConv2d | PackedBinaryConv2d) and module.groups == 1:
            return XnorConv2d(module)
        return None

    found = replace_modules(copy.deepcopy(network).cpu().eval().requires_grad_(False), form)
    if not any(isinstance(module, XnorConv2d) for module in found.modules()):
        raise UsageError(f"{type(network).__name__} has no binary convolution; use another engine than binary:cpu.")
    return found.eval()


class XnorConv2d(nn.Module):
    """A binary convolution on packed bits; made from a `BinaryConv2d` or `PackedBinaryConv2d`, inference only."""

    alpha: Tensor

    def __init__(self, layer: Any) -> None:
        super().__init__()
        signs = layer.signs()
        filters, channels, *size = signs.shape
        self.size, self.channels, self.filters = (int(size[0]), int(size[1])), channels, filters
        self.strides, self.pads, self.dilations = (pair(x) for x in (layer.stride, layer.padding, layer.dilation))
        self.padding_value = layer.padding_value
        alpha = layer.alpha if isinstance(layer.alpha, Tensor) else layer.alpha()
        self.register_buffer("alpha", alpha.detach().float().clone())
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().float().clone())
        threshold = layer.threshold
        self.threshold = (
            np.zeros(channels, np.float32) if threshold is None else threshold.detach().float().flatten().numpy()
        )
        self.words = -(-channels // 64)
        # (taps, words, filters): filters run fastest, for the vector units.
        self.weights = np.ascontiguousarray(
            pack_words(signs.permute(0, 2, 3, 1).reshape(filters, -1, channels).numpy() > 0).transpose(1, 2, 0)
        )
        self.kernels = kernels()

    @property
    def bytes(self) -> int:
        """Bytes of the packed weights."""
        return self.weights.nbytes

    def forward(self, x: Tensor) -> Tensor:
        """Convolve the signs."""
        # Contiguous as the float convolution's: other layouts are added up in another order by what comes next.
        return _scaled(torch.from_numpy(self.products(x)).float().contiguous(), self.alpha, self.bias)  # type: ignore[arg-type]

    def products(self, x: Tensor) -> np.ndarray:
        """Return the integers ``conv(sgn(x), sgn(W))`` as int32 ``n k rows columns``."""
        array = np.ascontiguousarray(x.float().numpy())
        rows, columns = (
            (array.shape[2 + d] + 2 * self.pads[d] - self.dilations[d] * (self.size[d] - 1) - 1) // self.strides[d] + 1
            for d in (0, 1)
        )
        out = np.empty((len(array), rows, columns, self.filters), np.int32)
        self.kernels(array, self, out)
        return out.transpose(0, 3, 1, 2)


@cache
def kernels() -> Any:
    """Return the function that fills the output: Numba's where it is installed, else NumPy's."""
    pack_signs, convolve = compiled(_binary_kernels.pack_signs), compiled(_binary_kernels.convolve)
    if pack_signs is None or convolve is None:
        return numpy_kernel

    def run(array: np.ndarray, layer: XnorConv2d, out: np.ndarray) -> None:
        packed = pack_signs(array, layer.threshold, layer.pads[0], layer.pads[1], layer.padding_value > 0, layer.words)
        convolve(
            packed,
            layer.weights,
            layer.size,
            layer.pads,
            layer.strides,
            layer.dilations,
            layer.channels,
            layer.padding_value == 0,
            out,
        )

    return run


def numpy_kernel(array: np.ndarray, layer: XnorConv2d, out: np.ndarray) -> None:
    """The same in NumPy, tap by tap."""
    positive = array - layer.threshold[:, None, None] >= 0
    pad = ((0, 0), (0, 0), (layer.pads[0],) * 2, (layer.pads[1],) * 2)
    words = pack_words(np.pad(positive, pad, constant_values=layer.padding_value > 0).transpose(0, 2, 3, 1))
    inside = np.pad(np.ones(array.shape[2:], bool), pad[2:], constant_values=layer.padding_value != 0)
    out[:] = 0
    _, rows, columns, _ = out.shape
    for i in range(layer.size[0]):
        for j in range(layer.size[1]):
            ys = _taps(i * layer.dilations[0], rows, layer.strides[0])
            xs = _taps(j * layer.dilations[1], columns, layer.strides[1])
            here, tap = words[:, ys, xs], layer.weights[i * layer.size[1] + j]
            differing = np.zeros(out.shape, np.int32)
            for word in range(layer.words):
                differing += np.bitwise_count(here[..., word, None] ^ tap[word]).astype(np.int32)
            out += np.where(inside[ys, xs][None, :, :, None], layer.channels - 2 * differing, 0).astype(np.int32)


def _taps(start: int, count: int, stride: int) -> slice:
    return slice(start, start + (count - 1) * stride + 1, stride)


def pack_words(positive: np.ndarray) -> np.ndarray:
    """Return the last axis of a boolean array as words of 64 bits; what is missing to a whole word is 0."""
    missing = -positive.shape[-1] % 64
    wide = np.pad(positive, [(0, 0)] * (positive.ndim - 1) + [(0, missing)])
    packed = np.packbits(wide, axis=-1, bitorder="little")
    return np.ascontiguousarray(packed).view("<u8").astype(np.uint64)
