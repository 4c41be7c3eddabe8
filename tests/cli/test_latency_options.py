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
    words = [
        "cost",
        "resnet20",
        "--channels",
        "1",
        "--against",
        "simplenet_cifar_310k",
        "--contention",
        "0,1",
        "--json",
    ]
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


def test_engines_leave_the_cores_of_the_load_alone(monkeypatch):
    monkeypatch.setattr(_latency.torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(_latency.os, "sched_getaffinity", lambda pid: set(range(4)), raising=False)
    assert [_latency.threads_beside(load) for load in (0, 1, 3, 4, 9)] == [None, 3, 1, 1, 1]


def test_a_run_folder_is_measured_as_it_ships(tmp_path, capsys):
    import convette
    from convette.pipeline.results import RUN_FILE, ExportedFile, ExportResult

    assert main(["cost", str(tmp_path)]) == 2
    (tmp_path / RUN_FILE).write_text("{}")
    assert main(["cost", str(tmp_path), "--no-latency"]) == 2
    assert "no network yet" in capsys.readouterr().err
    (tmp_path / "export").mkdir()
    model = convette.create_model("resnet20", in_channels=1, seed=0).eval()
    convette.save(model, tmp_path / "export" / "model.safetensors")
    noise = [convette_images(seed) for seed in range(4)]
    onnx = convette.export(model, noise[0][:1], tmp_path / "model.onnx")
    from convette.quantization import quantize_onnx

    quantize_onnx(onnx, noise, tmp_path / "export" / "model-int8.onnx")
    shipped = ExportedFile(file="export/model-int8.onnx", format="onnx", precision="int8", bytes=1)
    (tmp_path / "export" / "result.json").write_text(ExportResult(files=[shipped]).model_dump_json())
    words = ["cost", str(tmp_path), "--image-size", "8", "--engine", "onnxruntime", "--engine", "eager", "--json"]
    assert main([*words, "--budget", "latency.p99<=10s@onnxruntime:cpu"]) == 0
    latency = json.loads(capsys.readouterr().out)["latency"]
    assert latency["onnxruntime:cpu"]["precision"] == "int8" and latency["eager:cpu"]["precision"] == "fp32"


def convette_images(seed):
    import torch

    return torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
