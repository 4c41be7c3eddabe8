import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from convette.cost import LatencyCost, LatencyTable, calibrate_table, count, measure_table, read_layers
from convette.cost._table_measuring import grid_points
from convette.cost.latency_table import monotone
from convette.errors import FileFormatError, UsageError
from convette.surgery import apply, trace


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(24)
        self.act = nn.ReLU()
        self.deep = nn.Conv2d(24, 24, 3, padding=1, groups=24, bias=False)
        self.point = nn.Conv2d(24, 40, 1)
        self.head = nn.Linear(40, 10)

    def forward(self, x):
        x = self.point(self.deep(self.act(self.norm(self.stem(x)))))
        return self.head(x.mean((2, 3)))


EXAMPLE = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def macs_timer(factor: float = 1.0, fixed: float = 0.0):
    """A clock that takes MACs for milliseconds, plus something fixed for every network."""

    def timer(networks, engine):
        return {
            name: (fixed + factor * count(network, example).macs, 0.0, 0.0)
            for name, (network, example) in networks.items()
        }

    return timer


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return Small().eval()


def test_layers_are_read_with_what_is_fused_behind_them(network):
    layers = read_layers(network, EXAMPLE)
    assert [layer.name for layer in layers] == ["stem", "deep", "point", "head"]
    assert [layer.shape.kind for layer in layers] == ["conv", "depthwise", "conv", "linear"]
    assert [layer.shape.activation for layer in layers] == ["ReLU", "", "", ""]
    assert [layer.shape.norm for layer in layers] == [True, False, False, False]
    assert (layers[2].ins, layers[2].outs, layers[2].shape.height) == (24, 40, 8)


def test_with_macs_for_time_the_table_predicts_the_macs_of_every_selection(network):
    graph = trace(network, EXAMPLE)
    table = measure_table(network, EXAMPLE, timer=macs_timer(fixed=7.0), points=3)
    cost = LatencyCost(network, EXAMPLE, graph, table)
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        selection = {}
        for group in graph.groups:
            size = int(torch.randint(8, group.size + 1, (), generator=generator))
            selection[group.name] = torch.arange(size)
        shrunk = copy.deepcopy(network)
        apply(shrunk, graph.shrink(selection))
        assert cost.latency(selection) == pytest.approx(count(shrunk, EXAMPLE).macs, rel=1e-9)
        assert cost.macs(selection) == count(shrunk, EXAMPLE).macs
        assert float(cost.predict("latency", cost.widths(selection))) == pytest.approx(cost.latency(selection))


def test_calibration_finds_the_fixed_time_and_the_scale_and_states_its_error(network):
    graph = trace(network, EXAMPLE)
    table = measure_table(network, EXAMPLE, timer=macs_timer(), points=3)
    found = calibrate_table(table, network, EXAMPLE, graph, timer=macs_timer(1.25, 5000.0), networks=4, held_out=4)
    assert found.fixed == pytest.approx(5000.0, rel=1e-6)
    assert found.scale == pytest.approx(1.25, rel=1e-6)
    assert found.error == pytest.approx(0.0, abs=1e-9)
    assert found.rank_correlation == pytest.approx(1.0)
    assert found.scaled(2.0).total(np.array([10.0])) == pytest.approx(2 * found.total(np.array([10.0])))


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 5).flatmap(
        lambda columns: st.lists(st.lists(st.floats(0, 10), min_size=columns, max_size=columns), min_size=1, max_size=5)
    )
)
def test_monotone_tables_never_fall_and_keep_what_is_monotone(rows):
    times = np.array(rows)
    result = monotone(times)
    assert (np.diff(result, axis=0) >= -1e-12).all() and (np.diff(result, axis=1) >= -1e-12).all()
    assert np.allclose(monotone(result), result)


def test_noise_cannot_make_a_prediction_rise_when_units_go(network):
    generator = np.random.default_rng(0)
    clean = macs_timer()

    def noisy(networks, engine):
        return {k: (v[0] * generator.uniform(0.7, 1.3), 0.0, 0.0) for k, v in clean(networks, engine).items()}

    graph = trace(network, EXAMPLE)
    for query in ("linear", "ceil"):
        table = measure_table(network, EXAMPLE, timer=noisy, points=4)
        table = LatencyTable(**{**table.__dict__, "query": query})
        cost = LatencyCost(network, EXAMPLE, graph, table)
        for column, size in enumerate(cost.sizes):
            widths = torch.tensor(cost.sizes).repeat(size, 1)
            widths[:, column] = torch.arange(1, size + 1)
            assert (cost.predict("latency", widths).diff() >= -1e-9).all()


def test_ceil_takes_the_next_point_and_both_agree_on_the_grid(network):
    table = measure_table(network, EXAMPLE, timer=macs_timer(), points=3)
    shape, grid = next((s, g) for s, g in table.grids.items() if s.kind == "conv" and len(g.ins) > 1)
    ins, outs = np.array([float(grid.ins[1])]), np.array([float(grid.outs[1])])
    assert grid.at(ins, outs, "ceil") == pytest.approx(grid.at(ins, outs, "linear"))
    assert grid.at(ins, outs - 1, "ceil") == pytest.approx(grid.at(ins, outs, "ceil"))
    assert grid.at(ins, outs - 1, "linear") < grid.at(ins, outs, "linear")
    assert str(shape)


def test_the_file_holds_all_and_others_are_refused(network, tmp_path):
    table = measure_table(network, EXAMPLE, timer=macs_timer(), points=2)
    table.save(tmp_path / "table.json")
    assert LatencyTable.load(tmp_path / "table.json").to_json() == table.to_json()
    (tmp_path / "other.json").write_text('{"format": 9}')
    with pytest.raises(FileFormatError, match="latency table"):
        LatencyTable.load(tmp_path / "other.json")
    with pytest.raises(FileFormatError, match="missing"):
        LatencyTable.load(tmp_path / "missing.json")


def test_a_layer_that_was_not_timed_is_named(network):
    table = measure_table(network, EXAMPLE, timer=macs_timer(), points=2)
    larger = torch.randn(1, 3, 16, 16)
    with pytest.raises(UsageError, match="stem"):
        LatencyCost(network, larger, trace(network, larger), table)


def test_points_end_at_the_width_and_keep_to_multiples():
    assert len(grid_points(64, 4, 8)) == 4 and grid_points(64, 4, 8)[-1] == 64
    assert all(point % 8 == 0 for point in grid_points(64, 4, 8))
    assert grid_points(10, 4, 8)[-1] == 10 and grid_points(10, 4, 8)[0] < 10
    assert all(point % 6 == 0 for point in grid_points(36, 4, 2, groups=6))
    assert grid_points(1, 4, 8) == (1,)


def test_a_real_engine_times_layers():
    torch.set_num_threads(1)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()
    example = torch.randn(1, 1, 8, 8)
    table = measure_table(model, example, "eager:cpu", threads=1, points=2, seconds_each=0.005)
    assert len(table.grids) == 2 and table.precision == "fp32" and table.threads == 1
    assert float(table.layer(next(iter(table.grids)), 1, 4)[0]) >= 0
