"""Edits under a live optimiser."""

import os
import signal

import pytest
import torch

from convette import surgery
from convette.errors import InterruptedRun, StructureError
from convette.training import Distillation, Event, Method, TrainSettings, train

SETTINGS = TrainSettings(epochs=4, batch_size=16, augmentation=())


class Shrinker(Method):
    """Keeps every second unit of the first group that still has enough, at the given steps."""

    name = "shrinker"
    changes_structure = True

    def __init__(self, *steps, event=Event.BATCH_START, look=lambda before, after: None):
        self.steps, self.look, self.events = steps, look, frozenset({event})

    def apply(self, event, trainer):
        state = trainer.state
        if state.clock.step not in self.steps:
            return
        graph = surgery.trace(state.model, state.example[0])
        group = max(graph.groups, key=lambda group: group.size)
        kept = torch.arange(0, group.size, 2)
        before = snapshot(state)
        trainer.edit_structure([graph.shrink({group.name: kept})])
        self.look((before, kept), snapshot(state))


class Stopper(Method):
    name = "stopper"
    events = frozenset({Event.BATCH_END})

    def __init__(self, step):
        self.step = step

    def apply(self, event, trainer):
        if trainer.state.clock.step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def snapshot(state):
    names = {id(p): name for name, p in state.model.named_parameters()}
    optimizer = state.optimizers["main"]
    moments = {p: s.get("momentum_buffer", s.get("exp_avg")) for p, s in optimizer.state.items() if id(p) in names}
    groups = [(p, group) for group in optimizer.param_groups for p in group["params"] if id(p) in names]
    return {
        "weights": {name: p.detach().clone() for name, p in state.model.named_parameters()},
        "momentum": {names[id(p)]: moment.clone() for p, moment in moments.items()},
        "average": {name: p.clone() for name, p in state.ema.module.named_parameters()},
        "decay": {names[id(p)]: group["weight_decay"] for p, group in groups},
    }


def test_weights_momentum_and_average_are_cut_alike(data, make_network):
    seen = []
    method = Shrinker(5, look=lambda before, after: seen.append((before, after)))
    result = train(make_network(), data, SETTINGS, methods=[method])
    ((before, kept), after), *_ = seen
    name = next(n for n, w in after["weights"].items() if w.ndim == 4 and w.shape[0] == len(kept))
    for kind in ("weights", "momentum", "average"):
        assert torch.equal(after[kind][name], before[kind][name][kept])
        assert {n: t.shape for n, t in after[kind].items()} == {n: t.shape for n, t in after["weights"].items()}
    assert after["decay"] == before["decay"]
    assert len(surgery.structure_log(result.model).edits) == 1
    assert result.validation_accuracy is not None and result.validation_accuracy > 0.5


@pytest.mark.parametrize("stop", [3, 8, 17])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_resumed_run_with_an_edit_in_each_half_is_the_same_bits(stop, optimizer, data, make_network, equal, tmp_path):
    settings = TrainSettings(epochs=4, batch_size=16, optimizer=optimizer)
    whole = train(make_network(dropout=0.2), data, settings, methods=[Shrinker(5, 14), Stopper(-1)])
    with pytest.raises(InterruptedRun):
        train(
            make_network(dropout=0.2), data, settings, methods=[Shrinker(5, 14), Stopper(stop)], checkpoint_dir=tmp_path
        )
    again = train(
        make_network(dropout=0.2), data, settings, methods=[Shrinker(5, 14), Stopper(-1)], checkpoint_dir=tmp_path
    )
    assert again.resumed_from == stop and equal(whole.model, again.model)
    assert len(surgery.structure_log(again.model).edits) == 2


def test_a_finished_run_gives_its_edited_network_to_a_fresh_one(data, make_network, equal, tmp_path):
    one = train(make_network(), data, SETTINGS, methods=[Shrinker(5)], checkpoint_dir=tmp_path)
    two = train(make_network(), data, SETTINGS, methods=[Shrinker(5)], checkpoint_dir=tmp_path)
    assert equal(one.model, two.model)


def test_inside_a_step_an_edit_is_refused(data, make_network):
    for event in (Event.BEFORE_FORWARD, Event.AFTER_LOSS, Event.GRADIENTS_READY):
        with pytest.raises(StructureError, match="inside a step"):
            train(make_network(), data, SETTINGS, methods=[Shrinker(2, event=event)])


def test_taps_and_adapters_follow_an_edit(data, make_network):
    class Changed(Distillation):
        widths = ()

        def apply(self, event, trainer):
            super().apply(event, trainer)
            if event is Event.AFTER_LOSS:
                self.widths = (*self.widths, trainer.state.taps["2"].shape[1])

    method = Changed(make_network(), features={"2": "2"})
    train(make_network(), data, TrainSettings(epochs=2, batch_size=16), methods=[method, Shrinker(3)])
    assert method.widths[0] == 8 and len(method.widths) == 12
