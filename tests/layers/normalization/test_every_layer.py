"""What holds for every layer of the room: odd input, folds, state, export, compilation."""

import pytest
import torch
from tests.layers import common
from torch import nn

from convette.errors import UsageError
from convette.layers import Stays, TakesOver, folded_form
from convette.layers.normalization import (
    BL,
    IBN,
    TABL,
    BilinearNorm,
    BilinearNorm2d,
    BNET2d,
    ConsistentBatchNorm2d,
    ConsistentUnit,
    FilteredBatchNorm1d,
    FilteredBatchNorm2d,
    FinalNormLinear,
    MixStyle,
    PooledFilteredBatchNorm1d,
    SkewReducedBatchNorm2d,
    SparseSwitchNorm2d,
    TwoMomentNorm2d,
    WAConv2d,
    tabl,
    weight_align,
)

C = 6


def unit(norm=None, shortcut=True):
    convs = [nn.Conv2d(C, 4, 3, padding=1, bias=False), nn.Conv2d(4, C, 3, padding=1, bias=False)]
    made = ConsistentUnit(convs, norm or ConsistentBatchNorm2d(C), nn.Conv2d(C, C, 1) if shortcut else None)
    with torch.no_grad():
        nn.init.normal_(made.convs[1].weight, std=0.1)
        for parameter in (*made.before, *made.after, made.scale):
            parameter.add_(0.3)
    return made


def picked(name, var=None):
    layer = SparseSwitchNorm2d(C)
    with torch.no_grad():
        layer.mean_logits[["in", "ln", "bn"].index(name)] += 1
        layer.var_logits[["in", "ln", "bn"].index(var or name)] += 1
    layer.decide()
    return layer


MAPS = {
    "wa": lambda: WAConv2d(C, C, 3, padding=1),
    "wa_parametrized": lambda: weight_align(nn.Sequential(nn.Conv2d(C, C, 3, padding=1))),
    "ssn": lambda: SparseSwitchNorm2d(C),
    "ssn_bn": lambda: picked("bn"),
    "ssn_in": lambda: picked("in"),
    "ssn_ln": lambda: picked("ln"),
    "ssn_mixed": lambda: picked("ln", "bn"),
    "two_moments": lambda: TwoMomentNorm2d(C, mean="bn", var="in"),
    "bnsr": lambda: SkewReducedBatchNorm2d(C),
    "bnsr_learned": lambda: SkewReducedBatchNorm2d(C, 0.8, learned=True, restandardize=True),
    "bnsr_adaptive": lambda: SkewReducedBatchNorm2d(C, 0.8, mode="adaptive"),
    "bnsr_linear": lambda: SkewReducedBatchNorm2d(C, 1.0),
    "filtered": lambda: FilteredBatchNorm2d(C, threshold=2.0),
    "bnet": lambda: BNET2d(C),
    "bnet_1": lambda: BNET2d(C, 1),
    "ibn": lambda: IBN(C),
    "ibn_in": lambda: IBN(C, 1.0),
    "ibn_bn": lambda: IBN(C, 0.0),
    "mixstyle": lambda: MixStyle(p=1.0),
    "consistent": lambda: ConsistentBatchNorm2d(C, stats="clean"),
    "unit": unit,
    "unit_identity": lambda: unit(shortcut=False),
    "unit_group": lambda: unit(nn.GroupNorm(2, C)),
    "bin_2d": lambda: BilinearNorm2d(5, 4),
}
MATRICES = {
    "bin": lambda: BilinearNorm(C, 5),
    "bl": lambda: BL((C, 5), (3, 2)),
    "tabl": lambda: TABL((C, 5), (3, 1)),
    "tabl_network": lambda: tabl("B", (C, 5), 3),
    "filtered_1d": lambda: FilteredBatchNorm1d(C, threshold=2.0),
}
VECTORS = {
    "final": lambda: FinalNormLinear(C, 3),
    "final_features": lambda: FinalNormLinear(C, 3, where="features"),
    "filtered_pooled": lambda: PooledFilteredBatchNorm1d(C),
}
ALL = MAPS | MATRICES | VECTORS
# Layers whose statistics are of the batch: one value a channel is refused in training.
BATCH = {
    *("ssn", "ssn_bn", "ssn_in", "ssn_ln", "ssn_mixed", "bnsr", "bnsr_learned", "bnsr_adaptive", "bnsr_linear"),
    *("filtered", "bnet", "bnet_1", "ibn", "ibn_bn", "consistent", "final", "final_features"),
}
STAY = {"ssn", "two_moments", "bnsr", "bnsr_learned", "bnsr_adaptive", "bnet", "ibn", "unit_group", "bin", "bin_2d"}
PLAIN = {"bl", "tabl", "two_moments"}


