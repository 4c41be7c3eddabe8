"""The page and the picture of the pruning table, from its result file."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from _pruning_arms import ARMS, BOTH, DRAWN, INNER, RECOVERIES, SHOWN, THEIRS, key


def mean_of(arms: Mapping[str, Any], network: str, criterion: str, speedup: float, recovery: str) -> float | None:
    found = [
        arms[name]["accuracy"]
        for seed in range(DRAWN.get(criterion, 1))
        if (name := key(network, criterion, speedup, recovery, seed)) in arms
    ]
    return statistics.fmean(found) if found else None


def measured(arms: Mapping[str, Any]) -> tuple[list[str], list[str], list[float], list[str]]:
    """Return the networks, criteria, speed-ups and recoveries that have arms, in their order."""
    parts = [name.split() for name in arms if not name.endswith("unpruned")]
    networks = sorted({p[0] for p in parts}, key=lambda n: int(n.removeprefix("resnet")))
    criteria = [name for name in ARMS if any(p[1] == name for p in parts)]
    speedups = sorted({float(p[2].removesuffix("x")) for p in parts})
    return networks, criteria, speedups, [r for r in RECOVERIES if any(p[3] == r for p in parts)]


def page(found: Mapping[str, Any], others: Sequence[Mapping[str, Any]] = ()) -> str:
    """Return the page: a table a network, then those of the result files with another allocation."""
    how = found["choices"]
    lines = [
        "# Every criterion, side by side",
        "",
        f"Networks with given CIFAR-10 weights, cut once to a share of their MACs, {spent(found)}, scored on "
        f"{how['calibration_images']} training images; batch-norm statistics taken anew in all arms. "
        "Test accuracy in percent on 1,000 original images: arms less than about two points apart are not told apart. "
        "`random` is the mean of three draws. `tp_...` are the criteria of Torch-Pruning, which cuts the inner layers "
        "of the blocks only, here with our cut and recovery; `inner_...` are ours on those layers only, cut by the "
        "same share and rounding. Empty: not measured yet.",
        "",
        "![Accuracy by criterion](pruning-table.svg)",
        "",
        *best(found["arms"]),
        *sections(found, ""),
    ]
    for other in others:
        lines += sections(other, f", {spent(other)}")
    for each in (found, *others):
        lines += [f"Made by {commands(each)}, in several sittings, on {each['machine']}; {each['versions']}.", ""]
    return "\n".join(lines[:-1]) + "\n"


def best(arms: Mapping[str, Any]) -> list[str]:
    """Return a table of the best criterion of each kind: ours on all layers, ours on inner layers, Torch-Pruning's."""
    networks, criteria, speedups, recoveries = measured(arms)
    kinds = {
        "ours": [name for name in criteria if name not in (*INNER, *THEIRS)],
        "ours, inner layers": [name for name in criteria if name in INNER],
        "Torch-Pruning's": [name for name in criteria if name in THEIRS],
    }
    shown = [*recoveries, BOTH]
    lines = [
        "The best of each kind, chosen after the fact out of "
        + ", ".join(f"{len(names)} ({kind})" for kind, names in kinds.items())
        # More tries have the luckier best.
        + "; the more there are, the luckier the best one; the last column only among those further down:",
        "",
        "| network | MACs | criteria | " + " | ".join(SHOWN[r] for r in shown) + " |",
        "|---" * (len(shown) + 3) + "|",
    ]
    for network in networks:
        for speedup in speedups:
            for kind, names in kinds.items():
                cells = []
                for recovery in shown:
                    values = {n: mean_of(arms, network, n, speedup, recovery) for n in names}
                    known = {n: value for n, value in values.items() if value is not None}
                    top = max(known, key=lambda n: known[n]) if known else None
                    cells.append(f"{100 * known[top]:.1f} `{top}`" if top else "")
                lines.append(f"| {network} | 1/{speedup:g} | {kind} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def commands(found: Mapping[str, Any]) -> str:
    """Return the commands that fill the file, whatever part of them the last sitting was."""
    allocation = found["choices"]["allocation"]
    networks, criteria, _, _ = measured(found["arms"])
    recoveries = {name.split()[3] for name in found["arms"] if not name.endswith("unpruned")}
    options = ""
    if allocation != "uniform":
        options += f" --allocation {allocation} --out benchmarks/results/pruning_table_{allocation}.json"
    if criteria != ARMS:
        options += f" --criteria {' '.join(criteria)}"
    if not recoveries.issuperset(RECOVERIES):
        options += f" --recoveries {' '.join(name for name in SHOWN if name in recoveries)}"
    return " and ".join(
        f"`python benchmarks/pruning_table.py --networks {network} "
        f"--training-images {found['arms'][f'{network} unpruned']['training_images']}{options}`"
        for network in networks
    )


def spent(found: Mapping[str, Any]) -> str:
    allocation = found["choices"]["allocation"]
    return "the same share of every layer" if allocation == "uniform" else f"by the allocation `{allocation}`"


def sections(found: Mapping[str, Any], how: str) -> list[str]:
    """Return heading and tables of every network of a result file."""
    arms, lines = found["arms"], []
    networks, criteria, speedups, recoveries = measured(arms)
    for network in networks:
        whole = arms[f"{network} unpruned"]
        lines += [
            f"## {network}{how}",
            "",
            f"Unpruned: {100 * whole['accuracy']:.1f} %, {whole['macs'] / 1e6:.2f} M MACs. "
            f"An epoch of the distilled arms: {whole['training_images']:,} training images.",
            "",
            *table(arms, network, criteria, speedups, recoveries),
            "",
            *both(arms, network, criteria, speedups),
        ]
    return lines


def table(
    arms: Mapping[str, Any], network: str, criteria: list[str], speedups: list[float], recoveries: list[str]
) -> list[str]:
    columns = [f"{speedup:g}x, {SHOWN[recovery]}" for speedup in speedups for recovery in recoveries]
    lines = ["| criterion | " + " | ".join(columns) + " | seconds to score |", "|---" * (len(columns) + 2) + "|"]
    for criterion in criteria:
        cells = []
        for speedup in speedups:
            for recovery in recoveries:
                value = mean_of(arms, network, criterion, speedup, recovery)
                cells.append("" if value is None else f"{100 * value:.1f}")
        if any(cells):
            seconds = next(
                arm["scoring_seconds"] for name, arm in arms.items() if name.startswith(f"{network} {criterion} ")
            )
            cells.append("" if criterion in (*INNER, *THEIRS) else f"{seconds:.1f}")
            lines.append(f"| `{criterion}` | " + " | ".join(cells) + " |")
    return lines


def both(arms: Mapping[str, Any], network: str, criteria: list[str], speedups: list[float]) -> list[str]:
    """Return a small table of the criteria that were repaired by one recovery after the other, beside each alone."""
    rows = [name for name in criteria if mean_of(arms, network, name, speedups[0], BOTH) is not None]
    shown = {"least_squares": "least squares", "distilled": "distilled", BOTH: "both"}
    columns = [
        (speedup, recovery)
        for speedup in speedups
        for recovery in shown
        if any(mean_of(arms, network, name, speedup, recovery) is not None for name in rows)
    ]
    if not rows:
        return []
    heads = [f"{speedup:g}x, {shown[recovery]}" for speedup, recovery in columns]
    lines = [
        "Least squares before the cut and the three epochs after it, as `convette prune` does by itself:",
        "",
        "| criterion | " + " | ".join(heads) + " |",
        "|---" * (len(heads) + 1) + "|",
    ]
    for name in rows:
        values = [mean_of(arms, network, name, *column) for column in columns]
        cells = ["" if value is None else f"{100 * value:.1f}" for value in values]
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return [*lines, ""]


def picture(found: Mapping[str, Any], path: Path) -> None:
    """Draw a panel a network and speed-up: accuracy by criterion, a mark a recovery."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "convette"
    from matplotlib import pyplot

    arms = found["arms"]
    networks, criteria, speedups, recoveries = measured(arms)
    figure, axes = pyplot.subplots(
        len(networks),
        len(speedups),
        figsize=(3.6 * len(speedups) + 1.5, 0.21 * len(criteria) * len(networks) + 1.2),
        sharey=True,
        squeeze=False,
    )
    marks = {"none": ("o", "#888888"), "least_squares": ("D", "#00796b"), "distilled": ("s", "#c2185b")}
    for row, network in enumerate(networks):
        for column, speedup in enumerate(speedups):
            axis = axes[row][column]
            for recovery in recoveries:
                values = {i: mean_of(arms, network, name, speedup, recovery) for i, name in enumerate(criteria)}
                seen = {place: 100 * value for place, value in values.items() if value is not None}
                mark, colour = marks[recovery]
                axis.plot(
                    list(seen.values()),
                    list(seen),
                    mark,
                    color=colour,
                    markersize=4,
                    linestyle="",
                    label=SHOWN[recovery],
                )
            axis.axvline(100 * arms[f"{network} unpruned"]["accuracy"], color="#444444", linewidth=0.8, linestyle=":")
            axis.set_title(f"{network}, {speedup:g}x fewer MACs", fontsize=9)
            axis.set_yticks(range(len(criteria)), criteria, fontsize=7)
            axis.grid(axis="x", linewidth=0.3)
            axis.tick_params(axis="x", labelsize=7)
    # The rows share one axis: the first criterion on top.
    axes[0][0].set_ylim(len(criteria) - 0.4, -0.6)
    figure.legend(*axes[0][0].get_legend_handles_labels(), fontsize=8, loc="upper right", ncols=len(recoveries))
    figure.supxlabel("test accuracy, %", fontsize=9)
    figure.tight_layout(rect=(0, 0, 1, 0.985))
    figure.savefig(path, metadata={"Date": None})
