"""The lists of a recipe: `[[convert]]`, what the network becomes, and `[[method]]`, what takes part in training.

```toml
[[convert]]
replace = "BatchNorm2d"                        # classes of layers, with commas
by = "sparse-switchable-normalization"         # a catalogue slug, a public class, a layer of torch.nn
where = "stage:2, last in block"
options = { momentum = 0.003 }

[[convert]]
by = "mixstyle"
after = "layer1, layer2"

[[method]]
name = "norm-loss"
options = { weight = 0.01 }
```

Each may also be one line of text, as on the command line: ``convert = ["BatchNorm2d=bnet; where=last in block; k=5"]``.
"""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from convette.errors import ConvetteError, UsageError
from convette.layers import find_layer
from convette.pipeline._toml import parse_value
from convette.surgery import Conversion, check_words
from convette.training import find_method
from convette.training.methods import check_options

_LISTS = ("replace", "after", "where", "include", "exclude")


class Step(BaseModel):
    """An entry of a list of a recipe: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ConversionStep(Step):
    """One `[[convert]]`: see `convette.surgery.Conversion`. Lists may be text with commas.

    `method` "auto": a layer that is trained in a way of its own (a growing radius, clean images in front) gets the
    training method it names; "off": it does not.
    """

    by: str
    replace: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    where: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    options: dict[str, Any] = Field(default_factory=dict)
    method: Literal["auto", "off"] = "auto"

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        return _raised(conversion_text, value) if isinstance(value, str) else value

    @field_validator(*_LISTS, mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("where")
    @classmethod
    def _places(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        words = tuple(word if word.startswith("stage:") else word.replace("-", " ") for word in value)
        _raised(check_words, words)
        return words

    @field_validator("by")
    @classmethod
    def _known(cls, value: str) -> str:
        _raised(find_layer, value)
        return value

    @model_validator(mode="after")
    def _whole(self) -> "ConversionStep":
        _raised(self.conversion)
        return self

    def conversion(self, seed: int = 0) -> Conversion:
        """Return what surgery carries out."""
        return Conversion(
            self.by, self.replace, self.after, self.where, self.include, self.exclude, dict(self.options), seed
        )

    def words(self) -> str:
        """Return the step in a few words."""
        target = f"{', '.join(self.replace)} by {self.by}" if self.replace else self.by
        places = [f"after {', '.join(self.after)}"] if self.after else []
        places += [f"at {', '.join(self.where)}"] if self.where else []
        return " ".join([target, *places])


class ConvertSection(BaseModel):
    """`[[convert]]`: conversions of the network, carried out in order before training."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: tuple[ConversionStep, ...] = ()


class MethodStep(Step):
    """One `[[method]]`: the slug or class of a training method, and its options."""

    name: str
    options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        return _raised(method_text, value) if isinstance(value, str) else value

    @field_validator("name")
    @classmethod
    def _known(cls, value: str) -> str:
        _raised(find_method, value)
        return value

    @model_validator(mode="after")
    def _whole(self) -> "MethodStep":
        _raised(check_options, find_method(self.name), self.options)
        return self


class MethodSection(BaseModel):
    """`[[method]]`: methods that take part in training, besides those that converted layers bring along."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: tuple[MethodStep, ...] = ()


def as_steps(value: Any) -> Any:
    """Return a section of steps from any of the ways to write it: a list, one table, one text."""
    if isinstance(value, str):
        return {"steps": [value]}
    if isinstance(value, list | tuple):
        return {"steps": list(value)}
    if isinstance(value, Mapping) and value and "steps" not in value:
        return {"steps": [dict(value)]}
    return value


def conversion_text(text: str) -> dict[str, Any]:
    """Return the keys of a conversion written as ``"[REPLACE=]BY[; key=value]..."``; other keys are options.

    Raises `UsageError` where it is not of this form.
    """
    first, options = _parts(text, "convert")
    replace, equals, by = first.rpartition("=")
    own = {key: str(value) for key, value in options.items() if key in (*_LISTS, "method")}
    rest = {key: value for key, value in options.items() if key not in own}
    found: dict[str, Any] = {"by": by.strip(), **own}
    if equals:
        found["replace"] = replace.strip()
    return found | ({"options": rest} if rest else {})


def method_text(text: str) -> dict[str, Any]:
    """Return the keys of a method written as ``"NAME[; option=value]..."``."""
    name, options = _parts(text, "method")
    return {"name": name} | ({"options": options} if options else {})


def _parts(text: str, what: str) -> tuple[str, dict[str, Any]]:
    first, *rest = [part.strip() for part in text.split(";")]
    options = {}
    for part in rest:
        key, equals, value = part.partition("=")
        if not equals or not key.strip().isidentifier():
            raise UsageError(f"{what} {text!r}: write {part!r} as key=value, parts with semicolons between.")
        options[key.strip()] = parse_value(value.strip())
    if not first:
        raise UsageError(f"{what} {text!r}: begins with no name.")
    return first, options


def _raised(call: Any, *arguments: Any) -> Any:
    """Call, with our errors as the `ValueError` that pydantic knows."""
    try:
        return call(*arguments)
    except ConvetteError as error:
        raise ValueError(str(error)) from error
