import copy
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from convette.errors import ConvetteError, UsageError
from convette.runtime import ENGINES, EngineSpec, missing, prepare
from convette.runtime.engines import CHANNELS_LAST

CPU_ENGINES = [
    "eager:cpu",
    "eager:cpu:channels_last",
    "eager:cpu:bf16",
    "eager:cpu:bf16:channels_last",
    "onnxruntime:cpu",
    "openvino:cpu",
    "openvino:cpu:fp32",
    "openvino:cpu:bf16",
]
ERROR = {"fp32": 1e-5, "bf16": 0.03}  # of the largest logit


@given(st.sampled_from(sorted(ENGINES)), st.data())
def test_a_spec_reads_its_own_text(name, data):
    engine = ENGINES[name]
    precisions = [precision for precision in engine.precisions if precision != "default"]
    spec = EngineSpec(
        name,
        data.draw(st.sampled_from(engine.devices)),
        data.draw(st.sampled_from([None, *precisions])),
        engine.channels_last and data.draw(st.booleans()),
    )
    assert EngineSpec.parse(str(spec)) == spec
    words = data.draw(st.permutations(str(spec).split(":")[1:]))
    assert EngineSpec.parse(":".join([name.upper(), *words])) == spec


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("openvno", "Did you mean 'openvino'"),
        ("eager:gpu", "unknown part 'gpu'"),
        ("onnxruntime:bf16", "has no bf16; it has fp32, int8"),
        ("onnxruntime:cuda", "has no cuda"),
        ("openvino:channels_last", "leave it out"),
        ("eager:fp32:bf16", "precision twice"),
        ("", "unknown engine"),
    ],
)
def test_a_wrong_spec_is_named_with_the_remedy(text, message):
    with pytest.raises(UsageError, match=message):
        EngineSpec.parse(text)


@pytest.mark.parametrize("engine", CPU_ENGINES)
def test_every_engine_gives_the_networks_logits_at_any_batch_size(engine, tiny, images, expected):
    if missing(engine):
        pytest.skip(str(missing(engine)))
    before = copy.deepcopy(tiny.state_dict())
    with prepare(engine, tiny, images[:2]) as runner:
        assert runner.engine == engine and runner.device == "cpu" and runner.batch_size == 2
        assert runner.cold_start_seconds > 0
        for rows in (2, 1, 5):
            logits = runner(images[:rows])
            assert logits.dtype == np.float32
            assert np.abs(logits - expected[:rows]).max() <= ERROR[runner.precision] * np.abs(expected).max()
        np.testing.assert_array_equal(runner(images[:2].numpy()), runner(images[:2]))
    assert tiny.training
    assert all(torch.equal(before[name], value) for name, value in tiny.state_dict().items())


def test_an_answer_stays_when_the_next_batch_is_run(tiny, images):
    for engine in (engine for engine in CPU_ENGINES if missing(engine) is None):
        with prepare(engine, tiny, images[:2]) as runner:
            first = runner(images[:2])
            kept = first.copy()
            runner(images[2:4])
            np.testing.assert_array_equal(first, kept)


def test_openvino_reads_both_formats_and_runs_more_batch_sizes_than_it_keeps(exported, images, expected):
    for path in exported.values():
        with prepare("openvino:cpu:fp32", path, images[:1]) as runner:
            for rows in (*range(1, 8), 1):
                np.testing.assert_allclose(runner(images[:rows]), expected[:rows], rtol=1e-4, atol=1e-5)


def test_a_prepared_file_may_be_replaced(exported, images, expected, tmp_path):
    for suffix, engine in ((".onnx", "onnxruntime:cpu"), (".xml", "openvino:cpu:fp32")):
        for part in (".xml", ".bin") if suffix == ".xml" else (".onnx",):
            shutil.copy(exported[suffix].with_suffix(part), tmp_path / f"copy{part}")
        with prepare(engine, tmp_path / f"copy{suffix}", images[:1]) as runner:
            for part in tmp_path.iterdir():
                part.write_bytes(b"\0" * part.stat().st_size)
                part.unlink()
            np.testing.assert_allclose(runner(images), expected, rtol=1e-4, atol=1e-5)


def test_eager_uses_the_threads_it_was_told_and_puts_torchs_back(tiny, images):
    seen = []
    model = copy.deepcopy(tiny)
    model.register_forward_pre_hook(lambda *_: seen.append(torch.get_num_threads()))
    before = torch.get_num_threads()
    with prepare("eager:cpu", model, images[:1], threads=before + 1) as runner:
        runner(images[:1])
        assert runner.threads == before + 1
    assert set(seen) == {before + 1}
    assert torch.get_num_threads() == before


