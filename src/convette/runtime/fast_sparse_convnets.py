r"""Fast Sparse ConvNets: 1x1 convolutions with 70 to 95 % zeros that really run faster (arXiv 1911.09723).

A 1x1 convolution is a sparse matrix times the image, :math:`Y = W X + b` with :math:`X` of shape "channels positions".
Positions are contiguous (CHW), so vectors run over them and each non-zero costs one multiply-add a vector. Kernels are
compiled by Numba for this processor (the extra ``convette[sparse]``); without it SciPy multiplies, slower.

Source: E. Elsen, M. Dukhan, T. Gale, K. Simonyan, Fast Sparse ConvNets, CVPR 2020; the storage format, the rules for
blocks and which layers are eligible are those of XNNPACK's implementation, written anew.
"""

import time
import weakref
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from convette.errors import UsageError
from convette.layers import replace_modules
from convette.runtime import _sparse_kernels
from convette.runtime._compiling import compiled
from convette.runtime._export import deployable
from convette.runtime._torch_engines import _thread_count
from convette.runtime.engines import EngineSpec, Prepared

LEAST_ZEROS = 2 / 3  # a layer with a larger share of zeros (not just as large a one) runs sparse
_FILLED = {4: 3.6, 2: 1.8}  # non-zeros a block must hold on average


@dataclass(frozen=True)
class SparseWeights:
    """Weights of a 1x1 convolution as the kernels read them.

    - `deltas` (int32): by how many channels the next non-zero (block) lies further, one each, around to the first.
    - `counts` (uint32): non-zeros (blocks) of each filter (block of filters).
    - `values` (float32): for each filter (block) its bias(es), then `block` values for each non-zero.
    - `first`: the channel of the first non-zero. `block`: filters that share places; what is left over goes one by one.
    """

    filters: int
    channels: int
    block: int
    first: int
    deltas: np.ndarray
    counts: np.ndarray
    values: np.ndarray

    @property
    def bytes(self) -> int:
        """Bytes of the three streams."""
        return self.deltas.nbytes + self.counts.nbytes + self.values.nbytes

    @property
    def nonzeros(self) -> int:
        """Stored values besides biases (the zeros inside blocks count)."""
        return len(self.values) - self.filters


def choose_block(weight: np.ndarray) -> int:
    """Return 4, 2 or 1: the largest block of filters whose blocks with a non-zero are filled to 90 % on average."""
    for block, least in _FILLED.items():
        whole = len(weight) // block * block
        if not whole:
            continue
        nonzero = (weight[:whole] != 0).reshape(-1, block, weight.shape[1])
        blocks = nonzero.any(1).sum()
        if blocks and nonzero.sum() / blocks >= least:
            return block
    return 1


def pack_sparse_1x1(
    weight: Tensor | np.ndarray, bias: Tensor | np.ndarray | None = None, block: int | None = None
) -> SparseWeights:
    """Return the weights (``filters channels``, or ``filters channels 1 1``) in the sparse format; `unpack` undoes it.

    `block` None: as `choose_block` finds. Both zeros count as zero. Raises `UsageError` for a kernel larger than 1x1 or
    a block other than 1, 2, 4.
    """
    matrix = np.asarray(weight.detach().cpu() if isinstance(weight, Tensor) else weight, np.float32)
    if matrix.ndim == 4 and matrix.shape[2:] == (1, 1):
        matrix = matrix[:, :, 0, 0]
    if matrix.ndim != 2:
        raise UsageError(f"weights of shape {matrix.shape} are no 1x1 convolution.")
    block = choose_block(matrix) if block is None else block
    if block not in (1, 2, 4):
        raise UsageError(f"block = {block}: 1, 2 and 4 can be.")
    offsets = np.zeros(len(matrix), np.float32)
    if bias is not None:
        offsets[:] = bias.detach().cpu().numpy() if isinstance(bias, Tensor) else bias
    places: list[np.ndarray] = []
    values: list[np.ndarray] = []
    row = 0
    while row < len(matrix):
        rows = block if row + block <= len(matrix) else 1
        part = matrix[row : row + rows]
        found = np.flatnonzero((part != 0).any(0))
        places.append(found)
        values += [offsets[row : row + rows], part[:, found].T.ravel()]
        row += rows
    order = np.concatenate(places) if places else np.zeros(0, np.int64)
    deltas = np.diff(np.append(order, order[:1])).astype(np.int32)
    counts = np.array([len(found) for found in places], np.uint32)
    first = int(order[0]) if len(order) else 0
    return SparseWeights(
        len(matrix), matrix.shape[1], block, first, deltas, counts, np.concatenate(values).astype(np.float32)
    )


