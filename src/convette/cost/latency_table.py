"""Latency predicted from a table: each layer timed alone at a grid of widths, the network the sum of its layers.

The table of HFP (Yu et al., ICPR 2020): a key for all that a layer's time depends on, medians over repeated runs, made
monotone, and the error of the sum against networks that were really measured.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from convette import _files
from convette.errors import FileFormatError, UsageError

FORMAT = 1
Query = Literal["linear", "ceil"]


@dataclass(frozen=True)
class LayerShape:
    """What a layer's time depends on, beside its widths: one grid of the table each.

    `kind`: "conv", "depthwise" (as many groups as channels) or "linear"; height and width are those of its input (rows
    and 1 for a linear layer on sequences); `norm` and `activation`: what runs right behind it and is timed with it.
    """

    kind: str
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    height: int
    width: int
    batch: int
    bias: bool
    norm: bool
    activation: str

    def __str__(self) -> str:
        size = "x".join(map(str, self.kernel))
        after = ("+norm" if self.norm else "") + (f"+{self.activation}" if self.activation else "")
        stride = f"/{self.stride[0]}" if max(self.stride) > 1 else ""
        groups = f" in {self.groups} groups" if self.groups > 1 else ""
        return f"{self.kind} {size}{stride}{groups}{after} at {self.height}x{self.width}"


@dataclass(frozen=True)
class Grid:
    """Times of one `LayerShape`: rows are `ins`, columns `outs` (ascending channels), milliseconds.

    `median`, `p90` and `iqr` are as measured, less what an empty network takes; `times` is `median` made monotone. A
    depthwise layer has one row: its input channels are its output channels.
    """

    ins: tuple[int, ...]
    outs: tuple[int, ...]
    median: np.ndarray
    p90: np.ndarray
    iqr: np.ndarray
    times: np.ndarray

    def at(self, ins: np.ndarray, outs: np.ndarray, query: Query = "linear") -> np.ndarray:
        """Return the times at many widths; beyond the largest in the grid they go on along the last slope."""
        rows = np.zeros_like(np.asarray(outs, dtype=float)) if len(self.ins) == 1 else _places(self.ins, ins, query)
        columns = _places(self.outs, outs, query)
        low_r = np.clip(np.floor(rows).astype(int), 0, max(len(self.ins) - 2, 0))
        low_c = np.clip(np.floor(columns).astype(int), 0, max(len(self.outs) - 2, 0))
        high_r, high_c = np.minimum(low_r + 1, len(self.ins) - 1), np.minimum(low_c + 1, len(self.outs) - 1)
        part_r, part_c = rows - low_r, columns - low_c
        top = self.times[low_r, low_c] * (1 - part_c) + self.times[low_r, high_c] * part_c
        bottom = self.times[high_r, low_c] * (1 - part_c) + self.times[high_r, high_c] * part_c
        return np.maximum(top * (1 - part_r) + bottom * part_r, 0.0)


@dataclass(frozen=True)
class LatencyTable:
    r"""The times of layers on one engine of one machine, and what makes them the time of a network.

    .. math:: T = T_{fixed} + s \sum_{op} t(op)

    `fixed` (framework, untabled operations) and the scale `s` (warm caches, fusion across layers) are fitted by
    non-negative least squares to networks of random widths. `error`: median absolute error on other such networks, as
    a share; `rank_correlation`: Spearman's, on those. Both None before `calibrate`. `version` names the runtime.
    """

    engine: str
    device: str
    precision: str
    threads: int
    version: str
    machine: str
    grids: Mapping[LayerShape, Grid]
    fixed: float = 0.0
    scale: float = 1.0
    error: float | None = None
    rank_correlation: float | None = None
    query: Query = "linear"

    def layer(self, shape: LayerShape, ins: Any, outs: Any) -> np.ndarray:
        """Return the time of a layer at (one or many) widths, in milliseconds, before `scale`.

        Raises `UsageError` for a layer the table does not hold.
        """
        grid = self.grids.get(shape)
        if grid is None:
            raise UsageError(f"the latency table of {self.engine} has no {shape}; measure a table of this network.")
        return grid.at(np.atleast_1d(ins).astype(float), np.atleast_1d(outs).astype(float), self.query)

    def total(self, layers: np.ndarray) -> np.ndarray:
        """Return the time of networks from the sums of their layers' times."""
        return self.fixed + self.scale * layers

    def calibrated(self, sums: np.ndarray, measured: np.ndarray, held_out: int) -> "LatencyTable":
        """Return the table with `fixed` and `scale` fitted to all but the last `held_out` networks, tried on those.

        `sums`: the added times of the layers of each network; `measured`: its real latency.
        """
        from scipy.optimize import nnls
        from scipy.stats import spearmanr

        known = len(sums) - held_out
        fitted, _ = nnls(np.stack([np.ones(known), sums[:known]], axis=1), measured[:known])
        table = replace(self, fixed=float(fitted[0]), scale=float(fitted[1]))
        if not held_out:
            return table
        predicted = table.total(sums[known:])
        error = float(np.median(np.abs(predicted - measured[known:]) / measured[known:]))
        rank = float(spearmanr(predicted, measured[known:])[0]) if held_out > 2 else None  # type: ignore[arg-type]
        return replace(table, error=error, rank_correlation=rank)

    def scaled(self, factor: float) -> "LatencyTable":
        """Return the table with all times multiplied: what a measurement that disagrees asks for."""
        return replace(self, fixed=self.fixed * factor, scale=self.scale * factor)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; `from_json` reads them back."""
        rows = []
        for shape, grid in self.grids.items():
            values = {name: getattr(grid, name).tolist() for name in ("median", "p90", "iqr", "times")}
            rows.append({"shape": asdict(shape), "ins": list(grid.ins), "outs": list(grid.outs), **values})
        header = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "grids"}
        return {"format": FORMAT, **header, "grids": rows}

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> "LatencyTable":
        """Read back what `to_json` wrote; raises `FileFormatError` for anything else."""
        try:
            if value["format"] != FORMAT:
                raise ValueError(f"format {value['format']}")
            grids = {}
            for row in value["grids"]:
                fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in row["shape"].items()}
                arrays = [np.array(row[name], dtype=float) for name in ("median", "p90", "iqr", "times")]
                grids[LayerShape(**fields)] = Grid(tuple(row["ins"]), tuple(row["outs"]), *arrays)
            header = {k: v for k, v in value.items() if k not in ("format", "grids")}
            return LatencyTable(**header, grids=grids)
        except (KeyError, TypeError, ValueError) as error:
            raise FileFormatError(f"not the JSON of a latency table: {error!r}.") from error

    def save(self, path: Path | str) -> None:
        """Write the table as JSON, whole or not at all."""
        _files.write_json(path, self.to_json())

    @staticmethod
    def load(path: Path | str) -> "LatencyTable":
        """Read a table that `save` wrote; raises `FileFormatError` if it is none."""
        try:
            value = json.loads(Path(path).read_text())
        except (OSError, ValueError) as error:
            raise FileFormatError(f"{path}: not a readable latency table ({error}).") from error
        return LatencyTable.from_json(value)


def monotone(times: np.ndarray, rounds: int = 50) -> np.ndarray:
    """Return the table closest to `times` (about, by turns along both axes) that never falls along rows or columns.

    Timing noise is larger than what one channel saves: without this a search would collect the noise.
    """
    from scipy.optimize import isotonic_regression

    result = times.astype(float).copy()
    for _ in range(rounds):
        before = result.copy()
        for axis in (0, 1):
            result = np.apply_along_axis(lambda line: isotonic_regression(line).x, axis, result)
        if np.allclose(before, result, rtol=1e-9, atol=0):
            break
    # By turns it only comes close; what is left is removed for good.
    return np.maximum.accumulate(np.maximum.accumulate(result, axis=0), axis=1)


def make_grid(
    ins: tuple[int, ...], outs: tuple[int, ...], median: np.ndarray, p90: np.ndarray, iqr: np.ndarray
) -> Grid:
    """Return the grid of measured times, each ``(ins, outs)``, with its monotone version."""
    return Grid(ins, outs, median, p90, iqr, monotone(np.maximum(median, 0.0)))


def _places(grid: tuple[int, ...], widths: np.ndarray, query: Query) -> np.ndarray:
    """Return where widths lie on a grid, as fractional numbers of its points."""
    if len(grid) == 1:
        return np.zeros_like(widths)
    points = np.array(grid, dtype=float)
    if query == "ceil":
        return np.minimum(np.searchsorted(points, widths, side="left"), len(grid) - 1).astype(float)
    low = np.clip(np.searchsorted(points, widths, side="right") - 1, 0, len(grid) - 2)
    return low + (widths - points[low]) / (points[low + 1] - points[low])
