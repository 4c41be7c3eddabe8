"""Options of allocations and of schedules within training: from a recipe to the function, refused when they are read."""

import inspect
from pathlib import Path

import pytest

from convette.cli.main import main
from convette.cost import WidthCost
from convette.errors import UsageError
from convette.pipeline import build_recipe, load_recipe
from convette.pruning import ALLOCATIONS, CRITERIA, PruneSettings, find_allocation, find_criterion, prune, random
from convette.pruning._in_training import IN_TRAINING, make_method
from convette.pruning._options import own_options
from convette.pruning.allocation import allocate, check_options
from convette.pruning.methods import GradualPruning
from convette.training import find_method
from convette.training import make_method as made_method

PAGE = Path(__file__).parents[2] / "docs/systems/pruning/allocations.md"


@pytest.mark.parametrize("name", sorted(ALLOCATIONS))
def test_every_allocation_takes_its_own_options_with_their_defaults_and_the_page_lists_them(name):
    function = find_allocation(name)
    parameters = inspect.signature(function).parameters
    own = {option: parameters[option].default for option in own_options(function, ("rules", "loss"))}
    assert PruneSettings(allocation=name, allocation_options=own).allocation_options == own
    row = next(line for line in PAGE.read_text().splitlines() if line.startswith((f"| `{name}`", f"| [`{name}`")))
    for option, default in own.items():
        shown = str(list(default) if isinstance(default, tuple) else default).removesuffix(".0").lower()
        assert f"`{option}`" in row and (option == "seed" or f"`{option}` = {shown}" in row)
    with pytest.raises(UsageError, match=f"prune.allocation_options: allocation {name} has no option 'rules'"):
        PruneSettings(allocation=name, allocation_options={"rules": 1})


@pytest.mark.parametrize("schedule", sorted(IN_TRAINING))
def test_schedules_in_training_take_their_own_options(schedule):
    options = {"begin": 0.2, "end": 0.5, **({"floor": 0.01} if schedule == "growing" else {"times": 3})}
    settings = PruneSettings(
        schedule=schedule, schedule_options=options, allocation="exact", allocation_options={"seconds": 1.5}
    )
    method = make_method(settings, GradualPruning("macs<=50%").budget, [])
    assert (method.begin, method.end, method.allocation_options) == (0.2, 0.5, {"seconds": 1.5})
    assert vars(method).get("floor", 0.01) == 0.01 and method.times == (1 if schedule == "growing" else 3)
    row = next(line for line in PAGE.read_text().splitlines() if line.startswith(f"| `{schedule}`"))
    defaults = inspect.signature(type(method).__init__).parameters
    assert all(f"`{option}` = {defaults[option].default}" in row for option in options)


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({"allocation": "evolution", "allocation_options": {"generatons": 2}}, "'generatons'. Did you mean 'gener"),
        ({"allocation": "evolution", "allocation_options": {"population": 2}}, "population = 2: .*equal to 3"),
        ({"allocation": "evolution", "allocation_options": {"generations": True}}, "generations = True: .*integer"),
        ({"allocation": "policy_gradient", "allocation_options": {"deviation": 0.0}}, "deviation = 0.0: .*than 0"),
        ({"allocation": "policy_gradient", "allocation_options": {"deviation": float("inf")}}, "finite"),
        ({"allocation": "exact", "allocation_options": {"seconds": "long"}}, "seconds = 'long': .*number"),
        ({"allocation": "per_layer", "allocation_options": {"ratios": [0.5, 1.5]}}, "less than 1"),
        ({"allocation": "per_layer", "allocation_options": {"ratios": "0.5"}}, "ratios = '0.5'"),
        ({"allocation": "opti_cut", "allocation_options": {"per_cost": 1}}, "boolean"),
        ({"allocation": "global", "allocation_options": {"steps": 1}}, "It has none"),
        ({"criterion": "taylor", "criterion_options": {"normalise": 3}}, "criterion taylor: normalise = 3 is unknown"),
        ({"criterion": "trajectory", "criterion_options": {"relation": "x"}}, "relation = 'x' is unknown.*patch"),
        ({"criterion": "information_gain", "criterion_options": {"mode": "exakt"}}, "mode = 'exakt'.*mean 'exact'"),
        ({"schedule": "gradual", "schedule_options": {"floor": 0.1}}, "schedule gradual has no option 'floor'"),
        ({"schedule": "soft", "schedule_options": {"times": 1}}, "prune.schedule_options: .*at least 2"),
        ({"schedule": "growing", "schedule_options": {"begin": 0.7}}, "begin=0.7"),
        ({"schedule": "soft", "schedule_options": {"seed": 3}}, r"key of \[prune\] itself"),
    ],
)
def test_what_an_allocation_or_schedule_does_not_take_is_refused_before_anything_runs(choices, words):
    with pytest.raises(UsageError, match=words) as caught:
        PruneSettings(**choices)
    assert "\n" not in str(caught.value) and "_options" in str(caught.value)
    if "allocation_options" in choices:
        with pytest.raises(UsageError, match=words):
            made_method(find_method("gradual-pruning"), {"budget": "macs<=50%", **choices})