def unpack(packed: SparseWeights) -> tuple[np.ndarray, np.ndarray]:
    """Return the weights (``filters channels``) and biases that `pack_sparse_1x1` was given."""
    matrix = np.zeros((packed.filters, packed.channels), np.float32)
    bias = np.zeros(packed.filters, np.float32)
    row, at, k, channel = 0, 0, 0, packed.first
    for count in packed.counts:
        rows = packed.block if row + packed.block <= packed.filters else 1
        bias[row : row + rows] = packed.values[at : at + rows]
        at += rows
        for _ in range(int(count)):
            matrix[row : row + rows, channel] = packed.values[at : at + rows]
            channel += int(packed.deltas[k])
            k, at = k + 1, at + rows
        row += rows
    return matrix, bias


def multiply_packed(
    packed: SparseWeights, x: np.ndarray, low: float | int = -np.inf, high: float | int = np.inf
) -> np.ndarray:
    """Return ``clamp(W x + b)`` for ``x`` (channels positions, float32): by the kernel, or by SciPy without Numba."""
    if x.ndim != 2 or x.shape[0] != packed.channels:
        raise UsageError(f"the product needs {packed.channels} channels x positions, not {x.shape}.")
    out = np.empty((packed.filters, x.shape[1]), np.float32)
    _kernels()[0](packed, np.ascontiguousarray(x, np.float32), np.float32(low), np.float32(high), out)
    return out


@cache
def _kernels() -> tuple[Any, Any]:
    """Return the sparse product, and the depthwise convolution (None without Numba)."""
    options = {"fastmath": {"contract", "reassoc", "nsz"}}
    single = compiled(_sparse_kernels.multiply, **options)
    blocked = compiled(_sparse_kernels.multiply_blocks, **options)
    depthwise = compiled(_sparse_kernels.depthwise, **options)
    if single is None or blocked is None:
        return _scipy_product, None

    def run(packed: SparseWeights, x: np.ndarray, low: np.float32, high: np.float32, out: np.ndarray) -> None:
        if packed.block == 1:
            single(x, packed.first, packed.deltas, packed.counts, packed.values, low, high, out)
        else:
            blocked(x, packed.first, packed.deltas, packed.counts, packed.values, packed.block, low, high, out)

    return run, depthwise


_matrices: dict[int, tuple[Any, np.ndarray]] = {}


def _scipy_product(packed: SparseWeights, x: np.ndarray, low: np.float32, high: np.float32, out: np.ndarray) -> None:
    from scipy.sparse import csr_matrix

    if id(packed) not in _matrices:
        matrix, bias = unpack(packed)
        _matrices[id(packed)] = (csr_matrix(matrix), bias)
        # Gone with the weights, before their number is given to others.
        weakref.finalize(packed, _matrices.pop, id(packed), None)
    sparse, bias = _matrices[id(packed)]
    np.clip(sparse @ x + bias[:, None], low, high, out=out)


# Layers of the engine -------------------------------------------------------------------------------------------------


class SparseConv1x1(nn.Module):
    """A 1x1 convolution run sparse, with the clamp that follows it; made from a dense one, inference only."""

    def __init__(self, layer: nn.Conv2d, block: int | None = None) -> None:
        super().__init__()
        self.packed = pack_sparse_1x1(layer.weight, layer.bias, block)
        self.low, self.high = -np.inf, np.inf

    def forward(self, x: Tensor) -> Tensor:
        """Multiply, one image after another: their positions stay contiguous."""
        n, c, h, w = x.shape
        out = np.empty((n, self.packed.filters, h * w), np.float32)
        images = x.contiguous().numpy().reshape(n, c, h * w)
        run, low, high = _kernels()[0], np.float32(self.low), np.float32(self.high)
        for image, result in zip(images, out, strict=True):
            run(self.packed, image, low, high, result)
        return torch.from_numpy(out).reshape(n, -1, h, w)

    def extra_repr(self) -> str:
        """Shape, share of zeros, block."""
        packed = self.packed
        zeros = 1 - packed.nonzeros / (packed.filters * packed.channels)
        return (
            f"{packed.channels}, {packed.filters}, zeros={zeros:.3f}, block={packed.block}, clamp={self.low, self.high}"
        )


