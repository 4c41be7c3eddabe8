import copy
import json

import pytest
import torch
from tests.pruning.conftest import Block, Deep, plain
from tests.pruning.test_prune import fake_latency
from torch import nn

from convette.cost import count
from convette.errors import BudgetError, UsageError
from convette.pruning import GradualPruning, PruneSettings, StepRecord, check_budget, prune
from convette.pruning import _run as run_module
from convette.pruning._blocks import least_informative, least_missed
from convette.pruning._calibration import draw_calibration
from convette.pruning.in_place_distillation import InPlaceDistillation
from convette.pruning.methods.growing_regularization import GrowingRegularization
from convette.pruning.methods.soft_pruning import SoftPruning
from convette.pruning.recovery import stage_outputs, teaching
from convette.surgery import Origin, load_model, save_model, set_origin, structure_log
from convette.training import Event, Method, TrainSettings, train

QUICK = TrainSettings(batch_size=128, learning_rate=0.05, augmentation=(), precision="fp32")


@pytest.fixture
def deep(deep) -> nn.Module:
    with torch.no_grad():
        deep.blocks[2].second.weight.mul_(1e-4)  # this block does next to nothing
        deep.blocks[2].norm2.weight.mul_(1e-3)
    return set_origin(deep, Origin("deep", {}))


def by_layers(networks, example, engine):
    """A machine that takes a tenth of a millisecond a convolution, whatever its width, and a little for MACs."""
    return {
        name: fake_latency(
            0.1 * sum(isinstance(m, nn.Conv2d) for m in network.modules()) + 1e-8 * count(network, example).macs
        )
        for name, network in networks.items()
    }


def test_a_latency_of_overheads_is_met_by_leaving_blocks_out(deep):
    example = torch.randn(1, 1, 8, 8)
    choices = PruneSettings(steps=1, epochs=0)
    with pytest.raises(BudgetError):
        prune(deep, example, "latency<=70%", choices, measure=by_layers)
    shorter = PruneSettings(steps=1, epochs=0, blocks=0.5)
    result = prune(deep, example, "latency<=70%", shorter, measure=by_layers)
    assert result.met and len(result.blocks) == 2 and "blocks.2" in result.blocks
    assert sum(isinstance(m, nn.Conv2d) for m in result.model.modules()) == 5
    assert check_budget(deep, example, "latency<=70%", shorter, measure=by_layers).macs > 0
    with pytest.raises(BudgetError):
        prune(deep, example, "latency<=30%", shorter, measure=by_layers)
    assert isinstance(deep.blocks[2], Block)


