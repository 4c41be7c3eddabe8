"""Comparing recipes: the statistics, pairing by seed, resuming, and files that do not lie."""

import json
import math

import pytest

from convette.errors import FileFormatError, UsageError
from convette.pipeline import build_recipe, compare, load_evidence, validate_evidence
from convette.pipeline.compare import compare_files, estimate
from convette.pipeline.fit import FitResult
from convette.pipeline.results import Row, RunRecord, StageState, Summary


@pytest.fixture
def fast_runs(monkeypatch):
    """Runs that take no time: accuracy follows from seed and recipe."""
    import sys

    module = sys.modules["convette.pipeline.compare"]
    calls = []

    def run(recipe, stages, out):
        calls.append(out.name)
        accuracy = 0.9 + 0.01 * recipe.run.seed + (0.02 if recipe.prune.distil else 0)
        rows = [
            Row(key="accuracy", label="", unit="share", before=0.9, after=accuracy),
            Row(key="macs", label="", unit="count", before=100, after=40),
        ]
        return FitResult(out, Summary(rows=rows, met=True), {})

    record = RunRecord(
        name="x",
        command="",
        reproduce="",
        created="",
        updated="",
        recipe={},
        machine={},
        versions={},
        stages=[StageState(name="train", state="finished", seconds=2.0)],
    )
    monkeypatch.setattr(module, "run_recipe", run)
    monkeypatch.setattr(module, "read_run", lambda path: record)
    return calls


RECIPES = {
    "without": build_recipe({"prune": {"distil": False}}),
    "with": build_recipe({"prune": {"distil": True}}),
}


def test_the_interval_is_students():
    one = estimate([1.0, 2.0, 3.0, 4.0])
    half = 3.182446 * math.sqrt(5 / 3) / 2
    assert one.mean == 2.5 and one.low == pytest.approx(2.5 - half, rel=1e-6)


def test_differences_are_paired_by_seed(fast_runs, tmp_path):
    result = compare(RECIPES, 3, runs=tmp_path)
    assert fast_runs == [f"{name}-seed{seed}" for seed in range(3) for name in RECIPES]
    difference = result.sides[1].difference
    # Seeds differ by a point each, the recipes by two whatever the seed: pairing sees that, the means alone do not.
    assert difference.mean == pytest.approx(0.02) and difference.high - difference.low < 1e-9
    assert result.sides[1].figures["accuracy"].high - result.sides[1].figures["accuracy"].low > 0.02
    assert result.sides[0].difference is None and result.seconds == 12.0
    assert "with against without: accuracy +2 points" in result.summary
    assert result.columns[0] == "accuracy" and set(result.rows) == set(RECIPES)


def test_a_result_file_is_checked_against_its_own_values(fast_runs, tmp_path):
    path = tmp_path / "result.json"
    path.write_text(json.dumps(compare(RECIPES, 3, runs=tmp_path).to_json()))
    assert validate_evidence(path).metric == "accuracy"
    value = json.loads(path.read_text())
    value["sides"][1]["difference"]["mean"] = 0.5
    path.write_text(json.dumps(value))
    with pytest.raises(FileFormatError, match="difference: mean does not follow"):
        validate_evidence(path)
    del value["machine"]
    path.write_text(json.dumps(value))
    with pytest.raises(FileFormatError, match="machine"):
        validate_evidence(path)


def test_an_evidence_file_names_two_recipes(fast_runs, tmp_path):
    path = tmp_path / "distillation.toml"
    path.write_text(
        'slug = "distillation"\nseeds = 2\n[common]\ndata.source = "digits"\n[common.train]\nepochs = 3\n'
        "[baseline]\nprune.distil = false\n[method]\nprune.distil = true\ntrain.epochs = 4\n"
    )
    evidence = load_evidence(path)
    assert (evidence.baseline.train.epochs, evidence.method.train.epochs) == (3, 4)
    assert (evidence.baseline.prune.distil, evidence.method.prune.distil) == (False, True)
    result = compare_files([path], out=tmp_path / "result.json", runs=tmp_path / "runs")
    assert validate_evidence(tmp_path / "result.json") == result


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('slug = "x"\n[baselin]\n', "line 2: no key 'baselin' in evidence. Did you mean 'baseline'?"),
        ('slug = "x"\n[baseline]\n', "method is missing"),
        ('slug = "x"\n[baseline]\ntrain.epoch = 3\n[method]\n', "Did you mean 'epochs'?"),
    ],
)
def test_errors_of_evidence_files_name_the_remedy(tmp_path, text, words):
    path = tmp_path / "x.toml"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        load_evidence(path)
    assert words in str(caught.value)


def test_one_seed_or_an_unknown_metric_are_refused(fast_runs, tmp_path):
    with pytest.raises(UsageError, match="at least 2"):
        compare(RECIPES, 1, runs=tmp_path)
    with pytest.raises(UsageError, match="Did you mean 'accuracy'"):
        compare(RECIPES, 2, metric="acuracy", runs=tmp_path)
