"""The outcome of a run: the table people read, and how to use what came out."""

from pathlib import Path

from safetensors.torch import load_file

from convette.cost import Cost, format_bytes, format_count, format_milliseconds
from convette.pipeline.results import (
    ExplainResult,
    ExportResult,
    ModelResult,
    QuantizationResult,
    Row,
    Summary,
    Unit,
    VerifyResult,
    read_result,
    read_run,
)
from convette.pruning.sparsity import sparsity_in_words, zeros_of

_LABELS: dict[str, tuple[str, Unit]] = {
    "macs": ("MACs", "count"),
    "parameters": ("Parameters", "count"),
    "size": ("Size of the weights", "bytes"),
    "file": ("Size of the file", "bytes"),
}
_FORMATS = {"count": format_count, "bytes": format_bytes, "ms": format_milliseconds}


def summarise(run_dir: Path) -> Summary:
    """Return the outcome of the run in `run_dir`, from the results of its stages."""
    verified: VerifyResult = read_result(run_dir, "verify")
    before, after = Cost.from_json(verified.cost_before), Cost.from_json(verified.cost_after)
    limits = {limit.metric: limit for limit in verified.limits}
    rows = [
        Row(
            key="accuracy",
            label="Test accuracy",
            unit="share",
            before=verified.test_before.accuracy,
            after=_deployed_accuracy(run_dir, verified),
        )
    ]
    figures = {key: (before.get(key), after.get(key)) for key in _keys(after, list(limits))}
    if verified.file_before and verified.file_after:
        place = list(figures).index("size") + 1
        files = ("file", (verified.file_before, verified.file_after))
        figures = dict([*list(figures.items())[:place], files, *list(figures.items())[place:]])
    for key, values in figures.items():
        label, unit = _label(key)
        # A network in few bits has to meet a limit on size with its whole file.
        name = {"file": "size", "size": ""}.get(key, key) if _in_few_bits(run_dir) else key
        limit = limits.get(name) or limits.get(name.replace(".p50", ""))
        rows.append(
            Row(
                key=key,
                label=label,
                unit=unit,
                before=values[0],
                after=values[1],
                budget=limit.bound if limit else None,
                met=limit.met if limit else None,
            )
        )
    return Summary(
        rows=rows,
        met=all(limit.met for limit in verified.limits),
        notes=_notes(run_dir, verified),
        use=_use(run_dir, verified),
    )


def _in_few_bits(run_dir: Path) -> bool:
    quantized: QuantizationResult | None = read_result(run_dir, "quantize")
    return quantized is not None and quantized.kept == "low_bit"


def _deployed_accuracy(run_dir: Path, verified: VerifyResult) -> float:
    """Return the accuracy of what is deployed: on the limited engine, else on the one kept, in its precision."""
    quantized: QuantizationResult | None = read_result(run_dir, "quantize")
    limited = [limit.engine for limit in verified.limits if limit.engine is not None]
    engine = limited[0] if limited else quantized.kept if quantized else None
    checked = {check.engine: check.accuracy for check in verified.files if check.accuracy is not None}
    for name in (f"{engine}:int8", engine, f"{engine}:fp32"):
        if name in checked:
            return checked[name]
    return verified.test_after.accuracy


def table(summary: Summary) -> str:
    """Return the before / after / budget table as text; a run that only trained has just one column of figures."""
    if all(row.before == row.after and row.budget is None for row in summary.rows):
        width = max(len(row.label) for row in summary.rows)
        return "\n".join(f"{row.label.ljust(width)}  {format_value(row, row.after)}" for row in summary.rows)
    lines = [("", "before", "after", "change", "budget")]
    for row in summary.rows:
        budget = ""
        if row.budget is not None:
            budget = f"{format_value(row, row.budget)} {'met' if row.met else 'MISSED'}"
        lines.append((row.label, format_value(row, row.before), format_value(row, row.after), _change(row), budget))
    widths = [max(len(line[column]) for line in lines) for column in range(5)]
    text = [
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    ]
    return "\n".join(line.rstrip() for line in text)


def format_value(row: Row, value: float) -> str:
    """Return a figure of `row` with its unit."""
    return f"{100 * value:.2f} %" if row.unit == "share" else _FORMATS[row.unit](value)


def _change(row: Row) -> str:
    if row.unit == "share":
        return f"{100 * (row.after - row.before):+.2f} points"
    return f"{100 * row.after / row.before:.1f} %" if row.before else ""


def _keys(cost: Cost, limited: list[str]) -> list[str]:
    """Return the figures worth a row: the counts, and p50 and p95 of the limited engines or else of the fastest."""
    engines = list(dict.fromkeys(key.partition("@")[2] for key in limited if key.startswith("latency")))
    if not engines and cost.latency:
        engines = [min(cost.latency, key=lambda engine: cost.latency[engine].p50)]
    keys = [*(key for key in _LABELS if key != "file"), *(["memory"] if "memory" in limited else [])]
    for engine in engines:
        percentiles = ["p50", "p95", *(["p99"] if f"latency.p99@{engine}" in limited else [])]
        keys += [f"latency.{percentile}@{engine}" for percentile in percentiles]
    return keys


def _label(key: str) -> tuple[str, Unit]:
    if key in _LABELS:
        return _LABELS[key]
    if key == "memory":
        return "Peak activation memory", "bytes"
    percentile, _, engine = key.removeprefix("latency.").partition("@")
    return f"Latency {percentile}, {engine}", "ms"


