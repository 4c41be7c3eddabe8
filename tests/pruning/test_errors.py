"""What goes wrong is said in one line, or the stated fallback is taken, and the model stays as it was to the last bit."""

import pytest
import torch
from tests.pruning.conftest import Residual, lively

from convette.errors import BudgetError, StructureError, UsageError
from convette.pruning import ALLOCATIONS, CRITERIA, PruneSettings, prune, redistribute, score_units
from convette.surgery import trace

QUICK_OPTIONS = {"blend": {"generations": 1, "population": 4}}


def everything(model) -> list:
    """Weights as bytes, what needs gradients, training flags, hooks: all that a failure must not change."""
    return [
        [tensor.detach().numpy().tobytes() for tensor in model.state_dict().values()],
        [parameter.requires_grad for parameter in model.parameters()],
        [module.training for module in model.modules()],
        [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
    ]


def cut(model, data, budget="macs<=50%", **choices):
    settings = PruneSettings(**{"epochs": 0, "steps": 1, "calibration_images": 64, **choices})
    return prune(model, data, budget, settings, device="cpu")


def one_line(caught) -> str:
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("allocation", sorted(ALLOCATIONS))
def test_a_budget_that_needs_an_empty_layer(network, few, allocation):
    before = everything(network)
    with pytest.raises(BudgetError, match="at the least") as caught:
        cut(network, few, "macs<=0.1%", allocation=allocation, min_fraction=0)
    assert "start from a smaller model" in one_line(caught) and everything(network) == before


def test_weights_that_are_no_numbers_are_named_before_anything_is_scored(network, few):
    with torch.no_grad():
        network.inner.weight[3, 2] = float("nan")
    before = everything(network)
    for criterion in ("random", "bn_scale", "taylor"):
        with pytest.raises(StructureError, match=r"9 of the 864 values of inner\.weight are not finite") as caught:
            cut(network, few, criterion=criterion)
        assert "Take a checkpoint from before" in one_line(caught) and everything(network) == before


@pytest.mark.parametrize("criterion", sorted(CRITERIA))
def test_a_score_that_is_no_number(few, example, criterion):
    network = lively(Residual())
    with torch.no_grad():
        network.hidden.bias[0] = float("nan")
        network.inner.weight[3, 2] = network.inner_norm.weight[3] = float("nan")
    before, graph = everything(network), trace(network, example)
    batches = [(few.preprocessing(few.train.images(torch.arange(32))), few.train.labels[:32])]
    if criterion in ("random", "importance_gates"):  # which no weight can break; which `prune` asks first
        return
    with pytest.raises(StructureError, match="not finite") as caught:
        score_units(criterion, network, graph, batches, options=QUICK_OPTIONS.get(criterion))
    assert one_line(caught) and everything(network) == before


@pytest.mark.parametrize("criterion", sorted(CRITERIA))
def test_constant_activations_and_one_image_are_a_line_or_the_stated_fallback(few, example, capsys, criterion):
    dead = lively(Residual())
    with torch.no_grad():
        for module in (dead.stem, dead.inner, dead.outer, dead.wide):
            module.weight.zero_()
    options = QUICK_OPTIONS.get(criterion)
    for network, count in ((dead, 32), (lively(Residual()), 1)):
        before, graph = everything(network), trace(network, example)
        batches = [(few.preprocessing(few.train.images(torch.arange(count))), few.train.labels[:count])]
        try:
            scores = score_units(criterion, network, graph, batches, options=options)
            assert scores and all(torch.isfinite(score).all() for score in scores.values())
        except UsageError as error:
            assert criterion in str(error) and "needs" in str(error) and "\n" not in str(error)
        assert everything(network) == before
        said = capsys.readouterr().err
        if network is dead and criterion in ("l1", "l2", "taylor", "fisher"):
            assert "worth the same" in said and "another criterion" in said


def test_one_image_of_one_class_is_refused_where_classes_are_told_apart(network, few):
    before = everything(network)
    with pytest.raises(UsageError, match="at least two classes") as caught:
        cut(network, few, criterion="discriminant_information", calibration_images=1)
    assert one_line(caught) and everything(network) == before


def test_broken_activations_stop_least_squares_and_leave_the_model_alone(network, few):
    with torch.no_grad():
        network.norm.weight.fill_(3e38)
    before, graph = everything(network), trace(network, few.preprocessing(few.train.images(torch.tensor([0]))))
    with pytest.raises(StructureError, match="images are not finite") as caught:
        cut(network, few, redistribute=True)  # the accuracy of the start is taken first
    assert one_line(caught) and everything(network) == before
    images = few.preprocessing(few.train.images(torch.arange(8)))
    selection = {"inner": torch.arange(4)}
    with pytest.raises(StructureError, match="reads activations that are not finite") as caught:
        redistribute(network, graph, selection, [(images, few.train.labels[:8])])
    assert one_line(caught) and everything(network) == before


@pytest.mark.parametrize("criterion", ["l1", "taylor"])
def test_a_network_in_which_nothing_can_go_says_so(few, criterion):
    flat = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    with pytest.raises(BudgetError, match="Nothing in Sequential can be removed") as caught:
        cut(flat, few, criterion=criterion)
    one_line(caught)
