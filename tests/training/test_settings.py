import math

import pydantic
import pytest

from convette.errors import UsageError
from convette.training import TrainSettings


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("epochs", 0),
        ("batch_size", 0),
        ("learning_rate", -1.0),
        ("learning_rate", math.nan),
        ("momentum", 1.0),
        ("weight_decay", -0.1),
        ("label_smoothing", 1.0),
        ("ema_decay", 1.0),
        ("gradient_clip", 0.0),
        ("accumulate", 0),
        ("warmup_epochs", -1.0),
        ("checkpoint_steps", 0),
    ],
)
def test_values_out_of_range_are_refused_by_name(key, value):
    with pytest.raises(UsageError, match=rf"train\.{key} = "):
        TrainSettings(**{key: value})


def test_a_misspelt_choice_names_the_nearest():
    settings = TrainSettings()
    object.__setattr__(settings, "optimizer", "sdg")  # the type checker of the tests would speak first
    with pytest.raises(UsageError, match="Did you mean 'sgd'"):
        settings.__post_init__()


def test_a_misspelt_key_is_refused_by_pydantic():
    adapter = pydantic.TypeAdapter(TrainSettings)
    assert adapter.validate_python({"epochs": 3, "augmentation": ["flip"]}).augmentation == ("flip",)
    with pytest.raises(pydantic.ValidationError, match="epoch"):
        adapter.validate_python({"epoch": 3})
    assert set(adapter.json_schema()["properties"]["optimizer"]["enum"]) == {"sgd", "adamw"}


def test_learning_rate_follows_the_images_of_a_step_unless_given():
    assert TrainSettings().peak_learning_rate(128) == pytest.approx(0.1)
    assert TrainSettings().peak_learning_rate(256) == pytest.approx(0.2)
    assert TrainSettings(optimizer="adamw").peak_learning_rate(512) == pytest.approx(4e-3)
    assert TrainSettings(learning_rate=0.3).peak_learning_rate(512) == 0.3
