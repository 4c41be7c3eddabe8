import copy
import errno
import shutil

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from convette.errors import ConvetteError, FileFormatError, StorageError, UsageError
from convette.runtime import _vendors, export, exported_size, prepare, read_export_metadata
from convette.surgery import ModelCard, card_of, set_card

CARD = ModelCard(
    class_names=("cat", 'a "quoted" <name> & more', "Größe ≠ 0", "line\nbreak", "tab\tand \\"),
    preprocessing={"channels": 3, "height": 12, "width": 10, "mean": [0.1, 0.2, 0.3], "std": [1.0, 2.0, 3.0]},
    history=({"step": "train", "accuracy": 0.975}, {"step": "prune", "macs": 123}),
)


@pytest.mark.parametrize("suffix", [".onnx", ".xml"])
@pytest.mark.parametrize("rows", [1, 2, 7])
def test_the_file_computes_what_the_network_computes_at_any_batch_size(exported, images, expected, suffix, rows):
    engine = {".onnx": "onnxruntime:cpu", ".xml": "openvino:cpu:fp32"}[suffix]
    with prepare(engine, exported[suffix], images[:3]) as runner:
        np.testing.assert_allclose(runner(images[:rows]), expected[:rows], rtol=1e-4, atol=1e-5)


def test_the_network_is_left_as_it_was(tiny, images, tmp_path):
    before = copy.deepcopy(tiny.state_dict())
    random_state = torch.get_rng_state()
    export(tiny, images, tmp_path / "a.onnx")
    export(tiny, images, tmp_path / "a.xml")
    assert all(module.training for module in tiny.modules())
    assert all(parameter.requires_grad for parameter in tiny.parameters())
    assert all(torch.equal(before[name], value) for name, value in tiny.state_dict().items())
    assert torch.equal(random_state, torch.get_rng_state())


def test_onnx_is_one_valid_file_with_a_free_batch_and_no_batch_norm_left(exported):
    onnx.checker.check_model(exported[".onnx"], full_check=True)
    model = onnx.load(exported[".onnx"], load_external_data=False)
    assert {entry.domain for entry in model.opset_import} <= {""} and model.opset_import[0].version >= 18
    [given], [made] = model.graph.input, model.graph.output
    assert (given.name, made.name) == ("images", "logits")
    assert given.type.tensor_type.shape.dim[0].dim_param == made.type.tensor_type.shape.dim[0].dim_param == "batch"
    assert [dim.dim_value for dim in given.type.tensor_type.shape.dim[1:]] == [3, 12, 10]
    assert "BatchNormalization" not in {node.op_type for node in model.graph.node}


def test_nothing_but_the_files_is_written(exported):
    folder = exported[".onnx"].parent
    assert sorted(path.name for path in folder.iterdir()) == ["tiny.bin", "tiny.onnx", "tiny.xml"]
    assert exported_size(exported[".onnx"]) == exported[".onnx"].stat().st_size
    assert exported_size(exported[".xml"]) == sum((folder / name).stat().st_size for name in ("tiny.bin", "tiny.xml"))


@pytest.mark.parametrize("suffix", [".onnx", ".xml"])
def test_the_card_comes_back_out_of_the_file(suffix, images, tmp_path):
    model = set_card(nn.Sequential(nn.Flatten(), nn.Linear(360, 5)), CARD)
    path = export(model, images[:1], tmp_path / f"carded{suffix}")
    read = read_export_metadata(path)
    assert read["class_names"] == list(CARD.class_names)
    assert read["preprocessing"] == CARD.preprocessing
    assert read["history"] == list(CARD.history)
    assert (read["task"], read["precision"], read["input_shape"]) == ("classification", "fp32", [3, 12, 10])
    assert read["convette"]
    assert card_of(model) == CARD


def test_a_file_of_others_has_no_metadata(tmp_path):
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Relu", ["x"], ["y"])],
        "g",
        [onnx.helper.make_tensor_value_info("x", 1, [1, 2])],
        [onnx.helper.make_tensor_value_info("y", 1, [1, 2])],
    )
    model = onnx.helper.make_model(graph)
    onnx.save(model, tmp_path / "foreign.onnx")
    assert read_export_metadata(tmp_path / "foreign.onnx") == {}
    model.metadata_props.add(key="convette", value="{broken")
    onnx.save(model, tmp_path / "broken.onnx")
    with pytest.raises(FileFormatError, match=r"broken.onnx: .*no JSON"):
        read_export_metadata(tmp_path / "broken.onnx")


def test_damaged_and_missing_files_are_named(exported, tmp_path):
    (tmp_path / "cut.onnx").write_bytes(exported[".onnx"].read_bytes()[:100])
    with pytest.raises(FileFormatError, match=r"cut\.onnx"):
        read_export_metadata(tmp_path / "cut.onnx")
    shutil.copy(exported[".xml"], tmp_path / "alone.xml")
    with pytest.raises(UsageError, match=r"alone.bin: no such file"):
        read_export_metadata(tmp_path / "alone.xml")
    (tmp_path / "alone.bin").write_bytes(b"short")
    with pytest.raises(FileFormatError, match=r"alone\.xml"):
        read_export_metadata(tmp_path / "alone.xml")
    with pytest.raises(UsageError, match="no such file"):
        read_export_metadata(tmp_path / "none.onnx")


@pytest.mark.parametrize(
    ("name", "to", "message"),
    [
        ("model.pt", None, r"\.onnx or \.xml"),
        ("model.onnx", "onxx", "Did you mean 'onnx'"),
        ("model.onnx", "openvino", r"end in \.xml"),
    ],
)
def test_a_wrong_format_is_named_with_the_remedy(tiny, images, tmp_path, name, to, message):
    with pytest.raises(UsageError, match=message):
        export(tiny, images, tmp_path / name, to=to)
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_nan_are_named(tiny, images, tmp_path):
    broken = copy.deepcopy(tiny)
    broken.norm1.running_var[3] = torch.nan
    with pytest.raises(ConvetteError, match=r"norm1\.running_var of Tiny .* not finite"):
        export(broken, images, tmp_path / "nan.onnx")
    assert list(tmp_path.iterdir()) == []


class TwoOutputs(nn.Module):
    def forward(self, images):
        return images, images


class Untraceable(nn.Module):
    def forward(self, images):
        return images.flatten(1) if images.sum().item() > 0 else images.flatten(1) * 2


@pytest.mark.parametrize("suffix", [".onnx", ".xml"])
@pytest.mark.parametrize(("model", "message"), [(TwoOutputs(), "returns a tuple"), (Untraceable(), "Untraceable")])
def test_a_network_that_cannot_be_exported_leaves_the_old_file(suffix, model, message, images, tmp_path):
    path = tmp_path / f"old{suffix}"
    path.write_text("old")
    with pytest.raises(ConvetteError, match=message) as caught:
        export(model, images, path)
    assert "\n" not in str(caught.value)
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_a_full_disk_leaves_the_old_pair(tiny, another_tiny, images, tmp_path, monkeypatch):
    path = export(tiny, images, tmp_path / "pair.xml")
    before = {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()}

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(_vendors.openvino(), "save_model", full)
    with pytest.raises(StorageError, match="no space left"):
        export(another_tiny, images, path)
    assert {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()} == before


def test_export_prints_nothing(tiny, images, tmp_path, capfd):
    export(tiny, images, tmp_path / "quiet.onnx")
    export(tiny, images, tmp_path / "quiet.xml")
    assert capfd.readouterr() == ("", "")
