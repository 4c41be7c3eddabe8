"""The cost as a value: figures by name, JSON, comparison, tables; measuring through the runtime."""

import dataclasses
import io
import json

import pytest
import torch
from rich.console import Console
from torch import nn

from convette.cost import (
    Cost,
    available_engines,
    comparison_table,
    count,
    engine_table,
    format_bytes,
    format_count,
    format_figure,
    format_milliseconds,
    measure,
    measure_together,
)
from convette.errors import UsageError
from convette.runtime import Latency


def network(width=8):
    return nn.Sequential(
        nn.Conv2d(3, width, 3),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, 4),
    )


EXAMPLE = torch.randn(1, 3, 16, 16)


def latency(p50, engine):
    return Latency(
        engine, "cpu", "fp32", 1, 2, 100, p50, 2 * p50, 3 * p50, p50, (0.9 * p50, 1.1 * p50), 9.0, 0.1, (p50,)
    )


@pytest.fixture
def cost():
    engines = {"eager:cpu": latency(4.0, "eager:cpu"), "openvino:cpu": latency(0.5, "openvino:cpu")}
    return dataclasses.replace(count(network(), EXAMPLE), latency=engines)


def shown(table, width=140):
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    return console.file.getvalue()


def test_figures_by_name(cost):
    assert cost.get("macs") == cost.macs == 14 * 14 * 8 * 27 + 32
    assert cost.get("latency") == cost.get("latency.p50@eager:cpu") == 4.0
    assert cost.get("latency.p99@openvino:cpu") == 1.5
    with pytest.raises(UsageError, match=r"no figure 'mac'\. Did you mean 'macs'"):
        cost.get("mac")
    with pytest.raises(UsageError, match=r"no figure 'macs.p50'"):
        cost.get("macs.p50")
    with pytest.raises(UsageError, match=r"no 'p42': use p50, p95, p99"):
        cost.get("latency.p42")
    with pytest.raises(UsageError, match=r"onnxruntime:cpu' \(measured: eager:cpu, openvino:cpu\)"):
        cost.get("latency@onnxruntime:cpu")


def test_json_keeps_everything(cost):
    text = json.dumps(cost.to_json(), allow_nan=False)
    assert Cost.from_json(json.loads(text)) == cost
    assert "multiply-accumulates" in json.loads(text)["convention"]
    for damaged in ({}, {**cost.to_json(), "extra": 1}, {**cost.to_json(), "layers": [{"name": "x"}]}):
        with pytest.raises(UsageError, match="not the JSON of a cost"):
            Cost.from_json(damaged)


def test_relative_to_the_start(cost):
    small = count(network(4), EXAMPLE)
    ratios = small.relative_to(cost)
    assert ratios["macs"] == (14 * 14 * 4 * 27 + 16) / cost.macs
    assert set(ratios) == {"macs", "parameters", "size", "memory"}
    assert cost.relative_to(cost)["latency.p95@openvino:cpu"] == 1.0


def test_table_states_rows_totals_and_convention(cost):
    text = shown(cost.table())
    assert "Conv2d" in text and "1x8x14x14" in text and "42.34 K" in text and "100 %" in text
    assert "multiply-accumulates" in text and "Norm" in text
    assert shown(dataclasses.replace(cost, uncounted=("lib::op",)).table()).count("lib::op") == 1
    assert cost.table(everything=True).row_count == 3 > cost.table().row_count - 1
    narrow = shown(cost.table(), 80)
    assert max(map(len, narrow.splitlines())) <= 80


def test_comparison_table(cost):
    small = dataclasses.replace(count(network(4), EXAMPLE), latency={"eager:cpu": latency(1.0, "eager:cpu")})
    text = shown(comparison_table({"before": cost, "after": small}))
    macs, p95 = (next(line for line in text.splitlines() if name in line) for name in ("macs", "latency.p95@eager"))
    assert "42.37 K" in macs and "21.18 K (50.0 %)" in macs
    assert "2 ms (25.0 %)" in p95
    only_before = next(line for line in text.splitlines() if "latency.p50@openvino" in line)
    assert "0.5 ms" in only_before and "%" not in only_before
    with pytest.raises(UsageError, match="no cost to compare"):
        comparison_table({})


def test_engine_table(cost):
    text = shown(engine_table(cost.latency))
    lines = [line for line in text.splitlines() if ":cpu │" in line or ":cpu  " in line]
    assert "openvino:cpu" in lines[0] and "8.00x" in lines[0] and "0.5 ms" in lines[0]
    assert "eager:cpu" in lines[1] and "1.00x" in lines[1]
    assert "2 threads" in text
    assert f"threads, {cost.latency['openvino:cpu'].samples} calls, interleaved" in " ".join(text.split())
    assert "speed-up" not in shown(engine_table({"openvino:cpu": cost.latency["openvino:cpu"]}))
    with pytest.raises(UsageError, match="No latency was measured"):
        engine_table(cost.latency, "compiled:cpu")
    with pytest.raises(UsageError, match="name an engine"):
        engine_table({})


@pytest.mark.parametrize(
    "text, expected",
    [
        (format_count(0), "0"),
        (format_count(999), "999"),
        (format_count(1_814_073_344), "1.814 G"),
        (format_bytes(512), "512 B"),
        (format_bytes(46_827_520), "46.83 MB"),
        (format_milliseconds(2.345), "2.35 ms"),
        (format_milliseconds(0.0421), "42.1 us"),
        (format_milliseconds(12_000), "12 s"),
        (format_figure("latency.p95@openvino:cpu", 2.0), "2 ms"),
        (format_figure("memory", 2000), "2 KB"),
        (format_figure("parameters", 2000), "2 K"),
        (format_count(999_999), "1 M"),
    ],
)
def test_figures_as_text(text, expected):
    assert text == expected


def test_measuring_is_counting_with_latency():
    model = network().train()
    cost = measure(model, EXAMPLE, ("eager:cpu", "eager"), time_limit=0.05, relative_error=1.0)
    assert list(cost.latency) == ["eager:cpu"] and cost.latency["eager:cpu"].p50 > 0
    assert dataclasses.replace(cost, latency={}) == count(model, EXAMPLE)
    assert model.training
    assert measure(model, EXAMPLE, ()) == count(model, EXAMPLE)
    assert "eager:cpu" in available_engines()


def test_measuring_networks_together():
    costs = measure_together({"start": network(8), "end": network(2)}, EXAMPLE, time_limit=0.05, relative_error=1.0)
    assert list(costs) == ["start", "end"]
    assert costs["end"].macs < costs["start"].macs
    assert all(list(cost.latency) == ["eager:cpu"] for cost in costs.values())


def test_what_cannot_be_measured():
    with pytest.raises(UsageError, match="unknown engine 'eagre'"):
        measure(network(), EXAMPLE, ("eagre",))
    with pytest.raises(UsageError, match="one tensor"):
        measure(network(), (EXAMPLE,))
    with pytest.raises(UsageError, match="meta device"):
        measure(network().to("meta"), EXAMPLE)
