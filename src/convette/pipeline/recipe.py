"""A recipe: the whole of a run in one TOML file. Every option of the command line is one of its keys.

```toml
budget = "macs<=40%"          # or a table: [budget] limits = "macs<=40%"

[data]
source = "digits"

[train]
epochs = 30
```
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator, model_validator

from convette import _files
from convette.cost import Budget
from convette.errors import ConvetteError, UsageError, did_you_mean
from convette.pipeline._toml import line_of, read_toml
from convette.pipeline.searched import check_search
from convette.pipeline.steps import ConversionStep, ConvertSection, MethodSection, MethodStep, as_steps
from convette.pruning import PruneSettings
from convette.quantization import QuantizeSettings
from convette.training import TrainSettings, find_method

TRAIN = TrainSettings()
# Recovery after pruning takes this share of the training's epochs more, and units are judged by what the loss says of
# them: on the digits both were better on the validation split than half as long and by size alone.
RECOVERY_SHARE = 1.0
CRITERION = "taylor"
# Sections with a seed that follows the run's. That of the data stays: another seed must not mean other test images.
SEEDED = ("train", "prune", "quantize")
# Sections that are lists of tables, and the class of those.
LISTS: dict[str, type[BaseModel]] = {"convert": ConversionStep, "method": MethodStep}
LATER: tuple[tuple[str, str, Any], ...] = (
    ("model", "options", {}),
    ("prune", "schedule_options", {}),
    ("prune", "allocation_options", {}),
    ("prune", "keep_zeros", True),
)


class Section(BaseModel):
    """A table of a recipe: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class DataSection(Section):
    """`[data]`: where the images come from (`convette.load_data`); `mean`, `std`: found by looking unless given."""

    source: str = "digits"
    image_size: int | None = Field(default=None, ge=1)
    channels: Literal[1, 3] | None = None
    validation_fraction: float = Field(default=0.1, gt=0, lt=1)
    test_fraction: float = Field(default=0.2, gt=0, lt=1)
    max_bad: float = Field(default=0.01, ge=0, le=1)
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    seed: int = 0


class ModelSection(Section):
    """`[model]`: the network to start from (`convette.create_model`); `stem` "auto": small for images up to 64 px.

    `name` "dass" searches a network of cells for the data (`convette.pruning.dass`), with `options` for its settings,
    and trains it sparse.
    """

    name: str = "auto"
    options: dict[str, Any] = Field(default_factory=dict)
    stem: Literal["auto", "default", "small"] = "auto"
    pretrained: bool = False
    weights: str | None = None

    @model_validator(mode="after")
    def _searchable(self) -> "ModelSection":
        try:
            check_search(self.name, self.options)
        except ConvetteError as error:
            raise ValueError(str(error)) from error
        return self


class BudgetSection(Section):
    """`[budget]`: limits as `convette.cost.Budget.parse` reads them; empty: no compression."""

    limits: str = ""

    @field_validator("limits")
    @classmethod
    def _readable(cls, limits: str) -> str:
        try:
            return str(Budget.parse(limits)) if limits.strip() else ""
        except ConvetteError as error:
            raise ValueError(str(error)) from error


class ExportSection(Section):
    """`[export]`: which deployable files to write, besides the `.safetensors`."""

    formats: tuple[Literal["onnx", "openvino"], ...] = ("onnx", "openvino")
    verify_images: int = Field(default=512, ge=256)


class ExplainSection(Section):
    """`[explain]`: class-activation maps of test images before and after (`images` right and as many wrong ones)."""

    method: Literal["eigen_cam", "grad_cam", "off"] = "eigen_cam"
    images: int = Field(default=6, ge=1, le=64)


class ReportSection(Section):
    """`[report]`: the HTML report."""

    enabled: bool = True


class RunSection(Section):
    """`[run]`: where and on what. `engines` are measured besides those that the budget names.

    `contention`: how many processes load the machine while latency is measured for the budget.
    """

    out: str | None = None
    seed: int = 0
    device: str = "auto"
    engines: tuple[str, ...] = ("eager:cpu", "onnxruntime:cpu", "openvino:cpu")
    contention: int = Field(default=0, ge=0, le=64)


