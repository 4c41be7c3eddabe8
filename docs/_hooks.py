"""What mkdocs fills in while building: the table of systems, and each system's card, price and evidence."""

import json
import re
from pathlib import Path

from convette._catalogue import System, catalogue

RESULTS = Path(__file__).parent.parent / "benchmarks/evidence/results"
PRICES = Path(__file__).parent.parent / "benchmarks/results/layers.json"
PICTURES = Path(__file__).parent / "images"
CUTS = Path(__file__).parent.parent / "benchmarks/results/pruning_price.json"
# Systems whose criterion has another name in the table of prices than the system.
CRITERIA = {
    "criteria-blending": "blend",
    "dynamic-channel-propagation": "channel_utility",
    "hardware-aware-filter-pruning": "information_gain",
    "hierarchical-group-sparsity": "loss_increase",
    "main-subsidiary": "subsidiary",
    "optin": "trajectory",
    "progressive-gradient-pruning": "grad_change",
    "slimming-shortcut": "importance_gates",
}
NORMALISERS = Path(__file__).parent.parent / "benchmarks/results/normalization.json"


def on_page_markdown(markdown: str, page, config, files) -> str:
    """Replace `<!-- systems -->` and `<!-- card: slug -->`, `price` and `evidence` by what they stand for."""
    markdown = markdown.replace("<!-- systems -->", _systems_table())
    markdown = re.sub(r"<!-- card: ([\w-]+) -->", lambda found: _card(_find(found[1])), markdown)
    markdown = re.sub(r"<!-- price: ([\w-]+) -->", lambda found: _price(found[1]), markdown)
    markdown = re.sub(r"<!-- study: (\w+) -->", lambda found: _study(found[1]), markdown)
    return re.sub(r"<!-- evidence: ([\w-]+) -->", lambda found: _evidence(_find(found[1])), markdown)


def _find(slug: str) -> System:
    return next(system for system in catalogue() if system.slug == slug)


def _arxiv(system: System) -> str:
    return f"[arXiv {system.arxiv}](https://arxiv.org/abs/{system.arxiv})" if system.arxiv else "no arXiv id"


def _systems_table() -> str:
    lines = ["| system | room | kind | state | source |", "|---|---|---|---|---|"]
    for system in catalogue():
        name = f"[{system.name}]({system.docs.removeprefix('systems/')})" if system.docs else system.name
        source = f"{system.first_author}, {system.year}, {_arxiv(system)}"
        lines.append(f"| {name} | {system.room} | {system.kind} | {system.state} | {source} |")
    return "\n".join(lines)


def _card(system: System) -> str:
    name = f" Name: `{system.symbol}`." if system.symbol else ""
    return f"*{system.title}*, {system.first_author} and others, {system.year}, {_arxiv(system)}.{name}"


def _evidence(system: System) -> str:
    return _result(system.evidence) if system.evidence is not None else "Not measured yet."


def _study(name: str) -> str:
    """A study's result and, where it has been drawn, its picture."""
    picture = f"\n\n![{name.replace('_', ' ')}](../../images/{name}.svg)"
    return _result(f"{name}.json") + (picture if (PICTURES / f"{name}.svg").exists() else "")


def _result(file: str) -> str:
    """The summary, the table and the provenance of a result file."""
    if not (RESULTS / file).exists():
        return "Not measured yet."
    result = json.loads((RESULTS / file).read_text())
    question = f"*{result['question']}* " if result.get("question") else ""
    lines = [f"{question}{result['summary']}", "", "| | " + " | ".join(result["columns"]) + " |"]
    lines.append("|---" * (len(result["columns"]) + 1) + "|")
    lines += [f"| {name} | " + " | ".join(str(value) for value in row) + " |" for name, row in result["rows"].items()]
    machine, versions = result["machine"], result["versions"]
    lines += ["", f"Command: `{result['command']}`, {result['seconds']:.0f} s on {machine}; {versions}."]
    return "\n".join(lines)


