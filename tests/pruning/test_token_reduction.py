"""Fewer tokens: what merging keeps, what it costs, and the schedule that a small vision transformer gets."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from convette import models
from convette.cost import count
from convette.errors import BudgetError, StructureError, UsageError
from convette.layers import find_layer, folded_form
from convette.layers.attention import TokenReduction, insert_token_reduction, match_tokens
from convette.pruning import reduce_tokens, token_trajectory
from convette.pruning.token_reduction import TokenCosts, choose_schedule, find_blocks, least_schedule
from convette.surgery import Conversion, apply, convert_by, remove, structure_log, trace

IMAGES = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def transformer(**arguments):
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    given = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 5}
    return VisionTransformer(**{**given, **arguments}).eval()


@pytest.fixture(scope="module")
def scored():
    """A network, what its tokens are worth, and what every schedule costs."""
    model = transformer()
    found = token_trajectory(model, IMAGES, step=2)
    return model, found, TokenCosts(model, found, IMAGES[:1], count(model, IMAGES[:1]).macs)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 500), st.integers(2, 13), st.integers(0, 3), st.data())
def test_tokens_are_averages_of_groups_and_the_first_stay_as_they_are(seed, patches, prefix, data):
    remove = data.draw(st.integers(0, patches // 2))
    x = torch.randn(3, prefix + patches, 4, generator=torch.Generator().manual_seed(seed))
    y = TokenReduction(remove, prefix)(x)
    assert y.shape == (3, prefix + patches - remove, 4)
    assert torch.equal(y[:, :prefix], x[:, :prefix])
    groups = match_tokens(x, remove, prefix)
    for image in range(3):
        members = [x[image, groups[image] == number] for number in range(y.shape[1])]
        assert all(len(part) for part in members)
        torch.testing.assert_close(y[image], torch.stack([part.mean(0) for part in members]))
        assert all(torch.equal(y[image, number], part[0]) for number, part in enumerate(members) if len(part) == 1)
    torch.testing.assert_close(TokenReduction(remove, prefix)(x[1:2]), y[1:2])  # no image sees another


def test_nothing_removed_is_the_network_as_it_was():
    x = torch.randn(2, 5, 4)
    assert TokenReduction(0)(x) is x and isinstance(folded_form(TokenReduction(0)), nn.Identity)
    model = transformer()
    assert torch.equal(insert_token_reduction(transformer(), 0)(IMAGES), model(IMAGES))
    network = reduce_tokens(model, IMAGES, "macs<=100%", step=8)
    assert torch.equal(network(IMAGES), model(IMAGES)) and not structure_log(network).edits


def test_equal_tokens_merge_without_changing_the_mean():
    pairs = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(3))
    x = pairs.repeat_interleave(2, dim=1)
    y = TokenReduction(6, prefix_tokens=0)(x)
    torch.testing.assert_close(y, pairs)
    torch.testing.assert_close(y.mean(1), x.mean(1))


def test_the_most_alike_go_first_and_gradients_reach_all():
    x = torch.eye(8)[None].clone()
    x[0, 5] = x[0, 2] * 3  # token 2 and 5 point the same way, all others are orthogonal
    groups = match_tokens(x, 1, 0)[0]
    assert groups[2] == groups[5] and len(groups.unique()) == 7
    x.requires_grad_()
    TokenReduction(3)(x).square().sum().backward()
    assert bool((x.grad.abs().sum(-1) > 0).all())


def test_removing_nothing_costs_nothing_and_errors_are_at_least_zero(scored):
    _, found, _ = scored
    assert (found.blocks, found.tokens, found.width, found.removals) == ("blocks", 17, 24, (0, 2, 4, 6, 8))
    assert found.errors.shape == (3, 5) and bool((found.errors[:, 0] == 0).all())
    assert bool((found.errors[:, 1:] > 0).all())
    assert torch.equal(found.errors, token_trajectory(scored[0], IMAGES, step=2).errors)


def test_tokens_that_are_all_equal_can_go_for_free():
    model = transformer(pos_embed="none")
    found = token_trajectory(model, IMAGES[:2] * 0 + 0.5, step=4)
    # The same value to attend to, fewer times: only its weight against the class token changes.
    busy = token_trajectory(model, IMAGES[:2], step=4)
    assert float(found.errors.max()) < 0.1 * float(busy.errors.max())


@pytest.mark.parametrize("schedule", [[0, 0, 0], [8, 4, 2], [2, 0, 6], [0, 0, 8]])
def test_macs_are_predicted_as_they_are_counted(scored, schedule):
    model, _, costs = scored
    network = insert_token_reduction(transformer(), schedule)
    assert costs.macs(schedule) == count(network, IMAGES[:1]).macs
    assert count(model, IMAGES[:1]).parameters == count(network, IMAGES[:1]).parameters


@pytest.mark.parametrize("share", [0.95, 0.8, 0.7, 0.6])
def test_the_schedule_is_the_best_of_all_that_fit(scored, share):
    model, found, costs = scored
    limit = share * count(model, IMAGES[:1]).macs
    best = None
    for schedule in itertools.product(range(5), repeat=3):
        removal, tokens, fine = [found.removals[column] for column in schedule], 16, True
        for number in removal:
            fine, tokens = fine and number <= tokens // 2, tokens - number
        if fine and costs.macs(removal) <= limit:
            error = sum(float(found.errors[block, column]) for block, column in enumerate(schedule))
            best = error if best is None else min(best, error)
    chosen = choose_schedule(found, costs, limit)
    assert best is not None and costs.macs(chosen) <= limit
    error = sum(float(found.errors[block, found.removals.index(number)]) for block, number in enumerate(chosen))
    assert error == pytest.approx(best, rel=1e-6)


def test_budget_met_saved_loaded_and_cut_further(tmp_path):
    model = models.create_model("timm:test_vit", num_classes=5, seed=0).eval()
    images = torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(2))
    apply(model, remove(model, "blocks.2", images[:1]))  # an identity among the blocks from here on
    before = model(images)
    network = reduce_tokens(model, images, "macs<=70%", step=25)
    start, end = count(model, images[:1]), count(network, images[:1])
    assert end.macs <= 0.7 * start.macs and end.parameters == start.parameters
    assert torch.equal(model(images), before)  # a copy was changed
    edit = structure_log(network).edits[-1]
    assert edit.kind == "install" and edit.arguments["blocks"] == "blocks" and sum(edit.arguments["remove"]) > 0
    models.save(network, tmp_path / "m.safetensors")
    assert torch.equal(models.load(tmp_path / "m.safetensors")(images), network(images))


def test_heads_and_neurons_are_cut_behind_merged_tokens():
    model = reduce_tokens(transformer(), IMAGES, "macs<=80%", step=4)
    graph = trace(model, IMAGES[:1])
    neurons = {group.name: torch.arange(group.size // 2) for group in graph.groups if "mlp" in group.name}
    assert len(neurons) == 3
    apply(model, graph.shrink(neurons), example=IMAGES[:1], prove=True)


def test_by_name_from_a_recipe():
    model = transformer()
    convert_by(model, Conversion("insert_token_reduction", options={"remove": [0, 4, 2]}), example=IMAGES[:1])
    assert [part.remove for part in model.modules() if isinstance(part, find_layer("TokenReduction"))] == [4, 2]


class Pyramid(nn.Module):
    """Blocks of tokens, then maps: the length has to stay."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(*(nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 3)) for _ in range(2)))

    def forward(self, x):
        return self.blocks(x.flatten(2).transpose(1, 2)).reshape(len(x), 32, 32, 3).mean((1, 2))


