"""TAS's widths against uniform and random widths at the same MACs: one network, one cut, the same distillation.

    python benchmarks/evidence/transformable_architecture_search.py [--seeds 3]

Writes benchmarks/evidence/results/transformable-architecture-search.json; seeds that the file holds are kept. Per seed:
a ResNet-20 is trained on 539 digits and cut once to 20 % or 50 % of its MACs, filters by L1 magnitude. Only the widths
differ: one share for all layers (uniform), shares drawn at random and scaled to the same MACs (random), and those that
the allocation `transformable_architecture_search` learns on 512 training images in 100 steps. Each is then trained for
6 epochs, taught by the network before the cut; the last arm has TAS's widths without a teacher. Settings were written
before any result, but for the 50 %: they were added because at 20 % no arm is better than a guess once cut.
"""

import copy
import time
from pathlib import Path
from typing import Any

import torch
from _figures import gained, shown
from _work import go_on, options, share_right

from convette._progress import note
from convette.cost import Budget, WidthCost, count
from convette.data import ImageData, load_data
from convette.models import create_model
from convette.pruning import PruneSettings, WidthRules, find_allocation, l1, recalibrate, recover, uniform
from convette.pruning._calibration import draw_calibration, loss_of_cuts
from convette.pruning.allocation._ladder import build_ladders
from convette.pruning.allocation._scaling import scaled_rungs
from convette.pruning.allocation._search import selection_of
from convette.surgery import apply, trace
from convette.training import TrainSettings, train

OUT = Path(__file__).parent / "results" / "transformable-architecture-search.json"
SHARES, EPOCHS, ARMS = (0.2, 0.5), 6, ("uniform", "random", "TAS", "TAS, not taught")
TRAIN = {"batch_size": 64, "augmentation": (), "precision": "fp32", "ema_decay": None}


def main() -> None:
    seeds, data = range(options(__doc__).seeds), load_data("digits", test_fraction=0.6)
    pieces = [(seed, share) for seed in seeds for share in SHARES]
    work = {f"{share:.0%}/{seed}": lambda seed=seed, share=share: one_seed(data, seed, share) for seed, share in pieces}
    go_on(OUT, work, report)


def one_seed(data: ImageData, seed: int, part: float) -> dict[str, Any]:
    torch.manual_seed(seed)
    settings = TrainSettings(epochs=12, seed=seed, **TRAIN)
    whole = train(create_model("resnet20", in_channels=1, seed=seed), data, settings, device="cpu").model.eval()
    example = data.preprocessing(data.train.images(torch.tensor([0])))
    graph = trace(whole, example)
    cost, scores = WidthCost(whole, example, graph), l1(whole, graph)
    (limit,) = Budget.parse(f"macs<={part:.0%}").resolve(count(whole, example)).limits
    rules = WidthRules(1, {group.name: max(1, group.size // 10) for group in graph.groups})
    loss = loss_of_cuts(whole, graph, draw_calibration(data, 512, seed=seed, device="cpu"))
    began = time.perf_counter()
    learned = find_allocation("transformable_architecture_search")(
        scores, graph, cost, limit, rules=rules, loss=loss, seed=seed
    )
    found: dict[str, Any] = {"search": round(time.perf_counter() - began, 1), "whole": share_right(whole, data)}
    ladders = build_ladders(scores, graph, rules)
    draw = torch.Generator().manual_seed(seed)
    ratios = {ladder.name: float((0.5 * torch.randn((), generator=draw)).exp()) for ladder in ladders}
    rungs = scaled_rungs(ladders, ratios, {x.name: x.size for x in ladders}, (limit,), cost)
    selections = {
        "uniform": uniform(scores, graph, cost, limit, rules=rules),
        "random": selection_of(ladders, rungs),
        "TAS": learned,
        "TAS, not taught": learned,
    }
    for name, selection in selections.items():
        model = copy.deepcopy(whole)
        apply(model, graph.shrink(selection))
        recalibrate(model, data, seed=seed)
        cut = share_right(model, data)
        again = TrainSettings(learning_rate=0.05, seed=seed, **TRAIN)
        choices = PruneSettings(distil=name != "TAS, not taught")
        model, _ = recover(model, whole, data, EPOCHS, choices, train_settings=again, device="cpu")
        share = count(model, example).macs / count(whole, example).macs
        found[name] = {"cut": cut, "trained": share_right(model, data), "share": share}
        note(f"seed {seed}, {name}: {found[name]}")
    return found


def report(kept: dict[str, Any]) -> dict[str, Any]:
    rows, sentences = {}, []
    for share in SHARES:
        runs = [run for key, run in kept.items() if key.startswith(f"{share:.0%}/")]
        if len(runs) < 2:
            continue
        rows[f"whole, {share:.0%}"] = ["100 %", "", shown([run["whole"] for run in runs], 100)]
        for arm in ARMS:
            macs = 100 * sum(run[arm]["share"] for run in runs) / len(runs)
            cut, trained = ([run[arm][key] for run in runs] for key in ("cut", "trained"))
            rows[f"{arm}, {share:.0%}"] = [
                f"{macs:.1f} %",
                shown(cut, 100) if "not" not in arm else "",
                shown(trained, 100),
            ]
        sentences.append(
            f"At {share:.0%} of the MACs ({len(runs)} seeds) the widths that TAS learned are, once cut, "
            f"{against(runs, 'uniform', 'cut')} against uniform and {against(runs, 'random', 'cut')} against random "
            f"widths; trained again with a teacher {against(runs, 'uniform', 'trained')} and "
            f"{against(runs, 'random', 'trained')}; the teacher is worth {against(runs, 'TAS, not taught', 'trained')}."
        )
    columns = ["MACs", "accuracy once cut, %", "trained again, %"]
    return {"summary": " ".join(sentences), "columns": columns, "rows": rows}


def against(runs: list[dict[str, Any]], other: str, key: str) -> str:
    return gained([run["TAS"][key] for run in runs], [run[other][key] for run in runs])


if __name__ == "__main__":
    main()