def test_threads_reach_the_engines(tiny, images, monkeypatch):
    import onnxruntime

    from convette.runtime import _vendors

    told = {}
    real_session = onnxruntime.InferenceSession

    def session(path, options, **rest):
        told["onnxruntime"] = options.intra_op_num_threads
        told["spinning"] = options.get_session_config_entry("session.intra_op.allow_spinning")
        return real_session(path, options, **rest)

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    core = _vendors.openvino().Core
    real_compile = core.compile_model

    def compile_model(self, model, device, config):
        compiled = real_compile(self, model, device, config)
        told["openvino"] = compiled.get_property("INFERENCE_NUM_THREADS")
        return compiled

    monkeypatch.setattr(core, "compile_model", compile_model)
    for engine in ("onnxruntime:cpu", "openvino:cpu"):
        prepare(engine, tiny, images[:1], threads=1).close()
    assert told == {"onnxruntime": 1, "spinning": "0", "openvino": 1}
    with pytest.raises(UsageError, match="threads = 0"):
        prepare("eager", tiny, images[:1], threads=0)


def test_a_closed_runner_says_so(tiny, images):
    runner = prepare("eager", tiny, images[:1])
    runner.close()
    with pytest.raises(UsageError, match="closed"):
        runner(images[:1])


def test_what_an_engine_cannot_run_is_refused(tiny, images, exported, tmp_path):
    with pytest.raises(UsageError, match="int8_path"):
        prepare("openvino:cpu:int8", tiny, images[:1])
    with pytest.raises(UsageError, match="not a quantised file"):
        prepare("openvino:cpu:int8", exported[".xml"], images[:1])
    with pytest.raises(UsageError, match=r"reads \.onnx files"):
        prepare("onnxruntime:cpu", exported[".xml"], images[:1])
    with pytest.raises(UsageError, match="runs modules"):
        prepare("eager:cpu", exported[".onnx"], images[:1])
    with pytest.raises(UsageError, match="no such file"):
        prepare("openvino:cpu", tmp_path / "none.xml", images[:1])


@pytest.mark.parametrize("engine", ["onnxruntime:cpu", "openvino:cpu"])
def test_a_batch_of_another_shape_is_one_clear_line(engine, exported, images):
    path = exported[".onnx" if engine.startswith("onnx") else ".xml"]
    with (
        prepare(engine, path, images[:1]) as runner,
        pytest.raises(ConvetteError, match=r"shape \(1, 1, 4, 4\)") as caught,
    ):
        runner(torch.zeros(1, 1, 4, 4))
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_the_cpu_is_offered(tiny, images):
    with pytest.raises(UsageError, match="use eager:cpu:bf16:channels_last"):
        prepare("eager:cuda:bf16:channels_last", tiny, images[:1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_the_gpu_gives_the_networks_logits(tiny, images, expected):
    with prepare("eager:cuda", tiny, images[:2]) as runner:
        np.testing.assert_allclose(runner(images), expected, rtol=1e-3, atol=1e-3)


def test_without_a_compiler_the_remedy_is_named(tiny, images, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UsageError, match=r"C\+\+ compiler .*no-such-compiler.*eager:cpu"):
        prepare("compiled:cpu", tiny, images[:1])


def test_an_error_of_the_compiler_is_one_line_and_stays_there(tiny, images, monkeypatch):
    def broken(*arguments, **options):
        raise RuntimeError("first line\nsecond line")

    if missing("compiled:cpu"):
        pytest.skip(str(missing("compiled:cpu")))
    monkeypatch.setattr(torch, "compile", lambda model, **options: broken)
    with pytest.raises(ConvetteError, match=r"cannot compile Tiny: first line\. Use eager") as caught:
        prepare("compiled:cpu", tiny, images[:1])
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_compiled_gives_the_networks_logits_at_any_batch_size(tiny, images, expected):
    if missing("compiled:cpu"):
        pytest.skip(str(missing("compiled:cpu")))
    with prepare("compiled:cpu", tiny, images[:2]) as runner:
        for rows in (2, 1, 5):
            np.testing.assert_allclose(runner(images[:rows]), expected[:rows], rtol=1e-4, atol=1e-5)


def test_channels_last_is_a_part_of_eager_alone():
    assert [name for name, engine in ENGINES.items() if engine.channels_last] == ["eager"]
    assert EngineSpec.parse(f"eager:{CHANNELS_LAST}").channels_last
