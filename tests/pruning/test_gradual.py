import pytest
import torch
from tests.pruning.conftest import plain

from convette.cost import count
from convette.errors import BudgetError, UsageError
from convette.pruning import GradualPruning
from convette.surgery import structure_log
from convette.training import Event, Method, TrainSettings, train

QUICK = TrainSettings(epochs=2, batch_size=64, learning_rate=0.05, augmentation=(), precision="fp32")


class Watch(Method):
    """Notes MACs and whether every parameter kept its momentum after each edit."""

    name = "watch"
    events = frozenset({Event.STRUCTURE_CHANGED})

    def __init__(self):
        self.macs, self.momentum = [], []

    def apply(self, event, trainer):
        model = trainer.state.model
        self.macs.append(count(model, trainer.state.example[0][:1]).macs)
        states = trainer.state.optimizers["main"].state
        self.momentum.append(
            all(states[p]["momentum_buffer"].shape == p.shape for p in model.parameters() if trainer.state.clock.step)
        )


def test_the_budget_is_met_at_the_end_of_training(digits):
    model = plain(digits)
    example = digits.preprocessing(digits.train.images([0]))
    start = count(model, example)
    watch = Watch()
    pruning = GradualPruning("macs<=50%, parameters<=60%", times=4)
    trained = train(model, digits, QUICK, methods=(pruning, watch), device="cpu").model
    end = count(trained, example)
    assert end.macs <= 0.5 * start.macs and end.parameters <= 0.6 * start.parameters
    assert watch.macs == sorted(watch.macs, reverse=True) and len(set(watch.macs)) > 2
    assert all(watch.momentum)
    assert structure_log(trained).edits


def test_a_stopped_training_goes_on_to_the_same_bits(digits, tmp_path):
    class Stop(Method):
        name = "stop"
        events = frozenset({Event.EPOCH_START})

        def apply(self, event, trainer):
            if trainer.state.clock.epoch == 1:
                raise KeyboardInterrupt

    whole = train(plain(digits), digits, QUICK, methods=(GradualPruning("macs<=50%"),), device="cpu").model
    with pytest.raises(KeyboardInterrupt):
        train(
            plain(digits),
            digits,
            QUICK,
            methods=(GradualPruning("macs<=50%"), Stop()),
            device="cpu",
            checkpoint_dir=tmp_path,
        )
    resumed = train(
        plain(digits), digits, QUICK, methods=(GradualPruning("macs<=50%"),), device="cpu", checkpoint_dir=tmp_path
    ).model
    assert all(torch.equal(tensor, resumed.state_dict()[name]) for name, tensor in whole.state_dict().items())


def test_what_cannot_be_is_refused(digits):
    with pytest.raises(BudgetError, match="at the least"):
        train(plain(digits), digits, QUICK, methods=(GradualPruning("macs<=0.3K"),), device="cpu")
    with pytest.raises(UsageError, match="latency"):
        GradualPruning("latency<=2ms")
    with pytest.raises(UsageError, match="calibration"):
        GradualPruning("macs<=50%", criterion="taylor")
    with pytest.raises(UsageError, match="begin"):
        GradualPruning("macs<=50%", begin=0.8, end=0.2)
    with pytest.raises(UsageError, match="per_layer"):
        GradualPruning("macs<=50%", allocation="per_layer")
