"""Pruning in one training: progressive gradient pruning and dynamic channel propagation."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from convette.cost import WidthCost, count
from convette.errors import BudgetError, UsageError
from convette.models import create_model
from convette.pruning import channel_utility, grad_change
from convette.pruning._calibration import draw_calibration
from convette.pruning.criteria import score_units
from convette.pruning.criteria._observing import find_readers, sample_saliencies
from convette.pruning.methods import DynamicChannelPropagation, ProgressiveGradientPruning
from convette.pruning.methods.dynamic_channel_propagation import Gatekeeper, open_units
from convette.surgery import apply, structure_log, trace
from convette.training import Event, Method, TrainSettings, make_method, train

QUICK = TrainSettings(epochs=4, batch_size=128, learning_rate=0.05, augmentation=(), precision="fp32")


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 10, 3, padding=1, bias=False),
        nn.BatchNorm2d(10),
        nn.ReLU(),
        nn.Conv2d(10, 12, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(12 * 16, 10),
    )


class Watch(Method):
    """Notes sizes after each epoch, and whether momenta fit."""

    name = "watch"
    order = 100
    events = frozenset({Event.STRUCTURE_CHANGED, Event.EPOCH_START})

    def __init__(self):
        self.sizes, self.fits, self.zeros = [], [], []

    def apply(self, event, trainer):
        model = trainer.state.model
        states = trainer.state.optimizers["main"].state
        self.fits += [states[p]["momentum_buffer"].shape == p.shape for p in model.parameters() if p in states]
        self.sizes.append((model[0].out_channels, model[3].out_channels))
        if event is Event.EPOCH_START:
            rows = model[0].weight.detach().flatten(1).abs().amax(1)
            moved = states[model[0].weight]["momentum_buffer"].flatten(1).abs().amax(1) if states else rows
            self.zeros.append((int((rows == 0).sum()), int((moved[rows == 0] == 0).sum())))


def curve(size: int, rate: float, epochs: int) -> list[int]:
    kept = [math.ceil(size * (1 - rate) ** (e / epochs) - 1e-9) for e in range(1, epochs)]
    return [*kept, size - math.floor(size * rate)]


@pytest.mark.parametrize("mode", ["per_batch", "accumulate"])
@pytest.mark.parametrize("remove", [0.0, 0.5, 1.0])
def test_it_ends_where_the_rate_says_whatever_is_hard_or_soft(digits, mode, remove):
    method, watch = ProgressiveGradientPruning(0.5, epochs=3, remove=remove, mode=mode, passes=2), Watch()
    model = train(net(), digits, QUICK, methods=(method, watch), device="cpu").model
    assert (model[0].out_channels, model[3].out_channels) == (5, 6)
    assert model[6].in_features == 6 * 16 and all(watch.fits)
    assert watch.sizes == sorted(watch.sizes, reverse=True)
    # At the start of epochs 2 and 3 (one and two prunings done): cut, or reset to zero with their momentum.
    starts = [size for size, before in zip(watch.sizes[1:], watch.sizes, strict=False) if size != before]
    weak = 10 - curve(10, 0.5, 3)[0]
    assert watch.zeros[1] == ((weak - math.floor(remove * weak),) * 2)
    assert len(starts) == (1 if remove == 0 else 3)
    if remove == 1:
        assert [size[0] for size in starts] == curve(10, 0.5, 3)


def test_a_budget_is_met_by_the_smallest_rate(digits):
    example = digits.preprocessing(digits.train.images([0]))
    start = count(net(), example).macs
    method = ProgressiveGradientPruning(budget="macs<=40%", epochs=2)
    model = train(net(), digits, QUICK, methods=(method,), device="cpu").model
    assert count(model, example).macs <= 0.4 * start and structure_log(model).edits
    less = ProgressiveGradientPruning(method.rate - 1 / 256)
    less.epochs = 2
    graph = trace(net(), example)
    kept = {group.name: torch.arange(less.allowed(group.size, 2)) for group in graph}
    assert WidthCost(net(), example, graph).macs(kept) > 0.4 * start
    with pytest.raises(BudgetError, match="no share"):
        train(net(), digits, QUICK, methods=(ProgressiveGradientPruning(budget="macs<=0.01%"),), device="cpu")


def test_a_filter_that_starts_again_gets_gradients(digits):
    class Revived(Method):
        name = "revived"
        events = frozenset({Event.GRADIENTS_READY})

        def __init__(self):
            self.moved = []

        def apply(self, event, trainer):
            weight = trainer.state.model[0].weight
            zero = weight.detach().flatten(1).abs().amax(1) == 0
            if zero.any():
                self.moved.append(bool((weight.grad.flatten(1)[zero].abs().amax(1) > 0).all()))

    revived = Revived()
    train(net(), digits, QUICK, methods=(ProgressiveGradientPruning(epochs=3, remove=0.0), revived), device="cpu")
    assert revived.moved and all(revived.moved)


def test_psfp_is_a_choice_of_criterion_share_and_decay(digits):
    method = ProgressiveGradientPruning(0.4, epochs=8, criterion="l2", remove=0.0, decay="psfp")
    shares = [1 - method.allowed(10**6, epoch) / 10**6 for epoch in range(1, 9)]
    assert shares[0] == pytest.approx(0.25 * 0.4, rel=2e-3) and shares[-1] == pytest.approx(0.4)
    gone = [later - before for before, later in zip([0.0, *shares], shares, strict=False)]
    assert gone == sorted(gone, reverse=True) and min(gone) > 0
    watch = Watch()
    method = ProgressiveGradientPruning(0.5, epochs=3, criterion="l2", remove=0.0, decay="psfp")
    model = train(net(), digits, QUICK, methods=(method, watch), device="cpu").model
    assert (model[0].out_channels, model[3].out_channels) == (5, 6)
    # Sizes hold until the one cut; the zeros grow with the curve, momenta too.
    assert set(watch.sizes) == {(10, 12), (5, 6)} and method.changes == {}
    assert watch.zeros[:3] == [(0, 0)] + [(10 - method.allowed(10, epoch),) * 2 for epoch in (1, 2)]


class Asked(ProgressiveGradientPruning):
    """Notes the scores and what stays; keeps network, momenta and graph as they are before the second decision."""

    def _scores(self, trainer):
        self.worth = super()._scores(trainer)
        return self.worth

    def _cut(self, trainer):
        first = not hasattr(self, "before")
        if first:
            momenta = trainer.state.optimizers["main"].state
            named = dict(trainer.state.model.named_parameters())
            self.before = copy.deepcopy(trainer.state.model)
            self.momenta = {n: momenta[p]["momentum_buffer"].clone() for n, p in named.items()}
        graph = self._graph
        super()._cut(trainer)
        if first:
            self.graph, self.kept, self.reset = graph, *(self.decided[key] for key in ("kept", "reset"))

    def _choose(self, worth):
        self.decided = super()._choose(worth)
        return self.decided


@pytest.mark.parametrize("criterion", ["l2", "taylor", "grad_change"])
def test_any_criterion_says_what_goes(digits, criterion):
    made = make_method(Asked, {"rate": 0.5, "epochs": 1, "criterion": criterion, "calibration_images": 64}, digits)
    model = train(net(), digits, replace(QUICK, epochs=1), methods=(made,), device="cpu").model
    assert (model[0].out_channels, model[3].out_channels) == (5, 6)
    batches = draw_calibration(digits, 64, seed=0, device="cpu")
    scores = score_units(criterion, made.before, made.graph, batches, seed=1)
    for name, kept in made.kept.items():
        assert sorted(kept) == sorted(scores[name].topk(len(kept)).indices.tolist())
        assert len(kept) == made.graph[name].size // 2


def test_a_group_that_the_criterion_does_not_score_stays(digits):
    method = ProgressiveGradientPruning(0.5, epochs=1, criterion="bn_scale")
    model = train(net(), digits, replace(QUICK, epochs=1), methods=(method,), device="cpu").model
    assert (model[0].out_channels, model[3].out_channels) == (5, 12)


def test_a_step_after_the_cut_is_the_step_of_the_masked_network(digits):
    """No norm, no ReLU: what is kept must move as in the network before the cut, its weak units silent."""

    class First(Method):
        """Keeps the batch and the network of the first step after the cut."""

        name = "first"
        order = 100
        events = frozenset({Event.AFTER_TRANSFORM, Event.AFTER_OPTIMIZER_STEP})

        def apply(self, event, trainer):
            state = trainer.state
            if not hasattr(method, "kept") or hasattr(self, "after"):
                return
            if event is Event.AFTER_TRANSFORM:
                self.images, self.targets = state.images.clone(), state.targets.clone()
                self.start = {n: p.detach().clone() for n, p in state.model.named_parameters()}
                moved = state.optimizers["main"].state
                self.momenta = {n: moved[p]["momentum_buffer"].clone() for n, p in state.model.named_parameters()}
                self.group = {k: state.optimizers["main"].param_groups[0][k] for k in ("momentum", "nesterov")}
            else:
                self.rates = [group["lr"] for group in state.optimizers["main"].param_groups]
                self.after = {n: p.detach().clone() for n, p in state.model.named_parameters()}

    torch.manual_seed(0)
    linear = nn.Sequential(nn.Conv2d(1, 10, 3, padding=1, stride=2), nn.Flatten(), nn.Linear(10 * 16, 10))
    method, first = Asked(0.6, epochs=2, remove=0.5), First()
    settings = replace(QUICK, weight_decay=0.0, label_smoothing=0.0, gradient_clip=None, epochs=3)
    train(linear, digits, settings, methods=(method, first), device="cpu")

    (kept,), (reset,) = method.kept.values(), method.reset.values()
    gone = sorted(set(range(10)) - set(kept))
    assert (len(gone), len(reset)) == (1, 2) and set(reset) < set(kept)
    silent = torch.tensor([*gone, *reset])
    stay = torch.tensor([unit for unit in kept if unit not in reset])
    place = torch.tensor([kept.index(int(unit)) for unit in stay])
    # What was kept is as it was, bit for bit; what starts again is zero, and has forgotten.
    rows = [kept.index(unit) for unit in reset]
    for before, found in ((method.before.state_dict(), first.start), (method.momenta, first.momenta)):
        assert all(torch.equal(found[key][place], before[key][stay]) for key in ("0.weight", "0.bias"))
        assert all((found[key][rows] == 0).all() for key in ("0.weight", "0.bias"))
        columns = before["2.weight"].view(10, 10, 16)
        assert torch.equal(found["2.weight"].view(10, -1, 16), columns[:, kept])

    masked = method.before.train()
    optimizer = torch.optim.SGD(masked.parameters(), lr=first.rates[0], **first.group)
    for key, parameter in masked.named_parameters():
        optimizer.state[parameter]["momentum_buffer"] = method.momenta[key].clone()
    mask = torch.ones(10)
    mask[silent] = 0
    F.cross_entropy(masked[2](masked[1](masked[0](first.images) * mask[:, None, None])), first.targets).backward()
    optimizer.step()
    expected = dict(masked.named_parameters())
    assert len(set(first.rates)) == 1
    for key in ("0.weight", "0.bias"):
        assert torch.allclose(first.after[key][place], expected[key][stay], atol=1e-6)
        assert not torch.allclose(first.after[key][place], first.start[key][place], atol=1e-5)
    columns = expected["2.weight"].view(10, 10, 16)
    assert torch.allclose(first.after["2.weight"].view(10, -1, 16)[:, place], columns[:, stay], atol=1e-6)
    assert torch.allclose(first.after["2.bias"], expected["2.bias"], atol=1e-6)


def test_gradients_summed_and_gradients_by_batch(network, graph, batches):
    summed = grad_change(network, graph, batches, normalise="none")
    apart = grad_change(network, graph, batches, mode="per_batch", normalise="none")
    assert all((apart[name] >= summed[name] - 1e-6).all() for name in summed)
    network.zero_grad()
    total = sum(F.cross_entropy(network(x), y) for x, y in batches)
    total.backward()
    assert torch.allclose(summed["inner"], network.inner.weight.grad.abs().sum((1, 2, 3)), rtol=1e-4)
    backwards = grad_change(network, graph, batches[::-1], normalise="none")
    assert all(torch.allclose(backwards[name], summed[name], rtol=1e-3, atol=1e-6) for name in summed)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ProgressiveGradientPruning(epochs=3),
        lambda: ProgressiveGradientPruning(epochs=3, criterion="random", decay="psfp"),
        lambda: DynamicChannelPropagation(0.4, explore=0.0),
    ],
)
def test_a_stopped_training_goes_on_to_the_same_bits(digits, tmp_path, make):
    class Stop(Method):
        name = "stop"
        events = frozenset({Event.EPOCH_START})

        def apply(self, event, trainer):
            if trainer.state.clock.epoch == 2:
                raise KeyboardInterrupt

    whole = train(net(), digits, QUICK, methods=(make(),), device="cpu").model
    with pytest.raises(KeyboardInterrupt):
        train(net(), digits, QUICK, methods=(make(), Stop()), device="cpu", checkpoint_dir=tmp_path)
    resumed = train(net(), digits, QUICK, methods=(make(),), device="cpu", checkpoint_dir=tmp_path).model
    assert whole[0].out_channels < 10 or whole[3].out_channels < 12
    assert all(torch.equal(tensor, resumed.state_dict()[name]) for name, tensor in whole.state_dict().items())


# -- dynamic channel propagation ----------------------------------------------------------------------------------


def test_what_is_open_is_exactly_the_complement_of_the_rate():
    utility = {"a": torch.tensor([0.1, 0.2, 0.3, 0.4]), "b": torch.tensor([0.0, 0.0, 0.0])}
    assert all(flags.all() for flags in open_units(utility, 0.0).values())
    found = open_units(utility, 0.5)
    assert sum(int((~flags).sum()) for flags in found.values()) == round(0.5 * 7)
    assert found["b"].sum() == 1 and found["a"].tolist() == [False, False, True, True]
    assert min(flags.sum() for flags in open_units(utility, 0.99, at_least=2).values()) == 2


def test_a_closed_gate_is_a_removed_unit_and_its_maker_gets_no_gradient(network, graph, batches):
    readers = {name: found for name, found in find_readers(network, graph).items() if name in ("inner", "stem")}
    flags = {name: torch.arange(graph[name].size) % 3 > 0 for name in readers}
    gates = Gatekeeper([network], readers, flags)
    F.cross_entropy(network(batches[0][0]), batches[0][1]).backward()
    shut = ~flags["inner"]
    assert (network.inner.weight.grad[shut] == 0).all() and (network.inner_norm.weight.grad[shut] == 0).all()
    assert (network.inner.weight.grad[~shut] != 0).any()
    assert gates.take() == {}, "nothing is gathered in evaluation mode"
    network.train()
    F.cross_entropy(network(batches[0][0]), batches[0][1]).backward()
    worth = gates.take()
    assert (worth["inner"][shut] == 0).all() and (worth["inner"][~shut] > 0).any()
    network.eval()
    closed = network(batches[0][0])
    gates.close()
    apply(network, graph.shrink({name: flag.nonzero().flatten() for name, flag in flags.items()}))
    assert torch.allclose(network(batches[0][0]), closed, atol=1e-5)


def test_utilities_fade_for_the_open_and_rest_for_the_closed():
    method = DynamicChannelPropagation(0.4, decay=0.6)
    assert [method.decay_at(share) for share in (0.0, 0.5, 0.8, 0.95, 1.0)] == pytest.approx([0.6, 0.7, 0.8, 1, 1])
    method.utility, method.open = {"a": torch.tensor([0.0, 0.5])}, {"a": torch.tensor([True, False])}

    class Steady:
        def take(self):
            return {"a": torch.tensor([2.0, 0.0])}

    method._gates = Steady()
    for n in range(1, 6):
        method._remember(0.6)
        assert method.utility["a"].tolist() == pytest.approx([(1 - 0.6**n) / 0.4, 0.5])


@pytest.mark.parametrize("options", [{"rate": 0.4}, {"budget": "macs<=50%"}, {"rate": 0.5, "every": 5}])
def test_training_ends_with_the_closed_channels_gone_and_the_same_outputs(digits, options):
    class Before(Method):
        """Keeps the closed network as it is before the cut."""

        name = "before"
        order = -200  # after it at the ends
        events = frozenset({Event.EVALUATION_END})

        def apply(self, event, trainer):
            self.accuracy = None
            images = digits.preprocessing(digits.validation.images(slice(0, 50)))
            trainer.state.model.eval()
            with torch.no_grad():
                self.outputs = trainer.state.model(images)
            trainer.state.model.train()

    start, before = net(), Before()
    method = DynamicChannelPropagation(groups="all", explore=0.1, **options)
    model = train(copy.deepcopy(start), digits, QUICK, methods=(method, before), device="cpu").model.eval()
    example = digits.preprocessing(digits.train.images([0]))
    units = model[0].out_channels + model[3].out_channels
    if "budget" in options:
        assert count(model, example).macs <= 0.5 * count(start, example).macs
    else:
        assert units == 22 - round(options["rate"] * 22)
    assert not any(module._forward_pre_hooks for module in model.modules())
    if options.get("every", 1) == 1:
        images = digits.preprocessing(digits.validation.images(slice(0, 50)))
        with torch.no_grad():
            agreement = (model(images).argmax(1) == before.outputs.argmax(1)).float().mean()
        assert agreement > 0.9


def test_the_averaged_network_is_looked_at_through_the_gates(digits):
    class Look(Method):
        """Compares the averaged network, which validation sees, with itself cut to what is open."""

        name = "look"
        order = 100
        events = frozenset({Event.EVALUATION_END})

        def __init__(self):
            self.errors = []

        def apply(self, event, trainer):
            closed = {name: flags for name, flags in method.open.items() if not flags.all()}
            if not closed or method.finished:
                return
            averaged, images = trainer.state.ema.module, digits.preprocessing(digits.validation.images(slice(0, 20)))
            cut = copy.deepcopy(averaged)
            for module in cut.modules():
                module._forward_pre_hooks.clear()
            whole = cut(images)
            apply(cut, method._graph.shrink({n: flags.nonzero().flatten() for n, flags in closed.items()}))
            error, without = ((averaged(images) - other).abs().max().item() for other in (cut(images), whole))
            self.errors.append((error, without))

    method, look = DynamicChannelPropagation(0.4, groups="all", explore=0.1), Look()
    settings = TrainSettings(**{**QUICK.__dict__, "epochs": 2, "ema_decay": 0.9})
    train(net(), digits, settings, methods=(method, look), device="cpu")
    assert look.errors and all(error < 1e-4 < without for error, without in look.errors)


def test_channel_utility_does_not_cancel_over_images(network, graph, batches):
    scores = channel_utility(network, graph, batches, normalise="none")
    rows = list(sample_saliencies(network, graph, batches, F.cross_entropy, "test"))
    for name, score in scores.items():
        assert torch.allclose(score, torch.cat([found[name] for found in rows]).abs().mean(0), rtol=1e-4)
    assert all(float(score.max()) == pytest.approx(1) for score in channel_utility(network, graph, batches).values())


def test_what_cannot_be_asked_for_is_named(digits):
    with pytest.raises(UsageError, match="mode='perbatch'"):
        ProgressiveGradientPruning(mode="perbatch")
    with pytest.raises(UsageError, match="decay='fast'"):
        ProgressiveGradientPruning(decay="fast")
    with pytest.raises(UsageError, match="l2_norm"):
        ProgressiveGradientPruning(criterion="l2_norm")
    with pytest.raises(UsageError, match="not of criterion l2"):
        ProgressiveGradientPruning(criterion="l2", mode="accumulate")
    with pytest.raises(UsageError, match="criterion taylor needs calibration"):
        ProgressiveGradientPruning(criterion="taylor")
    with pytest.raises(UsageError, match="without a criterion"):
        ProgressiveGradientPruning(criterion_options={"normalise": "max"})
    with pytest.raises(UsageError, match="rate=1"):
        ProgressiveGradientPruning(1.0)
    with pytest.raises(UsageError, match="epochs=9, but the training has 4"):
        train(net(), digits, QUICK, methods=(ProgressiveGradientPruning(epochs=9),), device="cpu")
    with pytest.raises(UsageError, match="latency<=2ms is for `prune`"):
        DynamicChannelPropagation(budget="macs<=50%, latency<=2ms")
    with pytest.raises(UsageError, match="decay=2"):
        DynamicChannelPropagation(decay=2)
    with pytest.raises(UsageError, match="groups='some'"):
        DynamicChannelPropagation(groups="some")


def test_a_layer_without_gradient_only_fades_and_an_outlier_shrinks_the_others_less_by_the_mean():
    class Given:
        def __init__(self, values):
            self.values = values

        def take(self):
            return {"a": torch.tensor(self.values)}

    found = {}
    for how in ("max", "mean"):
        method = DynamicChannelPropagation(normalise=how)
        method.utility, method.open = {"a": torch.tensor([1.0, 1.0, 1.0])}, {"a": torch.tensor([True, True, False])}
        method._gates = Given([0.0, 0.0, 0.0])
        method._remember(0.5)
        assert method.utility["a"].tolist() == [0.5, 0.5, 1.0], "the closed one rests"
        method._gates = Given([float("inf"), 1.0, 0.0])
        method._remember(0.5)
        assert method.utility["a"].tolist() == [0.5, 0.5, 1.0], "a step that overflowed says nothing"
        method._gates = Given([8.0, 1.0, 0.0])
        method._remember(1.0)
        found[how] = method.utility["a"].tolist()
    assert found["max"] == pytest.approx([1.5, 0.625, 1.0])
    assert found["mean"] == pytest.approx([0.5 + 8 / 3, 0.5 + 1 / 3, 1.0])
    with pytest.raises(UsageError, match="normalise='sum'"):
        DynamicChannelPropagation(normalise="sum")


def test_the_networks_of_the_paper_have_their_counts():
    """VGG-16 for CIFAR without biases and with one linear layer; ResNet-32 with option A and with 1x1 shortcuts."""
    layers, channels = [], 3
    for width in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0):
        if not width:
            layers.append(torch.nn.MaxPool2d(2))
            continue
        layers += [
            torch.nn.Conv2d(channels, width, 3, padding=1, bias=False),
            torch.nn.BatchNorm2d(width),
            torch.nn.ReLU(),
        ]
        channels = width
    with torch.device("meta"):
        image = torch.zeros(1, 3, 32, 32)
        vgg = torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.Linear(512, 10)).to("meta").eval()
        found = count(vgg, image)
    assert found.parameters == 14_724_042 and found.macs == pytest.approx(313.2e6, rel=1e-3)
    resnet = count(create_model("resnet32", seed=0), torch.zeros(1, 3, 32, 32))
    assert resnet.parameters == 464_154 and resnet.macs == pytest.approx(68.9e6, rel=1e-3)
    # A 1x1 convolution with a norm in place of each of the two option-A shortcuts.
    shortcuts = sum(ins * 2 * ins + 4 * ins for ins in (16, 32))
    assert resnet.parameters + shortcuts == 466_906
