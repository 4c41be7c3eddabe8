"""Comparing explanations of two networks, boxes, and the picture."""

import copy
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from convette.errors import UsageError
from convette.explain import box_of, box_overlap, explanation_drift, overlay, rank_correlation
from convette.models import create_model

# Untrained networks look at much the same places in all images.
pytestmark = pytest.mark.filterwarnings("ignore::convette.explain.ExplanationWarning")


def test_rank_correlation_is_spearmans():
    from scipy.stats import spearmanr

    torch.manual_seed(0)
    a, b = torch.rand(4, 6, 5), torch.rand(4, 6, 5).round(decimals=1)  # with ties
    expected = [spearmanr(x.flatten(), y.flatten()).statistic for x, y in zip(a, b, strict=True)]
    torch.testing.assert_close(rank_correlation(a, b), torch.tensor(expected, dtype=torch.float32))
    assert rank_correlation(a[0], b[0]).shape == ()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), power=st.floats(0.3, 3))
def test_rank_correlation_sees_order_only(seed, power):
    a = torch.rand(1, 5, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1
    assert float(rank_correlation(a, a**power)) == pytest.approx(1)
    assert float(rank_correlation(a, -a)) == pytest.approx(-1)


def test_rank_correlation_of_constant_maps():
    constant, other = torch.zeros(2, 3, 3), torch.rand(2, 3, 3)
    assert rank_correlation(constant, constant).tolist() == [1, 1]
    assert rank_correlation(constant, other).tolist() == [0, 0]


def test_boxes():
    values = torch.zeros(8, 8)
    values[1:4, 2:7] = 1
    values[6, 0] = 0.9  # smaller, apart
    values[5, 5] = 0.1  # below the threshold
    assert box_of(values) == (1, 2, 4, 7)
    assert box_of(torch.zeros(4, 4)) is None
    assert box_overlap((0, 0, 2, 2), (1, 1, 3, 3)) == pytest.approx(1 / 7)
    assert box_overlap((0, 0, 1, 1), (2, 2, 3, 3)) == 0
    assert box_overlap(None, None) == 1 and box_overlap(None, (0, 0, 1, 1)) == 0


@pytest.mark.parametrize("method", ["grad_cam", "eigen_cam"])
def test_drift_is_nothing_between_equals_and_grows_with_the_change(method):
    torch.manual_seed(0)
    model = create_model("resnet20", seed=0).eval()
    images = torch.randn(6, 3, 32, 32)
    same = explanation_drift(model, copy.deepcopy(model), images, method=method, batch_size=4)
    assert same.correlation == pytest.approx(1) and same.box_overlap == 1 and same.images == 6
    assert same.layer_before == same.layer_after == "layer3" and len(same.correlations) == 6
    correlations = [same.correlation]
    for strength in (0.05, 1.0):
        changed = copy.deepcopy(model)
        with torch.no_grad():
            for p in changed.parameters():
                p.add_(torch.randn_like(p) * strength * p.std() if p.numel() > 1 else 0)
        correlations.append(explanation_drift(model, changed, images, method=method).correlation)
    assert correlations[0] > correlations[1] > correlations[2]
    json.dumps(same.to_json(), allow_nan=False)


def test_drift_between_different_networks_names_both_layers():
    found = explanation_drift(
        create_model("resnet20", seed=0),
        create_model("mobilenet_v2_035", stem="small", seed=0),
        torch.randn(2, 3, 32, 32),
        method="eigen_cam",
    )
    assert (found.layer_before, found.layer_after) == ("layer3", "features")
    assert -1 <= found.low <= found.correlation <= found.high <= 1
    with pytest.raises(UsageError, match="at least one"):
        explanation_drift(create_model("resnet20"), create_model("resnet20"), torch.zeros(0, 3, 32, 32))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("scale", [1, 3])
def test_overlay(channels, scale):
    image = torch.randint(0, 256, (channels, 8, 10), dtype=torch.uint8)
    heat = torch.zeros(4, 5)
    heat[0, 0] = 1
    picture = overlay(image, heat, scale=scale)
    assert picture.dtype == np.uint8 and picture.shape == (8 * scale, 10 * scale, 3)
    plain = image.float().expand(3, -1, -1)
    grey = (0.5 * plain + 0.5 * plain.mean(0, keepdim=True)).round()
    far = picture[-scale, -scale]
    assert np.abs(far.astype(int) - grey[:, -1, -1].numpy()).max() <= 1  # nothing covers it where the map is 0
    same = overlay(image.float() / 255, heat, scale=scale)
    assert np.abs(same.astype(int) - picture.astype(int)).max() <= 1
    strong = overlay(torch.zeros(channels, 8, 10), torch.ones(4, 5), strength=1.0)
    assert (strong == strong[0, 0]).all() and strong.sum() > 0


def test_overlay_grows_lighter_with_the_map():
    steps = torch.linspace(0, 1, 20)[None]
    light = overlay(torch.zeros(1, 1, 20), steps, strength=1.0).astype(int).sum(2)[0]
    assert (np.diff(light) > 0).all()


def test_overlay_refuses_what_cannot_be_shown():
    with pytest.raises(UsageError, match="4 channels"):
        overlay(torch.zeros(4, 8, 8), torch.zeros(2, 2))
    with pytest.raises(UsageError, match="undo the normalisation"):
        overlay(torch.randn(3, 8, 8) * 3, torch.zeros(2, 2))
    with pytest.raises(UsageError, match="scale 0"):
        overlay(torch.zeros(3, 8, 8), torch.zeros(2, 2), scale=0)