def test_blocks_left_out_survive_saving_and_a_stopped_run(deep, tmp_path, monkeypatch):
    example = torch.randn(1, 1, 8, 8)
    choices = PruneSettings(steps=3, epochs=0, blocks=0.5)
    whole = prune(deep, example, "latency<=60%", choices, measure=by_layers)
    real, calls = run_module.cut, []

    def stops_at_the_second(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(run_module, "cut", stops_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        prune(deep, example, "latency<=60%, macs<=20%", choices, measure=by_layers, checkpoint_dir=tmp_path)
    monkeypatch.setattr(run_module, "cut", real)
    again = prune(deep, example, "latency<=60%, macs<=20%", choices, measure=by_layers, checkpoint_dir=tmp_path)
    assert again.blocks == whole.blocks and again.met
    save_model(again.model, tmp_path / "pruned.safetensors")
    loaded = load_model(tmp_path / "pruned.safetensors", lambda origin: Deep())
    assert torch.equal(loaded(example), again.model(example))
    assert "remove" in [edit.to_json()["kind"] for edit in structure_log(again.model).edits]


def test_with_data_the_block_that_is_missed_least_goes_by_its_loss(deep, digits):
    deep.train()
    trained = train(deep, digits, TrainSettings(**{**QUICK.__dict__, "epochs": 2}), device="cpu").model
    with torch.no_grad():
        trained.blocks[1].norm2.weight.zero_()
        trained.blocks[1].norm2.bias.zero_()
    choices = PruneSettings(steps=1, epochs=0, blocks=0.25, criterion="l1")
    result = prune(trained, digits, "macs<=72%", choices, device="cpu")
    # Without a block that does nothing the budget is all but met; with it every layer would be cut.
    assert result.blocks == ("blocks.1",) and result.met
    assert result.steps[-1].blocks == ("blocks.1",)
    kept = StepRecord.from_json(json.loads(json.dumps(result.steps[-1].to_json())))
    assert kept.blocks == ("blocks.1",)


def test_least_missed_takes_each_with_those_before_it_gone(deep):
    example = torch.randn(2, 1, 8, 8)
    order = least_missed(deep, example, 3)
    assert order[0] == "blocks.2" and len(set(order)) == 3
    seen = []

    def loss(model):
        left = tuple(isinstance(block, Block) for block in model.blocks)
        seen.append(left)
        return float(sum((4 - i) * here for i, here in enumerate(left)))

    assert least_missed(deep, example, 2, loss) == ("blocks.0", "blocks.1")
    assert len(seen) == 4 + 3


def test_blocks_that_say_least_a_mac_go_first_where_asked(deep, few):
    with torch.no_grad():
        deep.blocks[2].norm2.weight.zero_()
        deep.blocks[2].norm2.bias.zero_()
    batches = draw_calibration(few, 64, seed=0, device="cpu")
    example = batches[0][0][:1]
    order = least_informative(deep, example, 4, batches)
    # A silent block says nothing; the first and the last of the stage stay; every choice is with the others gone.
    assert order == ("blocks.2", "blocks.1")
    choices = PruneSettings(steps=1, epochs=0, blocks=0.5, blocks_by="information")
    assert prune(deep, few, "latency<=70%", choices, measure=by_layers, device="cpu").blocks == order
    with pytest.raises(UsageError, match="blocks_by = 'information' needs a data set"):
        prune(deep, example, "macs<=72%", choices)


class Norms(Method):
    """Notes the largest weight of the units that are to go, and every change of structure."""

    name = "norms"
    order = 100
    events = frozenset({Event.BATCH_END, Event.STRUCTURE_CHANGED})

    def __init__(self, pruning):
        self.pruning, self.sizes, self.cuts = pruning, [], []

    def apply(self, event, trainer):
        if event is Event.STRUCTURE_CHANGED:
            self.cuts.append(trainer.state.clock.step)
        elif getattr(self.pruning, "selection", None) and self.pruning.cuts == 1:
            total, count_ = 0.0, 0
            tensors = dict(trainer.state.model.named_parameters())
            for name, dim, entries in self.pruning._pushed:
                if name in tensors and len(entries):
                    total += float(tensors[name].detach().index_select(dim, entries).abs().sum())
                    count_ += 1
            if count_:
                self.sizes.append(total)


def test_growing_regularisation_shrinks_what_goes_before_it_goes(digits):
    model, pruning = plain(digits), GrowingRegularization("macs<=50%")
    watch = Norms(pruning)
    settings = TrainSettings(**{**QUICK.__dict__, "epochs": 3})
    start = count(model, torch.zeros(1, 1, 8, 8))
    trained = train(model, digits, settings, methods=(pruning, watch), device="cpu").model
    assert len(watch.cuts) == 1 and count(trained, torch.zeros(1, 1, 8, 8)).macs <= 0.5 * start.macs
    assert watch.sizes[-1] < 0.05 * watch.sizes[0]


def test_soft_pruning_lets_units_come_back(digits):
    zeros = []

    class Zeros(Method):
        name = "zeros"
        order = 100
        events = frozenset({Event.BATCH_START, Event.BATCH_END})

        def apply(self, event, trainer):
            if pruning.cuts and len(trainer.state.model[0].weight) == 10:
                zeros.append((event, int((trainer.state.model[0].weight.flatten(1).abs().amax(1) == 0).sum())))

    model, pruning = plain(digits), SoftPruning("macs<=50%", times=4)
    settings = TrainSettings(**{**QUICK.__dict__, "epochs": 2})
    start = count(model, torch.zeros(1, 1, 8, 8))
    trained = train(model, digits, settings, methods=(pruning, Zeros()), device="cpu").model
    assert count(trained, torch.zeros(1, 1, 8, 8)).macs <= 0.5 * start.macs
    assert max(number for event, number in zeros if event is Event.BATCH_START) > 0  # masked at the moment
    assert all(number == 0 for event, number in zeros if event is Event.BATCH_END)  # and learning again


@pytest.mark.parametrize("schedule", ["gradual", "growing", "soft"])
def test_prune_by_a_training_and_go_on_after_a_stop(digits, schedule, tmp_path, monkeypatch):
    choices = PruneSettings(schedule=schedule, epochs=2, distil=False)
    settings = TrainSettings(**{**QUICK.__dict__, "epochs": 1})
    result = prune(plain(digits), digits, "macs<=50%", choices, train_settings=settings, device="cpu")
    assert result.met and result.end.macs <= 0.5 * result.start.macs
    assert [record.epochs for record in result.steps] == [0, 2] and len(result.recovery) == 2
    assert result.steps[-1].units < result.steps[0].units
    if schedule != "growing":
        return

    def stop(*arguments, **keywords):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run_module, "recover", stop)
        prune(
            plain(digits), digits, "macs<=50%", choices, train_settings=settings, checkpoint_dir=tmp_path, device="cpu"
        )
    again = prune(
        plain(digits), digits, "macs<=50%", choices, train_settings=settings, checkpoint_dir=tmp_path, device="cpu"
    )
    for name, tensor in result.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name])


