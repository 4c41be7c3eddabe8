"""Preprocessing: the equation, other sizes, and JSON of others."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from convette.data import Preprocessing
from convette.errors import UsageError

RGB = Preprocessing(3, 8, 6, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))


@given(st.integers(0, 255), st.integers(0, 2))
@settings(deadline=None)
def test_the_equation(level, channel):
    images = torch.full((2, 3, 8, 6), level, dtype=torch.uint8)
    out = RGB(images)
    assert out.shape == images.shape and out.dtype == torch.float32
    expected = (level / 255 - RGB.mean[channel]) / RGB.std[channel]
    torch.testing.assert_close(out[:, channel], torch.full((2, 8, 6), expected), atol=1e-5, rtol=1e-5)


def test_the_call_is_its_two_halves():
    images = torch.randint(0, 256, (2, 3, 8, 6), dtype=torch.uint8)
    assert torch.equal(RGB(images), RGB.normalize(RGB.to_unit(images)))
    unit = RGB.to_unit(images)
    assert unit.min() >= 0 and unit.max() <= 1


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
@given(height=st.integers(1, 40), width=st.integers(1, 40))
@settings(max_examples=20, deadline=None)
def test_any_size_becomes_the_networks(interpolation, height, width):
    to = Preprocessing(1, 8, 6, (0.0,), (1.0,), interpolation)
    out = to(torch.full((2, 1, height, width), 77, dtype=torch.uint8))
    assert out.shape == (2, 1, 8, 6)
    torch.testing.assert_close(out, torch.full_like(out, 77 / 255), atol=1e-6, rtol=0)


def test_the_middle_is_kept():
    images = torch.zeros(1, 1, 10, 30, dtype=torch.uint8)
    images[..., 10:20] = 255
    assert Preprocessing(1, 10, 10, (0.0,), (1.0,))(images).min() > 0.999


def test_wrong_channels_are_named_with_the_remedy():
    with pytest.raises(UsageError, match="channels=3"):
        RGB(torch.zeros(1, 1, 8, 6, dtype=torch.uint8))


def test_json_there_and_back():
    assert Preprocessing.from_json(RGB.to_json()) == RGB


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"channels": 2}, "channels is 2"),
        ({"channels": "3"}, "expected an integer"),
        ({"height": 0}, "size 0x6"),
        ({"height": 10**9}, "not within"),
        ({"width": True}, "expected an integer"),
        ({"mean": [0.5]}, "mean has 1 values"),
        ({"mean": "abc"}, "list of numbers"),
        ({"mean": [float("nan")] * 3}, "not finite"),
        ({"std": [0.0, 1.0, 1.0]}, "above 0"),
        ({"interpolation": "bilinaer"}, "'bilinear'"),
        ({"scale": 1}, "unknown field"),
        ({"std": None}, "list of numbers"),
    ],
)
def test_json_of_others_is_checked(change, text):
    with pytest.raises(UsageError, match=text):
        Preprocessing.from_json({**RGB.to_json(), **change})


def test_a_missing_field_is_named():
    value = RGB.to_json()
    del value["std"]
    with pytest.raises(UsageError, match="'std' is missing"):
        Preprocessing.from_json(value)
