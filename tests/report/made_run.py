"""A whole run folder made by hand, from real digits: what the report is tested on."""

from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

from convette import _files
from convette.cost import Cost
from convette.pipeline import results
from convette.runtime import Latency

CLASSES = [str(digit) for digit in range(10)]
STAGES = ("data", "model", "train", "compress", "quantize", "export", "verify", "explain")


def make_run(folder: Path, finished: int = len(STAGES)) -> Path:
    """Write a run whose first `finished` stages are there; class names hold characters that HTML must escape."""
    digits = load_digits()
    images = (digits.images[:40, None] * 15.9).astype(np.uint8)
    names = ["<b>zero</b>", *CLASSES[1:]]
    parts = _parts(names)
    for name in STAGES[:finished]:
        _files.write_text(folder / name / "result.json", parts[name].model_dump_json())
    generator = np.random.default_rng(0)
    maps = generator.random((4, 8, 8), dtype=np.float32)
    _save(folder / "data/samples.npz", images=images, labels=digits.target[:40])
    _save(folder / "verify/predictions.npz", indices=np.arange(3))
    _save(
        folder / "verify/mistakes.npz",
        images=images[:3],
        indices=np.arange(3),
        labels=np.array([0, 1, 2]),
        predictions=np.array([3, 3, 5]),
        confidences=np.array([0.91, 0.8, 0.55]),
    )
    _save(folder / "explain/maps.npz", images=images[:4], before=maps, after=np.sqrt(maps))
    _files.write_text(folder / "run.json", _record(finished).model_dump_json())
    return folder


def _save(path: Path, **arrays: np.ndarray) -> None:
    with _files.replacing(path) as temporary:
        np.savez(temporary, **arrays)


def _latency(scale: float, engine: str) -> Latency:
    timings = np.random.default_rng(1).lognormal(np.log(scale), 0.12, 200)
    p50, p95, p99 = np.percentile(timings, [50, 95, 99])
    interval = (0.98 * p50, 1.02 * p50)
    return Latency(engine, "cpu", "fp32", 1, 2, 200, p50, p95, p99, timings.mean(), interval, 90.0, 0.5, tuple(timings))