def test_what_cannot_be_is_said():
    with pytest.raises(UsageError, match="9 of 17 tokens cannot be merged here; 8 at the most"):
        TokenReduction(9)(torch.randn(2, 17, 4))
    with pytest.raises(UsageError, match="at least 0"):
        TokenReduction(-1)
    with pytest.raises(UsageError, match="ResNet has no transformer blocks"):
        find_blocks(models.create_model("timm:resnet18", seed=0), IMAGES)
    with pytest.raises(UsageError, match="no sequence 'layers' of equal blocks; it has: blocks"):
        insert_token_reduction(transformer(), 1, blocks="layers")
    with pytest.raises(UsageError, match="2 numbers for the 3 blocks"):
        insert_token_reduction(transformer(), [1, 2])
    with pytest.raises(UsageError, match="limits something else"):
        reduce_tokens(transformer(), IMAGES, "params<=50%")
    with pytest.raises(UsageError, match="must be positive"):
        token_trajectory(transformer(), IMAGES, step=0)
    with pytest.raises(StructureError, match="Pyramid does not run with fewer tokens from block 0 on"):
        token_trajectory(Pyramid(), IMAGES, prefix_tokens=0, step=512)


def test_a_budget_out_of_reach_names_the_least(scored):
    model, found, costs = scored
    least = costs.macs(least_schedule(found, costs))
    with pytest.raises(BudgetError, match=f"can go down to {least / 1e3:.1f} K at the least"):
        reduce_tokens(model, IMAGES, "macs<=10%", step=2)
    network = reduce_tokens(model, IMAGES, f"macs<={least}", step=2)
    assert count(network, IMAGES[:1]).macs == least
