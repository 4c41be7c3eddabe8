import torch
from torch import nn
from torch.nn import functional

from convette.training import TrainSettings, choose, train
from convette.training.choose import Choice, _decide


def pick(network, settings, total_images=10**12, seconds=0.05):
    images, labels = torch.linspace(-1, 1, 144).view(4, 1, 6, 6), torch.tensor([0, 1, 2, 0])
    loss = functional.cross_entropy
    return choose.choose(network, images, labels, loss, settings, total_images=total_images, seconds=seconds)


def test_what_is_given_is_not_measured(make_network):
    found = pick(make_network(), TrainSettings(precision="bf16", memory_format="channels_last"))
    assert found == Choice("bf16", "channels_last", "given")


def test_small_trainings_are_not_measured_so_they_come_out_the_same(make_network):
    found = pick(make_network(), TrainSettings(), total_images=1000)
    assert (found.precision, found.memory_format, found.milliseconds) == ("fp32", "contiguous", {})
    half = pick(make_network(), TrainSettings(precision="bf16"), total_images=1000)
    assert half.precision == "bf16"


def test_measuring_tries_what_is_open_and_leaves_no_trace(make_network, equal):
    network = make_network(dropout=0.5).train()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    found = pick(network, TrainSettings())
    assert torch.equal(torch.rand(2), expected)
    assert len(found.milliseconds) == 4 and f"{found.precision} {found.memory_format}" in found.milliseconds
    assert equal(network, make_network(dropout=0.5)) and all(p.grad is None for p in network.parameters())
    assert len(pick(network, TrainSettings(precision="fp32")).milliseconds) == 2


def test_only_clearly_faster_wins():
    plain, other = ("fp32", "contiguous"), ("bf16", "contiguous")
    assert _decide({plain: 1.0, other: 0.95}, plain).precision == "fp32"
    found = _decide({plain: 1.0, other: 0.5}, plain)
    assert found.precision == "bf16" and "2.00 times" in found.reason


def test_what_a_device_cannot_do_is_left_out():
    class NoHalf(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(36, 3)

        def forward(self, images):
            outputs = self.inner(images.flatten(1))
            if outputs.dtype == torch.bfloat16:
                raise RuntimeError("not here")
            return outputs

    assert set(pick(NoHalf(), TrainSettings(memory_format="contiguous")).milliseconds) == {"fp32 contiguous"}


def test_a_measured_choice_is_kept_with_the_first_checkpoint(data, make_network, tmp_path, monkeypatch):
    monkeypatch.setattr(choose, "_WORTH_MEASURING", {"cpu": 0.0})
    calls = []
    monkeypatch.setattr(
        choose, "_decide", lambda times, plain: calls.append(1) or Choice("bf16", "contiguous", "t", {"x": 1.0})
    )
    settings = TrainSettings(epochs=1, batch_size=32)
    first = train(make_network(), data, settings, checkpoint_dir=tmp_path)
    assert first.choice.precision == "bf16" and len(calls) == 1
    assert len(list(tmp_path.glob("checkpoint-000000000*"))) == 1
    assert train(make_network(), data, settings, checkpoint_dir=tmp_path).choice == first.choice and len(calls) == 1
