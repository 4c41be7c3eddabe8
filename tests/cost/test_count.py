"""A count leaves the network as it was; its rows, bytes and peak memory are right."""

import copy
import random

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from convette.cost import count, count_parameters
from convette.cost._count import _undisturbed
from convette.errors import UsageError

FLOAT = 4


class Restless(nn.Module):
    """Changes itself whenever it runs: in-place buffers, a replaced buffer, a cache, a counter, random numbers."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("seen", torch.zeros(1))
        self.register_buffer("last", torch.zeros(1))
        self.cache = {}
        self.log = []
        self.runs = 0

    def forward(self, x):
        self.seen += 1
        self.last = torch.ones(1, device=x.device)
        self.cache["shape"] = x.shape
        self.log.append(1)
        self.runs += 1
        self.extra = random.random()
        with torch.no_grad():
            self.conv.weight.mul_(2)
        x = x + torch.randn_like(x) * torch.rand(1, device=x.device)
        return F.batch_norm(self.drop(self.conv(x)), self.norm.running_mean, self.norm.running_var, training=True)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_nothing_changes(device):
    model = Restless().to(device).train()
    model.norm.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    identities = {name: id(value) for name, value in model.state_dict(keep_vars=True).items()}
    modes = [module.training for module in model.modules()]
    keys = [sorted(module.__dict__) for module in model.modules()]
    state = torch.get_rng_state()
    assert count(model, torch.randn(2, 3, 8, 8)).macs == 2 * 36 * 4 * 27
    state_after = torch.get_rng_state()
    torch.set_rng_state(state)
    torch.randn(2, 3, 8, 8)
    assert torch.equal(torch.get_rng_state(), state_after)
    assert identities == {name: id(value) for name, value in model.state_dict(keep_vars=True).items()}
    if device == "cpu":
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert [sorted(module.__dict__) for module in model.modules()] == keys
    assert (model.cache, model.log, model.runs) == ({}, [], 0)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert model.conv.weight.requires_grad and model.conv.weight.grad is None


def test_the_random_numbers_of_python_stay_too():
    # Inside `count` this cannot be seen under beartype, which draws from them to choose what it checks.
    state = random.getstate()
    with _undisturbed(nn.Identity()):
        random.random()
    assert random.getstate() == state


def test_a_failing_run_leaves_the_network_too():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(5, 6)).train()
    with pytest.raises(UsageError, match=r"Sequential cannot be run on the example \(1x3x8x8\): .*shape") as caught:
        count(model, torch.randn(1, 3, 8, 8))
    assert "\n" not in str(caught.value)
    assert all(module.training for module in model.modules())
    assert not torch.nn.modules.module._global_forward_hooks


def test_lazy_networks_are_refused():
    with pytest.raises(UsageError, match=r"weight of LazyLinear has no shape yet: run the network once"):
        count(nn.LazyLinear(3), torch.randn(1, 2))


@pytest.mark.parametrize(
    "example",
    [
        (torch.randn(2, 3), torch.randn(2, 4)),
        {"a": torch.randn(2, 3), "b": torch.randn(2, 4)},
    ],
    ids=["positional", "keyword"],
)
def test_several_inputs(example):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 5), nn.Linear(4, 5)

        def forward(self, a, b):
            return {"sum": self.a(a) + self.b(b), "none": None}

    cost = count(Two(), example)
    assert cost.macs == 2 * 15 + 2 * 20
    assert cost.inputs == "2x3, 2x4"
    assert {row.name: row.output_shape for row in cost.layers} == {"a": (2, 5), "b": (2, 5)}


def test_one_dictionary_as_argument():
    class Take(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 5)

        def forward(self, batch):
            return self.layer(batch["image"])

    assert count(Take(), ({"image": torch.randn(1, 3)},)).macs == 15


def test_shared_and_idle_layers():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.twice, self.tied, self.idle = nn.Linear(4, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 9)
            self.tied.weight = self.twice.weight
            self.scale = nn.Parameter(torch.ones(4))

        def forward(self, x):
            return self.tied(self.twice(self.twice(x))) * self.scale

    cost = count(Net(), torch.randn(3, 4))
    rows = {row.name: row for row in cost.layers}
    assert (rows["twice"].macs, rows["twice"].calls, rows["twice"].parameters) == (2 * 48, 2, 20)
    assert (rows["tied"].macs, rows["tied"].parameters) == (48, 0)
    assert (rows["idle"].calls, rows["idle"].parameters, rows["idle"].macs) == (0, 45, 0)
    assert rows[""].parameters == 4
    assert cost.parameters == count_parameters(Net()) == 20 + 45 + 4
    assert [row.name for row in cost.layers] == ["", "twice", "tied", "idle"]


def test_size_is_the_bytes_of_the_saved_tensors(tmp_path):
    from safetensors.torch import save_file

    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(2, 2).half())
    model[0].register_buffer("scratch", torch.zeros(100), persistent=False)
    cost = count(model[:2], torch.randn(1, 3, 8, 8))
    assert cost.size == (112 + 8 + 8) * FLOAT + 8  # num_batches_tracked is one int64
    assert cost.buffer_size == 8 * FLOAT + 8
    save_file(model[:2].state_dict(), tmp_path / "weights.safetensors")
    file = (tmp_path / "weights.safetensors").read_bytes()
    assert cost.size == len(file) - 8 - int.from_bytes(file[:8], "little")


# --- peak activation memory -----------------------------------------------------------------------------------------


def peak(model, x):
    return count(model, x).memory


def test_memory_of_a_chain():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 2, 3, padding=1))
    x = torch.randn(1, 3, 10, 10)
    # Input (held by the caller) 300, convolution 800, activation 800; then the last two and the result 200.
    assert peak(model, x) == (300 + 800 + 800) * FLOAT
    model[1] = nn.ReLU(inplace=True)
    assert peak(model, x) == (300 + 800 + 200) * FLOAT


def test_memory_of_a_residual_is_one_more():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x):
            return x + self.two(torch.relu_(self.one(x)))

    x = torch.randn(1, 4, 5, 5)
    assert peak(Block(), x) == 3 * 100 * FLOAT
    # A second block holds its own input beside the example.
    assert peak(nn.Sequential(Block(), Block()), x) == 4 * 100 * FLOAT


def test_views_constants_and_parameters_take_no_memory():
    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(50, 50))
            self.constant = torch.randn(1000)

        def forward(self, x):
            views = [x.view(2, 50), x.reshape(100)[:50], x.t(), self.weight.t(), self.constant[:10], self.weight.data]
            return views[0] @ views[3]

    assert peak(Views(), torch.randn(50, 2)) == (100 + 100) * FLOAT


def test_memory_of_concatenated_features_adds_up():
    class Dense(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Conv2d(2 * (i + 1), 2, 1) for i in range(3)])

        def forward(self, x):
            features = [x]
            for layer in self.layers:
                features.append(layer(torch.cat(features, 1)))
            return torch.cat(features, 1)

    x = torch.randn(1, 2, 5, 5)  # one feature: 50
    # In the last layer: four features, and the concatenation of three; at the end four and their concatenation.
    assert peak(Dense(), x) == (4 * 50 + 4 * 50) * FLOAT


def test_memory_follows_batch_and_type():
    model = nn.Conv2d(3, 8, 1)
    x = torch.randn(1, 3, 10, 10)
    assert peak(model, x.expand(4, 3, 10, 10).contiguous()) == 4 * peak(model, x)
    assert peak(copy.deepcopy(model).double(), x.double()) == 2 * peak(model, x)


def test_inference_tensors_and_meta_agree():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(800, 5))
    x = torch.randn(1, 3, 10, 10)
    plain = count(model, x)
    with torch.inference_mode():
        inside = count(model, torch.randn(1, 3, 10, 10))
    blank = count(copy.deepcopy(model).to("meta"), x)
    assert plain == inside == blank
