"""`compare`: is one recipe better than another, over seeds, on the same work?

An evidence file (`benchmarks/evidence/<slug>.toml`) names what is compared:

```toml
slug = "knowledge-distillation"
question = "Does a teacher help the pruned network?"
metric = "accuracy"                    # a figure of the runs: accuracy, macs, latency.p50@openvino:cpu ...
seeds = 5

[common]                               # keys of both recipes
data.source = "digits"

[baseline]                             # a recipe, or recipe = "file.toml" and keys over it
prune.distil = false

[method]
prune.distil = true
```
"""

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from convette import _files, _provenance
from convette._progress import note
from convette.errors import FileFormatError, UsageError, did_you_mean
from convette.pipeline._toml import line_of, read_toml
from convette.pipeline.fit import run_recipe
from convette.pipeline.recipe import Recipe, build_recipe, load_recipe
from convette.pipeline.results import read_run
from convette.pipeline.stages import COMPARE

LEVEL = 0.95
# Figures that are better when they are larger; all others are costs.
_HIGHER_IS_BETTER = ("accuracy",)


@dataclass(frozen=True)
class Evidence:
    """What is compared: two recipes and the figure to judge them by."""

    slug: str
    question: str
    metric: str
    seeds: int
    baseline: Recipe
    method: Recipe


class Estimate(BaseModel):
    """A mean over seeds with its 95 % interval (Student's t), and the values behind it, in the order of the seeds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    values: list[float]
    mean: float
    low: float
    high: float


class Side(BaseModel):
    """One recipe of a comparison; `difference` is paired with the baseline, seed by seed (None for the baseline)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    recipe: dict[str, Any]
    figures: dict[str, Estimate]
    difference: Estimate | None
    seconds: list[float]


