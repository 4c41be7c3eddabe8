"""What the user asks of widths in one line holds for every selection, and is refused in one line where it cannot."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.surgery.nets import OptionAResNet, half, randomise
from torch import nn

from convette import surgery
from convette.cost import Budget, count
from convette.errors import BudgetError, StructureError, UsageError
from convette.models import create_model
from convette.pruning import PruneSettings, prune
from convette.surgery import WidthConstraints

IMAGES = torch.randn(2, 3, 16, 12, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return randomise(OptionAResNet(blocks=1))


texts = st.builds(
    WidthConstraints,
    multiple_of=st.integers(1, 64),
    minimum=st.one_of(st.integers(1, 512), st.integers(1, 99).map(lambda n: n / 100)),
    whole_heads=st.booleans(),
    keep=st.lists(st.from_regex(r"[a-z*][a-z0-9_.*?]{0,8}", fullmatch=True), max_size=3).map(tuple),
)


@settings(deadline=None)
@given(texts)
def test_what_is_written_is_read_back(constraints):
    assert WidthConstraints.parse(str(constraints)) == constraints


def test_forms():
    assert WidthConstraints.parse("") == WidthConstraints()
    read = WidthConstraints.parse(
        " multiple of 8".replace("multiple of", "multiple-of=") + ", minimum=10%, whole heads"
    )
    assert read == WidthConstraints(8, 0.1, True)
    assert WidthConstraints.parse("keep stem* head, keep layer1.*").keep == ("stem*", "head", "layer1.*")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("multiple=8", "Did you mean 'multiple_of'?"),
        ("minimum=few", "a share such as 10%"),
        ("multiple_of=8.5", "a whole number is needed"),
        ("multiple_of=0", "at least 1"),
        ("minimum=3.5", "a share such as 10%"),
        ("keep", "keep PATTERN"),
        ("keep os.system('x')", "a pattern of module names"),
        ("minimum=4, minimum=5", "given twice"),
        ("whole_heads=maybe", "stands alone"),
    ],
)
def test_slips_are_one_line(text, said):
    with pytest.raises(UsageError, match=r"^constraints") as error:
        WidthConstraints.parse(text)
    assert said in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UsageError, match=r"prune\.constraints"):
        PruneSettings(constraints=text)


def test_multiples_and_minima_count_channels_of_every_layer():
    # A unit of the grouped convolution holds one channel of each of its four groups, and two of the plain one after it.
    model = nn.Sequential(nn.Conv2d(3, 24, 1), nn.Conv2d(24, 48, 3, groups=4), nn.ReLU(), nn.Conv2d(48, 5, 1)).eval()
    graph = surgery.trace(model, IMAGES)
    free = {group.name: group.constraints for group in graph}
    tight = graph.constrain(multiple_of=8, minimum=16)
    for group in tight:
        for member in group.of("producer"):
            k = member.index.shape[1]
            assert (group.constraints.multiple_of * k) % 8 == 0
            assert group.constraints.minimum * k >= 16
        short = torch.arange(group.constraints.multiple_of)
        with pytest.raises(StructureError, match="at least"):
            tight.check({group.name: short})
        with pytest.raises(StructureError, match="multiple of"):
            tight.check({group.name: torch.arange(group.size - 1)})
    assert {group.name: group.constraints for group in graph} == free, "the graph it came from has changed"


def test_layers_that_are_kept_keep_their_shape(model):
    graph = surgery.trace(model, IMAGES)
    kept = graph.constrain("keep layer2.0.conv1")
    assert "layer2.0.conv1" in kept.kept and kept.kept["layer2.0.conv1"] == "keep layer2.0.conv1"
    before = {name: p.shape for name, p in model.named_parameters() if name.startswith("layer2.0.conv1")}
    surgery.apply(model, kept.shrink(half(kept)), example=IMAGES, prove=True)
    assert {name: p.shape for name, p in model.named_parameters() if name.startswith("layer2.0.conv1")} == before
    assert model.layer3[0].conv1.weight.shape[0] < 64
    with pytest.raises(StructureError, match=r"stays as it is by the constraint 'keep layer2\.0\.conv1'"):
        kept.check({"layer2.0.conv1": torch.tensor([0])})


def test_a_name_stands_for_what_is_in_it_and_one_that_is_not_there_is_named(model):
    graph = surgery.trace(model, IMAGES)
    kept = graph.constrain(keep="layer3")
    owned = {member.parameter for group in kept for member in group.members}
    assert owned and not any(name.startswith("layer3.") for name in owned)
    with pytest.raises(StructureError, match=r"keep 'laier3' fits no module of OptionAResNet. Did you mean 'layer3'"):
        graph.constrain(keep="laier3")


@pytest.mark.parametrize("text", ["keep *", "minimum=1000", "multiple_of=512"])
def test_what_leaves_nothing_to_remove_is_said(model, text):
    graph = surgery.trace(model, IMAGES)
    with pytest.raises(StructureError, match=r"leave nothing to remove .the widest layer has 64"):
        graph.constrain(text)
    assert not any(len(kept) < graph[name].size for name, kept in _smallest(graph.constrain(text, allow_nothing=True)))


def _smallest(graph):
    return [(group.name, torch.arange(group.size)) for group in graph]


def test_pruning_keeps_to_them(model):
    example = torch.randn(1, 3, 32, 32)
    model = create_model("resnet20", seed=0)
    done = prune(
        model,
        example,
        "macs<=60%",
        PruneSettings(criterion="l1", epochs=0, steps=2, constraints="multiple_of=4, minimum=8, keep layer1.*"),
    ).model
    assert count(done, example).macs <= 0.6 * count(model, example).macs
    for name, layer in done.named_modules():
        if isinstance(layer, nn.Conv2d):
            assert layer.out_channels % 4 == 0 and layer.out_channels >= 8
            if name.startswith("layer1"):
                assert layer.weight.shape == model.get_submodule(name).weight.shape
    with pytest.raises(BudgetError, match="constraints 'multiple_of=4, minimum=8, keep layer3'"):
        prune(
            model,
            example,
            Budget.parse("macs<=10%"),
            PruneSettings(criterion="l1", epochs=0, constraints="multiple_of=4, minimum=8, keep layer3"),
        )


def test_shares_are_of_the_start_over_all_steps():
    model = create_model("resnet20", seed=0)
    example = torch.randn(1, 3, 32, 32)
    settings = PruneSettings(criterion="random", epochs=0, steps=4, min_fraction=0, constraints="minimum=50%")
    done = prune(model, example, "macs<=40%", settings).model
    widths = [(a.weight.shape[0], b.weight.shape[0]) for a, b in _convs(model, done)]
    assert all(2 * after >= before for before, after in widths) and any(after < before for before, after in widths)


def _convs(model, done):
    pairs = zip(model.modules(), done.modules(), strict=True)
    return [(a, b) for a, b in pairs if isinstance(a, nn.Conv2d)]


class Attention(nn.Module):
    """Heads by hand, with a gate a channel: those within heads can be removed."""

    def __init__(self, heads=3, width=4):
        super().__init__()
        self.num_heads, self.head_dim = heads, width
        self.gate = nn.Parameter(torch.rand(width, 1, 1))
        self.stem = nn.Conv2d(3, 10, 1)
        self.value = nn.Conv2d(10, heads * width, 1)
        self.proj = nn.Conv2d(heads * width, 6, 1)

    def forward(self, x):
        x = self.stem(x)
        v = self.value(x)
        n, c, h, w = v.shape
        v = v.view(n, self.num_heads, self.head_dim, h, w)
        return self.proj((v * self.gate).reshape(n, c, h, w))


def test_whole_heads():
    graph = surgery.trace(Attention().eval(), IMAGES)
    free = {member.parameter: group for group in graph for member in group.of("producer")}
    assert free["value.weight"].members[0].index.shape[1] % 4, "the network does not show what the constraint is for"
    whole = graph.constrain(whole_heads=True)
    assert "value" in whole.kept and "stem" not in whole.kept
    import timm

    vit = surgery.trace(timm.create_model("test_vit").eval(), torch.randn(1, 3, 160, 160))
    assert len(vit.constrain(whole_heads=True)) == len(vit), "heads of a transformer are whole by themselves"


def test_weights_that_are_standardised_keep_two_inputs():
    from timm.layers import ScaledStdConv2d

    model = nn.Sequential(nn.Conv2d(3, 6, 1), ScaledStdConv2d(6, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    graph = surgery.trace(model, IMAGES)
    assert [group.constraints.minimum for group in graph] == [2, 1]
    with pytest.raises(StructureError, match="at least 2 units"):
        graph.shrink({"0": torch.tensor([1])})
    surgery.apply(model, graph.shrink({"0": torch.tensor([1, 4])}), example=IMAGES, prove=True)
    assert model(IMAGES).shape == (2, 4, 16, 12)


def test_weights_that_are_standardised_with_a_kernel_are_cut():
    from timm.layers import ScaledStdConv2d

    model = nn.Sequential(ScaledStdConv2d(3, 6, 3), ScaledStdConv2d(6, 8, 3, groups=2), nn.ReLU(), nn.Conv2d(8, 4, 1))
    graph = surgery.trace(model.eval(), IMAGES)
    assert [(group.name, group.size) for group in graph] == [("0", 3), ("1", 4)]
    surgery.apply(model, graph.shrink({"0": torch.tensor([0, 2]), "1": torch.tensor([1])}), example=IMAGES, prove=True)
    assert model[1].weight.shape == (2, 2, 3, 3)
