"""What every explainer must keep: the network as it was, the random state, memory; and that it runs on every network."""

import copy
import gc
import importlib
import os

import psutil
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from convette.errors import UsageError
from convette.explain import EXPLAINERS, ExplanationWarning, GradCAM, eigen_cam, grad_cam, target_layer
from convette.models import create_model

# Untrained networks look at much the same places in all images.
pytestmark = pytest.mark.filterwarnings("ignore::convette.explain.ExplanationWarning")


def make(name, *args, **kwargs):
    module, symbol = EXPLAINERS[name].split(":")
    return getattr(importlib.import_module(module), symbol)(*args, **kwargs)


explainers = pytest.mark.parametrize("explainer", EXPLAINERS)


class Net(nn.Module):
    """A small network; how its activations are written is the caller's choice."""

    def __init__(self, activation):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 12, 3, stride=2, padding=1), nn.BatchNorm2d(12)
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(12, 5)
        self.activation = activation

    def forward(self, x):
        x = self.activation(self.bn1(self.conv1(x)))
        x = self.activation(self.bn2(self.conv2(x)))
        return self.head(self.drop(F.adaptive_avg_pool2d(x, 1).flatten(1)))


ACTIVATIONS = {
    "reused_module": lambda: nn.ReLU(),
    "reused_inplace": lambda: nn.ReLU(inplace=True),
    "functional": lambda: F.relu,
    "functional_inplace": lambda: lambda x: F.relu(x, inplace=True),
    "silu": lambda: F.silu,
}


def trained_like(model, seed=0):
    """Give batch norms statistics that are not those of initialisation."""
    torch.manual_seed(seed)
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(16, 3, 16, 16) * 2 + 1)
    return model


@explainers
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nothing_is_left_behind(explainer, activation):
    model = trained_like(Net(ACTIVATIONS[activation]()))
    model.bn1.eval()  # a mixture of modes must come back as it was
    model.head.weight.grad = torch.ones_like(model.head.weight)
    frozen = model.conv1.weight.requires_grad_(False)
    images = torch.randn(4, 3, 16, 16)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    copied = copy.deepcopy(model).eval()
    before = copied(images)
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()]
    random, given = torch.random.get_rng_state(), images.clone()

    maps = make(explainer, model)(images)

    assert maps.shape == (4, 16, 16) and float(maps.min()) >= 0 and float(maps.max()) <= 1
    assert not maps.requires_grad
    assert torch.equal(random, torch.random.get_rng_state()) and torch.equal(images, given)
    assert [m.training for m in model.modules()] == modes
    assert [
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()
    ] == hooks
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert [p.grad is None for p in model.parameters()] == [p is not model.head.weight for p in model.parameters()]
    assert torch.equal(model.head.weight.grad, torch.ones_like(model.head.weight))
    assert not frozen.requires_grad and torch.is_grad_enabled()
    assert torch.equal(model.eval()(images), before)


@explainers
def test_in_place_and_functional_activations_give_the_same_maps(explainer):
    images = torch.randn(4, 3, 16, 16)
    maps = {}
    for name in ("reused_module", "reused_inplace", "functional", "functional_inplace"):
        torch.manual_seed(0)
        model = trained_like(Net(ACTIVATIONS[name]()))
        maps[name] = make(explainer, model, "bn2")(images)
    for name, other in maps.items():
        # An in-place module call after the layer must not reach into what was kept.
        torch.testing.assert_close(other, maps["functional"], msg=name)


@explainers
def test_a_failing_network_is_left_clean_too(explainer):
    class Fails(Net):
        def forward(self, x):
            super().forward(x)
            raise RuntimeError("in the middle")

    model = Fails(F.relu).train()
    with pytest.raises(RuntimeError, match="in the middle"):
        make(explainer, model, "conv2")(torch.randn(2, 3, 16, 16))
    with pytest.raises(RuntimeError, match="in the middle"):
        make(explainer, model)(torch.randn(2, 3, 16, 16))
    assert all(m.training and not m._forward_hooks for m in model.modules())
    assert torch.is_grad_enabled()


