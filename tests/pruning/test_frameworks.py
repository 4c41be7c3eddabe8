"""Whole frameworks as schedules of `prune`, and TAS as an allocation."""

import json

import pytest
import torch
from torch import nn

from convette import models
from convette.cli.main import main
from convette.cost import Limit, WidthCost, count
from convette.errors import BudgetError, StructureError, UsageError
from convette.pruning import PruneSettings, check_budget, find_allocation, prune
from convette.pruning._calibration import draw_calibration, loss_of_cuts
from convette.surgery import card_of, structure_log, trace
from convette.training import TrainSettings

QUICK = TrainSettings(batch_size=256, learning_rate=0.05, augmentation=(), precision="fp32")
N2N = {"removal_epochs": 1, "shrink_epochs": 3, "rollouts": 3, "student_epochs": 0, "least": 2}


@pytest.mark.parametrize(("schedule", "options"), [("n2n", N2N), ("block_then_channel", {"rounds": 2})])
def test_a_framework_meets_the_budget_of_prune_and_goes_on_where_it_was(tmp_path, deep, digits, schedule, options):
    settings = PruneSettings(schedule=schedule, schedule_options=options, epochs=2)
    found = prune(
        deep, digits, "macs<=50%", settings, train_settings=QUICK, checkpoint_dir=tmp_path / "kept", device="cpu"
    )
    assert found.met and found.end.macs <= 0.5 * found.start.macs
    assert [record.step for record in found.steps] == list(range(len(found.steps))) and found.recovery
    gone = {f"blocks.{number}" for number in range(4)} & set(found.blocks)
    assert set(found.blocks) == gone
    assert all(isinstance(deep.get_submodule(name).first, nn.Conv2d) for name in gone)
    steps = [entry["step"] for entry in card_of(found.model).history]
    assert steps[-1] == "prune" and steps.count("prune") == 1
    assert len(structure_log(found.model).edits) and found.steps[-1].accuracy is not None
    again = prune(
        deep, digits, "macs<=50%", settings, train_settings=QUICK, checkpoint_dir=tmp_path / "kept", device="cpu"
    )
    for name, tensor in found.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name]), name


def test_what_a_framework_cannot_do_is_said_before_anything_is_trained(deep, digits):
    plain = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    blocks = PruneSettings(schedule="block_then_channel")
    for call in (check_budget, prune):
        with pytest.raises(StructureError, match="no residual block"):
            call(plain, digits, "macs<=50%", blocks)
        with pytest.raises(UsageError, match="counts, it does not measure"):
            call(deep, digits, "memory<=50%", blocks)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with pytest.raises(StructureError, match="no block"):
        prune(flat, digits, "macs<=50%", PruneSettings(schedule="n2n", schedule_options=N2N))
    with pytest.raises(BudgetError, match="cannot be reached"):
        check_budget(deep, digits, "macs<=0.01%", blocks)
    with pytest.raises(BudgetError, match="none of 2 students"):
        few = {**N2N, "removal_epochs": 0, "shrink_epochs": 1, "rollouts": 2, "least": 8}
        prune(deep, digits, "macs<=50%", PruneSettings(schedule="n2n", schedule_options=few), train_settings=QUICK)
    for options in ({"schedule": "n2n", "schedule_options": {"rolouts": 3}}, {"schedule_options": {"rounds": 2}}):
        with pytest.raises(UsageError, match="schedule_options"):
            PruneSettings(**options)
    with pytest.raises(UsageError, match=r"key of \[prune\] itself"):
        PruneSettings(schedule="n2n", schedule_options={"epochs": 3})
    with pytest.raises(UsageError, match="rounds"):
        PruneSettings(schedule="block_then_channel", schedule_options={"rounds": 0})
    with pytest.raises(UsageError, match=r"prune\.epochs"):
        PruneSettings(schedule="n2n", epochs=0)
    with pytest.raises(UsageError, match="data set"):
        prune(deep, digits.preprocessing(digits.train.images([0])), "macs<=50%", PruneSettings(schedule="n2n"))


def test_the_command_line_reaches_the_frameworks(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = "{removal_epochs = 0, shrink_epochs = 2, rollouts = 2, student_epochs = 0, least = 2}"
    command = ["prune", "resnet8", "--data", "digits", "--budget", "params<=90%", "--schedule", "n2n", "--epochs", "1"]
    command += ["--set", f"prune.schedule_options={options}", "--device", "cpu", "--out", "a.safetensors", "-q"]
    assert main([*command, "--json"]) == 0
    done = json.loads(capsys.readouterr().out)
    assert all(limit["met"] for limit in done["limits"]) and len(done["path"]) == 2
    assert models.load("a.safetensors")(torch.zeros(1, 1, 8, 8)).shape == (1, 10)
    wrong = ["recipe", "--set", "prune.schedule=block_then_channel", "--set", "prune.schedule_options={roundz=2}"]
    assert main(wrong) == 2 and "Did you mean 'rounds'" in capsys.readouterr().err


class Useless(nn.Module):
    """Of two wide layers side by side the classifier hears one only."""

    def __init__(self) -> None:
        super().__init__()
        self.heard, self.unheard = nn.Conv2d(1, 16, 3), nn.Conv2d(1, 16, 3)
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        both = torch.cat([self.heard(x).relu(), 1e-4 * self.unheard(x).relu()], dim=1)
        return self.head(both.mean((2, 3)))


def test_differentiable_widths_learn_where_width_is_worth_something(digits):
    torch.manual_seed(0)
    model = Useless().eval()
    calibration = draw_calibration(digits, 128, seed=0, device="cpu")
    head = torch.optim.Adam(model.parameters(), 0.05)
    for images, labels in calibration * 20:
        head.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        head.step()
    example = calibration[0][0][:1]
    graph = trace(model, example)
    cost = WidthCost(model, example, graph)
    scores = {group.name: torch.arange(group.size, 0, -1).float() for group in graph.groups}
    half = Limit("macs", None, 0.5 * float(cost.macs({})), False, None)
    allocate, before = find_allocation("transformable_architecture_search"), model.head.weight.detach().clone()
    loss = loss_of_cuts(model, graph, calibration)
    found = allocate(scores, graph, cost, half, loss=loss, steps=40, size_rate=0.1)
    assert len(found["heard"]) > 1.3 * len(found["unheard"]) and cost.macs(found) <= half.value
    again = allocate(scores, graph, cost, half, loss=loss, steps=40, size_rate=0.1)
    assert all(torch.equal(kept, again[name]) for name, kept in found.items())
    assert torch.equal(model.head.weight, before) and not model.training
    one = loss_of_cuts(model, graph, draw_calibration(digits, 1, seed=0, device="cpu"))
    assert cost.macs(allocate(scores, graph, cost, half, loss=one, steps=3, weight_rate=0.01)) <= half.value


def test_prune_takes_tas_by_name_and_refuses_it_without_data(deep, digits):
    settings = PruneSettings(
        allocation="transformable_architecture_search", steps=1, epochs=1, calibration_images=64, seed=1
    )
    found = prune(deep, digits, "macs<=40%, params<=60%", settings, train_settings=QUICK, device="cpu")
    assert found.met and found.end.macs > 0.25 * found.start.macs
    with pytest.raises(UsageError, match="needs a data set"):
        prune(
            deep,
            digits.preprocessing(digits.train.images([0])),
            "macs<=50%",
            PruneSettings(allocation="transformable_architecture_search", epochs=0),
        )
    assert count(deep, digits.preprocessing(digits.train.images([0]))).macs == found.start.macs
