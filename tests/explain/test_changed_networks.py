"""Explanations of folded and pruned networks: the same maps where the network computes the same."""

import pytest
import torch

from convette.explain import EigenCAM, GradCAM, explanation_drift
from convette.models import create_model
from convette.surgery import apply, fold, masked, trace

# Untrained networks look at much the same places in all images.
pytestmark = pytest.mark.filterwarnings("ignore::convette.explain.ExplanationWarning")


@pytest.fixture(params=["resnet20", "timm:resnet18", "simplenet_cifar_310k"])
def network(request):
    torch.manual_seed(0)
    model = create_model(request.param, stem="small", seed=0)
    with torch.no_grad():
        for _ in range(3):
            model.train()(torch.randn(8, 3, 32, 32))
    return model.eval()


@pytest.fixture
def images():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_folded_networks_explain_the_same(network, images):
    folded = fold(network, images)
    for found, expected in (
        (GradCAM(folded)(images, 3), GradCAM(network)(images, 3)),
        (EigenCAM(folded)(images), EigenCAM(network)(images)),
    ):
        assert float(expected.max()) > 0.5
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_pruned_by_mask_and_for_real_explain_the_same(network, images):
    graph = trace(network, images)
    selection = {g.name: torch.arange(0, g.size, 2) for g in graph.groups if g.constraints.parts == 1}
    with masked(network, graph, selection) as hidden:
        expected = GradCAM(hidden)(images, 3)
    apply(network, graph.shrink(selection))
    torch.testing.assert_close(GradCAM(network)(images, 3), expected, atol=1e-4, rtol=0)


def test_drift_of_folding_is_none_and_of_pruning_some(network, images):
    folded = fold(network, images)
    assert explanation_drift(network, folded, images).correlation > 0.999
    pruned = fold(network, images)
    graph = trace(pruned, images)
    apply(
        pruned,
        graph.shrink({g.name: torch.arange(max(1, g.size // 4)) for g in graph.groups if g.constraints.parts == 1}),
    )
    drift = explanation_drift(network, pruned, images, method="eigen_cam")
    assert drift.correlation < 0.999 and drift.layer_after == drift.layer_before
