import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from convette.errors import DataError, UsageError
from convette.training import evaluate, evaluate_runner, recalibrate_batch_norm, resolve_device
from convette.training.evaluation import summarise


class Oracle(nn.Module):
    """Answers with a table of logits, in the order of the split."""

    def __init__(self, logits):
        super().__init__()
        self.logits, self.place = logits, 0

    def forward(self, images):
        self.place += len(images)
        return self.logits[self.place - len(images) : self.place]


def test_a_perfect_and_a_stubborn_network(data):
    labels = data.test.labels
    sure = nn.functional.one_hot(labels, 3) * 50.0
    found = evaluate(Oracle(sure), data.test, data.preprocessing, batch_size=7)
    assert found.accuracy == 1 and found.loss < 1e-6 and found.calibration_error < 1e-6
    assert torch.equal(found.confusion, torch.diag(torch.bincount(labels)))
    stubborn = torch.tensor([[0.0, 50.0, 0.0]]).repeat(len(labels), 1)
    found = evaluate(Oracle(stubborn), data.test, data.preprocessing)
    share = float((labels == 1).double().mean())
    assert found.accuracy == pytest.approx(share) and found.calibration_error == pytest.approx(1 - share)
    assert found.correct == int((labels == 1).sum())


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 60), st.integers(2, 6), st.integers(0, 1000))
def test_figures_of_an_evaluation_agree_with_each_other(count, classes, seed):
    torch.manual_seed(seed)
    logits, labels = torch.randn(count, classes) * 3, torch.randint(0, classes, (count,))
    found = summarise(logits, labels)
    assert int(found.confusion.sum()) == count
    assert found.confusion.diagonal().sum() / count == pytest.approx(found.accuracy)
    assert torch.allclose(found.probabilities.sum(1), torch.ones(count), atol=1e-5)
    assert 0 <= found.calibration_error <= 1
    chosen = found.probabilities[torch.arange(count), labels]
    assert float(-chosen.log().mean()) == pytest.approx(found.loss, rel=1e-3)


def test_evaluation_leaves_the_network_as_it_was(data, make_network, equal):
    network, twin = make_network(), make_network()
    network.train()
    network[1].eval()
    evaluate(network, data.test, data.preprocessing)
    assert equal(network, twin) and network.training and not network[1].training


def test_a_runner_is_evaluated_like_the_network(data, make_network):
    network = make_network().eval()

    def runner(batch):
        with torch.no_grad():
            return network(torch.as_tensor(batch)).numpy().astype(numpy.float32)

    one = evaluate(network, data.test, data.preprocessing)
    two = evaluate_runner(runner, data.test, data.preprocessing, batch_size=256)
    assert torch.equal(one.probabilities, two.probabilities) and one.loss == two.loss


def test_an_empty_split_is_refused(data, make_network):
    class Empty:
        name = "test"

        def batches(self, batch_size):
            return iter(())

    with pytest.raises(DataError, match="'test' holds no images"):
        evaluate(make_network(), Empty(), data.preprocessing)


def test_recalibrated_statistics_are_those_of_the_images(data, make_network):
    network = make_network().eval()
    network[1].running_mean.fill_(9)
    weights = [parameter.clone() for parameter in network.parameters()]
    recalibrate_batch_norm(network, data.train, data.preprocessing, batches=4, batch_size=24)
    inner = network[0](data.preprocessing(data.train.images(slice(None)))).detach()
    assert torch.allclose(network[1].running_mean, inner.mean((0, 2, 3)), atol=1e-4)
    assert torch.allclose(network[1].running_var, inner.var((0, 2, 3)), rtol=0.15)
    assert all(torch.equal(a, b) for a, b in zip(weights, network.parameters(), strict=True))
    assert network[1].momentum == 0.1 and not network[1].training


def test_devices():
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type in ("cpu", "cuda")
    with pytest.raises(UsageError, match="not known"):
        resolve_device("gpuu")
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="no CUDA device"):
            resolve_device("cuda")
