"""What a network costs: the figures of one run on one example, in total and per layer."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from convette.errors import UsageError, did_you_mean
from convette.runtime import Latency

CONVENTION = (
    "MACs are multiply-accumulates of convolutions, linear maps, matrix products and attention (query x key and "
    "weights x value; masked and padded places count), for the whole example; softmax, activations, pooling and "
    "resizing are not counted. Norm: one for each element a normalisation returns. Bias: one addition for each "
    "element it is added to. Both apart."
)
METRICS = ("macs", "parameters", "size", "memory", "latency")
PERCENTILES = ("p50", "p95", "p99")
DEFAULT_ENGINE = "eager:cpu"


@dataclass(frozen=True)
class LayerCost:
    """The share of one module (not of its children) in the cost of a network.

    Attributes:
        name: dotted name of the module; empty for the network itself.
        kind: class name of the module.
        calls: how often it ran (0: never as a module, or folded into a fused operator of its parent).
        output_shape: shape of its last output, the batch included.
        parameters: number of its own parameters (shared ones are counted where they appear first).
        macs, norm_macs, bias_macs: see `CONVENTION`.
    """

    name: str
    kind: str
    macs: int
    parameters: int
    output_shape: tuple[int, ...]
    norm_macs: int = 0
    bias_macs: int = 0
    calls: int = 1

    @property
    def other_macs(self) -> int:
        """What normalisation and bias add, which `macs` leaves out."""
        return self.norm_macs + self.bias_macs

    def to_json(self) -> dict[str, Any]:
        """Return the row as plain JSON values."""
        return {**self.__dict__, "output_shape": list(self.output_shape)}

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> "LayerCost":
        """Read back what `to_json` wrote."""
        return LayerCost(**{**value, "output_shape": tuple(value["output_shape"])})


@dataclass(frozen=True)
class Cost:
    """What a network costs on one example.

    Attributes:
        parameters: number of parameters, shared ones once.
        macs: multiply-accumulates of the run (see `CONVENTION`).
        size: bytes of the tensors a model file holds: parameters and persistent buffers, in their own types. The
            header of the file (names, shapes, structure log; a few KB) is not in it.
        memory: peak bytes of activations alive at once at inference: inputs and every result until it is freed;
            parameters, buffers and the insides of fused operators are not in it.
        layers: one row a module, in the order they first ran.
        norm_macs, bias_macs: what normalisation and bias add, apart from `macs`.
        families: `macs` by operation: convolution, linear, matmul, attention.
        buffer_size: the bytes of `size` that are buffers (batch-norm statistics and the like).
        inputs: the shapes of the example, as text.
        uncounted: operators from outside PyTorch that ran and have no formula: if not empty, `macs` is a lower bound.
        latency: measured latency by engine ("openvino:cpu"); empty when only counted.
    """

    parameters: int
    macs: int
    size: int
    memory: int
    layers: tuple[LayerCost, ...] = ()
    norm_macs: int = 0
    bias_macs: int = 0
    families: Mapping[str, int] = field(default_factory=dict)
    buffer_size: int = 0
    inputs: str = ""
    uncounted: tuple[str, ...] = ()
    latency: Mapping[str, Latency] = field(default_factory=dict)

    def get(self, metric: str) -> int | float:
        """Return one figure by name: "macs", "parameters", "size", "memory", "latency.p95@openvino:cpu".

        "latency" alone is the p50 of the only engine measured, or of `DEFAULT_ENGINE` if there are several. Latencies
        are in milliseconds, sizes in bytes.

        Raises:
            UsageError: the metric is unknown, or its latency was not measured.
        """
        head, _, engine = metric.partition("@")
        name, _, percentile = head.partition(".")
        if name not in METRICS or (name != "latency" and metric != name):
            raise UsageError(f"A cost has no figure {metric!r}.{did_you_mean(name, METRICS)}")
        if name != "latency":
            return getattr(self, name)
        if percentile not in ("", *PERCENTILES):
            raise UsageError(f"A latency has no {percentile!r}: use {', '.join(PERCENTILES)}.")
        return float(getattr(self._latency_on(engine), percentile or "p50"))

    def _latency_on(self, engine: str) -> Latency:
        if not engine:
            engine = next(iter(self.latency)) if len(self.latency) == 1 else DEFAULT_ENGINE
        if engine not in self.latency:
            known = ", ".join(self.latency) or "none"
            raise UsageError(f"No latency was measured on {engine!r} (measured: {known}); measure with that engine.")
        return self.latency[engine]

    def figures(self) -> dict[str, int | float]:
        """All figures by the names that `get` takes, latencies as "latency.p50@ENGINE" and so on."""
        values: dict[str, int | float] = {name: getattr(self, name) for name in METRICS if name != "latency"}
        for engine in self.latency:
            for percentile in PERCENTILES:
                name = f"latency.{percentile}@{engine}"
                values[name] = self.get(name)
        return values

    def relative_to(self, start: "Cost") -> dict[str, float]:
        """Each figure both costs have, as a fraction of that of `start` (0.4: 40 % of it), where that is not zero."""
        before = start.figures()
        return {name: value / before[name] for name, value in self.figures().items() if before.get(name)}

    def table(self, everything: bool = False) -> Any:
        """The rows as a `rich` table with totals; its caption states the convention.

        Layers without MACs share the last row, and norm and bias are in the caption, unless `everything` is asked for.
        """
        from convette.cost._tables import cost_table

        return cost_table(self, everything)

    def to_json(self) -> dict[str, Any]:
        """Return the cost as plain JSON values, `from_json` reads it back."""
        return {
            **self.__dict__,
            "layers": [layer.to_json() for layer in self.layers],
            "families": dict(self.families),
            "uncounted": list(self.uncounted),
            "latency": {engine: latency.to_json() for engine, latency in self.latency.items()},
            "convention": CONVENTION,
        }

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> "Cost":
        """Read back what `to_json` wrote.

        Raises:
            UsageError: a field is missing or unknown.
        """
        fields = {name: item for name, item in value.items() if name != "convention"}
        try:
            fields["layers"] = tuple(LayerCost.from_json(row) for row in fields["layers"])
            fields["uncounted"] = tuple(fields["uncounted"])
            fields["latency"] = {engine: Latency.from_json(item) for engine, item in fields["latency"].items()}
            return Cost(**fields)
        except (KeyError, TypeError) as error:
            raise UsageError(f"This is not the JSON of a cost: {error}.") from error
