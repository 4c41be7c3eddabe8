"""`convette cost` on all engines and under background load."""

import json

from convette.cli.main import main
from convette.pipeline import _latency
from convette.pipeline.recipe import build_recipe


def test_cost_on_engines_says_which_to_use(capsys):
    words = ["cost", "resnet20", "--engines", "eager,onnxruntime", "--json"]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)["engines"]
    assert set(found["latency"]) == {"eager:cpu", "onnxruntime:cpu"} and found["use"] in found["latency"]
    assert found["random_images"]


def test_cost_under_contention_compares_networks(capsys, monkeypatch):
    import functools

    from convette.pipeline import latency_study

    monkeypatch.setattr(latency_study, "study_of", functools.partial(latency_study.study_of, samples=20))
    words = ["cost", "resnet20", "--against", "simplenet_cifar_310k", "--contention", "0,1", "--json"]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["conditions"]) == {"idle", "1 x alu 100 %"}
    assert set(found["conditions"]["idle"]["networks"]) == {"resnet20", "simplenet_cifar_310k"}
    assert main(["cost", "resnet20", "--contention", "many"]) == 2
    assert "0,1,2" in capsys.readouterr().err


def test_cost_shows_where_a_network_can_be_cut(capsys):
    assert main(["cost", "resnet20", "--split", "--json"]) == 0
    found = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert found["layer1"]["shape"] == [16, 32, 32] and found["layer3"]["bytes"] == 64 * 8 * 8


def test_a_budget_is_measured_under_the_load_and_with_enough_calls(monkeypatch):
    import contextlib

    from convette.cost import Budget

    seen = []

    @contextlib.contextmanager
    def load(processes):
        seen.append(processes)
        yield

    def measured(runners, example, *, minimum_samples):
        seen.append(minimum_samples)
        return {}

    monkeypatch.setattr(_latency, "contention", load)
    monkeypatch.setattr(_latency, "measure_latency", measured)
    recipe = build_recipe({}, {"run.contention": 2, "budget.limits": "latency.p99<=3ms@openvino:cpu"})
    _latency.measurer(Budget.parse(recipe.budget.limits), recipe.run.contention)({}, None, "eager:cpu")
    _latency.measurer(Budget.parse("latency<=3ms"), 0)({}, None, "eager:cpu")
    assert seen == [2, _latency.TAIL_SAMPLES, 0, 50]
