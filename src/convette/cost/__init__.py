"""What a network costs: multiply-accumulates, parameters, bytes, activation memory, measured latency; and budgets."""

from convette.cost._budget import Budget, Limit, LimitStatus, status_rows, status_text, unreachable
from convette.cost._cost import CONVENTION, DEFAULT_ENGINE, METRICS, PERCENTILES, Cost, LayerCost
from convette.cost._count import Example, count, count_parameters
from convette.cost._measure import available_engines, measure, measure_together
from convette.cost._table_measuring import LatencyCost, calibrate_table, measure_table, read_layers
from convette.cost._tables import (
    comparison_table,
    cost_table,
    engine_table,
    format_bytes,
    format_count,
    format_figure,
    format_milliseconds,
    status_table,
)
from convette.cost._widths import WidthCost
from convette.cost.latency_table import LatencyTable, LayerShape

__all__ = [
    "CONVENTION",
    "DEFAULT_ENGINE",
    "METRICS",
    "PERCENTILES",
    "Budget",
    "Cost",
    "Example",
    "LatencyCost",
    "LatencyTable",
    "LayerCost",
    "LayerShape",
    "Limit",
    "LimitStatus",
    "WidthCost",
    "available_engines",
    "calibrate_table",
    "comparison_table",
    "cost_table",
    "count",
    "count_parameters",
    "engine_table",
    "format_bytes",
    "format_count",
    "format_figure",
    "format_milliseconds",
    "measure",
    "measure_table",
    "measure_together",
    "read_layers",
    "status_rows",
    "status_table",
    "status_text",
    "unreachable",
]
