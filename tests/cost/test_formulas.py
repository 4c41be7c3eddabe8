"""The MACs of single operators, against counts that need no formula.

With inputs and weights of ones and no padding, every product adds one to some output, so the sum of the outputs IS the
number of multiply-accumulates.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from convette.cost import count


class Call(nn.Module):
    """A network that is one function of its inputs."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


def ones(*shape):
    return torch.ones(*shape, dtype=torch.float64)


@settings(max_examples=60, deadline=None)
@given(
    dims=st.integers(1, 3),
    groups=st.integers(1, 3),
    into=st.integers(1, 3),
    out=st.integers(1, 3),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    dilation=st.integers(1, 2),
    batch=st.integers(1, 2),
    transposed=st.booleans(),
    bias=st.booleans(),
)
def test_convolutions(dims, groups, into, out, kernel, stride, dilation, batch, transposed, bias):
    kind = getattr(nn, f"Conv{'Transpose' if transposed else ''}{dims}d")
    layer = kind(
        into * groups, out * groups, kernel, stride=stride, dilation=dilation, groups=groups, bias=bias
    ).double()
    x = ones(batch, into * groups, *range(5, 5 + dims))
    cost = count(layer, x)
    nn.init.ones_(layer.weight)
    if bias:
        nn.init.zeros_(layer.bias)
    y = layer(x)
    assert cost.macs == y.sum().item()
    assert cost.bias_macs == (y.numel() if bias else 0)
    assert cost.families == {"convolution": cost.macs}
    assert (
        count(Call(lambda x: layer._conv_forward(x, layer.weight, None) if not transposed else layer(x)), x).macs
        == cost.macs
    )


@pytest.mark.parametrize(
    "function, shapes",
    [
        (torch.mm, [(3, 4), (4, 5)]),
        (torch.bmm, [(2, 3, 4), (2, 4, 5)]),
        (torch.matmul, [(2, 1, 3, 4), (6, 4, 5)]),
        (torch.matmul, [(4,), (4,)]),
        (torch.mv, [(3, 4), (4,)]),
        (torch.matmul, [(2, 3, 4), (4,)]),
        (lambda a, b: torch.addmm(ones(5), a, b, beta=0), [(3, 4), (4, 5)]),
        (lambda a, b: torch.baddbmm(ones(5), a, b, beta=0), [(2, 3, 4), (2, 4, 5)]),
        (lambda a, b: torch.addbmm(ones(5), a, b, beta=0), [(2, 3, 4), (2, 4, 5)]),
        (lambda a, b: torch.addmv(ones(3), a, b, beta=0), [(3, 4), (4,)]),
        (lambda a, b: torch.einsum("bhqd,bhkd->bhqk", a, b), [(2, 3, 4, 5), (2, 3, 6, 5)]),
        (lambda a, b: torch.einsum("bnc,dc->bnd", a, b), [(2, 3, 4), (5, 4)]),
        (lambda a, b: torch.tensordot(a, b, dims=2), [(2, 3, 4), (3, 4, 5)]),
        (F.linear, [(2, 3, 7, 4), (5, 4)]),
        (F.linear, [(4,), (5, 4)]),
        (F.bilinear, [(3, 4), (3, 5), (6, 4, 5)]),
        (lambda x, w: F.conv2d(x, w, groups=4), [(1, 4, 6, 6), (8, 1, 3, 3)]),
        (lambda x, w: F.conv1d(x, w), [(4, 6), (8, 4, 3)]),
    ],
)
@pytest.mark.parametrize("inference", [False, True])
def test_products(function, shapes, inference):
    with torch.inference_mode(inference):
        operands = tuple(ones(*shape) for shape in shapes)
        assert count(Call(function), operands).macs == function(*operands).sum().item()


@pytest.mark.parametrize("shape", [(2, 5, 6), (7, 6), (2, 3, 4, 6)])
def test_linear_counts_every_vector(shape):
    cost = count(nn.Linear(6, 8), torch.randn(shape))
    vectors = torch.Size(shape[:-1]).numel()
    assert (cost.macs, cost.bias_macs) == (vectors * 48, vectors * 8)
    assert cost.families == {"linear": cost.macs}
    assert cost.layers[0].output_shape == (*shape[:-1], 8)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_scaled_dot_product_attention(causal, device):
    q, k, v = (torch.randn(2, 3, t, w, device=device) for t, w in ((5, 8), (5, 8), (5, 8)))
    cost = count(Call(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=causal)), (q, k, v))
    assert cost.macs == 2 * 3 * 5 * 5 * (8 + 8)


def test_attention_other_lengths_masked_and_grouped_queries():
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 8)
    mask = torch.zeros(5, 7)
    grouped = Call(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True))
    assert count(grouped, (q, k, v)).macs == 2 * 4 * 5 * 7 * 16


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flexible_attention():
    from torch.nn.attention.flex_attention import flex_attention

    q, k, v = torch.randn(2, 3, 16, 16), torch.randn(2, 3, 32, 16), torch.randn(2, 3, 32, 16)
    cost = count(Call(flex_attention), (q, k, v))
    assert cost.macs == cost.families["attention"] == 2 * 3 * 16 * 32 * 32
    assert cost.uncounted == ()


