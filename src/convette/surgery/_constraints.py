"""What the user asks of widths, in one line: multiples, minima, whole heads, layers that keep their shape."""

import copy
import fnmatch
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from convette.errors import StructureError, UsageError, did_you_mean
from convette.surgery._groups import Constraints, Group, Member

if TYPE_CHECKING:
    from convette.surgery._graph import ChannelGraph

_WORDS = ("multiple_of", "minimum", "whole_heads", "keep", "min_fraction")
_FORMS = "multiple_of=8, minimum=16 (or 10%), whole_heads, keep PATTERN"
_HEADS = ("num_heads", "n_heads", "heads", "nhead")


@dataclass(frozen=True)
class WidthConstraints:
    """What every selection of channels has to keep to, whatever chooses it.

    - `multiple_of`: layers keep a multiple of this many channels, or all of them; 8, 16 and 32 suit vector units.
    - `minimum`: channels that stay in a layer at least (a whole number), or the share of them (a number below 1).
    - `whole_heads`: attention loses whole heads only, no channels within heads.
    - `keep`: patterns of module names (``"stem*"``, ``"layer1.*"``); such layers keep their shape, inputs as well as
      outputs, and so does all that goes with their channels. A name stands for everything within it.
    - `min_fraction`: the share of its channels that stays in every layer, beside a `minimum` in channels.

    Raises `UsageError` for values out of range.
    """

    multiple_of: int = 1
    minimum: int | float = 1
    whole_heads: bool = False
    keep: tuple[str, ...] = ()
    min_fraction: float | int = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.multiple_of, bool) or not isinstance(self.multiple_of, int) or self.multiple_of < 1:
            raise UsageError(f"constraints: multiple_of={self.multiple_of}: a whole number of at least 1 is needed.")
        if isinstance(self.minimum, bool) or self.minimum < 0 or (self.minimum > 1 and self.minimum % 1):
            raise UsageError(f"constraints: minimum={self.minimum}: a number of channels, or a share such as 10%.")
        if isinstance(self.min_fraction, bool) or not 0 <= self.min_fraction <= 1:
            raise UsageError(f"constraints: min_fraction={self.min_fraction}: a share between 0 and 1 is needed.")
        for pattern in self.keep:
            if not pattern or not re.fullmatch(r"[\w.*?\[\]!-]+", pattern):
                raise UsageError(f"constraints: keep {pattern!r}: a pattern of module names, such as 'layer1.*'.")

    @staticmethod
    def parse(text: str) -> "WidthConstraints":
        """Read ``"multiple_of=8, minimum=16, whole_heads, keep stem*"``; raises `UsageError` with what would work."""
        values: dict[str, int | float | bool] = {}
        keep: list[str] = []
        for part in filter(None, (item.strip() for item in text.split(","))):
            word, _, rest = (item.strip() for item in re.sub(r"[\s=]+", " ", part, count=1).partition(" "))
            word = word.replace("-", "_")
            if word == "whole" and rest == "heads":
                word, rest = "whole_heads", ""
            if word not in _WORDS:
                raise UsageError(f"constraints {part!r}: no such word.{did_you_mean(word, _WORDS)} Write {_FORMS}.")
            if word != "keep" and word in values:
                raise UsageError(f"constraints {text!r}: {word} is given twice.")
            if word == "keep":
                if not rest:
                    raise UsageError(f"constraints {part!r}: keep what? Write keep PATTERN, such as keep layer1.*")
                keep += rest.split()
            else:
                values[word] = _value(part, word, rest)
        return WidthConstraints(**values, keep=tuple(keep))  # type: ignore[arg-type]

    def __str__(self) -> str:
        """Return the text that `parse` reads back."""
        parts = [f"multiple_of={self.multiple_of}"] if self.multiple_of > 1 else []
        if self.minimum != 1:
            parts.append(f"minimum={self.minimum if isinstance(self.minimum, int) else f'{100 * self.minimum:g}%'}")
        if self.min_fraction:
            parts.append(f"min_fraction={100 * self.min_fraction:g}%")
        parts += ["whole_heads"] * self.whole_heads
        parts += [f"keep {pattern}" for pattern in self.keep]
        return ", ".join(parts)


def _value(part: str, word: str, text: str) -> int | float | bool:
    if word == "whole_heads":
        if text.lower() not in ("", "true", "false"):
            raise UsageError(f"constraints {part!r}: whole_heads stands alone.")
        return text.lower() != "false"
    try:
        if word in ("minimum", "min_fraction") and text.endswith("%"):
            return float(text[:-1]) / 100
        if word == "min_fraction":
            return float(text)
        return int(text)
    except ValueError:
        what = "a number of channels, or a share such as 10%" if word == "minimum" else "a whole number"
        what = "a share such as 10%" if word == "min_fraction" else what
        raise UsageError(f"constraints {part!r}: {what} is needed.") from None


