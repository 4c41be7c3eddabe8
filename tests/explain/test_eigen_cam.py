"""Eigen-CAM against its definition: rank one, invariances, signs, solvers, limiting cases."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from convette.errors import UsageError
from convette.explain import EigenCAM, ExplanationWarning, eigen_cam, principal_maps
from convette.models import create_model

# Untrained networks look at much the same places in all images.
pytestmark = pytest.mark.filterwarnings("ignore::convette.explain.ExplanationWarning")
shapes = st.tuples(st.integers(2, 12), st.integers(2, 6), st.integers(2, 6))


def features(shape, seed, *, signed=False, count=2):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, *shape, generator=generator, dtype=torch.float64)
    x = x + 1.5 * torch.randn(count, shape[0], 1, 1, generator=generator, dtype=torch.float64)
    return x if signed else x.relu()


@settings(max_examples=30, deadline=None)
@given(shape=shapes, seed=st.integers(0, 10**6))
def test_rank_one_features_give_their_map(shape, seed):
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(shape[0], generator=generator) + 0.01
    pattern = torch.rand(*shape[1:], generator=generator)
    found = principal_maps((weights[:, None, None] * pattern)[None])
    torch.testing.assert_close(found.maps[0, 0], weights.norm() * pattern, atol=1e-5, rtol=1e-5)
    assert float(found.share) == pytest.approx(1, abs=1e-6) and float(found.gap) > 1e3


@settings(max_examples=40, deadline=None)
@given(shape=shapes, seed=st.integers(0, 10**6), signed=st.booleans(), center=st.booleans())
def test_solvers_agree(shape, seed, signed, center):
    x = features(shape, seed, signed=signed)
    found = {solver: principal_maps(x, center=center, solver=solver) for solver in ("gram", "power", "svd")}
    clear = found["svd"].gap > 1.05
    scale = found["svd"].maps.abs().amax()
    for solver in ("gram", "power"):
        difference = (found[solver].maps - found["svd"].maps)[clear].abs()
        assert difference.numel() == 0 or float(difference.max()) < 1e-4 * float(scale), solver
        torch.testing.assert_close(found[solver].share[clear], found["svd"].share[clear], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shape", [(160, 10, 10), (90, 12, 12), (256, 9, 9)])
@pytest.mark.parametrize(("signed", "center", "components"), [(False, False, 1), (True, True, 1), (False, True, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_maps_agree_with_the_full_decomposition(shape, signed, center, components, dtype):
    """Large Gram matrices are solved by subspace iteration, or wholly where that does not converge."""
    coarse = features((shape[0], 4, 4), 3, signed=signed)
    coarse[:, : shape[0] // 2] += 2 * coarse[:, :1]  # one pattern that stands out
    smooth = torch.nn.functional.interpolate(coarse, size=shape[1:], mode="bilinear")
    noisy = features(shape, 4, signed=signed)
    x = torch.cat([smooth + 0.02 * noisy, noisy, torch.zeros_like(noisy[:1])]).to(dtype)
    state = torch.random.get_rng_state()
    found = principal_maps(x, center=center, components=components)
    assert torch.equal(state, torch.random.get_rng_state())
    full = principal_maps(x, center=center, components=components, solver="svd")
    clear = full.gap > 1.05
    assert clear.any()
    scale = full.maps.abs().amax()
    assert float((found.maps - full.maps)[clear, 0].abs().max()) < 1e-4 * float(scale)
    torch.testing.assert_close(found.share[:, 0], full.share[:, 0], atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(found.gap[clear], full.gap[clear], atol=0, rtol=0.33)
    near = full.gap < 1.3
    torch.testing.assert_close(found.gap[near], full.gap[near], atol=0, rtol=0.02)
    assert not found.maps[-1].any()


@settings(max_examples=30, deadline=None)
@given(shape=shapes, seed=st.integers(0, 10**6), center=st.booleans())
def test_length_share_and_gap_follow_from_the_singular_values(shape, seed, center):
    x = features(shape, seed, signed=True)
    found = principal_maps(x, center=center, components=2)
    for n in range(2):
        matrix = x[n].flatten(1).T
        if center:
            matrix = matrix - matrix.mean(0)
        s = torch.linalg.svdvals(matrix)
        assert float(found.maps[n, 0].norm()) == pytest.approx(float(s[0]), rel=1e-4, abs=1e-6)
        assert float(found.share[n, 0]) == pytest.approx(float(s[0] ** 2 / (s**2).sum()), rel=1e-3)
        assert 0 <= float(found.share[n].sum()) <= 1 + 1e-6
        if s[1] > 1e-3 * s[0]:
            assert float(found.gap[n]) == pytest.approx(float(s[0] / s[1]), rel=1e-2)


@settings(max_examples=30, deadline=None)
@given(shape=shapes, seed=st.integers(0, 10**6), signed=st.booleans(), factor=st.floats(1e-3, 1e3))
def test_invariances(shape, seed, signed, factor):
    x = features(shape, seed, signed=signed)
    found = principal_maps(x)
    if float(found.gap.min()) < 1.05 or not bool(x.flatten(1).any(1).all()):
        return
    tolerance = {"atol": 1e-4 * float(found.maps.abs().max()), "rtol": 0}
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(shape[0], generator=generator)
    torch.testing.assert_close(principal_maps(x[:, order]).maps, found.maps, **tolerance)
    with_zeros = torch.cat([x, torch.zeros_like(x)], 1)
    zeros = principal_maps(with_zeros)
    torch.testing.assert_close(zeros.maps.abs(), found.maps.abs(), **tolerance)
    scaled = principal_maps(x * factor)
    torch.testing.assert_close(scaled.maps / factor, found.maps, **tolerance)
    shifted = principal_maps(x.roll((1, 1), (2, 3)))
    torch.testing.assert_close(shifted.maps, found.maps.roll((1, 1), (2, 3)), **tolerance)
    rotation, _ = torch.linalg.qr(torch.randn(shape[0], shape[0], generator=generator, dtype=torch.float64))
    rotated = principal_maps(torch.einsum("dc,nchw->ndhw", rotation, x))
    torch.testing.assert_close(rotated.maps.abs(), found.maps.abs(), **tolerance)


@settings(max_examples=30, deadline=None)
@given(shape=shapes, seed=st.integers(0, 10**6))
def test_maps_of_nonnegative_features_are_nonnegative(shape, seed):
    found = principal_maps(features(shape, seed))
    if float(found.gap.min()) > 1.05:
        assert float(found.maps.min()) >= -1e-5 * float(found.maps.max().clamp_min(1))


@settings(max_examples=30, deadline=None)
@given(shape=shapes, seed=st.integers(0, 10**6), components=st.integers(1, 4))
def test_centred_maps_have_mean_zero(shape, seed, components):
    found = principal_maps(features(shape, seed, signed=True), center=True, components=components)
    assert found.maps.shape[1] == components
    assert float(found.maps.mean((2, 3)).abs().max()) < 1e-5


def test_signed_features_follow_their_mean():
    x = features((6, 4, 4), 3, signed=True, count=8)
    for center in (False, True):
        found = principal_maps(x, center=center).maps[:, 0].flatten(1)
        mean = x.mean(1).flatten(1)
        for a, b in zip(found, mean, strict=True):
            assert float(torch.corrcoef(torch.stack([a.double(), b]))[0, 1]) >= -1e-6


def test_features_without_a_mean_put_the_larger_end_up():
    """As after layer norm: the channels sum to 0 everywhere, so that no sign correlates with them."""
    x = features((6, 4, 4), 5, signed=True, count=8)
    x = (x - x.mean(1, keepdim=True)).float()
    found = principal_maps(x).maps[:, 0].flatten(1)
    assert bool((found.amax(1) >= -found.amin(1)).all())


def test_components_are_orthogonal_and_end_with_the_rank():
    found = principal_maps(features((3, 5, 5), 0, signed=True), components=5)
    flat = found.maps.flatten(2).double()
    gram = flat @ flat.transpose(1, 2)
    off = gram - torch.diag_embed(gram.diagonal(dim1=1, dim2=2))
    assert float(off.abs().max()) < 1e-4
    assert not found.maps[:, 3:].any() and not found.share[:, 3:].any()


def test_nothing_gives_nothing():
    for solver in ("gram", "power", "svd"):
        for shape in ((1, 3, 2, 2), (1, 2, 4, 4)):
            found = principal_maps(torch.zeros(shape), solver=solver)
            assert not found.maps.any() and not found.share.any() and float(found.gap) == 1


def test_half_precision_features_do_not_overflow():
    x = features((8, 4, 4), 1).float() * 8e3
    half = principal_maps(x.half())
    assert half.maps.isfinite().all()
    torch.testing.assert_close(half.maps, principal_maps(x).maps, rtol=2e-2, atol=2e-3 * float(x.max()))


def test_non_finite_features_are_refused():
    with pytest.raises(UsageError, match="not finite"):
        principal_maps(torch.full((1, 2, 2, 2), float("inf")))


def test_a_map_without_anything_positive_keeps_its_order():
    """Signed features whose common part is negative: the sign follows the mean, and no value is above 0."""

    class Below(nn.Module):
        def forward(self, x):
            return self.conv(x).mean((2, 3))

    model = Below()
    model.conv = nn.Conv2d(1, 2, 1)
    nn.init.constant_(model.conv.weight, 1.0)
    nn.init.constant_(model.conv.bias, -10.0)
    image = torch.rand(1, 1, 6, 6)
    found = EigenCAM(model, "conv").explain(image)
    assert float(found.raw.max()) < 0
    torch.testing.assert_close(
        found.maps[0], (image[0, 0] - image.min()) / (image.max() - image.min()), atol=1e-4, rtol=0
    )


def test_independent_of_the_classifier():
    """This is also why Eigen-CAM fails the sanity check of class sensitivity."""
    model = create_model("resnet20", seed=0).eval()
    images = torch.randn(3, 3, 32, 32)
    before = eigen_cam(model, images)
    nn.init.normal_(model.linear.weight)
    assert torch.equal(eigen_cam(model, images), before)


def test_no_gradient_and_no_class():
    model = create_model("resnet20", seed=0)
    images = torch.randn(2, 3, 32, 32, requires_grad=True)
    with torch.inference_mode():
        inside = EigenCAM(model)(images.detach())
    maps = EigenCAM(model)(images)
    assert not maps.requires_grad and images.grad is None
    torch.testing.assert_close(inside, maps)
    maps.mul_(2)  # not an inference tensor
    with pytest.warns(ExplanationWarning, match="no classes"):
        EigenCAM(model)(images, 3)


def test_components_and_metadata():
    model = create_model("resnet20", seed=0)
    images = torch.randn(2, 3, 32, 32)
    found = EigenCAM(model, components=3).explain(images)
    assert found.maps.shape == (2, 3, 32, 32) and found.raw.shape == (2, 3, 8, 8) and found.share.shape == (2, 3)
    one = EigenCAM(model).explain(images)
    torch.testing.assert_close(one.maps, found.maps[:, 0])
    assert one.share.shape == (2,) and bool((one.gap >= 1).all()) and one.layer == "layer3"
    assert one.classes is None and math.isfinite(one.similarity)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"components": 0}, "at least 1"), ({"components": 2, "solver": "power"}, "solver 'gram'")],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(UsageError, match=message):
        EigenCAM(create_model("resnet20"), **arguments)(torch.randn(1, 3, 32, 32))