def _notes(run_dir: Path, verified: VerifyResult) -> list[str]:
    started: ModelResult | None = read_result(run_dir, "model")
    notes = [f"Converted before training: {line}." for line in started.converted] if started is not None else []
    exported: ExportResult | None = read_result(run_dir, "export")
    if exported is not None and notes:
        kinds = sorted(set(exported.unfolded.values()))
        left = f"left as it is: {', '.join(exported.unfolded)} ({' '.join(kinds)})" if kinds else "nothing is left."
        notes.append(f"Exported with everything folded that can be, exactly; {left}")
    if masks := zeros_of(load_file(_network(run_dir))):
        notes.append(f"Sparse: {sparsity_in_words(masks)}; only an engine for sparse weights runs that faster.")
    quantized: QuantizationResult | None = read_result(run_dir, "quantize")
    if quantized is not None:
        notes.append(f"Precision: {quantized.reason}")
        notes += _over_the_limit(verified, exported) if _in_few_bits(run_dir) else []
    before, after = verified.cost_before["latency"], verified.cost_after["latency"]
    notes += [
        f"Latency on {engine}: before in {before[engine]['precision']}, as it was trained, after in "
        f"{after[engine]['precision']}; both measured in turns in one run."
        for engine in after
        if before[engine]["precision"] != after[engine]["precision"]
    ]
    for check in verified.files:
        accuracy = f", {100 * check.accuracy:.2f} % right on the test split" if check.accuracy is not None else ""
        notes.append(
            f"{check.file} was run on {check.images} real images on {check.engine}: same class as the network on "
            f"{100 * check.agreement:.2f} %{accuracy}."
        )
    explained: ExplainResult | None = read_result(run_dir, "explain")
    if explained is not None:
        notes.append(
            f"Where it looks drifted by {explained.drift:.2f} over {explained.drift_images} test images "
            "(0: the same, 1: unrelated)."
        )
    return notes


def _over_the_limit(verified: VerifyResult, exported: ExportResult | None) -> list[str]:
    """Return which files for engines are larger than a limit on size, which the network's own file keeps."""
    bound = min((limit.bound for limit in verified.limits if limit.metric == "size"), default=None)
    if bound is None or exported is None:
        return []
    large = [f"{x.file} has {format_bytes(x.bytes)}" for x in exported.files[1:] if x.bytes > bound]
    if not large:
        return []
    return [
        f"The limit on size is kept by {exported.files[0].file} ({format_bytes(exported.files[0].bytes)}); "
        f"{', '.join(large)}: a file for an engine holds the graph besides."
    ]


def fewer_threads(verified: VerifyResult, all_threads: int) -> int | None:
    """Return the threads that limits on latency were measured with, where those are fewer than all."""
    engines = {limit.engine for limit in verified.limits if limit.metric.startswith("latency")}
    used = [one["threads"] for name, one in verified.cost_after["latency"].items() if name in engines]
    return min(used) if used and min(used) < all_threads else None


def _use(run_dir: Path, verified: VerifyResult) -> list[str]:
    """Return the commands that use what came out."""
    exported: ExportResult | None = read_result(run_dir, "export")
    network = _network(run_dir)
    if exported is None:
        return [f"convette show {network}", f"python -c \"import convette; model = convette.load('{network}')\""]
    commands = [
        f"convette show {network}",
        f"convette explain {network} IMAGE --out cam.png",
        f"python -c \"import convette; model = convette.load('{network}')\"",
    ]
    record = read_run(run_dir)
    load = record.recipe.get("run", {}).get("contention", 0)
    # Left to itself an engine takes all cores; beside a load it was measured on those that are free.
    most = record.machine["cores" if load else "threads"]
    threads = fewer_threads(verified, most)
    commands += [_open(run_dir / file.file, file.format, threads) for file in exported.files if file.recommended]
    commands = list(dict.fromkeys(commands))
    if threads is not None:
        beside = f", beside {load} busy process{'es' if load > 1 else ''}" if load else ""
        commands.append(f"# The limits on latency were measured with {threads} of {most} threads{beside}.")
    if record.stage("report").state != "left out":
        commands.append(f"open {run_dir / 'report.html'}")
    return commands


def _network(run_dir: Path) -> Path:
    """Return the file of the network that came out."""
    exported: ExportResult | None = read_result(run_dir, "export")
    if exported is not None:
        return run_dir / exported.files[0].file
    return run_dir / ("compress" if read_result(run_dir, "compress") else "train") / "model.safetensors"


def _open(path: Path, form: str, threads: int | None) -> str:
    """Return the command that opens a deployable file, with the threads that it was measured with."""
    if form == "onnx" and threads is not None:
        options = f"o = onnxruntime.SessionOptions(); o.intra_op_num_threads = {threads}; "
        return f"python -c \"import onnxruntime; {options}session = onnxruntime.InferenceSession('{path}', o)\""
    if form == "onnx":
        return f"python -c \"import onnxruntime; session = onnxruntime.InferenceSession('{path}')\""
    if form == "openvino":
        number = f", {{'INFERENCE_NUM_THREADS': {threads}}}" if threads is not None else ""
        return f"python -c \"import openvino; network = openvino.compile_model('{path}', 'CPU'{number})\""
    set_threads = f"import torch; torch.set_num_threads({threads}); " if threads is not None else ""
    return f"python -c \"{set_threads}import convette; model = convette.load('{path}')\""
