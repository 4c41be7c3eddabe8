"""Numbers with units, read and written exactly: in decimals, so that what is written is read back to the same float."""

import re
from decimal import Decimal, InvalidOperation

from convette.errors import UsageError

_TIME = {"us": Decimal("0.001"), "ms": Decimal(1), "s": Decimal(1000)}
_BYTES = {
    "B": Decimal(1),
    "KB": Decimal(10) ** 3,
    "MB": Decimal(10) ** 6,
    "GB": Decimal(10) ** 9,
    "KiB": Decimal(2) ** 10,
    "MiB": Decimal(2) ** 20,
    "GiB": Decimal(2) ** 30,
}
_COUNTS = {"": Decimal(1), "K": Decimal(10) ** 3, "M": Decimal(10) ** 6, "G": Decimal(10) ** 9, "T": Decimal(10) ** 12}
# Metric -> unit -> how many of the metric's own units (milliseconds, bytes, one) it is.
UNITS = {"latency": _TIME, "size": _BYTES, "memory": _BYTES, "macs": _COUNTS, "parameters": _COUNTS}
_EXAMPLES = {"latency": "2ms", "size": "30KB", "memory": "10MB", "macs": "1.5G", "parameters": "300K"}
_NUMBER = re.compile(r"([+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?)\s*([^\d\s]*)")
# A count below this without a unit is a forgotten "%", "K" or "M".
_SMALLEST_BARE_COUNT = 1000


def parse_value(metric: str, text: str, where: str) -> tuple[float, bool]:
    """Read "2ms", "30 %", "1.5G": the value in the metric's own unit (a fraction if relative), and if it is relative.

    Raises:
        UsageError: no number, unit missing, unknown or of another kind, not positive, above 100 %, or too large.
    """
    match = _NUMBER.fullmatch(text.strip())
    example = _EXAMPLES[metric]
    if match is None:
        raise UsageError(
            f"{where}: {text.strip()!r} is not a number with a unit. Write {metric}<={example} or {metric}<=40%."
        )
    number, unit = match.groups()
    factor = Decimal("0.01") if unit == "%" else _factor(metric, unit, number, where)
    try:
        value = float(Decimal(number) * factor)
    except (InvalidOperation, OverflowError):
        value = float("inf")
    if not 0 < value < float("inf"):
        raise UsageError(f"{where}: a limit must be above zero and finite. Write {metric}<={example} or {metric}<=40%.")
    if unit == "%" and value > 1:
        raise UsageError(f"{where}: more than 100% of the start limits nothing. Write 100% or less.")
    if not unit and value < _SMALLEST_BARE_COUNT:
        raise UsageError(f"{where}: {number} {metric} has no unit. Write {number}%, {number}K or {number}M.")
    return value, unit == "%"


def format_value(metric: str, value: float, relative: bool) -> str:
    """Write a value so that `parse_value` reads the same float: "30%", "2ms", "1.5G"."""
    exact = Decimal(repr(float(value)))
    if relative:
        return f"{_plain(exact * 100)}%"
    units = [(unit, factor) for unit, factor in UNITS[metric].items() if "i" not in unit]
    fitting = [(unit, factor) for unit, factor in units if exact >= factor]
    unit, factor = max(fitting, key=lambda pair: pair[1]) if fitting else min(units, key=lambda pair: pair[1])
    if unit == "" and exact < _SMALLEST_BARE_COUNT:
        unit, factor = "K", UNITS[metric]["K"]
    return f"{_plain(exact / factor)}{unit}"


def _factor(metric: str, unit: str, number: str, where: str) -> Decimal:
    units = UNITS[metric]
    unit = unit.replace("µ", "u").replace("μ", "u")
    for name, factor in units.items():
        if name.lower() == unit.lower():
            return factor
    known = ", ".join(name for name in units if name)
    if not unit:
        raise UsageError(
            f"{where}: {number} has no unit. {metric} takes {known} or %: write {metric}<={_EXAMPLES[metric]}."
        )
    raise UsageError(
        f"{where}: {unit!r} is no unit of {metric}. It takes {known} or %: write {metric}<={_EXAMPLES[metric]}."
    )


def _plain(number: Decimal) -> str:
    if number == 0 or not -9 <= number.adjusted() <= 18:
        return f"{number.normalize():e}"
    text = f"{number:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