def _cost(macs: int, scale: float) -> dict:
    latency = {engine: _latency(scale * k, engine) for engine, k in (("eager:cpu", 4), ("openvino:cpu", 0.6))}
    return Cost(macs // 10, macs, 4 * macs // 10, 20_000, latency=latency).to_json()


def _scores(accuracy: float) -> results.Scores:
    right = round(40 * accuracy)
    confusion = np.diag([right] * 10)
    confusion[3, 8] = 40 - right
    return results.Scores(
        images=360, accuracy=accuracy, loss=0.1, calibration_error=0.013, confusion=confusion.tolist()
    )


def _epochs(count: int, first: int = 1) -> list[results.Epoch]:
    return [
        results.Epoch(
            epoch=first + i,
            train_loss=2 / (i + 1),
            train_accuracy=1 - 0.5 / (i + 1),
            validation_accuracy=1 - 0.6 / (i + 1),
            seconds=1.5,
        )
        for i in range(count)
    ]


def _parts(names: list[str]) -> dict[str, results.Part]:
    limit = {"limit": "macs<=40%", "metric": "macs", "engine": None, "value": 1.01e6, "bound": 1.02e6, "met": True}
    splits = {
        name: {"images": n, "class_counts": [n // 10] * 10}
        for name, n in (("train", 1290), ("validation", 140), ("test", 360))
    }
    data = {
        "source": "digits",
        "fingerprint": "f" * 16,
        "class_names": names,
        "channels": 1,
        "height": 8,
        "width": 8,
        "preprocessing": {},
    }
    path = [
        {"step": i, "macs": m, "parameters": m // 10, "size": m, "accuracy": a, "accuracy_before_recovery": b}
        for i, m, a, b in ((0, 2_550_000, 0.99, None), (1, 1_800_000, 0.985, 0.93), (2, 1_010_000, 0.98, 0.81))
    ]
    widths = [
        {
            "layer": f"layer{i // 6 + 1}.{i % 6 // 2}.conv{i % 2 + 1}",
            "before": 16 << (i // 6),
            "after": (16 << (i // 6)) - i,
        }
        for i in range(18)
    ]
    candidates = [
        {
            "name": f"openvino:cpu:{precision}",
            "engine": f"openvino:cpu:{precision}",
            "precision": precision,
            "file": "x.xml",
        }
        | figures
        for precision, figures in (
            ("fp32", {"accuracy": 0.98, "latency": 0.31, "size": 109_000}),
            ("int8", {"accuracy": 0.979, "latency": 0.34, "size": 41_000, "note": "slower"}),
        )
    ]
    files = [
        {"file": "export/model.onnx", "format": "onnx", "precision": "fp32", "bytes": 112_000, "recommended": True},
        {"file": "export/model.safetensors", "format": "convette", "precision": "fp32", "bytes": 120_000},
    ]
    check = {
        "file": "export/model.onnx",
        "engine": "onnxruntime:cpu",
        "images": 360,
        "max_abs_error": 2e-6,
        "tolerance": 1e-4,
        "agreement": 1.0,
        "passed": True,
    }
    looked = [
        {
            "index": i,
            "label": i,
            "prediction_before": i,
            "prediction_after": i if i else 3,
            "confidence_after": 0.9,
            "right": bool(i),
            "correlation": 0.95,
        }
        for i in range(4)
    ]
    return {
        "data": results.DataResult(
            **data, splits=splits, bad=[{"path": "a/<x>.png", "reason": "truncated"}], notes=["grey, 8 x 8"]
        ),
        "model": results.ModelResult(
            name="resnet20", requested="auto", reason="small images", cost=_cost(2_550_000, 1), smallest=None
        ),
        "train": results.TrainingResult(
            settings={"epochs": 20}, device="cpu", epochs=_epochs(20), validation=_scores(0.99)
        ),
        "compress": results.CompressResult(
            budget="macs<=40%",
            settings={},
            path=path,
            widths=widths,
            recovery=_epochs(6),
            validation_before=_scores(0.99),
            validation_after=_scores(0.98),
            limits=[limit],
        ),
        "quantize": results.QuantizationResult(
            candidates=candidates,
            failures=["onnxruntime:cpu:int8: <constant> activations"],
            kept="openvino:cpu:fp32",
            precision="fp32",
            reason="int8 is not faster here.",
            file=None,
        ),
        "export": results.ExportResult(files=files),
        "verify": results.VerifyResult(
            files=[check],
            test_before=_scores(0.9861),
            test_after=_scores(0.9778),
            cost_before=_cost(2_550_000, 1),
            cost_after=_cost(1_010_000, 0.5),
            limits=[limit],
        ),
        "explain": results.ExplainResult(
            method="eigen_cam",
            layer_before="layer3.2",
            layer_after="layer3.2",
            reason="the last spatial stage.",
            images=looked,
            drift=0.05,
            drift_interval=(0.04, 0.06),
            drift_images=256,
        ),
    }


def _record(finished: int) -> results.RunRecord:
    rows = [
        results.Row(key="accuracy", label="accuracy (test)", unit="share", before=0.9861, after=0.9778),
        results.Row(key="macs", label="MACs", unit="count", before=2.55e6, after=1.01e6, budget=1.02e6, met=True),
        results.Row(key="parameters", label="parameters", unit="count", before=269e3, after=108e3),
        results.Row(key="size", label="size", unit="bytes", before=1.08e6, after=430e3),
        results.Row(
            key="latency.p50@openvino:cpu", label="latency p50, openvino:cpu", unit="ms", before=0.6, after=0.3
        ),
    ]
    use = ["python -c \"import convette; model = convette.load('runs/x/export/model.safetensors')\""]
    stages = [
        results.StageState(name=name, state="finished" if i < finished else "to do", seconds=2.0)
        for i, name in enumerate(STAGES)
    ]
    done = finished == len(STAGES)
    return results.RunRecord(
        name="x",
        command="convette fit digits",
        reproduce="convette fit --recipe recipe.toml",
        created="2026-11-21T03:00:00Z",
        updated="2026-11-21T03:05:00Z",
        recipe={"data": {"source": "digits"}, "budget": {"limits": "macs<=40%"}},
        machine={"cpu": "a processor", "cores": 2, "threads": 2, "memory": 24 << 30, "gpu": None, "system": "Linux"},
        versions={"python": "3.11.7", "torch": "2.15.0"},
        state="finished" if done else "running",
        stages=stages,
        summary=results.Summary(rows=rows, met=True, notes=["int8 was tried and not kept."], use=use) if done else None,
    )
