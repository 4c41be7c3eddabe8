import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from convette.errors import FileFormatError
from convette.training import TrainSettings, WarmupCosine, build_optimizer
from convette.training.optimizers import load_optimizer_state, optimizer_state, parameter_groups, schedule_for


@given(st.integers(1, 500), st.integers(0, 100), st.floats(0, 1))
def test_schedule_rises_then_falls_to_its_end(total, warmup, final):
    warmup = min(warmup, total - 1)
    factors = [WarmupCosine(total, warmup, final)(step) for step in range(total + 1)]
    assert all(0 < factor <= 1 + 1e-12 for factor in factors[:total])
    assert factors[: warmup + 1] == sorted(factors[: warmup + 1])
    assert factors[warmup] == pytest.approx(1)
    assert all(a >= b - 1e-12 for a, b in zip(factors[warmup:], factors[warmup + 1 :], strict=False))
    assert factors[total] == pytest.approx(final)


def test_warm_up_is_a_tenth_of_the_epochs_and_never_all():
    assert schedule_for(TrainSettings(epochs=30), 10) == WarmupCosine(300, 30)
    assert schedule_for(TrainSettings(epochs=200), 10) == WarmupCosine(2000, 50)
    assert schedule_for(TrainSettings(epochs=1, warmup_epochs=5), 4) == WarmupCosine(4, 3)


def test_no_weight_decay_on_norms_and_biases(make_network):
    decayed, plain = parameter_groups([make_network()], 0.1)
    assert decayed["weight_decay"] == 0.1 and plain["weight_decay"] == 0.0
    assert {p.ndim for p in decayed["params"]} == {2, 4}
    assert {p.ndim for p in plain["params"]} == {1}


def test_frozen_and_shared_parameters_are_taken_once_or_not_at_all():
    shared = nn.Linear(2, 2)
    frozen = nn.Linear(2, 2).requires_grad_(False)
    groups = parameter_groups([nn.Sequential(shared, shared, frozen), shared], 0.1)
    assert sum(len(group["params"]) for group in groups) == 2


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_state_by_name_gives_the_same_next_step(name, make_network, equal):
    settings = TrainSettings(optimizer=name)
    networks = [make_network(), make_network()]
    optimizers = [build_optimizer([network], settings, 0.1) for network in networks]

    def step(index):
        torch.manual_seed(0)
        networks[index].train()(torch.randn(4, 1, 6, 6)).square().sum().backward()
        optimizers[index].step()

    step(0)
    names = {id(p): n for n, p in networks[0].named_parameters()}
    kept = copy.deepcopy(optimizer_state(optimizers[0], names))
    networks[1].load_state_dict(networks[0].state_dict())
    networks[1].zero_grad()
    networks[0].zero_grad()
    load_optimizer_state(optimizers[1], kept, dict(networks[1].named_parameters()))
    step(0)
    step(1)
    assert equal(*networks)


def test_state_of_another_network_is_refused(make_network):
    network = make_network()
    optimizer = build_optimizer([network], TrainSettings(), 0.1)
    state = optimizer_state(optimizer, {id(p): f"x.{n}" for n, p in network.named_parameters()})
    with pytest.raises(FileFormatError, match=r"x\."):
        load_optimizer_state(optimizer, state, dict(network.named_parameters()))
