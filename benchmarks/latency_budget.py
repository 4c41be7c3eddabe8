"""Pruned for measured latency against pruned for MACs, at the same measured latency; and what a latency table knows.

    python benchmarks/latency_budget.py                      # a quarter of an hour and more on one core, or in parts:
    python benchmarks/latency_budget.py --networks resnet18 --engines openvino:cpu

Parts of equal settings are added to those that the file holds.

Networks of the shapes of MobileNetV2 and ResNet-18, untrained. For each network and engine:

- a table of layer times, calibrated on shrunk networks; its error and rank correlation on other random widths, beside
  those of MACs (a straight line through half of those very networks);
- the network pruned to a share of its measured latency twice: allocating MACs to the best L1 scores ("macs"), and
  milliseconds of the table by Opti-Cut ("latency table"). Reported: what was measured at the end, the MACs that are
  left, and the share of the whole network's L1 score that stays, which is what both try to keep.

The score says nothing of accuracy by itself: see the evidence of hardware-aware-filter-pruning. Writes
benchmarks/results/latency_budget.json and docs/latency-budget.md.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

from convette._files import write_json, write_text
from convette._progress import note
from convette._provenance import provenance
from convette.cost import measure_together
from convette.cost._table_measuring import LatencyCost, _random_selection, calibrate_table, measure_table
from convette.models import create_model
from convette.pruning import PruneSettings, l1, prune
from convette.surgery import trace

OUT = Path(__file__).parent / "results" / "latency_budget.json"
PAGE = Path(__file__).parent.parent / "docs" / "latency-budget.md"
INTRODUCTION = """# Pruned for latency, pruned for MACs

