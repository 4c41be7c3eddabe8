from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from convette.cli.main import main
from convette.errors import StructureError, UsageError
from convette.models import build_from_origin, create_model, load
from convette.pruning import PruneSettings, prune
from convette.pruning.methods import GradualSparsity, KeepSparsity
from convette.pruning.sparsity import (
    apply_masks,
    make_masks,
    masks_of,
    n_m_mask,
    parse_pattern,
    pattern_of,
    report,
    sparse_layers,
    sparsify,
    sparsity_in_words,
    unstructured_mask,
    zeros_of,
)
from convette.surgery import load_model, save_model
from convette.training import Event, Method, TrainSettings, train

QUICK = TrainSettings(epochs=2, batch_size=128, learning_rate=0.05, augmentation=(), precision="fp32")


def three(widths=(8, 8)) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, widths[0], 3, padding=1),
        nn.BatchNorm2d(widths[0]),
        nn.ReLU(),
        nn.Conv2d(widths[0], widths[1], 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(widths[1], 10),
    )


@settings(deadline=None, max_examples=40)
@given(size=st.integers(1, 40), sparsity=st.floats(0, 0.99), seed=st.integers(0, 9), ties=st.booleans())
def test_as_many_stay_as_the_share_says_and_the_largest(size, sparsity, seed, ties):
    scores = torch.rand(size, generator=torch.Generator().manual_seed(seed))
    scores = (scores * 3).round() if ties else scores
    mask = unstructured_mask(scores, sparsity)
    assert int(mask.sum()) == round((1 - sparsity) * size)
    if mask.any() and not mask.all():
        assert scores[mask].min() >= scores[~mask].max()


@settings(deadline=None, max_examples=40)
@given(
    out=st.integers(1, 4),
    inputs=st.integers(1, 17),
    kernel=st.sampled_from([None, 1, 3]),
    pattern=st.sampled_from([(1, 2), (2, 4), (1, 4), (3, 8)]),
    seed=st.integers(0, 9),
)
def test_n_of_every_m_inputs_stay(out, inputs, kernel, pattern, seed):
    n, m = pattern
    shape = (out, inputs) if kernel is None else (out, inputs, kernel, kernel)
    scores = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    mask = n_m_mask(scores, n, m)
    for first in range(0, inputs, m):
        block, kept = scores[:, first : first + m], mask[:, first : first + m]
        width = block.shape[1]
        assert (kept.sum(1) == min(n, width)).all()
        if width > n:
            least = torch.where(kept, block, torch.inf).amin(1)
            most = torch.where(kept, -torch.inf, block).amax(1)
            assert (least >= most).all()


def test_first_last_and_depthwise_layers_stay_dense():
    model = create_model("mobilenet_v2", num_classes=10, in_channels=3, seed=0)
    names = set(sparse_layers(model))
    convolutions = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    assert f"{convolutions[0][0]}.weight" not in names
    assert not any(f"{n}.weight" in names for n, m in convolutions if m.groups > 1)
    assert len(names) == sum(m.groups == 1 for _, m in convolutions) - 1
    assert len(sparse_layers(model, exclude=["*"])) == 0


def test_global_shares_differ_layer_shares_do_not():
    model = create_model("resnet20", seed=0)
    found = report(make_masks(model, 0.9))
    assert found.sparsity == pytest.approx(0.9, abs=1e-5)
    assert max(found.layers.values()) - min(found.layers.values()) > 0.05
    even = report(make_masks(model, 0.9, scope="layer"))
    assert all(share == pytest.approx(0.9, abs=2e-3) for share in even.layers.values())
    half = report(make_masks(model, pattern="2:4"))
    assert half.sparsity == pytest.approx(0.5)


def test_zeros_survive_saving_and_loading(tmp_path):
    model = create_model("resnet20", seed=0).eval()
    done = sparsify(model, pattern="2:4")
    save_model(model, tmp_path / "sparse.safetensors")
    loaded = load_model(tmp_path / "sparse.safetensors", build_from_origin)
    masks = masks_of(loaded)
    assert report(masks).nonzero == done.nonzero
    assert set(masks) == set(sparse_layers(model))


