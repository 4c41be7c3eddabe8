"""The latency table of a pruning run: measured once on the start, kept beside the run's state."""

import copy
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from convette._progress import note
from convette.cost import LatencyTable, calibrate_table, measure_table
from convette.errors import UsageError
from convette.surgery import trace


def make_table(network: nn.Module, example: Any, engine: str, directory: Path | None) -> LatencyTable:
    """Return the calibrated table of `network` on `engine`; one in `directory` is taken, a new one is written there.

    Raises `UsageError` for an example that is not one tensor. Costs the measuring: seconds to minutes.
    """
    if not isinstance(example, Tensor):
        raise UsageError("a latency table is measured on one tensor; use prune.predictor = 'macs' for this example.")
    path = directory / "latency-table.json" if directory is not None else None
    if path is not None and path.exists():
        return LatencyTable.load(path)
    network, example = copy.deepcopy(network).cpu(), example.cpu()
    table = measure_table(network, example, engine)
    table = calibrate_table(table, network, example, trace(network, example))
    if table.error is not None:
        note(
            f"latency table of {engine}: {len(table.grids)} layer shapes; on networks it had not seen it is off by"
            f" {table.error:.1%} (median), rank correlation {table.rank_correlation:.2f}"
        )
    if path is not None:
        table.save(path)
    return table