@pytest.mark.parametrize("name", sorted(CRITERIA))
def test_a_criterion_says_all_the_words_that_an_option_takes(name):
    function = find_criterion(name)
    texts = [option for option, one in inspect.signature(function).parameters.items() if isinstance(one.default, str)]
    for option in set(texts) - {"pool"}:  # names of criteria with commas
        with pytest.raises(UsageError, match=f"prune.criterion_options: .*{option} = 'x' is unknown. Known: "):
            PruneSettings(criterion=name, criterion_options={option: "x"})


def test_a_recipe_with_a_wrong_word_is_refused_when_it_is_read(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text('[prune]\ncriterion = "l1"\n\n[prune.criterion_options]\nnormalise = "men"\n')
    with pytest.raises(UsageError, match=r"recipe.toml, line 4: .*normalise = 'men' is unknown. Did you mean 'mean'"):
        load_recipe(path)
    path.write_text('[prune]\nblocks_by = "mutual"\n')
    with pytest.raises(UsageError, match=r"recipe.toml, line 2: .*blocks_by.*information"):
        load_recipe(path)


def test_options_reach_the_search_and_the_seed_is_the_runs(network, graph, example):
    width_cost, calls = WidthCost(network, example, graph), []

    def loss(selection):
        calls.append(tuple(sorted((name, len(kept)) for name, kept in selection.items())))
        return float(sum(units * (17 + 13 * place) for place, (_, units) in enumerate(calls[-1])) % 97)

    def tried(options, seed=0):
        calls.clear()
        half = GradualPruning("macs<=125000").budget.limits
        scores = random(network, graph)
        allocate("evolution", scores, graph, width_cost, half, loss=loss, seed=seed, options=options)
        return list(calls)

    few_tried, many = tried({"generations": 0, "population": 3}), tried({"generations": 3})
    assert len(few_tried) <= 4 < len(many)
    assert tried({"generations": 3}) == many != tried({"generations": 3}, seed=1)
    assert tried({"generations": 3, "seed": 1}) == tried({"generations": 3}, seed=1)
    assert check_options("per_layer", {"ratios": (0.5,)}) == {"ratios": (0.5,)}


def test_prune_hands_them_on(network, few, monkeypatch):
    seen = []
    genuine = allocate

    def watched(name, *given, **keywords):
        seen.append((name, keywords["options"], keywords["seed"]))
        return genuine(name, *given, **keywords)

    monkeypatch.setattr("convette.pruning._candidate.allocate", watched)
    settings = PruneSettings(
        allocation="per_layer", allocation_options={"ratios": [0.5]}, epochs=0, steps=1, calibration_images=32, seed=5
    )
    result = prune(network, few, "macs<=60%", settings, device="cpu")
    assert result.met and seen == [("per_layer", {"ratios": [0.5]}, 5)]


def test_the_command_line_and_a_recipe_set_them_alike(tmp_path, capsys):
    by_set = ["recipe", "--set", "prune.allocation=evolution", "--set", "prune.allocation_options.generations=2"]
    assert main(by_set) == 0
    printed = capsys.readouterr().out
    assert "[prune.allocation_options]\ngenerations = 2" in printed
    (tmp_path / "r.toml").write_text(printed)
    assert main(["recipe", str(tmp_path / "r.toml")]) == 0 and capsys.readouterr().out == printed
    (tmp_path / "r.toml").write_text("[prune]\nallocation = 'evolution'\n[prune.allocation_options]\ngeneratons = 2\n")
    assert main(["recipe", str(tmp_path / "r.toml")]) == 2
    assert "line 3: prune.allocation_options: allocation evolution has no" in capsys.readouterr().err.replace("\n", " ")
    given = {"prune": {"allocation_options": {}}}
    changed = build_recipe(given, {"prune.allocation": "evolution", "prune.allocation_options.population": 4})
    assert changed.prune.allocation_options == {"population": 4} and given == {"prune": {"allocation_options": {}}}
    # An empty table says nothing, so a run keeps the name it had before there was one.
    assert changed.digest() != build_recipe({"prune": {"allocation": "evolution"}}).digest()
    assert build_recipe(given).digest() == build_recipe({}).digest()