Shapes of MobileNetV2 and ResNet-18, untrained, pruned to the same share of their measured latency in two ways: spending
MACs on the best L1 scores, and spending milliseconds of a latency table (Opti-Cut). "Error" and "rank" are those of the
prediction (the table's, or a straight line through the MACs of half of the networks) on networks of random widths that
nothing was fitted to; "latency left" was measured at the end; "L1 score left" is what both try to keep, and says
nothing of accuracy by itself. Written by `benchmarks/latency_budget.py`.
"""
NAMES = {"mobilenet_v2": "torchvision:mobilenet_v2", "resnet18": "torchvision:resnet18"}


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    started = time.perf_counter()
    found, before = earlier(options)
    for name in options.networks:
        for engine in options.engines:
            note(f"--- {name} on {engine}")
            found[f"{name}, {engine}"] = one(name, engine, options)
            result = report(found, options, before + time.perf_counter() - started)
            write_json(options.out, result)
            if options.out == OUT:
                write_text(PAGE, page(result))


def page(result: dict[str, Any]) -> str:
    rows = [f"| {name} | {' | '.join(cells)} |" for name, cells in result["rows"].items()]
    table = ["| | " + " | ".join(result["columns"]) + " |", "|---" + "|---:" * len(result["columns"]) + "|", *rows]
    return "\n".join(
        [INTRODUCTION, result["summary"], "", *table, "", f"{result['machine']}; {result['versions']}.", ""]
    )


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(options, name) for name in ("size", "budget", "points", "seconds", "random")}


def earlier(options: argparse.Namespace) -> tuple[dict[str, Any], float]:
    """Return what the file holds of runs with the same settings, and the seconds they took."""
    held = json.loads(options.out.read_text()) if options.out.exists() else {}
    if held.get("settings") != settings_of(options):
        return {}, 0.0
    return held["results"], held["seconds"]


def one(name: str, engine: str, options: argparse.Namespace) -> dict[str, Any]:
    model = create_model(NAMES[name], num_classes=10, seed=0).eval()
    example = torch.randn(1, 3, options.size, options.size, generator=torch.Generator().manual_seed(0))
    graph = trace(model, example)
    table = measure_table(model, example, engine, threads=1, points=options.points, seconds_each=options.seconds)
    table = calibrate_table(table, model, example, graph, threads=1, networks=6, held_out=0, seconds_each=0.5)
    result: dict[str, Any] = {"prediction": prediction(model, example, graph, table, engine, options)}
    result["table"] = {"shapes": len(table.grids), "fixed": table.fixed, "scale": table.scale, "version": table.version}
    for arm, choices in {
        "macs": {"allocation": "global", "predictor": "macs"},
        "latency table": {"allocation": "opti_cut", "predictor": "latency_table"},
    }.items():
        began = time.perf_counter()
        settings = PruneSettings(steps=1, epochs=0, multiple_of=8, **choices)
        pruned = prune(model, example, f"latency<={options.budget}%@{engine}", settings)
        start, end = pruned.start.latency[engine], pruned.end.latency[engine]
        result[arm] = {
            "latency": end.p50,
            "latency_share": end.p50 / start.p50,
            "macs_share": pruned.end.macs / pruned.start.macs,
            "score_share": score_share(model, graph, pruned.widths),
            "met": pruned.met,
            "seconds": round(time.perf_counter() - began, 1),
        }
        note(f"{arm}: {result[arm]}")
    return result


def prediction(model, example, graph, table, engine: str, options: argparse.Namespace) -> dict[str, float]:
    """Predict and measure networks of random widths that nothing was fitted to, by the table and by MACs."""
    import copy

    from convette.surgery import apply

    cost = LatencyCost(model, example, graph, table)
    draw = torch.Generator().manual_seed(1)
    selections = [_random_selection(graph, draw) for _ in range(options.random)]
    networks = {"whole": model}
    for number, selection in enumerate(selections):
        networks[str(number)] = copy.deepcopy(model)
        if selection:
            apply(networks[str(number)], graph.shrink(selection))
    costs = measure_together(networks, example, (engine,), threads=1, time_limit=0.5)
    measured = np.array([costs[str(n)].latency[engine].p50 for n in range(len(selections))])
    by_table = np.array([cost.latency(selection) for selection in selections])
    macs = np.array([float(cost.macs(selection)) for selection in selections])
    # MACs get their line from half of these very networks: a head start that the table has not.
    half = len(macs) // 2
    slope, offset = np.polyfit(macs[:half], measured[:half], 1)
    by_macs = offset + slope * macs
    whole = costs["whole"].latency[engine].p50
    return {
        "networks": len(selections),
        "whole_predicted": cost.latency({}),
        "whole_measured": whole,
        "whole_error": abs(cost.latency({}) - whole) / whole,
        "table_error": error(by_table, measured),
        "table_rank": float(spearmanr(by_table, measured)[0]),
        "macs_error": error(by_macs[half:], measured[half:]),
        "macs_rank": float(spearmanr(macs, measured)[0]),
    }


def error(predicted: np.ndarray, measured: np.ndarray) -> float:
    return float(np.median(np.abs(predicted - measured) / measured))


def score_share(model, graph, widths: dict[str, tuple[int, int]]) -> float:
    """Return the share of the L1 scores that the kept units had, each group's best kept."""
    scores = l1(model, graph)
    kept = total = 0.0
    for name, score in scores.items():
        before, after = widths.get(name, (len(score), len(score)))
        left = round(len(score) * after / before)
        kept += float(score.sort(descending=True).values[:left].sum())
        total += float(score.sum())
    return kept / total


def report(found: dict[str, Any], options: argparse.Namespace, seconds: float) -> dict[str, Any]:
    rows = {}
    for name, result in found.items():
        about = result["prediction"]
        for arm in ("macs", "latency table"):
            which = "table" if arm == "latency table" else "macs"
            one = result[arm]
            rows[f"{name}: {arm}"] = [
                f"{100 * about[f'{which}_error']:.1f} %",
                f"{about[f'{which}_rank']:.2f}",
                f"{100 * one['latency_share']:.1f} %",
                f"{100 * one['macs_share']:.1f} %",
                f"{100 * one['score_share']:.1f} %",
            ]
    return {
        "summary": (
            f"Networks at {options.size} px, pruned without training to {options.budget} % of their measured latency, "
            "one thread. Error and rank: of the prediction, on networks of random widths."
        ),
        "columns": ["error", "rank", "latency left", "MACs left", "L1 score left"],
        "rows": rows,
        "results": found,
        "settings": settings_of(options),
        **provenance(seconds),
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=list(NAMES), default=list(NAMES))
    parser.add_argument("--engines", nargs="+", default=["eager:cpu", "onnxruntime:cpu", "openvino:cpu"])
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--budget", type=int, default=60, help="%% of the latency that may stay")
    parser.add_argument("--points", type=int, default=4, help="widths along each side of the table")
    parser.add_argument("--seconds", type=float, default=0.1, help="of measuring, for each point of the table")
    parser.add_argument("--random", type=int, default=16, help="networks of random widths to predict")
    parser.add_argument("--out", type=Path, default=OUT)
    return parser.parse_args()


if __name__ == "__main__":
    main()