class DepthwiseConv(nn.Module):
    """A depthwise 3x3 or 5x5 convolution on CHW, with the clamp that follows it; made from a dense one."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.weights = layer.weight.detach().numpy()[:, 0].copy()
        bias = layer.bias
        self.bias = np.zeros(len(self.weights), np.float32) if bias is None else bias.detach().numpy().copy()
        self.stride = int(layer.stride[0])
        self.low, self.high = -np.inf, np.inf

    def forward(self, x: Tensor) -> Tensor:
        """Convolve each channel by its own filter."""
        n, c, h, w = x.shape
        rows, columns = ((side - 1) // self.stride + 1 for side in (h, w))
        out = np.empty((n, c, rows, columns), np.float32)
        for image, result in zip(x.contiguous().numpy(), out, strict=True):
            _kernels()[1](
                image, self.weights, self.bias, self.stride, np.float32(self.low), np.float32(self.high), result
            )
        return torch.from_numpy(out)


# The engine -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Eligibility:
    """Whether a convolution runs on the sparse engine's kernels (`runs`: "sparse", "depthwise", "dense"), and why."""

    layer: str
    runs: str
    zeros: float
    reason: str


def eligibility(model: nn.Module) -> tuple[Eligibility, ...]:
    """Return for each convolution of `model` what the engine does with it: the report of what is worth pruning."""
    found = []
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.Conv2d):
            continue
        zeros = float((layer.weight == 0).float().mean())
        if _is_depthwise(layer):
            found.append(Eligibility(name, "depthwise", zeros, "depthwise, padded to the same size"))
        elif not _is_1x1(layer):
            found.append(Eligibility(name, "dense", zeros, "no 1x1 convolution of stride 1"))
        elif 3 * int((layer.weight == 0).sum()) > 2 * layer.weight.numel():
            found.append(Eligibility(name, "sparse", zeros, f"{100 * zeros:.1f} % zeros"))
        else:
            reason = f"{100 * zeros:.1f} % zeros: only more than {100 * LEAST_ZEROS:.1f} % are worth it"
            found.append(Eligibility(name, "dense", zeros, reason))
    return tuple(found)


def _is_1x1(layer: nn.Conv2d) -> bool:
    plain = layer.kernel_size == (1, 1) and layer.stride == (1, 1) and layer.groups == 1 and layer.dilation == (1, 1)
    return plain and layer.padding in ((0, 0), "valid")


def _is_depthwise(layer: nn.Conv2d) -> bool:
    size, stride = layer.kernel_size, layer.stride
    return (
        layer.groups == layer.in_channels == layer.out_channels
        and size in ((3, 3), (5, 5))
        and stride in ((1, 1), (2, 2))
        and layer.padding == (size[0] // 2, size[1] // 2)
        and layer.dilation == (1, 1)
        and layer.padding_mode == "zeros"
    )


def sparse_network(model: nn.Module, example: Tensor) -> nn.Module:
    """Return a copy of `model` for inference on CHW: norms folded, 1x1 convolutions with zeros sparse, ReLUs fused.

    Raises `UsageError` where no 1x1 convolution has more than two thirds of zeros.
    """
    plain = deployable(model, example)
    runs = {row.layer: row.runs for row in eligibility(plain)}
    if "sparse" not in runs.values():
        raise UsageError(
            f"{type(model).__name__} has no 1x1 convolution of stride 1 with over {100 * LEAST_ZEROS:.0f} % zeros: "
            "train it with the method fast-sparse-convnets first, or use another engine than sparse:cpu."
        )
    depthwise = _kernels()[1] is not None

    def form(name: str, module: nn.Module) -> nn.Module | None:
        if runs.get(name) == "sparse" and isinstance(module, nn.Conv2d):
            return SparseConv1x1(module)
        if runs.get(name) == "depthwise" and depthwise and isinstance(module, nn.Conv2d):
            return DepthwiseConv(module)
        return None

    network = replace_modules(plain, form)
    for module in list(network.modules()):
        if isinstance(module, nn.Sequential):
            _fuse_clamps(module)
    return network.eval()


def _fuse_clamps(sequence: nn.Sequential) -> None:
    """Let the kernels clamp: a ReLU or ReLU6 right behind one goes into it."""
    before: Any = None
    for name, module in sequence.named_children():
        if isinstance(module, nn.Identity):
            continue
        if isinstance(module, nn.ReLU | nn.ReLU6) and before is not None:
            before.low, before.high = 0.0, 6.0 if isinstance(module, nn.ReLU6) else np.inf
            sequence._modules[name] = nn.Identity()
            before = None
            continue
        before = module if isinstance(module, SparseConv1x1 | DepthwiseConv) else None


def make(spec: EngineSpec, source: nn.Module, example: np.ndarray, threads: int) -> Prepared:
    """Return the function that runs `source` with sparse kernels; these use one thread, the rest `threads`."""
    network = sparse_network(source, torch.from_numpy(example))
    started = time.perf_counter()

    def run(batch: np.ndarray) -> np.ndarray:
        with _thread_count(threads), torch.no_grad():
            return network(torch.from_numpy(batch)).float().numpy()

    return Prepared(run, "fp32", started)