@pytest.mark.parametrize(
    "switches",
    [{"distil_from": "features"}, {"distil_from": "in_place"}, {"redistribute": True, "recalibrate": False}],
    ids=lambda switches: next(iter(switches.values())),
)
def test_every_switch_of_recovery_works_alone(digits, switches):
    settings = TrainSettings(**{**QUICK.__dict__, "epochs": 1})
    epochs = 1 if "distil_from" in switches else 0
    choices = PruneSettings(steps=1, epochs=epochs, **switches)
    model = plain(digits)
    before = copy.deepcopy(model.state_dict())
    result = prune(model, digits, "macs<=60%", choices, train_settings=settings, device="cpu")
    assert result.met and result.steps[-1].accuracy is not None
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    named = {term for record in result.recovery for term in record.terms}
    if switches.get("distil_from") == "features":
        assert any(term.startswith("feature:") for term in named)
    if switches.get("distil_from") == "in_place":
        assert {"in_place_distillation", "in_place_distillation:teacher"} <= named


def test_redistribution_keeps_more_of_the_outputs_than_plain_cutting(digits):
    settings = TrainSettings(**{**QUICK.__dict__, "epochs": 3})
    model = train(plain(digits), digits, settings, device="cpu").model
    images = digits.preprocessing(digits.validation.images(torch.arange(64)))
    errors = {}
    for switch in (False, True):
        choices = PruneSettings(steps=1, epochs=0, recalibrate=False, redistribute=switch, min_fraction=0.3)
        result = prune(model, digits, "macs<=60%", choices, device="cpu")
        with torch.no_grad():
            errors[switch] = float((result.model(images) - model(images)).square().mean())
    assert errors[True] < 0.7 * errors[False]


def test_the_teacher_in_place_learns_too(digits):
    teacher = plain(digits)
    before = teacher[0].weight.detach().clone()
    settings = TrainSettings(**{**QUICK.__dict__, "epochs": 1})
    train(plain(digits), digits, settings, methods=(InPlaceDistillation(teacher),), device="cpu")
    assert not torch.equal(before, teacher[0].weight)


def test_stages_end_where_maps_change_size(deep):
    from convette.models import create_model

    found = stage_outputs(create_model("resnet20", seed=0), torch.zeros(1, 3, 32, 32))
    assert list(found.values())[-3:] == ["layer1", "layer2", "layer3"]
    network = Deep()
    example = torch.zeros(1, 1, 8, 8)
    assert teaching(network, deep, example, PruneSettings(distil=False)) == ()
    assert teaching(network, deep, example, PruneSettings(distil_from="features"))[0].features == {"blocks": "blocks"}


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"schedule": "soft", "epochs": 0}, "prunes while training"),
        ({"schedule": "soft", "predictor": "latency_table"}, "predictor = 'macs'"),
        ({"blocks": 1.5}, "between 0 and 1"),
    ],
)
def test_choices_that_cannot_be_are_refused(choices, message):
    with pytest.raises(UsageError, match=message):
        PruneSettings(**choices)


def test_methods_refuse_what_is_no_schedule():
    for build in (
        lambda: SoftPruning("macs<=50%", times=1),
        lambda: GrowingRegularization("macs<=50%", floor=2.0),
        lambda: GrowingRegularization("macs<=50%", begin=0.5, end=0.5),
        lambda: InPlaceDistillation(Deep(), temperature=0),
        lambda: GradualPruning("latency<=1ms"),
    ):
        with pytest.raises(UsageError):
            build()


def test_untied_streams_are_cut_layer_by_layer(deep):
    example = torch.randn(1, 1, 8, 8)
    result = prune(deep, example, "macs<=60%", PruneSettings(steps=2, epochs=0, untie=True, criterion="random"))
    assert result.met and "untie" in [edit.to_json()["kind"] for edit in structure_log(result.model).edits]
    inner = {result.widths[f"blocks.{number}.second"][1] for number in range(4)}
    assert len(inner) > 1  # tied, all of them would keep the same channels
    assert result.model(example).shape == (1, 10)