def example(name, count=8, dtype=torch.float32):
    torch.manual_seed(3)
    shape = (C, 5, 4) if name in MAPS else (C, 5) if name in MATRICES else (C,)
    return (torch.randn(count, *shape) * 2 + 0.5).to(dtype)


def learned(name):
    return common.learned(ALL[name], example(name))


@pytest.mark.parametrize("name", ALL)
def test_state_dict_round_trip_and_copies(name):
    common.check_state_and_copies(ALL[name], learned(name).eval(), example(name))


@pytest.mark.parametrize("name", ALL)
def test_gradients_flow_and_are_finite(name):
    layer = ALL[name]().train()
    x = example(name).requires_grad_()
    layer(x).square().mean().backward()
    assert bool(torch.isfinite(x.grad).all())
    for label, parameter in layer.named_parameters():
        if parameter.grad is not None:
            assert bool(torch.isfinite(parameter.grad).all()), label


@pytest.mark.parametrize("name", ALL)
def test_eval_does_not_depend_on_the_batch(name):
    common.check_examples_are_alone(learned(name).eval(), example(name))


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("training", [True, False])
def test_channels_last_gives_the_same(name, training):
    common.check_channels_last(learned(name).train(training and name != "mixstyle"), example(name))


@pytest.mark.parametrize("name", ALL)
def test_bfloat16_input_keeps_float32_statistics(name):
    """Under autocast parameters stay float32 and features are bfloat16."""
    layer, exact = learned(name), learned(name)
    x = example(name) + 100  # of 8 bits, a mean of 100 leaves little for sums in bfloat16
    if name == "mixstyle":
        layer.eval(), exact.eval()
    half = x.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(half)
    expected = exact(half.float())
    assert bool(torch.isfinite(found.float()).all())
    scale = float(expected.std()) + 1e-3
    if not any(isinstance(module, nn.Conv2d | nn.Linear | BL | TABL) for module in layer.modules()):
        assert float((found.float() - expected).abs().max()) < 0.05 * max(scale, float(expected.abs().max()))
    ours, theirs = dict(layer.named_buffers()), dict(exact.named_buffers())
    for key in ours:
        if ours[key].is_floating_point() and "unit" not in name and "bin" not in name and "tabl" not in name:
            assert ours[key].dtype == torch.float32
            torch.testing.assert_close(ours[key], theirs[key], atol=0.5, rtol=2e-2)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("value", [0.0, 1.0, 1e4])
def test_constant_input_gives_finite_numbers(name, value):
    common.check_constant_input(ALL[name]().train(), torch.full_like(example(name), value))


@pytest.mark.parametrize("name", ALL)
def test_not_a_number_comes_out_and_spoils_nothing(name):
    layer = ALL[name]().train()
    x = example(name)
    x.view(-1)[3] = float("nan")
    assert bool(torch.isnan(layer(x)).any())
    if name.startswith(("ssn", "filtered", "consistent")):
        for buffer in layer.buffers():
            assert bool(torch.isfinite(buffer).all())


@pytest.mark.parametrize("name", ALL)
def test_empty_batch(name):
    common.check_empty_batch(learned(name), example(name))


@pytest.mark.parametrize("name", sorted(BATCH))
def test_one_value_a_channel_is_refused_in_training(name):
    layer = ALL[name]().train()
    x = example(name)[:2] if name == "consistent" else example(name)[:1]
    x = x[..., :1, :1] if name in MAPS else x
    common.check_one_value_is_refused(layer, x, match=r"at least 2|1x1")


