"""N2N's shrinkage policy against as many students drawn at random, and against one factor for all layers.

    python benchmarks/evidence/n2n.py [--seeds 3]

Writes benchmarks/evidence/results/n2n.json; seeds that the file holds are kept. Per seed: a network of six convolutions
(77,000 parameters) is trained on 539 digits. Each arm tries 100 students, cut from the teacher and judged by accuracy
on the validation split (with batch-norm statistics of their own) and parameters: the policy in 25 updates of 4; random,
the same policy never updated; uniform, one factor for all layers, 100 values from 5 % to 99 %; transferred, the policy
after the same search on a teacher of four convolutions, for 12 updates only. The best student of each arm is then
trained for 8 epochs, taught by the teacher, and scored on the test split. Settings were written before any result.
"""

import copy
import statistics
from pathlib import Path
from typing import Any

import torch
from _figures import shown
from _work import go_on, options, share_right
from torch import nn

from convette._progress import note
from convette.cost import count
from convette.data import ImageData, load_data
from convette.pipeline.compare import estimate
from convette.pruning import PruneSettings, l1, recalibrate, recover
from convette.pruning.allocation import WidthRules, build_ladders
from convette.pruning.n2n import N2NSettings, n2n, student_reward
from convette.surgery import apply, trace
from convette.training import TrainSettings, evaluate, train

OUT = Path(__file__).parent / "results" / "n2n.json"
STUDENTS, EPOCHS = 100, 8
TRAIN = TrainSettings(epochs=12, batch_size=64, augmentation=(), precision="fp32", ema_decay=None)


def main() -> None:
    seeds, data = range(options(__doc__).seeds), load_data("digits", test_fraction=0.6)
    work = {str(seed): lambda seed=seed: one_seed(data, seed) for seed in seeds}
    go_on(OUT, work, lambda kept: report(list(kept.values())) if len(kept) > 1 else {})


def network(widths: tuple[int, ...]) -> nn.Module:
    layers: list[nn.Module] = []
    for number, (ins, outs) in enumerate(zip((1, *widths), widths, strict=False)):
        stride = 2 if number == len(widths) // 2 else 1
        layers += [nn.Conv2d(ins, outs, 3, stride, 1, bias=False), nn.BatchNorm2d(outs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10))


def one_seed(data: ImageData, seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    chosen = TrainSettings(**{**TRAIN.__dict__, "seed": seed})
    teacher = train(network((16, 24, 32, 48, 64, 64)), data, chosen, device="cpu").model
    small = train(network((16, 24, 32, 48)), data, chosen, device="cpu").model

    def searched(model: nn.Module, updates: int, rate: float, policy: Any = None) -> Any:
        choices = N2NSettings(
            removal_epochs=0, shrink_epochs=updates, rollouts=4, student_epochs=0, shrink_rate=rate, least=4, seed=seed
        )
        return n2n(model, data, choices, shrink=policy, device="cpu")

    updates = STUDENTS // 4
    policy, drawn = searched(teacher, updates, 0.01), searched(teacher, updates, 1e-12)
    before = searched(small, updates, 0.01)
    moved = searched(teacher, updates // 2, 0.01, before.shrink)
    arms = {
        "random": ([s.reward for s in drawn.students], drawn.model),
        "uniform": uniform_students(teacher, data),
        "policy": ([s.reward for s in policy.students], policy.model),
        "transferred": ([s.reward for s in moved.students], moved.model),
    }
    example = data.preprocessing(data.train.images(torch.tensor([0])))
    found: dict[str, Any] = {"teacher": share_right(teacher, data), "parameters": count(teacher, example).parameters}
    for name, (rewards, model) in arms.items():
        model = copy.deepcopy(model)
        share = count(model, example).parameters / found["parameters"]
        model, _ = recover(
            model,
            teacher,
            data,
            EPOCHS,
            PruneSettings(),
            train_settings=TrainSettings(**{**chosen.__dict__, "learning_rate": 0.05}),
            device="cpu",
        )
        found[name] = {
            "best": max(rewards),
            "late": statistics.median(rewards[-20:]),
            "reached": next((n for n, r in enumerate(rewards, start=1) if r >= max(arms["random"][0])), None),
            "share": share,
            "accuracy": share_right(model, data),
        }
        note(f"seed {seed}, {name}: {found[name]}")
    return found


def uniform_students(teacher: nn.Module, data: ImageData) -> tuple[list[float], nn.Module]:
    example = data.preprocessing(data.train.images(torch.tensor([0])))
    graph, whole = trace(teacher, example), count(teacher, example).parameters
    ladders = build_ladders(l1(teacher, graph), graph, WidthRules(1, {g.name: min(4, g.size) for g in graph.groups}))
    base = float(evaluate(teacher, data.validation, data.preprocessing).accuracy)
    rewards, best = [], teacher
    for step in range(STUDENTS):
        share, model = 0.05 + 0.94 * step / (STUDENTS - 1), copy.deepcopy(teacher)
        selection = {
            x.name: x.kept(min(range(len(x.widths)), key=lambda i, x=x, s=share: abs(x.widths[i] - s * x.size)))
            for x in ladders
        }
        apply(model, graph.shrink(selection))
        recalibrate(model, data, batches=4)
        right = float(evaluate(model, data.validation, data.preprocessing).accuracy)
        rewards.append(student_reward(right, base, count(model, example).parameters, whole))
        best = model if rewards[-1] == max(rewards) else best
    return rewards, best


def report(runs: list[dict[str, Any]]) -> dict[str, Any]:
    arms = ("random", "uniform", "policy", "transferred")
    rows = {"teacher": ["", "", "", "100 %", shown([run["teacher"] for run in runs], 100)]}
    for arm in arms:
        figures = {key: [run[arm][key] for run in runs] for key in ("best", "late", "share", "accuracy", "reached")}
        reached = [str(n) if n is not None else "never" for n in figures["reached"]]
        rows[arm] = [
            shown(figures["best"], digits=3),
            shown(figures["late"], digits=3) if arm != "uniform" else "",
            ", ".join(reached) if arm != "random" else "",
            f"{100 * statistics.mean(figures['share']):.0f} %",
            shown(figures["accuracy"], 100),
        ]
    gains = {
        (arm, key): estimate([run[arm][key] - run["random"][key] for run in runs])
        for arm in ("policy", "transferred", "uniform")
        for key in ("best", "late")
    }
    words = {key: f"{g.mean:+.3f} (95 % interval {g.low:+.3f} to {g.high:+.3f})" for key, g in gains.items()}
    summary = (
        f"{STUDENTS} students each, {len(runs)} seeds. Against drawing at random the policy's best reward is "
        f"{words['policy', 'best']} and the median of its last 20 students {words['policy', 'late']}; the policy of "
        f"another teacher, with half as many students, {words['transferred', 'best']} and "
        f"{words['transferred', 'late']}; one factor for all layers {words['uniform', 'best']}."
    )
    columns = [
        "best reward",
        "median reward of the last 20",
        "students until random's best",
        "parameters of the best",
        "its test accuracy after 8 epochs, %",
    ]
    return {"summary": summary, "columns": columns, "rows": rows}


if __name__ == "__main__":
    main()