def constrained(
    graph: "ChannelGraph", wanted: WidthConstraints, allow_nothing: bool, sizes: Mapping[str, int]
) -> "ChannelGraph":
    """Return `graph` with what is `wanted` added to the constraints of its groups; groups to keep are no longer in it.

    Shares are of `sizes`, by group name, and of what a group has where it is not among them.

    Raises `StructureError` where a pattern fits no module, or (unless `allow_nothing`) nothing could be removed.
    """
    kept = {name: f"keep {pattern}" for name, pattern in _kept(graph, wanted.keep).items()}
    if wanted.whole_heads:
        for group in graph.groups:
            if group.name not in kept and _splits_heads(graph.model, group):
                kept[group.name] = "whole_heads"
    groups = [
        _with(group, wanted, sizes.get(group.name, group.size)) for group in graph.groups if group.name not in kept
    ]
    if graph.groups and not allow_nothing and not any(_smallest(group) < group.size for group in groups):
        widest = max((_channels(group) * group.size for group in graph.groups), default=0)
        raise StructureError(f"constraints {str(wanted)!r} leave nothing to remove (the widest layer has {widest}).")
    result = copy.copy(graph)
    result.groups = tuple(groups)
    result.kept = {**graph.kept, **kept}
    result._by_name = {group.name: group for group in groups}
    return result


def _kept(graph: "ChannelGraph", patterns: Sequence[str]) -> dict[str, str]:
    """Return the groups that a pattern keeps, and which."""
    result: dict[str, str] = {}
    names = [name for name, _ in graph.model.named_modules() if name]
    known = {*names, *(name for name, _ in graph.model.named_parameters())}
    for pattern in patterns:
        if not any(_fits(name, pattern) for name in known):
            tops = dict.fromkeys(name.partition(".")[0] for name in names)
            hint = did_you_mean(pattern.rstrip("*."), names) or f" It has {', '.join(tops)}."
            raise StructureError(f"constraints: keep {pattern!r} fits no module of {type(graph.model).__name__}.{hint}")
        for group in graph.groups:
            owned = {member.parameter for member in group.members}
            if group.name not in result and any(_fits(name, pattern) for name in owned):
                result[group.name] = pattern
    return result


def _fits(name: str, pattern: str) -> bool:
    """Tell whether `pattern` fits a dotted name or something around it."""
    parts = name.split(".")
    return any(fnmatch.fnmatchcase(".".join(parts[: end + 1]), pattern) for end in range(len(parts)))


def _with(group: Group, wanted: WidthConstraints, size: int) -> Group:
    rules = group.constraints
    least = wanted.minimum
    many = math.ceil(least * size) if isinstance(least, float) and least <= 1 else _units(least, group)
    many = max(many, math.ceil(wanted.min_fraction * size))
    step = math.lcm(rules.multiple_of, *(wanted.multiple_of // math.gcd(wanted.multiple_of, k) for k in _widths(group)))
    return replace(group, constraints=Constraints(rules.parts, max(rules.minimum, min(many, group.size)), step))


def _units(channels: int | float, group: Group) -> int:
    return math.ceil(channels / _channels(group))


def _widths(group: Group) -> list[int]:
    """Return how many channels a unit has in each of the layers that make it."""
    return sorted({member.index.shape[1] for member in group.of("producer")}) or [1]


def _channels(group: Group) -> int:
    return _widths(group)[0]


def _smallest(group: Group) -> int:
    """Return the fewest units that the constraints of `group` allow."""
    rules = group.constraints
    step = math.lcm(rules.parts, rules.multiple_of)
    return min(group.size, math.ceil(max(1, rules.minimum) / step) * step)


def _splits_heads(model: nn.Module, group: Group) -> bool:
    """Tell whether the units of `group` are less than whole heads of an attention."""
    modules = dict(model.named_modules())
    for member in group.of("producer"):
        parts = member.module.split(".")
        for path in (".".join(parts[:end]) for end in range(len(parts), -1, -1)):
            heads = next((getattr(modules[path], key, None) for key in _HEADS if hasattr(modules[path], key)), None)
            if isinstance(heads, int) and heads > 1:
                if _splits(member, heads, modules[path], path):
                    return True
                break
    return False


def _splits(member: Member, heads: int, attention: nn.Module, path: str) -> bool:
    # Only layers that make heads: the one that ends an attention gives channels of the network.
    leaf = member.parameter.removeprefix(f"{path}.").split(".")[0]
    if not any(word in leaf for word in ("qkv", "query", "key", "value", "in_proj", "to_q", "to_k", "to_v")) and (
        leaf not in ("q", "k", "v", "kv", "qk")
    ):
        return False
    width = getattr(attention, "head_dim", None) or getattr(attention, "key_dim", None)
    width = width if isinstance(width, int) else max(1, int(member.index.max() + 1) // (3 * heads))
    return member.index.shape[1] % width != 0


def least_units(
    groups: Iterable[Group], units: Mapping[str, Tensor], singles: Sequence[Tensor], labels: int
) -> tuple[Group, ...]:
    """Return `groups` with a minimum of two units where statistics need two values: `singles` are their labels' roots.

    `labels`: how many labels there are.

    A convolution that standardises its weights (timm's ``ScaledStdConv2d``) has no variance over one input channel.
    """
    if not singles:
        return tuple(groups)
    needs_two = torch.zeros(labels, dtype=torch.bool)
    for single in singles:
        needs_two[single.reshape(-1)] = True
    result = []
    for group in groups:
        if group.size > 1 and bool(needs_two[units[group.name]].any()):
            rules = replace(group.constraints, minimum=max(2, group.constraints.minimum))
            group = replace(group, constraints=rules)
        result.append(group)
    return tuple(result)