@explainers
def test_memory_does_not_grow(explainer):
    model = Net(F.relu)
    images = torch.randn(4, 3, 32, 32)
    cam = make(explainer, model)
    process = psutil.Process(os.getpid())
    for _ in range(30):
        cam(images)
    gc.collect()
    before = process.memory_info().rss
    for _ in range(200):
        cam(images)
    gc.collect()
    assert process.memory_info().rss - before < 5e6


@explainers
def test_batched_equals_one_by_one(explainer):
    model = trained_like(Net(F.relu))
    images = torch.randn(5, 3, 16, 16)
    cam = make(explainer, model)
    together = cam(images)
    for index in range(5):
        torch.testing.assert_close(cam(images[index : index + 1])[0], together[index], atol=1e-5, rtol=1e-4)


@explainers
def test_runs_in_inference_mode_and_without_gradients(explainer):
    model = trained_like(Net(F.relu))
    images = torch.randn(2, 3, 16, 16)
    expected = make(explainer, model)(images)
    with torch.no_grad():
        torch.testing.assert_close(make(explainer, model)(images), expected)
    with torch.inference_mode():
        torch.testing.assert_close(make(explainer, model)(images.clone()), expected)


@explainers
@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("resnet20", "layer3"),
        ("simplenet_cifar_310k", "features"),
        ("mobilenet_v2_035", "features"),
        ("timm:resnet18", "layer4"),
        ("timm:mobilenetv3_small_050", "blocks"),
        ("timm:efficientnet_b0", "bn2"),
        ("timm:convnext_atto", "stages"),
        ("timm:ghostnet_050", "blocks"),
        ("torchvision:resnet18", "layer4"),
        ("torchvision:mobilenet_v3_small", "features"),
        ("torchvision:squeezenet1_1", "features"),
        ("torchvision:densenet121", "features"),
        ("torchvision:regnet_y_400mf", "trunk_output"),
        ("torchvision:swin_t", "permute"),
        ("timm:swin_tiny_patch4_window7_224", "norm"),
    ],
)
def test_the_last_stage_is_found(explainer, name, layer):
    swin = "swin" in name
    if explainer == "grad_cam" and name.endswith(("densenet121", "efficientnet_b0")):
        pytest.skip("the choice does not depend on the explainer; one run is enough")
    model = create_model(name, stem="default" if swin else "small", num_classes=6, seed=0).eval()
    images = torch.randn(1, 3, 224, 224) if swin else torch.randn(2, 3, 64, 64)
    chosen = target_layer(model, images)
    assert chosen.name == layer, chosen
    assert chosen.reason.startswith(layer) and min(chosen.shape[1:]) >= 4
    maps = make(explainer, model)(images)
    assert maps.shape == (len(images), *images.shape[2:]) and maps.isfinite().all() and float(maps.max()) > 0


def test_pools_are_passed_over():
    """VGG ends in a pool and an adaptive pool that enlarges; what comes before holds all there is."""
    model = create_model("torchvision:vgg11_bn", seed=0)
    assert target_layer(model, torch.zeros(1, 3, 64, 64)).name == "features.27"


def test_coarse_stages_are_passed_over_with_the_reason():
    model = create_model("resnet20", in_channels=1, seed=0)
    chosen = target_layer(model, torch.zeros(1, 1, 8, 8))
    assert chosen.name == "layer2" and chosen.shape == (32, 4, 4)
    assert "later ones are 2x2" in chosen.reason
    assert target_layer(model, torch.zeros(1, 1, 8, 8), min_side=2).name == "layer3"


def test_networks_without_maps_are_refused():
    with pytest.raises(UsageError, match="no layer of this network has a map"):
        target_layer(nn.Sequential(nn.Flatten(), nn.Linear(48, 3)), torch.zeros(1, 3, 4, 4))