class Zeros(Method):
    """Counts the zeros after every step."""

    name = "zeros"
    order = 1000
    events = frozenset({Event.BATCH_END})

    def __init__(self):
        self.shares = []

    def apply(self, event, trainer):
        self.shares.append(float((trainer.state.model[3].weight == 0).float().mean()))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_masks_are_held_through_training_momentum_and_averaging(digits, optimizer):
    model = three()
    sparsify(model, 0.75, scope="layer")
    masks, watch = masks_of(model), Zeros()
    choices = TrainSettings(**{**QUICK.__dict__, "epochs": 1, "optimizer": optimizer, "ema_decay": 0.9})
    trained = train(model, digits, choices, methods=(KeepSparsity(), watch), device="cpu").model
    assert set(watch.shares) == {0.75}
    assert all(torch.equal(trained.get_parameter(name) != 0, mask) for name, mask in masks.items())


def test_a_gradual_schedule_ends_at_the_share_and_resumes_to_the_same(digits, tmp_path):
    watch = Zeros()
    settings_ = TrainSettings(**{**QUICK.__dict__, "checkpoint_steps": 3})
    trained = train(three(), digits, settings_, methods=(GradualSparsity(0.8, times=4), watch), device="cpu").model
    assert watch.shares[-1] == pytest.approx(0.8, abs=2e-3)
    assert watch.shares == sorted(watch.shares) and len(set(watch.shares)) == 5

    class Stop(Method):
        name = "stop"
        events = frozenset({Event.BATCH_END})

        def apply(self, event, trainer):
            if trainer.state.clock.step == 10:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(
            three(),
            digits,
            settings_,
            methods=(GradualSparsity(0.8, times=4), Stop()),
            device="cpu",
            checkpoint_dir=tmp_path,
        )
    again = train(
        three(), digits, settings_, methods=(GradualSparsity(0.8, times=4),), device="cpu", checkpoint_dir=tmp_path
    )
    assert again.resumed_from == 9
    for name, tensor in trained.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name])


def test_n_m_goes_down_one_at_a_time(digits):
    watch = Zeros()
    trained = train(three(), digits, QUICK, methods=(GradualSparsity(pattern="2:4"), watch), device="cpu").model
    assert sorted(set(watch.shares)) == [0.0, 0.25, 0.5]
    blocks = (trained[3].weight != 0).unflatten(1, (2, 4)).sum(2)
    assert (blocks == 2).all()


def test_masks_follow_a_cut(digits):
    from convette.pruning import GradualPruning

    model = three()
    sparsify(model, 0.5, scope="layer")
    keep = KeepSparsity()
    trained = train(model, digits, QUICK, methods=(keep, GradualPruning("macs<=60%", times=2)), device="cpu").model
    mask = keep.masks["3.weight"]
    assert trained[3].weight.shape == mask.shape and trained[3].weight.shape[1] < 8
    assert not (trained[3].weight[~mask] != 0).any()


def test_what_cannot_be_is_refused():
    for pattern in ("4:2", "2:2", "x", "0:4", "2-4"):
        with pytest.raises(UsageError, match="2:4"):
            parse_pattern(pattern)
    for build in (
        lambda: make_masks(three(), 1.0),
        lambda: make_masks(three(), 0.5, scope="net"),
        lambda: GradualSparsity(1.5),
        lambda: GradualSparsity(begin=0.8, end=0.2),
        lambda: GradualSparsity(scope="net"),
    ):
        with pytest.raises(UsageError):
            build()
    with pytest.raises(StructureError, match="can be sparse"):
        make_masks(nn.Sequential(nn.BatchNorm2d(4)))
    with pytest.raises(StructureError, match="does not fit"):
        apply_masks(three(), {"3.weight": torch.ones(2, 2, dtype=torch.bool)})
    broken = three()
    with torch.no_grad():
        broken[3].weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(StructureError, match=r"3\.weight is not finite"):
        make_masks(broken)


