"""The options of criteria and allocations: the keywords that such a function has of its own, checked before it runs.

Types, ranges and words are in the annotations (``population: Annotated[int, Ge(2)]``, ``mode: Literal["a", "b"]``), so
that a recipe is refused when it is read, not after the training that comes first.
"""

import inspect
from collections.abc import Callable, Collection, Mapping
from functools import cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from convette.errors import UsageError, did_you_mean


def own_options(function: Callable[..., Any], given: Collection[str] = ()) -> list[str]:
    """Return the keywords of `function` that are its options: all but those that the caller fills in, `given`."""
    parameters = inspect.signature(function).parameters.values()
    return [one.name for one in parameters if one.kind is inspect.Parameter.KEYWORD_ONLY and one.name not in given]


def check_options(
    what: str, function: Callable[..., Any], options: Mapping[str, Any], given: Collection[str] = ()
) -> dict[str, Any]:
    """Return `options` in the types that `function` asks for; `what` names it in the errors.

    Raises `UsageError` for an option it does not have, or a value of another type or out of its range.
    """
    known = own_options(function, given)
    for option in options:
        if option not in known:
            hint = did_you_mean(option, known) if known else " It has none."
            raise UsageError(f"{what} has no option {option!r}.{hint}")
    return {option: _checked(what, function, option, value) for option, value in options.items()}


def check_values(what: str, function: Callable[..., Any], **values: Any) -> None:
    """Raise `UsageError` where one of the `values` of the options of `function` is of no use, as `check_options`."""
    for option, value in values.items():
        _checked(what, function, option, value)


def _checked(what: str, function: Callable[..., Any], option: str, value: Any) -> Any:
    if callable(value):
        return value
    try:
        return _adapters(function)[option].validate_python(value, strict=True)
    except ValidationError as error:
        kind = get_type_hints(function).get(option)
        if get_origin(kind) is Literal:
            hint = did_you_mean(str(value), get_args(kind))
            raise UsageError(f"{what}: {option} = {value!r} is unknown.{hint}") from None
        message = error.errors()[0]["msg"]
        raise UsageError(f"{what}: {option} = {value!r}: {message[:1].lower()}{message[1:]}.") from None


@cache
def _adapters(function: Callable[..., Any]) -> dict[str, Any]:
    hints = get_type_hints(function, include_extras=True)
    config = ConfigDict(arbitrary_types_allowed=True)
    return {name: TypeAdapter(hints[name], config=config) for name in own_options(function) if name in hints}
