"""Layers that know what they are at inference, and layers that take over what the one before them has learned."""

import copy
import json
from typing import Any

import pytest
import torch
from torch import nn

from convette import surgery
from convette.errors import FileFormatError, StructureError
from convette.layers.normalization.bnet import BNET2d
from convette.layers.normalization.skewness_batch_norm import SkewReducedBatchNorm2d
from convette.layers.normalization.sparse_switchable_normalization import SparseSwitchNorm2d
from convette.layers.normalization.weight_align import WAConv2d
from convette.models import create_model, load, save
from convette.surgery._convert import carry_over

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Stubborn(nn.BatchNorm2d):
    def take_over(self, old):
        raise ValueError("no such thing")


def resnet(seed: int = 0) -> Any:
    model = create_model("resnet20", num_classes=5, seed=seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.running_var, module.weight, module.bias):
                torch.nn.init.uniform_(tensor, 0.2, 1.5)
    return model.eval()


def decide(norm: Any, mean: str, var: str) -> None:
    norm.decide()
    norm.picks.copy_(torch.tensor([norm.candidates.index(mean), norm.candidates.index(var)]))


def outputs(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IMAGES)


def test_a_converted_layer_takes_over_what_names_do_not_tell():
    model = resnet()
    before = outputs(model)
    surgery.convert(model, {nn.BatchNorm2d: BNET2d}, IMAGES)
    assert isinstance(model.bn1, BNET2d)
    assert torch.allclose(outputs(model), before, atol=1e-4 * float(before.abs().max()))


def test_parameters_taken_over_unchanged_stay_the_same_and_others_are_the_new_layers_own():
    class Doubled(nn.BatchNorm2d):
        def take_over(self, old):
            self.load_state_dict(old.state_dict())
            self.bias.mul_(2)

    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    old: Any = model[1]
    nn.init.normal_(old.weight)
    nn.init.normal_(old.bias)
    kept = old.bias.detach().clone()
    new = Doubled(4)
    carry_over(old, new)
    assert new.weight is old.weight
    assert new.running_var is old.running_var
    assert torch.equal(new.bias, 2 * kept)
    assert torch.equal(old.bias, kept)


def test_a_layer_that_cannot_take_over_is_one_line_and_changes_nothing():
    model = resnet()
    before = outputs(model)
    with surgery.trusting(f"{__name__}:Stubborn"), pytest.raises(StructureError, match="cannot take over from Batch"):
        surgery.apply(model, surgery.Convert("bn1", f"{__name__}:Stubborn", {"num_features": 16}))
    assert torch.equal(outputs(model), before)


def test_every_kind_folds_and_the_file_comes_back(tmp_path):
    model = resnet()
    surgery.convert(model, {nn.Conv2d: WAConv2d}, IMAGES, include="layer1.*")
    surgery.convert(model, {nn.BatchNorm2d: SparseSwitchNorm2d}, IMAGES, include="layer2.0.*")
    surgery.convert(model, {nn.BatchNorm2d: SkewReducedBatchNorm2d}, IMAGES, include="layer2.1.*")
    surgery.convert(model, {nn.BatchNorm2d: surgery.Replacement(BNET2d, {"k": 1})}, IMAGES, include="layer3.0.*")
    model.eval()
    names: dict[str, Any] = dict(model.named_modules())
    decide(names["layer2.0.bn1"], "bn", "bn")
    decide(names["layer2.0.bn2"], "in", "bn")
    before = outputs(model)
    folded = surgery.fold(model, IMAGES)
    assert torch.allclose(outputs(folded), before, atol=1e-4 * float(before.abs().max()))
    kinds = {type(module).__name__ for module in folded.modules()}
    assert "WAConv2d" not in kinds and "BNET2d" not in kinds and "SparseSwitchNorm2d" not in kinds
    assert "TwoMomentNorm2d" in kinds  # mean and variance chose differently: as plain as it gets
    assert "SkewReducedBatchNorm2d" in kinds  # it must stay
    edits = surgery.structure_log(folded).edits
    assert {edit.module for edit in edits if isinstance(edit, surgery.FoldLayer)} >= {"layer1.0.conv1", "layer2.0.bn2"}
    for edit in edits:
        assert surgery.edit_from_json(json.loads(json.dumps(edit.to_json()))) == edit
    save(folded, tmp_path / "folded.safetensors")
    again = load(tmp_path / "folded.safetensors")
    assert torch.equal(outputs(again), outputs(folded))


def test_undo_is_bitwise_and_a_copy_with_other_choices_is_refused():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), SparseSwitchNorm2d(4)).eval()
    decide(model[1], "ln", "ln")
    other = copy.deepcopy(model)
    decide(other[1], "bn", "bn")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    norm: Any = model[1]
    (edit,) = surgery.fold_layers(copy.deepcopy(model), IMAGES)
    assert edit.constructor == "torch.nn:GroupNorm"
    change = edit.apply(model)
    assert isinstance(model[1], nn.GroupNorm)
    change.revert()
    assert model[1] is norm
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    with pytest.raises(StructureError, match="BatchNorm2d here"):
        surgery.apply(other, edit)
    other[1] = SparseSwitchNorm2d(4)
    with pytest.raises(StructureError, match="ratios are not one-hot"):
        surgery.apply(other, edit)
    with pytest.raises(StructureError, match="plain layer already"):
        surgery.apply(other, surgery.FoldLayer("0"))


@pytest.mark.parametrize(
    "value",
    [
        {"kind": "fold_layer"},
        {"kind": "fold_layer", "module": ""},
        {"kind": "fold_layer", "module": "a", "constructor": "os:system"},
        {"kind": "fold_layer", "module": "a", "constructor": "torch.nn:Conv2d", "arguments": [1]},
    ],
)
def test_tampered_edits_are_refused(value):
    with pytest.raises(FileFormatError):
        surgery.edit_from_json(value)


def test_the_optimiser_trains_what_came_and_forgets_what_went():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), SparseSwitchNorm2d(4), nn.ReLU()).eval()
    decide(model[1], "in", "in")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(IMAGES).sum().backward()
    optimizer.step()
    edits = surgery.fold_layers(copy.deepcopy(model), IMAGES)
    surgery.apply(model, *edits).migrate_optimizer(optimizer)
    trained = {id(item) for group in optimizer.param_groups for item in group["params"]}
    assert trained == {id(item) for item in model.parameters()}