def test_a_dense_network_has_nothing_to_keep(digits):
    with pytest.raises(UsageError, match="no weight of this network is zero"):
        train(three(), digits, QUICK, methods=(KeepSparsity(),), device="cpu")


def test_masks_of_a_pattern_follow_a_cut_and_keep_the_pattern(digits):
    from convette.pruning import GradualPruning

    model = three((16, 16))
    sparsify(model, pattern="2:4")
    cutting = GradualPruning("macs<=60%", times=1, begin=0.6, end=0.6)
    trained = train(model, digits, QUICK, methods=(KeepSparsity(pattern="2:4"), cutting), device="cpu").model
    weight = trained[3].weight
    assert weight.shape[1] < 16
    assert not ((weight != 0) & ~n_m_mask(weight.detach().abs(), 2, 4)).any()


@pytest.mark.parametrize(("pattern", "epochs"), [("2:4", 0), ("2:4", 1), ("unstructured", 1)])
def test_a_sparse_network_that_is_pruned_stays_sparse(digits, pattern, epochs):
    model = three((16, 16))
    sparsify(model, 0.8, pattern=pattern, scope="layer")
    choices = PruneSettings(criterion="l1", steps=2, epochs=epochs, calibration_images=64)
    pruned = prune(model, digits, "macs<=50%", choices, train_settings=QUICK, device="cpu").model
    weight = pruned[3].weight.detach()
    assert weight.shape[0] < 16 or weight.shape[1] < 16
    if pattern == "2:4":
        assert not ((weight != 0) & ~n_m_mask(weight.abs(), 2, 4)).any()
        assert float((weight == 0).float().mean()) >= 0.4
    else:
        assert float((weight == 0).float().mean()) > 0.6
    if epochs:
        dense = prune(
            model, digits, "macs<=50%", replace(choices, keep_zeros=False), train_settings=QUICK, device="cpu"
        ).model
        assert zeros_of(dense) == {}


def test_patterns_are_told_from_chance_and_from_layers_that_begin_at_zero():
    model = create_model("resnet20", seed=0)
    assert zeros_of(model) == {} and pattern_of({}) is None
    with torch.no_grad():
        next(iter(sparse_layers(model).values())).zero_()
    assert zeros_of(model) == {}, "a layer that begins at zero is not a sparse one"
    for share, pattern, found in ((0.8, "unstructured", None), (0.5, "2:4", (2, 4)), (0.5, "1:8", (1, 8))):
        masks = make_masks(create_model("resnet20", seed=0), share, pattern=pattern)
        assert pattern_of(masks) == found
    assert sparsity_in_words({"a": torch.tensor([[True, False]])}) == "50% of the weights of 1 layer are zero (1:2)"


def test_a_recipe_asks_for_it_and_the_files_of_training_and_pruning_hold_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.toml").write_text(
        "[model]\nname = 'resnet8'\n[train]\nepochs = 1\naugmentation = []\n"
        "[[method]]\nname = 'gradual-sparsity'\noptions = { pattern = '2:4' }\n"
    )
    assert main(["train", "r.toml", "--out", "run", "--device", "cpu", "-q"]) == 0
    command = ["prune", "run/train/model.safetensors", "--data", "digits", "--budget", "macs<=60%", "--epochs", "1"]
    assert main([*command, "--set", "prune.steps=1", "--out", "small.safetensors", "--device", "cpu", "-q"]) == 0
    capsys.readouterr()
    for file in ("run/train/model.safetensors", "small.safetensors"):
        masks = zeros_of(load(file))
        assert set(masks) == set(sparse_layers(create_model("resnet8"))) and pattern_of(masks) == (2, 4)
    bad = ["recipe", "--set", "prune.keep_zeros=2"]
    assert main(bad) == 2
