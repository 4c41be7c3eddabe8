"""`fit` deploys on the engine that was measured to be the one to use."""

import json
from pathlib import Path

import pytest
from tests.report.made_run import make_run

from convette import quantization
from convette.pipeline import summary
from convette.pipeline.results import ExportedFile, QuantizationResult, read_result
from convette.pipeline.stages.export import _of_engine, _recommend
from convette.pipeline.stages.quantize import on_named_engine
from convette.runtime import EngineSpec, Latency


def file(form, precision):
    return ExportedFile(file=f"export/{form}-{precision}", format=form, precision=precision, bytes=1)


@pytest.mark.parametrize(
    ("kept", "int8", "expected"),
    [
        ("openvino:cpu", None, "export/openvino-fp32"),
        ("openvino:cpu:fp32", None, "export/openvino-fp32"),
        ("onnxruntime:cpu:fp32", None, "export/onnx-fp32"),
        ("onnxruntime:cpu:int8", "quantize/model.int8.onnx", "export/onnx-int8"),
        ("openvino:cpu:int8", "quantize/model.int8.xml", "export/openvino-int8"),
    ],
)
def test_the_file_of_the_engine_that_was_kept_is_recommended(kept, int8, expected):
    files = [file("convette", "fp32"), file("onnx", "fp32"), file("openvino", "fp32")]
    if int8:
        files.append(file("onnx" if int8.endswith(".onnx") else "openvino", "int8"))
    answer = QuantizationResult(
        candidates=[], failures=[], kept=kept, precision="int8" if int8 else "fp32", reason="measured.", file=int8
    )
    found = _recommend(files, answer)
    assert [one.file for one in found if one.recommended] == [expected]


@pytest.mark.parametrize(
    ("named", "int8", "expected"),
    [
        ("openvino:cpu", None, "export/openvino-fp32"),
        ("onnxruntime:cpu", None, "export/onnx-fp32"),
        ("openvino:cpu:bf16", None, "export/openvino-fp32"),
        ("openvino:cpu", "model.int8.xml", "export/openvino-int8"),
        ("openvino:cpu:fp32", "model.int8.xml", "export/openvino-fp32"),
        ("openvino:cpu", "model.int8.onnx", "export/openvino-fp32"),
        ("eager:cpu", None, "export/convette-fp32"),
        ("compiled:cpu", None, "export/convette-fp32"),
    ],
)
def test_the_file_is_that_of_the_engine_the_budget_names_whatever_is_fastest(named, int8, expected):
    files = [file("convette", "fp32"), file("onnx", "fp32"), file("openvino", "fp32")]
    if int8:
        files.append(file("onnx" if int8.endswith(".onnx") else "openvino", "int8"))
    kept = "onnxruntime:cpu:int8" if int8 else "onnxruntime:cpu"
    answer = QuantizationResult(candidates=[], failures=[], kept=kept, precision="x", reason="measured.", file=int8)
    place = _of_engine(files, EngineSpec.parse(named), answer)
    assert place is not None and files[place].file == expected


def test_a_named_engine_without_a_file_of_its_own_leaves_the_choice_to_measuring():
    assert _of_engine([file("convette", "fp32"), file("onnx", "fp32")], EngineSpec.parse("openvino"), None) is None


def candidate(name: str, precision: str, milliseconds: float):
    latency = Latency(
        engine=name.partition(":")[0],
        device="cpu",
        precision=precision,
        batch_size=1,
        threads=1,
        samples=100,
        p50=milliseconds,
        p95=milliseconds,
        p99=milliseconds,
        mean=milliseconds,
        p50_interval=(milliseconds, milliseconds),
        cold_start=1.0,
        load_average=0.0,
        timings=(milliseconds,) * 100,
    )
    return quantization.Candidate(name, precision, 0.98, latency, 1000, Path("x"))


@pytest.mark.parametrize(
    ("named", "kept"),
    [
        (None, "onnxruntime:cpu:int8"),
        ("openvino:cpu", "openvino:cpu"),
        ("openvino:cpu:fp32", "openvino:cpu:fp32"),
        ("onnxruntime:cpu", "onnxruntime:cpu:int8"),
        ("eager:cpu", "onnxruntime:cpu:int8"),
    ],
)
def test_a_precision_is_chosen_among_those_of_the_engine_the_budget_names(named, kept):
    speeds = {
        ("openvino:cpu:fp32", "fp32"): 5.0,
        ("openvino:cpu", "bf16"): 3.0,
        ("openvino:cpu:int8", "int8"): 4.0,
        ("onnxruntime:cpu", "fp32"): 2.0,
        ("onnxruntime:cpu:int8", "int8"): 1.0,
    }
    candidates = tuple(candidate(*name, time) for name, time in speeds.items())
    result = quantization.QuantizeResult(candidates, "onnxruntime:cpu:int8", "measured.")
    spec = None if named is None else EngineSpec.parse(named)
    found = on_named_engine(result, spec, quantization.QuantizeSettings())
    assert found.kept == kept
    assert ("the budget names" in found.reason) == (kept != "onnxruntime:cpu:int8")


@pytest.mark.parametrize(("threads", "said"), [(1, True), (2, False)], ids=["fewer", "all"])
def test_the_use_lines_say_that_a_limit_was_measured_with_fewer_threads(tmp_path, threads, said):
    folder = make_run(tmp_path)
    path = folder / "verify" / "result.json"
    result = json.loads(path.read_text())
    engine = "openvino:cpu"
    result["cost_after"]["latency"][engine]["threads"] = threads
    result["limits"] = [
        {"limit": "x", "metric": f"latency.p50@{engine}", "engine": engine, "value": 1, "bound": 2, "met": True}
    ]
    path.write_text(json.dumps(result))
    record = json.loads((folder / "run.json").read_text())
    record["recipe"]["run"] = {"contention": 1}
    (folder / "run.json").write_text(json.dumps(record))
    assert record["machine"]["cores"] == 2
    lines = "\n".join(summary._use(folder, read_result(folder, "verify")))
    assert ("measured with 1 of 2 threads, beside 1 busy process." in lines) == said
    assert ("intra_op_num_threads = 1" in lines) == said