class Comparison(BaseModel):
    """The result of `compare`, and the format of `benchmarks/evidence/results/<slug>.json`.

    `summary`, `columns` and `rows` say the same in words and as a table, for the documentation.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: int = 1
    slug: str
    question: str
    metric: str
    higher_is_better: bool
    seeds: list[int]
    sides: list[Side] = Field(min_length=2)
    summary: str
    columns: list[str]
    rows: dict[str, list[str]]
    machine: str
    versions: str
    command: str
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return self.model_dump(mode="json")

    def table(self) -> str:
        """Return rows and summary as text."""
        lines = [["", *self.columns], *([name, *cells] for name, cells in self.rows.items())]
        widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
        text = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
        ]
        return "\n".join([*text, "", self.summary])


def compare(
    recipes: Mapping[str, Recipe],
    seeds: int | Sequence[int] = 5,
    *,
    metric: str = "accuracy",
    slug: str = "compare",
    question: str = "",
    runs: Path | str | None = None,
) -> Comparison:
    """Run each recipe (data, model, train, compress, one look at the test split) once a seed and compare them.

    The first recipe is the baseline. For each figure: the mean over n seeds with its 95 % interval

    .. math:: m \\pm t_{0.975,\\,n-1} \\, s / \\sqrt n

    and for `metric` the same of the differences to the baseline, paired by seed. Every run has a folder of its own
    under `runs` (None: ``runs/compare-SLUG``) and is skipped when it is finished there.

    Raises `UsageError` with fewer than two recipes or two seeds.
    """
    numbers = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    if len(recipes) < 2:
        raise UsageError("compare needs at least two recipes: the baseline first.")
    if len(numbers) < 2:
        raise UsageError(f"compare: {len(numbers)} seed says nothing about chance; give at least 2, better 5.")
    base = Path(runs) if runs is not None else Path("runs") / f"compare-{slug}"
    found: dict[str, list[dict[str, float]]] = {name: [] for name in recipes}
    # Seed by seed, so that an early stop leaves whole pairs.
    for seed in numbers:
        for name, recipe in recipes.items():
            found[name].append(_one_run(recipe, seed, base / f"{name}-seed{seed}", f"{name}, seed {seed}"))
    shared = [
        key for key in found[next(iter(found))][0] if all(key in one for runs_ in found.values() for one in runs_)
    ]
    if metric not in shared:
        raise UsageError(f"compare: the runs have no figure {metric!r}.{did_you_mean(metric, shared)}")
    sides = _sides(recipes, found, shared, metric)
    columns, rows = _table(sides, shared)
    return Comparison(
        slug=slug,
        question=question,
        metric=metric,
        higher_is_better=metric in _HIGHER_IS_BETTER,
        seeds=numbers,
        sides=sides,
        summary=_summary(sides, metric, len(numbers)),
        columns=columns,
        rows=rows,
        **_provenance.provenance(sum(sum(side.seconds) for side in sides)),
    )


def compare_files(
    files: Sequence[Path],
    *,
    seeds: int | None = None,
    overrides: Mapping[str, Any] | None = None,
    out: Path | None = None,
    runs: Path | None = None,
) -> Comparison:
    """Compare recipe files (the first is the baseline), or what one evidence file names; `out` gets the result."""
    given = dict(overrides or {})
    if len(files) == 1:
        evidence = load_evidence(files[0], given)
        result = compare(
            {"baseline": evidence.baseline, "method": evidence.method},
            seeds or evidence.seeds,
            metric=evidence.metric,
            slug=evidence.slug,
            question=evidence.question,
            runs=runs,
        )
    else:
        names = [file.stem for file in files]
        if len(set(names)) < len(names):
            raise UsageError("compare: two recipes have the same file name; rename one, the names stand in the table.")
        recipes = {file.stem: load_recipe(file, given) for file in files}
        result = compare(recipes, seeds or 5, slug="-".join(names), runs=runs)
    if out is not None:
        _files.write_json(out, result.to_json())
    return result


def load_evidence(path: Path | str, overrides: Mapping[str, Any] | None = None) -> Evidence:
    """Read an evidence file; the dotted `overrides` go over both recipes. Raises `UsageError` with file and line."""
    path = Path(path)
    tables, text = read_toml(path)
    known = ("slug", "question", "metric", "seeds", "common", "baseline", "method")
    for key in tables:
        if key not in known:
            raise UsageError(
                f"{path}, line {line_of(text, [key])}: no key {key!r} in evidence.{did_you_mean(key, known)}"
            )
    for key in ("slug", "baseline", "method"):
        if key not in tables:
            raise UsageError(f"{path}: {key} is missing; an evidence file names slug, baseline and method.")
    recipes = {}
    for name in ("baseline", "method"):
        keys = _merged(tables.get("common", {}), tables[name])
        file = keys.pop("recipe", None)
        merged = _merged(read_toml(path.parent / file)[0], keys) if file else keys
        recipes[name] = build_recipe(merged, overrides, source=f"{path} [{name}]")
    return Evidence(
        slug=str(tables["slug"]),
        question=str(tables.get("question", "")),
        metric=str(tables.get("metric", "accuracy")),
        seeds=int(tables.get("seeds", 5)),
        baseline=recipes["baseline"],
        method=recipes["method"],
    )


def validate_evidence(path: Path | str) -> Comparison:
    """Read a result file and check that its means, intervals and differences follow from its values.

    Raises `FileFormatError` naming the first key that does not.
    """
    path = Path(path)
    try:
        result = Comparison.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}).") from error
    except ValidationError as error:
        first = error.errors()[0]
        raise FileFormatError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}.") from error
    base = result.sides[0].figures.get(result.metric)
    for side in result.sides:
        if result.metric not in side.figures or base is None:
            raise FileFormatError(f"{path}: sides.{side.name}.figures: {result.metric!r} is missing.")
        for name, one in side.figures.items():
            if len(one.values) != len(result.seeds):
                raise FileFormatError(f"{path}: sides.{side.name}.figures.{name}: not one value a seed.")
            _check_estimate(one, one.values, f"{path}: sides.{side.name}.figures.{name}")
        if side.difference is not None:
            pairs = [a - b for a, b in zip(side.figures[result.metric].values, base.values, strict=True)]
            _check_estimate(side.difference, pairs, f"{path}: sides.{side.name}.difference")
    return result


def estimate(values: Sequence[float]) -> Estimate:
    """Return mean and 95 % interval (Student's t) of independent values; needs at least two."""
    from scipy.stats import t

    mean = statistics.fmean(values)
    half = float(t.ppf(0.5 + LEVEL / 2, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return Estimate(values=list(values), mean=mean, low=mean - half, high=mean + half)


def _one_run(recipe: Recipe, seed: int, folder: Path, title: str) -> dict[str, float]:
    seeded = build_recipe(recipe.tables(), {"run.seed": seed})
    note(f"compare: {title}")
    started = time.monotonic()
    result = run_recipe(seeded, COMPARE, out=folder)
    stages = [stage for stage in read_run(folder).stages if stage.state == "finished"]
    seconds = sum(stage.seconds for stage in stages) or time.monotonic() - started
    return {row.key: row.after for row in result.summary.rows} | {"seconds": seconds}


def _sides(
    recipes: Mapping[str, Recipe], found: Mapping[str, list[dict[str, float]]], keys: Sequence[str], metric: str
) -> list[Side]:
    sides: list[Side] = []
    for name, recipe in recipes.items():
        figures = {key: estimate([one[key] for one in found[name]]) for key in keys if key != "seconds"}
        difference = None
        if sides:
            base = sides[0].figures[metric].values
            difference = estimate([a - b for a, b in zip(figures[metric].values, base, strict=True)])
        seconds = [one["seconds"] for one in found[name]]
        sides.append(Side(name=name, recipe=recipe.tables(), figures=figures, difference=difference, seconds=seconds))
    return sides


def _table(sides: Sequence[Side], keys: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    columns = [key for key in keys if key != "seconds"]
    rows = {}
    for side in sides:
        cells = [_shown(key, side.figures[key]) for key in columns]
        rows[side.name] = [*cells, f"{statistics.fmean(side.seconds):.0f}"]
    return [*columns, "seconds a run"], rows


def _shown(key: str, one: Estimate) -> str:
    factor, unit = (100, " %") if key == "accuracy" else (1, "")
    half = (one.high - one.low) / 2
    return f"{factor * one.mean:.4g}{unit}" + (f" ± {factor * half:.2g}" if half else "")


def _summary(sides: Sequence[Side], metric: str, seeds: int) -> str:
    parts = []
    factor, unit = (100, " points") if metric == "accuracy" else (1, "")
    for side in sides[1:]:
        assert side.difference is not None
        low, high = factor * side.difference.low, factor * side.difference.high
        verdict = "no difference can be told from chance" if low <= 0 <= high else "a difference beyond chance"
        parts.append(
            f"{side.name} against {sides[0].name}: {metric} {factor * side.difference.mean:+.3g}{unit} "
            f"(95 % interval {low:+.3g} to {high:+.3g}, {seeds} seeds, paired): {verdict}."
        )
    return " ".join(parts)


def _merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {key: dict(value) if isinstance(value, Mapping) else value for key, value in under.items()}
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = {**result[key], **value} if both else value
    return result


def _check_estimate(one: Estimate, values: Sequence[float], where: str) -> None:
    right = estimate(values)
    for key in ("mean", "low", "high"):
        if not math.isclose(getattr(one, key), getattr(right, key), rel_tol=1e-6, abs_tol=1e-9):
            raise FileFormatError(f"{where}: {key} does not follow from the values.")
