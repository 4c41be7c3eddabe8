"""Appending a layer behind a module: names, the log, files, taking it back."""

import pytest
import torch
from torch import nn

from convette.errors import FileFormatError, StructureError
from convette.models import create_model, load, save
from convette.surgery import Append, apply, edit_from_json, structure_log


def test_a_sequence_grows_and_other_modules_are_wrapped(tmp_path):
    model = create_model("resnet20", seed=0)
    x = torch.randn(2, 3, 16, 16)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    edits = (
        Append("layer1", "torch.nn:PReLU", {"num_parameters": 16}),
        Append("bn1", "torch.nn:BatchNorm2d", {"num_features": 16}),
    )
    change = apply(model, *edits)
    change.migrate_optimizer(optimizer)
    assert isinstance(model.layer1[3], nn.PReLU) and isinstance(model.bn1[1], nn.BatchNorm2d)
    assert "layer1.0.conv1.weight" in model.state_dict()
    assert {id(p) for p in model.parameters()} == {id(p) for g in optimizer.param_groups for p in g["params"]}
    assert [edit_from_json(edit.to_json()) for edit in structure_log(model).edits] == list(edits)
    save(model.eval(), tmp_path / "m.safetensors")
    assert torch.equal(load(tmp_path / "m.safetensors")(x), model(x))


def test_a_refused_edit_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Sequential(nn.Conv2d(1, 2, 1)))
    with pytest.raises(StructureError):
        apply(model, Append("0", "torch.nn:PReLU"), Append("0", "torch.nn:Linear", {"in_features": 2}))
    assert len(model[0]) == 1
    for wrong in ({"module": ""}, {"module": "0", "constructor": "os:system"}, {"module": "0", "seed": -1}):
        with pytest.raises(FileFormatError):
            edit_from_json({"kind": "append", "constructor": "torch.nn:PReLU"} | wrong)