class Recipe(Section):
    """Everything a run is made from; `convette recipe` prints it, `convette recipe --schema` its JSON schema."""

    data: DataSection = DataSection()
    model: ModelSection = ModelSection()
    convert: ConvertSection = ConvertSection()
    method: MethodSection = MethodSection()
    budget: BudgetSection = BudgetSection()
    train: TrainSettings = TRAIN
    prune: PruneSettings = PruneSettings()
    quantize: QuantizeSettings = QuantizeSettings()
    export: ExportSection = ExportSection()
    explain: ExplainSection = ExplainSection()
    report: ReportSection = ReportSection()
    run: RunSection = RunSection()

    @model_validator(mode="before")
    @classmethod
    def _shorthands(cls, tables: Any) -> Any:
        if not isinstance(tables, dict):
            return tables
        tables = dict(tables)
        if isinstance(tables.get("budget"), str):
            tables["budget"] = {"limits": tables["budget"]}
        for section in LISTS:
            if section in tables:
                tables[section] = as_steps(tables[section])
        return _without_nulls(_with_followers(tables))

    @model_validator(mode="after")
    def _rounded_last(self) -> "Recipe":
        limits = Budget.parse(self.budget.limits).limits if self.budget.limits else ()
        counted = [limit.metric for limit in limits if limit.metric in ("macs", "parameters", "size")]
        named = [step.name for step in self.method.steps if find_method(step.name).__name__ == "QuantizationAware"]
        if counted and named:
            raise UsageError(
                f"method {named[0]!r} rounds every layer in the training, and what is rounded cannot be cut to a budget"
                f" on {counted[0]} afterwards. Cut first and train the smaller network with it (--model FILE), or leave"
                ' it out: [quantize] mode = "on" quantises what was cut.'
            )
        return self

    def tables(self) -> dict[str, dict[str, Any]]:
        """Return every section and key as plain JSON values."""
        return self.model_dump(mode="json")

    def digest(self) -> str:
        """Return twelve hex digits that change when anything changes but where the results go."""
        tables = self.tables()
        tables["run"].pop("out")
        # Keys that came later: where they are as if they were not there a run keeps the name it had before.
        for section, key, same in LATER:
            if tables[section].get(key) == same:
                tables[section].pop(key, None)
        # A recipe without such steps keeps the name it had before there were any.
        tables = {name: table for name, table in tables.items() if name not in LISTS or table["steps"]}
        return hashlib.sha256(json.dumps(tables, sort_keys=True).encode()).hexdigest()[:12]

    def to_toml(self) -> str:
        """Return the recipe as TOML with every key; `parse_recipe` reads the same recipe back."""
        import tomli_w

        defaults = Recipe().tables()
        # TOML has no null. A key that is null by default is left out; one that was switched off says so.
        written = {
            section: {
                key: "none" if value is None else value
                for key, value in table.items()
                if value is not None or defaults[section][key] is not None
            }
            for section, table in self.tables().items()
            if section not in LISTS or table["steps"]
        }
        return tomli_w.dumps(written, multiline_strings=False)

    def save(self, path: Path | str) -> None:
        """Write the recipe to `path`, whole or not at all."""
        _files.write_text(path, self.to_toml())


