"""`fit` deploys on the engine that was measured to be the one to use."""

import pytest

from convette.pipeline.results import ExportedFile, QuantizationResult
from convette.pipeline.stages.export import _recommend


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
