"""Layers in a row and side by side, scales and fusing blocks become one, exactly, and only where they may."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.surgery.nets import randomise
from torch import nn

from convette import surgery
from convette.errors import FileFormatError, StructureError

IMAGES = torch.randn(2, 4, 11, 9, generator=torch.Generator().manual_seed(0))


def output(model, images=IMAGES):
    with torch.no_grad():
        return model.eval()(images)


def near(a, b, tolerance=1e-5):
    return a.shape == b.shape and (a - b).abs().max() <= tolerance * b.abs().max()


def kinds(model):
    return [edit.kind for edit in surgery.structure_log(model).edits]


def folded_as(make, *expected):
    """Fold a network; check the edits' kinds, the output, a trip through JSON and a replay on another's weights."""
    torch.manual_seed(0)
    model = randomise(make())
    folded = surgery.fold(model, IMAGES)
    assert near(output(folded), output(model))
    assert kinds(folded) == list(expected)
    edits = [surgery.edit_from_json(json.loads(json.dumps(e.to_json()))) for e in surgery.structure_log(folded).edits]
    assert edits == surgery.structure_log(folded).edits
    torch.manual_seed(1)
    other = surgery.replay(make(), edits)
    other.load_state_dict(folded.state_dict(), strict=True)
    assert torch.equal(output(other), output(folded))
    return folded


class Scaled(nn.Module):
    def __init__(self, layer, shape, inner=None):
        super().__init__()
        self.layer, self.drop, self.scale = layer, nn.Dropout(0.5), Scale(shape)
        self.inner = inner or nn.Identity()

    def forward(self, x):
        return self.inner(self.scale(self.drop(self.layer(x))))


class Scale(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(shape) + 0.5)

    def forward(self, x):
        return x * self.gamma


def test_convolutions_in_a_row():
    def wide():
        return nn.Sequential(nn.Conv2d(4, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.Conv2d(16, 6, 1, 2), nn.ReLU())

    folded = folded_as(wide, "fold", "fold_convs")
    assert folded[0].stride == (4, 4) and folded[0].out_channels == 6 and isinstance(folded[2], nn.Identity)

    # The norm between goes into the first, its shift into the bias of one that does not pad.
    def reverse(bias=True, padding=0, mode="zeros"):
        return nn.Sequential(nn.Conv2d(4, 16, 1, bias=bias), nn.Conv2d(16, 6, 3, 1, padding, padding_mode=mode))

    folded_as(reverse, "fold_convs")
    folded_as(lambda: reverse(bias=False, padding=1), "fold_convs")
    folded_as(lambda: reverse(padding=1, mode="circular"), "fold_convs")
    # Zeros would have to be the first one's bias.
    folded_as(lambda: reverse(padding=1))
    # More multiplications than before: a narrow middle stays.
    folded_as(lambda: nn.Sequential(nn.Conv2d(4, 1, 1), nn.Conv2d(1, 6, 1)))
    folded_as(lambda: nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 8, 1)))
    # Groups of a pointwise second, within those of the first.
    for groups in (1, 2):
        folded_as(
            lambda groups=groups: nn.Sequential(nn.Conv2d(4, 8, 3, groups=groups), nn.Conv2d(8, 8, 1, groups=4)),
            "fold_convs",
        )
    # Something between.
    folded_as(lambda: nn.Sequential(nn.Conv2d(4, 16, 3), nn.ReLU(), nn.Conv2d(16, 6, 1)))
    folded_as(lambda: nn.Sequential(nn.Flatten(), nn.Linear(396, 30), nn.Dropout(), nn.Linear(30, 8)), "fold_convs")


def test_a_result_read_twice_stays():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 1)

        def forward(self, x):
            y = self.a(x)
            return y + self.b(y)

    class Shared(Twice):
        def forward(self, x):
            return self.b(self.b(self.a(x)))

    twice, shared = folded_as(Twice), folded_as(Shared)
    for folded in (twice, shared):
        assert isinstance(folded.a, nn.Conv2d) and isinstance(folded.b, nn.Conv2d)


def test_scales():
    folded = folded_as(lambda: Scaled(nn.Conv2d(4, 6, 3), (6, 1, 1)), "fold_scale")
    assert not any(isinstance(module, Scale) for module in folded.modules())
    folded_as(lambda: Scaled(nn.Conv2d(4, 6, 3, bias=False), 1, nn.ReLU()), "fold_scale")
    folded_as(lambda: nn.Sequential(nn.Flatten(2), Scaled(nn.Linear(99, 7), 7)), "fold_scale")
    # Along another axis than that of the channels: not the layer's to hold.
    kept = folded_as(lambda: Scaled(nn.Conv2d(4, 7, 3), (1, 1, 7)))
    assert any(isinstance(module, Scale) for module in kept.modules())


class Rep(nn.Module):
    """RepVGG-like: kernel 3, kernel 1 and the identity, each with its norm."""

    def __init__(self, channels=4, groups=1, inplace=False):
        super().__init__()
        self.inplace = inplace
        self.three = nn.Conv2d(channels, channels, 3, padding=1, groups=groups, bias=False)
        self.norm3 = nn.BatchNorm2d(channels)
        self.one = nn.Conv2d(channels, channels, 1, groups=groups)
        self.norm1 = nn.BatchNorm2d(channels)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x):
        y = self.norm3(self.three(x))
        if self.inplace:
            y += self.norm1(self.one(x))
            y += self.norm(x)
        else:
            y = self.norm(x) + self.norm1(self.one(x)) + y
        return torch.relu(y)


class Dilated(nn.Module):
    def __init__(self, padding=2):
        super().__init__()
        self.large = nn.Conv2d(4, 4, (7, 7), padding=3, groups=4)
        self.small = nn.Conv2d(4, 4, 3, padding=padding, dilation=2, groups=4)
        self.thin = nn.Conv2d(4, 4, (1, 5), padding=(0, 2), groups=4)

    def forward(self, x):
        return self.thin(x) + self.large(x) + self.small(x)


@settings(max_examples=12, deadline=None)
@given(groups=st.sampled_from([1, 2, 4]), inplace=st.booleans(), count=st.integers(1, 3))
def test_branches_side_by_side(groups, inplace, count):
    model = folded_as(
        lambda: nn.Sequential(*[Rep(4, groups, inplace) for _ in range(count)]),
        *["fold"] * (2 * count),
        *["merge"] * count,
    )
    assert sum(p.numel() for p in model.parameters()) == count * (4 * 4 // groups * 9 + 4)


def test_dilated_branches_and_what_reads_something_else():
    folded = folded_as(Dilated, "merge")
    assert isinstance(folded.small, surgery.Nothing) and isinstance(folded.thin, surgery.Nothing)

    class Apart(Dilated):
        def forward(self, x):
            return self.large(x) + self.small(x * 2) + torch.relu(self.thin(x))

    folded_as(Apart)


@pytest.mark.parametrize(
    "name", ["repvgg_a0", "mobileone_s0", "fastvit_t8", "repvit_m0_9", "repghostnet_050", "vit_tiny_patch16_224.x"]
)
def test_timm_networks_fold_whole(name, tmp_path):
    import timm

    options = {"init_values": 0.5, "img_size": 32, "depth": 2} if ".x" in name else {}

    def build(origin=None):
        torch.manual_seed(0)
        return timm.create_model(name.removesuffix(".x"), num_classes=5, **options)

    model = surgery.set_origin(randomise(build()), surgery.Origin("test"))
    images = torch.randn(1, 3, 32, 32)
    expected = output(model.double(), images.double())
    folded = surgery.fold(model.double(), images.double())
    assert near(output(folded, images.double()), expected)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    assert set(kinds(folded)) & ({"fold_scale"} if ".x" in name else {"reparameterize", "merge"})
    if name == "repvgg_a0":
        assert sum(isinstance(m, nn.Conv2d) for m in folded.modules()) == 22
    surgery.save_model(folded, tmp_path / "m.safetensors")
    again = surgery.load_model(tmp_path / "m.safetensors", lambda origin: build().double())
    assert torch.equal(output(again, images.double()), output(folded, images.double()))


@pytest.mark.parametrize(
    "edit",
    [
        surgery.FoldConvs("0", "2"),
        surgery.FoldConvs("0", "nothing"),
        surgery.FoldConvs("0", "1"),
        surgery.FoldScale("0", "1"),
        surgery.Merge("0", ("2",)),
        surgery.Merge("0", ("0",)),
        surgery.Reparameterize("0", "fuse"),
    ],
)
def test_what_does_not_fit_leaves_the_model_alone(edit):
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Conv2d(5, 6, 1))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = list(model.modules())
    with pytest.raises(StructureError):
        surgery.apply(model, edit)
    assert list(model.modules()) == modules
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    "value",
    [
        {"kind": "fold_convs", "first": "a"},
        {"kind": "fold_scale", "layer": 3, "scale": "b"},
        {"kind": "merge", "into": "a", "branches": []},
        {"kind": "merge", "into": "a", "branches": "b"},
        {"kind": "reparameterize", "module": "a", "method": "__init__"},
        {"kind": "reparameterize", "module": "a", "method": "forward"},
    ],
)
def test_tampered_edits_are_refused(value):
    with pytest.raises(FileFormatError, match=value["kind"]):
        surgery.edit_from_json(value)
