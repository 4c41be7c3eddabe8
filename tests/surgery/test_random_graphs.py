"""Random networks: shrink, JSON, replay, fold, file names of groups; every one proved in float64."""

import json
import os

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.surgery.nets import half, randomise
from tests.surgery.random_graphs import OPERATIONS, RandomNet

from convette import surgery


def check(operations, seed):
    torch.manual_seed(seed % 1000)
    model = randomise(RandomNet(operations, seed)).double()
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    torch.manual_seed(seed % 1000)
    fresh = randomise(RandomNet(operations, seed)).double()
    with torch.no_grad():
        before = model(images)
    graph = surgery.trace(model, images)
    assert not graph.frozen, [str(item) for item in graph.frozen]
    assert len({group.name for group in graph}) == len(graph)
    owned = set()
    for group in graph:
        for member in group.members:
            keys = {(member.parameter, member.dim, int(index)) for index in member.index.reshape(-1)}
            assert len(keys) == member.index.numel() and not keys & owned, "an entry belongs to two units"
            owned |= keys
    edit = graph.shrink(half(graph, seed))
    with torch.no_grad():
        assert torch.equal(model(images), before)
    surgery.apply(model, edit, example=images, prove=True, tolerance=1e-9)
    surgery.replay(fresh, [surgery.edit_from_json(json.loads(json.dumps(edit.to_json())))])
    with torch.no_grad():
        got = model(images)
        assert torch.equal(fresh(images), got) and got.shape == before.shape
    folds = surgery.fold_edits(model, images)
    surgery.apply(model, *folds, example=images, prove=True, tolerance=1e-9)


@settings(
    max_examples=int(os.environ.get("CONVETTE_GRAPHS", "500")),
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=True,
)
@given(st.lists(st.sampled_from(OPERATIONS), min_size=1, max_size=7), st.integers(0, 1 << 20))
def test_random_networks(operations, seed):
    check(operations, seed)