def _price(slug: str) -> str:
    """What a system costs beside what it replaces: for a layer from benchmarks/layers.py."""
    if slug == "criteria":
        return _criteria_price()
    if _find(slug).room == "pruning":
        return _cut_price(_find(slug))
    normalisers = json.loads(NORMALISERS.read_text()) if NORMALISERS.exists() else {"systems": {}}
    if slug in normalisers["systems"]:
        return _normaliser_price(normalisers, slug)
    found = json.loads(PRICES.read_text())["systems"].get(slug) if PRICES.exists() else None
    if found is None:
        return "Not measured yet."
    columns = ["", "in the place of", "parameters", "MACs", "training step", "inference, folded"]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for case in found["cases"]:
        counts = [f"{case[key][1]:,} ({case[key][0]:,})" for key in ("parameters", "macs")]
        times = [
            f"{one['ratio']:.2f} times ({one['milliseconds'][1]:.1f} ms)"
            for one in (case["training_step"], case["inference"])
        ]
        lines.append("| " + " | ".join([case["method"], case["baseline"], *counts, *times]) + " |")
    rounds, machine, versions = found["rounds"], found["machine"], found["versions"]
    lines += ["", "In brackets what is replaced has, and the milliseconds; inputs " + _inputs(found["cases"]) + "."]
    lines += [f"CPU time of one thread, medians over {rounds} turns. `{found['command']}` on {machine}; {versions}."]
    return "\n".join(lines)


def _cut_price(system: System) -> str:
    """What pruning costs: scores in training steps (benchmarks/pruning_price.py), and whole runs of the evidence."""
    cuts, own, lines = json.loads(CUTS.read_text()), system.slug.replace("-", "_"), []
    name = CRITERIA.get(system.slug, own)
    if name in cuts["prices"]:
        seconds, steps = _steps(cuts["prices"][name])
        lines.append(
            f"The criterion `{name}` scores a ResNet-20 of half width once in {seconds:.2g} s of one CPU thread, as "
            f"long as {steps:.2g} training steps of the same 64 images ([all criteria](../../pruning-price.md)), on "
            f"{cuts['machine']}."
        )
    if name != own and own in cuts["prices"]:
        lines.append(f"While training it adds {100 * _steps(cuts['prices'][own])[1]:.0f} % to a step of that network.")
    evidence = RESULTS / str(system.evidence)
    result: dict = json.loads(evidence.read_text()) if evidence.is_file() else {"columns": []}
    if "seconds a run" in result["columns"]:
        column = result["columns"].index("seconds a run")
        method, baseline = (result["rows"][row][column] for row in ("method", "baseline"))
        lines.append(
            f"A whole run of the evidence, training and all, took {method} s, and {baseline} s with what it is "
            "compared with, by the clock of a machine with other work to do: an order of magnitude. Parameters and "
            "MACs of what comes out stand in the table above."
        )
    return " ".join(lines) or "Seconds beside what it replaces: not measured. What comes out is in the table above."


def _criteria_price() -> str:
    """The cheapest and the dearest criterion that was measured, from benchmarks/pruning_price.py."""
    cuts = json.loads(CUTS.read_text())
    steps = {name: _steps(cuts["prices"][name])[1] for name in _criteria() if name in cuts["prices"]}
    low, high = min(steps, key=steps.__getitem__), max(steps, key=steps.__getitem__)
    return (
        f"{len(steps)} of {len(_criteria())} are measured: scoring a ResNet-20 of half width once takes from "
        f"{steps[low]:.2g} (`{low}`) to {steps[high]:.2g} (`{high}`) training steps of the same 64 images."
    )


def _criteria() -> tuple[str, ...]:
    from convette.pruning import CRITERIA as known

    return tuple(known)


def _steps(price: dict) -> tuple[float, float]:
    """Seconds, and how many training steps of the same run they are."""
    return price["seconds"], price["seconds"] / price["step"]


def _normaliser_price(result: dict, slug: str) -> str:
    """What a normaliser costs beside batch norm, from benchmarks/normalization.py."""
    found = result["systems"][slug]
    columns = ["a training step", "against", "parameters", "MACs", *_batches(result["columns"])]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in found["steps"]]
    if found["folded"]:
        columns = ["inference, folded", "times folded batch norm", "ms", "all folded"]
        lines += ["", "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
        lines += ["| " + " | ".join(row) + " |" for row in found["folded"]]
    lines += ["", "Times what it is compared with, in brackets what that has; maps of 64 channels and 16 × 16 values."]
    lines += [f"`{result['command']}` on {result['machine']}; {result['versions']}."]
    return "\n".join(lines)


def _batches(columns: list[str]) -> list[str]:
    return [name.partition(":")[0].replace(" ", ", batch ") for name in columns if name.endswith("batch norm")]


def _inputs(cases: list[dict]) -> str:
    return " and ".join(dict.fromkeys(" × ".join(map(str, case["input"])) for case in cases))
