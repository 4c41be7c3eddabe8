import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from convette.errors import UsageError
from convette.training import Ema, FeatureTaps


def test_a_tap_gives_the_inner_activation_with_its_gradient(make_network):
    network = make_network()
    taps = FeatureTaps(network)
    taps.request("2", "2")
    images = torch.randn(2, 1, 6, 6)
    network.eval()(images)
    expected = network[2](network[1](network[0](images)))
    assert torch.equal(taps["2"], expected)
    taps["2"].sum().backward()
    assert network[0].weight.grad is not None
    assert taps.detach() == ("2",)
    network(images)
    with pytest.raises(UsageError, match="nothing was tapped at '2'"):
        taps["2"]


def test_an_unknown_module_is_refused_by_name(make_network):
    with pytest.raises(UsageError, match="no module 'layer9'"):
        FeatureTaps(make_network()).request("layer9")


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=30), st.floats(0, 0.999))
def test_average_is_the_recursion_of_its_equation(values, decay):
    network = nn.BatchNorm1d(1)
    average = Ema(network, decay)
    expected = {"weight": 1.0, "running_mean": 0.0}
    for step, value in enumerate(values):
        with torch.no_grad():
            network.weight.fill_(value)
            network.running_mean.fill_(-value)
            network.num_batches_tracked.fill_(step)
        average.update()
        d = min(decay, (1 + step) / (10 + step))
        expected["weight"] = d * expected["weight"] + (1 - d) * value
        expected["running_mean"] = d * expected["running_mean"] - (1 - d) * value
    assert float(average.module.weight.detach()) == pytest.approx(expected["weight"], abs=1e-4)
    assert float(average.module.running_mean) == pytest.approx(expected["running_mean"], abs=1e-4)
    assert int(average.module.num_batches_tracked) == len(values) - 1


def test_average_of_a_standing_network_is_the_network(make_network):
    network = make_network()
    average = Ema(network, 0.9)
    for _ in range(5):
        average.update()
    for (name, ours), theirs in zip(average.module.named_parameters(), network.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-7), name
        assert not ours.requires_grad