@pytest.mark.parametrize("name", MAPS)
def test_one_by_one_maps_in_eval(name):
    layer = learned(name).eval()
    try:
        y = layer(example(name)[..., :1, :1])
    except UsageError as error:
        assert name in ("ibn", "ibn_in", "bin_2d"), error
    else:
        assert bool(torch.isfinite(y).all())


@pytest.mark.parametrize("name", ALL)
def test_another_shape_is_refused_with_a_clear_error(name):
    if name in ("mixstyle", "filtered_pooled", "bin_2d"):
        pytest.skip("takes any width")
    x = example(name)
    wrong = torch.cat([x, x], 1)
    with pytest.raises((UsageError, RuntimeError)):
        ALL[name]()(wrong)


@pytest.mark.parametrize("name", ALL)
def test_folds_are_exact_or_say_why_not(name):
    layer = learned(name).eval()
    result = common.check_folded(layer, example(name))
    if name in STAY - PLAIN:
        assert result.kept
        with pytest.raises(Stays):
            folded_form(layer)
    elif name not in PLAIN and name != "tabl_network":
        assert result.folded and not result.kept
        assert (
            all(type(m).__module__.startswith("torch") for m in result.model.modules())
            or "unit" in name
            or name == "ssn_mixed"
        )


@pytest.mark.parametrize("name", [name for name in ALL if name != "wa_parametrized"])
def test_torch_export(name):
    common.check_torch_export(learned(name).eval(), example(name))


@pytest.mark.parametrize("name", MAPS)
def test_surgery_folds_around_it_and_shrinks_it_exactly(name):
    common.check_surgery(*common.network_around(learned(name), C))


@pytest.mark.parametrize(
    "name", ["ssn", "bnsr", "bnsr_linear", "filtered", "bnet", "bnet_1", "ibn", "ibn_bn", "consistent"]
)
def test_what_a_batch_norm_has_learned_is_taken_over(name):
    torch.manual_seed(8)
    norm = nn.BatchNorm2d(C)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2), norm.bias.normal_()
    norm(example(name) * 3)
    norm.eval()
    layer = ALL[name]()
    if isinstance(layer, TakesOver):
        layer.take_over(nn.Identity())
        layer.take_over(norm)
    else:
        layer.load_state_dict(norm.state_dict(), strict=False)
    x = example(name)
    found, expected = layer.eval()(x), norm(x)
    if name in ("ssn", "bnsr"):
        assert torch.equal(layer.weight, norm.weight) and torch.equal(layer.bias, norm.bias)
    elif name == "ibn":
        torch.testing.assert_close(found[:, C // 2 :], expected[:, C // 2 :], atol=1e-5, rtol=1e-5)
    else:
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "kind", [SparseSwitchNorm2d, SkewReducedBatchNorm2d, FilteredBatchNorm2d, BNET2d, IBN, ConsistentBatchNorm2d]
)
def test_surgery_converts_a_network_to_it(kind):
    from convette.models import create_model
    from convette.surgery import convert

    model = create_model("resnet20", num_classes=4, seed=0)
    convert(model, {nn.BatchNorm2d: kind}, torch.randn(2, 3, 16, 16))
    assert sum(isinstance(module, kind) for module in model.modules()) == 19
    model.train()(torch.randn(2, 3, 16, 16)).sum().backward()


def test_exported_to_onnx_they_agree(tmp_path):
    """One file with every layer of maps that has a deployable form; switchable ones are collapsed first."""
    torch.manual_seed(7)
    names = [
        "wa",
        "bnsr",
        "bnsr_adaptive",
        "filtered",
        "bnet",
        "ibn",
        "mixstyle",
        "consistent",
        "unit_identity",
        "bin_2d",
    ]
    layers = [learned(name) for name in names]
    layers += [picked("bn").folded(), picked("ln", "bn").folded(), picked("in").folded()]
    model = nn.Sequential(*layers).eval()
    common.check_onnx(model, example("ibn"), tmp_path, atol=1e-4, rtol=1e-4)


# One of each make: compiling is slow.
COMPILED = ["wa", "ssn", "bnsr_adaptive", "filtered", "bnet", "ibn", "mixstyle", "consistent", "bin", "final"]


def compiled():
    return {name: (ALL[name](), example(name)) for name in COMPILED}


def test_training_compiles_without_a_graph_break():
    common.check_compiles(__name__)
