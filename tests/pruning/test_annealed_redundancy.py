import pytest
import torch
from tests.pruning.conftest import plain

from convette.cost import count
from convette.errors import UsageError
from convette.pruning.methods import AnnealedRedundancy
from convette.pruning.methods.linear_redundancy import fading, move, predictors
from convette.surgery import apply
from convette.training import Event, Method, TrainSettings, find_method, train

QUICK = TrainSettings(epochs=4, batch_size=32, learning_rate=0.02, augmentation=(), precision="fp32")


def hung(network, graph, batches, share: float):
    """Return the method with its hooks in `network`, fading what goes to this share."""
    method = AnnealedRedundancy("macs<=50%", calibration=batches)
    method._faded = fading(network, graph, {"inner": list(range(8)), "stem": list(range(6))})
    method.alphas, method.share = predictors(network, method._faded, batches, 1e-3), share
    for name, (reader, kept, gone) in method._faded.items():
        network.get_submodule(reader.module).register_forward_pre_hook(method._hook(name, reader, kept, gone))
    return method


def test_nothing_changes_at_first_and_nothing_at_the_cut(network, graph, batches):
    images = batches[0][0]
    before = network(images)
    method = hung(network, graph, batches, 0.0)
    assert set(method._faded) == {"inner.weight", "outer.weight", "wide.weight"}
    assert torch.equal(network(images), before)
    method.share = 1.0
    faded = network(images)
    assert not torch.allclose(faded, before, atol=1e-3)
    faded.sum().backward()
    gone = network.inner.weight.grad[8:], network.stem.weight.grad[6:]
    assert all((slope == 0).all() for slope in gone) and (network.inner.weight.grad[:8] != 0).any()
    for module in network.modules():
        module._forward_pre_hooks.clear()
    move(network, method._faded, method.alphas)
    apply(network, graph.shrink({"inner": torch.arange(8), "stem": torch.arange(6)}))
    assert torch.allclose(network(images), faded, atol=1e-5)


def test_what_says_the_same_is_predicted_exactly(network, graph, batches):
    with torch.no_grad():
        network.inner.weight[9] = 2 * network.inner.weight[0]
        for tensor in (network.inner_norm.weight, network.inner_norm.bias, network.inner_norm.running_mean):
            tensor[9] = 2 * tensor[0]
        network.inner_norm.running_var[9] = 4 * network.inner_norm.running_var[0]
        network.inner_norm.weight[9] = 2 * network.inner_norm.weight[0]
    faded = fading(network, graph, {"inner": [unit for unit in range(12) if unit != 9]})
    alpha = predictors(network, faded, batches, 1e-9)["outer.weight"][:, 0]
    assert float(alpha[0]) == pytest.approx(2, abs=1e-3) and alpha[1:].abs().max() < 1e-3


class Stop(Method):
    name = "stop"
    events = frozenset({Event.EPOCH_START})

    def apply(self, event, trainer):
        if trainer.state.clock.epoch == 2:
            raise KeyboardInterrupt


def test_a_training_ends_within_the_budget_and_goes_on_after_a_stop(few, tmp_path):
    assert find_method("linear-redundancy") is AnnealedRedundancy

    def made():
        return AnnealedRedundancy("macs<=50%", data=few, calibration_images=64)

    start = count(plain(few), torch.zeros(1, 1, 8, 8))
    whole = train(plain(few), few, QUICK, methods=(made(),), device="cpu").model
    assert count(whole, torch.zeros(1, 1, 8, 8)).macs <= 0.5 * start.macs
    assert not any(module._forward_pre_hooks for module in whole.modules())
    with pytest.raises(KeyboardInterrupt):
        train(plain(few), few, QUICK, methods=(made(), Stop()), device="cpu", checkpoint_dir=tmp_path)
    again = train(plain(few), few, QUICK, methods=(made(),), device="cpu", checkpoint_dir=tmp_path).model
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in whole.state_dict().items())


def test_what_cannot_be_is_refused(batches):
    with pytest.raises(UsageError, match="needs calibration"):
        AnnealedRedundancy("macs<=50%", criterion="l1")
    for wrong in ({"times": 0}, {"ridge": 0}, {"begin": 0.5, "end": 0.5}):
        with pytest.raises(UsageError):
            AnnealedRedundancy("macs<=50%", calibration=batches, **wrong)