def load_recipe(path: Path | str, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Return the recipe in the TOML file `path`, with dotted `overrides` (``{"train.epochs": 3}``) put over it.

    Raises `UsageError` with file, line and what would work for a key or value that cannot be.
    """
    tables, text = read_toml(path)
    return build_recipe(tables, overrides, source=str(path), text=text)


def build_recipe(
    tables: Mapping[str, Any] | None = None,
    overrides: Mapping[str, Any] | None = None,
    *,
    source: str = "recipe",
    text: str = "",
) -> Recipe:
    """Return the recipe made of `tables` and dotted `overrides`; `source` and `text` are for error messages.

    An override of ``run.seed`` also replaces the seeds of the sections that follow it.
    """
    merged: dict[str, Any] = {name: dict(t) if isinstance(t, Mapping) else t for name, t in (tables or {}).items()}
    if isinstance(merged.get("budget"), str):
        merged["budget"] = {"limits": merged["budget"]}
    given = dict(overrides or {})
    for name in LISTS:
        if name in merged or name in given:
            # Steps that are given come after those of the file.
            steps = as_steps(merged.get(name, []))
            more = as_steps(given.pop(name, []))
            if isinstance(steps, Mapping) and isinstance(steps.get("steps", []), list):
                merged[name] = {**steps, "steps": [*steps.get("steps", []), *more["steps"]]}
    _unfollow(merged, given)
    if "run.seed" in given:
        given = {f"{name}.seed": given["run.seed"] for name in SEEDED} | given
    for dotted, value in given.items():
        section, *path = dotted.split(".")
        table = merged.setdefault(section, {})
        for name in path[:-1]:
            # A table within the section, such as prune.criterion_options: copied, because it may be the caller's.
            table[name] = dict(table[name]) if isinstance(table.get(name), Mapping) else {}
            table = table[name]
        if not path or not isinstance(table, dict):
            raise UsageError(f"{dotted}: not a key of a recipe; write section.key, such as train.epochs.")
        table[path[-1]] = value
    try:
        return Recipe.model_validate(merged)
    except ValidationError as error:
        raise _explained(error, merged, given, source, text) from None
    except ConvetteError as error:
        # Raised by the settings of another room, which know nothing of files: the place is added here.
        raise type(error)(f"{_place(_blamed(merged, str(error)), given, source, text)}{error}") from None


def _unfollow(tables: dict[str, Any], given: Mapping[str, Any]) -> None:
    # A recipe that was written out holds every key. Recovery that only followed the old length follows the new one.
    train, prune = tables.get("train"), tables.get("prune")
    if "train.epochs" in given and isinstance(train, dict) and isinstance(prune, dict):
        old = train.get("epochs", TRAIN.epochs)
        if isinstance(old, int) and prune.get("epochs") == _recovery_epochs(old):
            del prune["epochs"]


def _recovery_epochs(epochs: int) -> int:
    return max(1, math.ceil(RECOVERY_SHARE * epochs))


def _with_followers(tables: dict[str, Any]) -> dict[str, Any]:
    """Fill in the keys that follow others unless they are given: seeds the run's, recovery the training's length."""
    run, train = tables.get("run", {}), tables.get("train", {})
    seed = run.get("seed", 0) if isinstance(run, dict) else getattr(run, "seed", 0)
    epochs = train.get("epochs", TRAIN.epochs) if isinstance(train, dict) else getattr(train, "epochs", TRAIN.epochs)
    for section in SEEDED:
        table = tables.get(section, {})
        if isinstance(table, dict) and isinstance(seed, int):
            tables[section] = {"seed": seed, **table}
    prune = tables.get("prune", {})
    if isinstance(prune, dict) and isinstance(epochs, int):
        tables["prune"] = {"criterion": CRITERION, "epochs": _recovery_epochs(epochs), **prune}
    return tables


def _without_nulls(tables: dict[str, Any]) -> dict[str, Any]:
    # "none" stands for null where a key may be null and is not a text; see `Recipe.to_toml`.
    result: dict[str, Any] = {}
    for section, table in tables.items():
        result[section] = table
        if isinstance(table, dict) and section in Recipe.model_fields:
            kind = Recipe.model_fields[section].annotation
            result[section] = {
                key: None if value == "none" and _nullable(kind, key) else value for key, value in table.items()
            }
    return result


def _nullable(kind: Any, key: str) -> bool:
    if is_dataclass(kind):
        annotation = next((field.type for field in fields(kind) if field.name == key), None)
    else:
        annotation = kind.model_fields[key].annotation if key in kind.model_fields else None
    return type(None) in get_args(annotation)


def _keys_of(section: str) -> list[str]:
    if section in LISTS:
        return list(LISTS[section].model_fields)
    kind = Recipe.model_fields[section].annotation
    if is_dataclass(kind):
        return [field.name for field in fields(kind)]
    return list(kind.model_fields)  # type: ignore[union-attr]


def _blamed(tables: Mapping[str, Any], message: str) -> list[str]:
    """Return the section whose settings refuse their values, and the key of it that `message` speaks of."""
    for section, table in tables.items():
        try:
            Recipe.model_validate({section: table})
        except ConvetteError:
            keys = table if isinstance(table, dict) else {}
            named = [key for key in keys if re.search(rf"\b{section}\.{key}\b", message)]
            # Else the key whose value is quoted; the longest, because a 3 is found in many words.
            quoted = [key for key, value in keys.items() if repr(value) in message]
            named += sorted(quoted, key=lambda key: -len(repr(keys[key])))
            return [section, *named[:1]]
    return []


def _place(key: Sequence[str], given: Mapping[str, Any], source: str, text: str) -> str:
    if ".".join(key[:2]) in given:
        return ""
    line = None
    if text and key and key[0] in LISTS and len(key) > 2:
        # [[convert]], and [[convert.steps]] as a recipe is written out.
        short = line_of(text, [key[0], *key[2:]])
        line = short if short is not None else line_of(text, key)
    elif text:
        line = line_of(text, key)
    return f"{source}, line {line}: " if line else f"{source}: " if text else ""


def _explained(
    error: ValidationError, tables: Mapping[str, Any], given: Mapping[str, Any], source: str, text: str
) -> UsageError:
    # A key that is misspelt is what is wrong, not the one that is missing for it.
    first = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
    location = [str(part) for part in first["loc"]]
    section = location[0] if location else ""
    key = location[:4] if section in LISTS else location[:2]
    place = _place(key, given, source, text)
    if section not in Recipe.model_fields:
        return UsageError(f"{place}no section [{section}] in a recipe.{did_you_mean(section, Recipe.model_fields)}")
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        wrong, shown = (location[-1], f"[[{section}]]") if section in LISTS else (location[1], f"[{section}]")
        return UsageError(f"{place}no key {wrong!r} in {shown}.{did_you_mean(wrong, _keys_of(section))}")
    context = first.get("ctx", {})
    if isinstance(context.get("error"), Exception):
        return UsageError(f"{place}{context['error']}")
    message = first["msg"][:1].lower() + first["msg"][1:]
    if first["type"] == "literal_error":
        options = [option.strip("'") for option in context["expected"].replace(" or ", ", ").split(", ")]
        # One list is enough where nothing is near.
        near = did_you_mean(str(first["input"]), options).partition(" Known:")[0]
        message = f"not one of {', '.join(options)}.{near}"
    if section in LISTS:
        key = [section, *[part for part in key[1:] if part != "steps" and not part.isdecimal()]]
    return UsageError(f"{place}{'.'.join(key)} = {first['input']!r}: {message.rstrip('.')}.")


def settings_json(settings: Any) -> dict[str, Any]:
    """Return a settings dataclass as plain JSON values."""
    return TypeAdapter(type(settings)).dump_python(settings, mode="json")