@explainers
def test_layers_by_name_and_as_module(explainer):
    model = trained_like(Net(F.relu))
    images = torch.randn(2, 3, 16, 16)
    by_name = make(explainer, model, "conv2").explain(images)
    assert by_name.layer == "conv2" and "named by the user" in by_name.reason
    assert torch.equal(by_name.maps, make(explainer, model, model.conv2)(images))
    for layer, message in (("convv2", "Did you mean 'conv2'"), ("head", "not one map"), (nn.ReLU(), "not part")):
        with pytest.raises(UsageError, match=message):
            make(explainer, model, layer)(images)


@explainers
def test_unused_layers_are_named(explainer):
    model = Net(F.relu)
    model.spare = nn.Conv2d(1, 1, 1)
    with pytest.raises(UsageError, match="did not run"):
        make(explainer, model, "spare")(torch.randn(2, 3, 16, 16))


@explainers
def test_the_same_map_for_every_image_is_reported(explainer):
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 1), nn.Linear(4, 2)
            self.pattern = torch.linspace(0, 1, 64).reshape(1, 1, 8, 8)

        def forward(self, x):
            x = self.conv(x * 1e-3).relu().mean((2, 3), keepdim=True) + self.pattern
            x = nn.functional.relu(self.tap(x))
            return self.head(x.mean((2, 3)))

    model = Constant()
    model.tap = nn.Conv2d(4, 4, 1, bias=False)
    nn.init.constant_(model.tap.weight, 0.5)
    nn.init.constant_(model.head.weight, 0.5)
    with pytest.warns(ExplanationWarning, match="nearly the same"):
        found = make(explainer, model, "tap").explain(torch.randn(5, 3, 8, 8))
    assert found.similarity > 0.95


@explainers
def test_non_finite_features_are_refused(explainer):
    model = Net(F.relu)
    nn.init.constant_(model.conv2.weight, float("nan"))
    with pytest.raises(UsageError, match="not finite"):
        make(explainer, model, "conv2")(torch.randn(1, 3, 16, 16))


@explainers
def test_half_precision_networks(explainer):
    model = trained_like(Net(F.relu)).to(torch.bfloat16)
    maps = make(explainer, model)(torch.randn(2, 3, 16, 16, dtype=torch.bfloat16))
    assert maps.dtype == torch.float32 and maps.isfinite().all()


def _reference_grad_cam(model, images, classes):
    """The formula written out on an explicit feature extractor: alpha = spatial mean of the gradient."""
    features = model.bn2(model.conv2(F.relu(model.bn1(model.conv1(images))))).relu()
    features.retain_grad()
    logits = model.head(F.adaptive_avg_pool2d(features, 1).flatten(1))
    maps = []
    for n, k in enumerate(classes):
        features.grad = None
        logits[n, k].backward(retain_graph=True)
        alpha = features.grad[n].sum((1, 2)) / features.grad[n][0].numel()
        cam = torch.zeros(features.shape[2:])
        for c in range(features.shape[1]):
            cam += alpha[c] * features[n, c].detach()
        cam = cam.clamp_min(0)
        cam = (cam - cam.min()) / (cam.max() - cam.min())
        maps.append(F.interpolate(cam[None, None], size=images.shape[2:], mode="bilinear", align_corners=False)[0, 0])
    return torch.stack(maps)


def test_grad_cam_agrees_with_its_formula():
    model = trained_like(Net(nn.ReLU())).eval()
    images = torch.randn(4, 3, 16, 16)
    classes = [0, 3, 2, 4]
    reference = _reference_grad_cam(model, images, classes)
    keep = reference.isfinite().flatten(1).all(1)  # a map that is 0 everywhere has no scale
    found = GradCAM(model, "activation")(images, classes)  # reused: the last call counts
    assert keep.sum() >= 2
    torch.testing.assert_close(found[keep], reference[keep], atol=1e-5, rtol=1e-4)


