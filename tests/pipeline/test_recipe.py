"""Recipes: what is accepted, what is refused and with which words, and that they survive being written."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from convette.errors import UsageError
from convette.pipeline import Recipe, build_recipe, load_recipe
from convette.pipeline._toml import line_of, parse_value


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "r.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("[train]\nepochs = 3\nlearning_rat = 0.1\n", 3, "Did you mean 'learning_rate'?"),
        ("[trian]\nepochs = 3\n", 1, "Did you mean 'train'?"),
        ("# first\n\n[train]\nepochs = 'ten'\n", 4, "train.epochs = 'ten'"),
        ("[train]\nepochs = 0\n", 2, "at least 1"),
        ("[train]\noptimizer = 'sgdd'\n", 2, "Did you mean 'sgd'?"),
        ("[data]\nmax_bad = 3\n", 2, "less than or equal to 1"),
        ("[model]\nstem = 'tiny'\n", 2, "small"),
        ("budget = 'macs<=40%'\n[prune]\nsteps = 3\ncriterion = 'l3'\n", 4, "l1"),
        ("budget = 'macs<=40'\n", 1, "40%"),
        ("[budget]\nlimits = 'mcas<=40%'\n", 2, "macs"),
        ("[run]\nseed = 1.5\n", 2, "integer"),
        ("[data]\nsource = \n", 2, "not valid TOML"),
        ("[quantize]\nmode = 'of'\n", 2, "off"),
    ],
)
def test_an_error_names_file_line_and_remedy_in_one_line(tmp_path, text, line, words):
    path = written(tmp_path, text)
    with pytest.raises(UsageError) as caught:
        load_recipe(path)
    message = str(caught.value)
    assert message.startswith(f"{path}, line {line}")
    assert words in message
    assert "\n" not in message


def test_an_error_in_an_override_does_not_blame_the_file(tmp_path):
    path = written(tmp_path, "[train]\nepochs = 3\n")
    with pytest.raises(UsageError) as caught:
        load_recipe(path, {"train.epochs": "x"})
    assert str(path) not in str(caught.value) and "train.epochs" in str(caught.value)


def test_a_missing_file_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="cannot be read"):
        load_recipe(tmp_path / "none.toml")


def test_a_budget_may_be_a_bare_string(tmp_path):
    short = load_recipe(written(tmp_path, "budget = 'params<=30%'\n"))
    long = load_recipe(written(tmp_path, "[budget]\nlimits = 'parameters <= 30 %'\n"))
    assert short == long


def test_seeds_and_recovery_follow_unless_given():
    assert build_recipe({"run": {"seed": 7}}).train.seed == 7
    assert build_recipe({"run": {"seed": 7}, "train": {"seed": 2}}).train.seed == 2
    recipe = build_recipe({"train": {"epochs": 10}})
    assert build_recipe({}, {"train.epochs": 10}).prune.epochs == recipe.prune.epochs == 10
    assert build_recipe({"train": {"epochs": 10}, "prune": {"epochs": 4}}).prune.epochs == 4


def test_overrides_of_a_written_recipe_act_as_they_would_have_at_first():
    written_out = build_recipe({"train": {"epochs": 10}}).tables()
    assert build_recipe(written_out, {"train.epochs": 4, "run.seed": 3}) == build_recipe(
        {"train": {"epochs": 4}, "run": {"seed": 3}}
    )


def test_the_digest_changes_with_meaning_only():
    base = build_recipe({})
    assert build_recipe({}, {"run.out": "elsewhere"}).digest() == base.digest()
    assert build_recipe({}, {"train.epochs": 31}).digest() != base.digest()


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "train": st.fixed_dictionaries(
                {},
                optional={
                    "epochs": st.integers(1, 500),
                    "learning_rate": st.none() | st.floats(1e-6, 10),
                    "ema_decay": st.none() | st.floats(0, 0.999),
                    "augmentation": st.just("auto") | st.lists(st.sampled_from(["flip", "shift", "mixup"]), max_size=3),
                    "optimizer": st.sampled_from(["sgd", "adamw"]),
                },
            ),
            "data": st.fixed_dictionaries(
                {},
                optional={
                    "source": st.text("ab1 :/\\\"'\n#=[]é€", min_size=1),
                    "mean": st.none() | st.lists(st.floats(0, 1), min_size=1, max_size=3),
                    "image_size": st.none() | st.integers(1, 512),
                },
            ),
            "prune": st.fixed_dictionaries(
                {}, optional={"criterion": st.sampled_from(["l1", "lamp"]), "steps": st.integers(1, 9)}
            ),
            "budget": st.sampled_from(["macs<=40%", "latency.p99<=5ms@openvino:cpu, params<=30%"]),
        },
    )
)
def test_a_recipe_survives_being_written(tables):
    import tomllib

    recipe = build_recipe(tables)
    assert build_recipe(tomllib.loads(recipe.to_toml())) == recipe
    assert build_recipe(json.loads(json.dumps(recipe.tables()))) == recipe


def test_the_schema_names_every_key():
    schema = Recipe.model_json_schema()
    assert set(schema["properties"]) == set(Recipe.model_fields)
    assert "epochs" in schema["$defs"]["TrainSettings"]["properties"]
    assert schema["additionalProperties"] is False


def test_values_of_set_options_are_toml_or_text():
    assert [parse_value(text) for text in ("3", "0.5", "true", "[1, 2]", "adamw", "'x'")] == [
        3,
        0.5,
        True,
        [1, 2],
        "adamw",
        "x",
    ]


def test_lines_are_found_for_dotted_keys_and_tables():
    text = 'a = 1\n"b c".d = 2\n[e]\nf = 3\n[e.g]\nh = 4\n'
    assert line_of(text, ["b c", "d"]) == 2
    assert line_of(text, ["e", "f"]) == 4
    assert line_of(text, ["e", "g", "h"]) == 6
    assert line_of(text, ["e", "g", "missing"]) == 5
    assert line_of(text, ["z"]) is None


def test_what_is_rounded_in_training_is_not_cut_afterwards():
    with pytest.raises(UsageError, match="cut to a budget on macs"):
        build_recipe({"budget": "macs<=50%", "method": [{"name": "QuantizationAware"}]})
    alone = build_recipe({"method": [{"name": "quantization-aware"}]})
    assert alone.method.steps and build_recipe({"budget": "macs<=50%"}).budget.limits