@pytest.fixture(params=[True, False], ids=["fast path", "slow path"])
def fast_path(request):
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(request.param)
    yield request.param
    torch.backends.mha.set_fastpath_enabled(before)


def multi_head(batch, tokens, width):
    """Three input maps, query x key, weights x value, output map."""
    return batch * (4 * tokens * width**2 + 2 * tokens**2 * width)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("need_weights", [False, True])
def test_multi_head_attention(fast_path, device, need_weights):
    layer = nn.MultiheadAttention(16, 2, batch_first=True, device=device)
    x = torch.randn(3, 5, 16)
    cost = count(layer, {"query": x, "key": x, "value": x, "need_weights": need_weights})
    assert cost.macs == multi_head(3, 5, 16)
    assert cost.bias_macs == 3 * 5 * 4 * 16 if device == "cpu" and fast_path else cost.bias_macs <= 3 * 5 * 4 * 16
    rows = {row.name: row.macs for row in cost.layers}
    assert rows == {"": multi_head(3, 5, 16) - 3 * 5 * 256, "out_proj": 3 * 5 * 256}


def test_cross_attention():
    layer = nn.MultiheadAttention(16, 2, batch_first=True, kdim=6, vdim=10)
    q, k, v = torch.randn(3, 5, 16), torch.randn(3, 7, 6), torch.randn(3, 7, 10)
    assert count(layer, (q, k, v)).macs == 3 * (5 * 256 + 7 * 16 * 6 + 7 * 16 * 10 + 2 * 5 * 7 * 16 + 5 * 256)


@pytest.mark.parametrize("norm_first", [False, True])
def test_encoder_layer(fast_path, norm_first):
    layer = nn.TransformerEncoderLayer(16, 2, 40, batch_first=True, norm_first=norm_first)
    cost = count(layer, torch.randn(3, 5, 16))
    assert cost.macs == multi_head(3, 5, 16) + 2 * 3 * 5 * 16 * 40
    assert cost.norm_macs == 2 * 3 * 5 * 16
    rows = {row.name: (row.macs, row.parameters) for row in cost.layers}
    assert rows["linear1"] == (3 * 5 * 16 * 40, 17 * 40)
    assert rows["linear2"] == (3 * 5 * 16 * 40, 41 * 16)
    assert rows["self_attn.out_proj"] == (3 * 5 * 256, 17 * 16)
    assert rows["norm1"] == (0, 32)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_encoder_with_padding_counts_what_the_fast_path_really_multiplies(fast_path):
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 40, batch_first=True), 2)
    padded = torch.tensor([[False] * 5, [False, False, True, True, True]])
    cost = count(encoder, {"src": torch.randn(2, 5, 16), "src_key_padding_mask": padded})
    lengths = (5, 2) if fast_path else (5, 5)  # the fast path packs the sequences
    assert cost.macs == 2 * sum(multi_head(1, n, 16) + 2 * n * 16 * 40 for n in lengths)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("kind, gates", [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
def test_recurrent_layers(device, kind, gates):
    layer = kind(4, 6, num_layers=2, batch_first=True, device=device)
    cost = count(layer, torch.randn(3, 5, 4))
    assert cost.macs == 3 * 5 * gates * 6 * ((4 + 6) + (6 + 6))
    assert cost.families == {"linear": cost.macs}


def test_weights_computed_on_the_fly():
    class Standardised(nn.Conv2d):
        def forward(self, x):
            w = self.weight
            w = (w - w.mean((1, 2, 3), keepdim=True)) / w.std((1, 2, 3), keepdim=True)
            return F.conv2d(x, w, self.bias)

    plain, standardised = nn.Conv2d(3, 8, 3), Standardised(3, 8, 3)
    normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3))
    x = torch.randn(1, 3, 9, 9)
    expected = 7 * 7 * 8 * 3 * 9
    for layer in (plain, standardised, normed):
        cost = count(nn.Sequential(layer), x)
        assert cost.macs == expected
        assert [row.macs for row in cost.layers if row.name == "0"] == [expected]
    assert count(nn.Sequential(normed), x).parameters == plain.weight.numel() + 8 + 8


@pytest.mark.parametrize(
    "layer, shape",
    [
        (nn.BatchNorm2d(4), (2, 4, 3, 3)),
        (nn.GroupNorm(2, 4), (2, 4, 3, 3)),
        (nn.LayerNorm(3), (2, 4, 3, 3)),
        (nn.InstanceNorm2d(4), (2, 4, 3, 3)),
    ],
)
def test_normalisation_is_apart(layer, shape):
    cost = count(layer, torch.randn(shape))
    assert (cost.macs, cost.norm_macs, cost.bias_macs) == (0, 2 * 4 * 9, 0)


def test_deformable_convolution():
    torchvision = pytest.importorskip("torchvision")
    x, offset, weight = torch.randn(2, 4, 8, 8), torch.zeros(2, 18, 6, 6), torch.randn(6, 2, 3, 3)
    cost = count(Call(torchvision.ops.deform_conv2d), (x, offset, weight))
    assert cost.macs == 2 * 6 * 6 * weight.numel()
    assert cost.uncounted == ()


def test_operators_without_a_formula_are_named():
    @torch.library.custom_op("convette_test::double", mutates_args=())
    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    assert count(Call(double), torch.ones(3)).uncounted == ("convette_test::double",)
