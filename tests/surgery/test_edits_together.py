"""Any edits one after another: the optimiser follows, copies follow, and the file gives the same network back."""

import copy

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.surgery.nets import OptionAResNet, randomise
from torch import nn

from convette import surgery
from convette.errors import StructureError

IMAGES = torch.randn(3, 3, 12, 12, generator=torch.Generator().manual_seed(0))
NORMS = (nn.BatchNorm2d, nn.GroupNorm, nn.InstanceNorm2d)


def build(origin=None):
    torch.manual_seed(0)
    return randomise(OptionAResNet(blocks=2, width=4))


def pick(data, items):
    return data.draw(st.sampled_from(list(items)))


def drawn_edits(kind, model, data):
    """Return edits of a kind that fit `model` as it is, drawn by hypothesis."""
    seed = data.draw(st.integers(0, 99))
    if kind in ("shrink", "grow"):
        graph = surgery.trace(model, IMAGES)
        group = pick(data, graph.groups)
        if kind == "shrink":
            return [graph.shrink({group.name: torch.arange(data.draw(st.integers(1, group.size)))})]
        mode = pick(data, ["split", "zero_in", "zero_out"])
        return [surgery.grow(graph, {group.name: data.draw(st.integers(1, 4))}, mode, seed=seed, exact=False)]
    if kind == "insert":
        places = [name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
        form = pick(data, ["conv", "block"])
        return [surgery.insert(model, pick(data, places), IMAGES, form, kernel_size=1, seed=seed)] if places else []
    if kind == "remove":
        names = surgery.removable(model, IMAGES)
        return [surgery.remove(model, pick(data, names), IMAGES)] if names else []
    if kind == "convert":
        norm = {nn.GroupNorm: surgery.Replacement(nn.GroupNorm, {"num_groups": 1})}
        target = pick(data, NORMS)
        places = [name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
        if not places:
            return []
        policy = {nn.BatchNorm2d: norm.get(target, target)}
        return surgery.convert_edits(model, policy, IMAGES, include=pick(data, places), seed=seed)
    return surgery.fold_edits(model, IMAGES)[:2]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    kinds=st.lists(st.sampled_from(["shrink", "grow", "insert", "remove", "convert", "fold"]), min_size=2, max_size=5),
    data=st.data(),
)
def test_any_sequence_of_edits(kinds, data, tmp_path_factory):
    model = surgery.set_origin(build(), surgery.Origin("test"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    average = copy.deepcopy(model)
    for kind in kinds:
        model.train()
        optimizer.zero_grad()
        model(IMAGES).square().mean().backward()
        optimizer.step()
        model.eval()
        modules, log = list(model.modules()), list(surgery.structure_log(model).edits)
        try:
            edits = drawn_edits(kind, model, data)
        except StructureError:
            assert kind in ("grow", "shrink")
            edits = []
        assert list(model.modules()) == modules and surgery.structure_log(model).edits == log
        change = surgery.apply(model, *edits)
        change.migrate_optimizer(optimizer)
        change.migrate(average)
        held = [id(p) for group in optimizer.param_groups for p in group["params"]]
        # A folded layer's new bias is for inference: nothing trains it.
        known = {id(p) for name, p in model.named_parameters() if kind != "fold" or not name.endswith("bias")}
        assert len(held) == len(set(held)) and known <= set(held)
        if kind == "fold":
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                state = optimizer.state.get(parameter, {})
                assert all(v.shape == parameter.shape for k, v in state.items() if k.startswith("exp"))
    assert {name: t.shape for name, t in average.state_dict().items()} == {
        n: t.shape for n, t in model.state_dict().items()
    }
    path = tmp_path_factory.mktemp("m") / "m.safetensors"
    surgery.save_model(model, path)
    again = surgery.load_model(path, build)
    with torch.no_grad():
        assert torch.equal(again(IMAGES), model.eval()(IMAGES))
    assert surgery.structure_log(again).edits == surgery.structure_log(model).edits
