"""Classification: loss and figures against independent computations, and heads that do not fit."""

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from convette.errors import UsageError
from convette.tasks import Classification, Task, calibration_error, confusion_matrix, top_k_accuracy


def sample(n, k, seed, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, k, generator=generator) * scale, torch.randint(0, k, (n,), generator=generator)


def names(k):
    return [f"class {index}" for index in range(k)]


@given(n=st.integers(1, 40), k=st.integers(2, 12), seed=st.integers(0, 1000), smoothing=st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_loss_is_the_cross_entropy_with_the_smoothed_targets(n, k, seed, smoothing):
    logits, labels = sample(n, k, seed)
    one_hot = torch.eye(k, dtype=torch.float64)[labels]
    smoothed = (1 - smoothing) * one_hot + smoothing / k
    expected = -(smoothed * logits.double().log_softmax(1)).sum(1).mean()
    task = Classification(names(k))
    torch.testing.assert_close(task.loss(logits, labels, smoothing).double(), expected, atol=1e-4, rtol=1e-4)
    # Soft targets that are one-hot are the labels.
    torch.testing.assert_close(
        task.loss(logits, one_hot.float(), smoothing), task.loss(logits, labels, smoothing), atol=1e-4, rtol=1e-4
    )


def test_low_precision_logits_go_with_soft_targets():
    logits, labels = sample(8, 5, 0)
    task = Classification(names(5))
    soft = torch.eye(5)[labels] * 0.8 + 0.04
    loss = task.loss(logits.bfloat16(), soft)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, task.loss(logits, soft), atol=0.05, rtol=0)


def test_loss_goes_down_along_its_gradient():
    logits, labels = sample(16, 5, 0)
    logits.requires_grad_()
    task = Classification(names(5))
    before = task.loss(logits, labels, 0.1)
    before.backward()
    assert logits.grad is not None
    assert task.loss((logits - 0.5 * logits.grad).detach(), labels, 0.1) < before


@given(n=st.integers(1, 60), k=st.integers(2, 9), seed=st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_figures_agree_with_torchmetrics(n, k, seed):
    from torchmetrics.functional import classification as reference

    logits, labels = sample(n, k, seed)
    metrics = Classification(names(k)).metrics(logits, labels)
    assert metrics.accuracy == pytest.approx(float(reference.multiclass_accuracy(logits, labels, k, average="micro")))
    assert torch.equal(metrics.confusion, reference.multiclass_confusion_matrix(logits, labels, k))
    expected = float(reference.multiclass_calibration_error(logits.softmax(1), labels, k, n_bins=15))
    assert metrics.calibration_error == pytest.approx(expected, abs=1e-5)
    if k > 5:
        top5 = reference.multiclass_accuracy(logits, labels, k, average="micro", top_k=5)
        assert metrics.top5 == pytest.approx(float(top5))
    else:
        assert metrics.top5 is None


def test_limits():
    labels = torch.arange(10)
    task = Classification(names(10))
    perfect = task.metrics(torch.eye(10) * 100, labels)
    assert (perfect.accuracy, perfect.top5, perfect.calibration_error) == (1.0, 1.0, 0.0)
    assert perfect.loss == pytest.approx(0.0, abs=1e-6)
    assert torch.equal(perfect.confusion, torch.eye(10, dtype=torch.int64))
    undecided = task.metrics(torch.zeros(10, 10), labels)
    assert undecided.loss == pytest.approx(math.log(10))
    assert undecided.calibration_error == pytest.approx(0.0, abs=1e-6)  # 10 % sure, 10 % right
    wrong = calibration_error(torch.eye(10), (labels + 1) % 10)
    assert wrong == pytest.approx(1.0)


def test_confusion_rows_are_the_truth():
    counts = confusion_matrix(torch.tensor([1, 1, 2]), torch.tensor([0, 1, 0]), 3)
    assert counts.tolist() == [[0, 1, 1], [0, 1, 0], [0, 0, 0]]
    assert top_k_accuracy(torch.tensor([[0.1, 0.9, 0.5]]), torch.tensor([2]), 2) == 1.0


def test_class_accuracy_is_a_share_of_each_row():
    logits, labels = torch.tensor([[2.0, 0, 0], [0, 2, 0], [2, 0, 0]]), torch.tensor([0, 1, 1])
    found = Classification(names(3)).metrics(logits, labels).class_accuracy
    assert found[:2].tolist() == [1.0, 0.5] and math.isnan(float(found[2]))


@pytest.mark.parametrize("outputs", [torch.zeros(4, 1000), torch.zeros(4, 10, 7, 7), (torch.zeros(4, 10),)])
def test_a_head_that_does_not_fit_is_named_with_the_remedy(outputs):
    with pytest.raises(UsageError, match=r"n x 10"):
        Classification(names(10)).check_outputs(outputs)


def test_one_class_is_no_classification():
    with pytest.raises(UsageError, match="at least two"):
        Classification(["only"])


def test_it_is_a_task_and_imports_nothing_heavy():
    assert isinstance(Classification(names(2)), Task)
    code = (
        "import sys, convette.tasks; heavy = {'torchmetrics', 'torchvision', 'sklearn', 'kornia'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