def test_grad_cam_with_a_linear_head_is_the_class_activation_map():
    """With average pooling and a linear head, alpha is the head's weight over the number of positions."""
    model = trained_like(Net(nn.ReLU())).eval()
    images = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        features = model.bn2(model.conv2(F.relu(model.bn1(model.conv1(images))))).relu()
        expected = torch.einsum("c,nchw->nhw", model.head.weight[1], features).clamp_min(0) / 64
    torch.testing.assert_close(GradCAM(model, model.activation).explain(images, 1).raw, expected, atol=1e-6, rtol=1e-4)


def test_grad_cam_classes_and_scores():
    model = trained_like(Net(F.relu)).eval()
    images = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        logits = model(images)
    found = GradCAM(model).explain(images)
    assert torch.equal(found.classes, logits.argmax(1))
    torch.testing.assert_close(found.scores, logits.amax(1))
    each = torch.stack([grad_cam(model, images[i : i + 1], i)[0] for i in range(3)])
    torch.testing.assert_close(grad_cam(model, images, torch.arange(3)), each, atol=1e-5, rtol=1e-4)
    for wrong, message in ((5, r"0\.\.4"), (-1, r"0\.\.4"), ([0, 1], "2 classes for 3 images")):
        with pytest.raises(UsageError, match=message):
            grad_cam(model, images, wrong)


def test_grad_cam_on_outputs_that_are_not_logits():
    class Wrapped(nn.Module):
        def __init__(self, form):
            super().__init__()
            self.net, self.form = Net(F.relu), form

        def forward(self, x):
            return self.form(self.net(x), x)

    images = torch.randn(2, 3, 16, 16)
    plain = Wrapped(lambda y, x: y)
    for form in (lambda y, x: (y, "aux"), lambda y, x: {"out": y}, lambda y, x: [x.sum(), y]):
        model = Wrapped(form)
        model.net.load_state_dict(plain.net.state_dict())
        assert torch.equal(GradCAM(model, "net.conv2")(images, 1), GradCAM(plain, "net.conv2")(images, 1))
    boxes = Wrapped(lambda y, x: y[:, None, :].expand(-1, 7, -1))
    with pytest.raises(UsageError, match="score="):
        GradCAM(boxes, "net.conv2")(images)
    found = GradCAM(boxes, "net.conv2", score=lambda output: output[:, 3, 2]).explain(images)
    assert found.classes is None and found.maps.isfinite().all()
    with pytest.raises(UsageError, match=r"shape \(2,\)"):
        GradCAM(boxes, "net.conv2", score=lambda output: output)(images)


def test_grad_cam_of_a_segmenter_takes_the_mean_logit():
    model = create_model("deeplabv3_mobilenet_v2", num_classes=3, seed=0).eval()
    images = torch.randn(1, 3, 65, 65)
    found = GradCAM(model).explain(images, 2)
    with torch.no_grad():
        torch.testing.assert_close(found.scores, model(images)[:, 2].mean((1, 2)), atol=1e-5, rtol=1e-4)
    assert min(found.raw.shape[1:]) >= 4


def test_grad_cam_needs_a_layer_on_the_way():
    class Aside(Net):
        def forward(self, x):
            self.conv2(self.conv1(x))
            return self.head(F.adaptive_avg_pool2d(self.bn2(x[:, :1].expand(-1, 12, -1, -1)), 1).flatten(1))

    with pytest.raises(UsageError, match="does not depend on layer 'conv2'"):
        GradCAM(Aside(F.relu), "conv2")(torch.randn(1, 3, 16, 16))


def test_functional_forms_equal_the_classes():
    model = trained_like(Net(F.relu))
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(grad_cam(model, images, 2, layer="conv2"), make("grad_cam", model, "conv2")(images, 2))
    assert torch.equal(eigen_cam(model, images, "conv2", True), make("eigen_cam", model, "conv2", center=True)(images))
