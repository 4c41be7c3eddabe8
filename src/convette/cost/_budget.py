"""Budgets: what a network may cost, absolute or relative to where it started."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from convette.cost._cost import DEFAULT_ENGINE, METRICS, PERCENTILES, Cost
from convette.cost._tables import format_figure
from convette.cost._units import format_value, parse_value
from convette.errors import BudgetError, UsageError, did_you_mean
from convette.runtime import EngineSpec

_ALIASES = {
    "params": "parameters",
    "param": "parameters",
    "parameter": "parameters",
    "mac": "macs",
    "bytes": "size",
    "mem": "memory",
    "time": "latency",
}
_FLOPS = re.compile(r"[kmgt]?flops?s?", re.IGNORECASE)


@dataclass(frozen=True)
class Limit:
    """One limit of a budget: ``metric <= value``.

    Attributes:
        metric: "macs", "parameters", "size", "memory" or "latency".
        percentile: "p50", "p95" or "p99" of the latency; None for the other metrics.
        value: milliseconds, bytes or a count; a fraction (0.3 for 30 %) if `relative`.
        relative: whether the value is a fraction of the cost at the start.
        engine: where the latency is measured ("openvino:cpu"); None: on the engine the run uses anyway.
    """

    metric: str
    percentile: str | None
    value: int | float
    relative: bool
    engine: str | None

    @property
    def key(self) -> str:
        """Name of the figure that is limited, as `Cost.get` takes it: "latency.p99@openvino:cpu"."""
        percentile = f".{self.percentile}" if self.percentile else ""
        return f"{self.metric}{percentile}" + (f"@{self.engine}" if self.engine else "")

    def __str__(self) -> str:
        percentile = f".{self.percentile}" if self.percentile not in (None, "p50") else ""
        engine = f"@{self.engine}" if self.engine else ""
        return f"{self.metric}{percentile}<={format_value(self.metric, self.value, self.relative)}{engine}"


@dataclass(frozen=True)
class LimitStatus:
    """How a cost stands against one (absolute) limit: the value found, and whether it is within it."""

    limit: Limit
    value: int | float
    met: bool


@dataclass(frozen=True)
class Budget:
    """Several limits that must all hold."""

    limits: tuple[Limit, ...]

    @staticmethod
    def parse(text: "str | Budget | Iterable[str]") -> "Budget":
        """Read limits such as ``"latency<=2ms, params<=30%, latency.p99<=5ms@openvino:cpu"``.

        A limit is ``METRIC[.PERCENTILE]<=VALUE[@ENGINE]``: metrics macs, parameters (params), size (bytes of the
        weights), memory (peak activation bytes), latency (p50 unless said); values with a unit (us, ms, s; B, KB, MB,
        GB, KiB, MiB, GiB; K, M, G, T), or in % of the start.

        Raises:
            UsageError: a metric, percentile, unit, value or engine that cannot be, or a limit given twice.
        """
        if isinstance(text, Budget):
            return text
        if isinstance(text, str) and (comma := re.search(r"[<=≤]\s*(\d+),(\d+)", text)):
            raise UsageError(f"budget {text!r}: write {comma[1]}.{comma[2]} with a point; commas stand between limits.")
        parts = text.split(",") if isinstance(text, str) else [part for item in text for part in item.split(",")]
        parts = [part.strip() for part in parts if part.strip()]
        if not parts:
            raise UsageError("The budget is empty. Write for example macs<=40% or latency<=2ms@openvino:cpu.")
        limits: dict[str, Limit] = {}
        for part in parts:
            limit = _parse_limit(part)
            if limit.key in limits:
                raise UsageError(
                    f"budget: {part!r} and '{limits[limit.key]}' limit the same figure. Keep the tighter one."
                )
            limits[limit.key] = limit
        return Budget(tuple(limits.values()))

    @property
    def engines(self) -> tuple[str, ...]:
        """The engines to measure on: those named, and `DEFAULT_ENGINE` for a latency limit that names none."""
        named = (limit.engine or DEFAULT_ENGINE for limit in self.limits if limit.metric == "latency")
        return tuple(dict.fromkeys(named))

    def on(self, engine: str) -> "Budget":
        """The same budget with `engine` for the latency limits that name none."""
        return Budget(
            tuple(replace(x, engine=engine) if x.metric == "latency" and not x.engine else x for x in self.limits)
        )

    def resolve(self, start: Cost) -> "Budget":
        """The same budget with every relative limit turned into an absolute one, from the cost at the start.

        Raises:
            UsageError: a relative latency limit whose engine was not measured at the start.
        """
        return Budget(
            tuple(
                replace(limit, value=limit.value * start.get(limit.key), relative=False) if limit.relative else limit
                for limit in self.limits
            )
        )

    def check(self, cost: Cost) -> tuple[LimitStatus, ...]:
        """How `cost` stands against each limit.

        Raises:
            UsageError: a limit is still relative (`resolve` first), or its latency was not measured.
        """
        statuses = []
        for limit in self.limits:
            if limit.relative:
                raise UsageError(
                    f"The limit '{limit}' is relative: resolve the budget with the cost at the start first."
                )
            value = cost.get(limit.key)
            statuses.append(LimitStatus(limit, value, value <= limit.value))
        return tuple(statuses)

    def met(self, cost: Cost) -> bool:
        """Whether `cost` is within every limit (which must be absolute, see `resolve`)."""
        return all(status.met for status in self.check(cost))

    def __str__(self) -> str:
        return ", ".join(str(limit) for limit in self.limits)


def status_rows(statuses: Iterable[LimitStatus], start: Cost | None = None) -> list[dict[str, str]]:
    """The statuses as rows of text for a table: metric, limit, value, met ("yes" or "no"), and start where given."""
    rows = []
    for status in statuses:
        key = status.limit.key
        row = {
            "metric": key,
            "limit": format_figure(key, status.limit.value),
            "value": format_figure(key, status.value),
            "met": "yes" if status.met else "no",
        }
        if start is not None:
            before = start.get(key)
            row["start"] = format_figure(key, before)
            row["share"] = f"{100 * status.value / before:.1f} %" if before else ""
        rows.append(row)
    return rows


def status_text(statuses: Iterable[LimitStatus]) -> str:
    """The statuses in one line: ``macs 0.61 M of 0.72 M: met; latency.p50 2.4 ms of 2 ms: over by 20 %``."""
    parts = []
    for status in statuses:
        key, limit = status.limit.key, status.limit.value
        times = status.value / limit
        over = f"{times:.3g} times too much" if times >= 2 else f"over by {100 * (times - 1):.2g} %"
        verdict = "met" if status.met else over
        parts.append(f"{key} {format_figure(key, status.value)} of {format_figure(key, limit)}: {verdict}")
    return "; ".join(parts)


def unreachable(budget: Budget, smallest: Cost, note: str = "") -> BudgetError:
    """The error for an absolute budget that cannot be reached; it names the smallest cost that can (and `note`).

    `smallest` is the cost of the smallest network found, with every latency the budget limits.
    """
    over = [status for status in budget.check(smallest) if not status.met]
    parts = [
        f"{status.limit.key} can go down to {format_figure(status.limit.key, status.value)} at the least, "
        f"the limit is {format_figure(status.limit.key, status.limit.value)}"
        for status in over
    ]
    what = "; ".join(parts) or "its limits cannot all be met at once"
    remedy = f" Raise the limit to at least that, or start from a smaller model.{' ' + note if note else ''}"
    return BudgetError(f"The budget '{_in_few_digits(budget)}' cannot be reached: {what}.{remedy}")


def _in_few_digits(budget: Budget) -> str:
    # A share of the start has all the digits of a float, which say nothing to a reader.
    limits = [
        one if float(one.value).is_integer() else replace(one, value=float(f"{one.value:.4g}")) for one in budget.limits
    ]
    return str(Budget(tuple(limits)))


def _parse_limit(part: str) -> Limit:
    where = f"budget limit {part!r}"
    head, sign, tail = re.match(r"\s*([^<>=≤≥@]*)\s*([<>=≤≥]*)(.*)", part, re.DOTALL).groups()  # type: ignore[union-attr]
    if not sign and tail.startswith("@") and (misplaced := re.fullmatch(r"@\s*([^<≤]*?)\s*(?:<=|≤)\s*(.*)", tail)):
        name, value = misplaced.groups()
        raise UsageError(f"{where}: name the engine behind the value: {head.strip()}<={value}@{name}.")
    if sign not in ("<=", "≤"):
        found = f"uses {sign!r}" if sign else "has no '<='"
        raise UsageError(f"{where} {found}: write METRIC<=VALUE, for example macs<=40% or latency<=2ms@openvino:cpu.")
    metric, percentile = _metric(head.strip(), where)
    value, _, engine = tail.partition("@")
    number, relative = parse_value(metric, value, where)
    if "@" in tail and metric != "latency":
        raise UsageError(f"{where}: only latency depends on an engine; leave out '@{engine.strip()}'.")
    return Limit(metric, percentile, number, relative, _engine(engine.strip(), where) if "@" in tail else None)


def _metric(head: str, where: str) -> tuple[str, str | None]:
    name, dot, percentile = head.lower().partition(".")
    if _FLOPS.fullmatch(name):
        raise UsageError(
            f"{where}: count multiply-accumulates, not FLOPs (about two to one). Write macs instead of {name}."
        )
    metric = _ALIASES.get(name, name)
    if metric not in METRICS:
        raise UsageError(f"{where}: unknown metric {name!r}.{did_you_mean(name, [*METRICS, 'params'])}")
    if metric != "latency":
        if dot:
            raise UsageError(f"{where}: only latency has percentiles. Write {metric}, not {head}.")
        return metric, None
    if dot and percentile not in PERCENTILES:
        known = ", ".join(f"latency.{p}" for p in PERCENTILES)
        raise UsageError(f"{where}: unknown percentile {percentile!r}. Known: {known}.")
    return metric, percentile or "p50"


def _engine(text: str, where: str) -> str:
    if not text:
        raise UsageError(f"{where}: no engine after '@'. Write for example @openvino:cpu.")
    try:
        return str(EngineSpec.parse(text))
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from error
