"""Surgery on one small member of every family of timm and torchvision: label, shrink half of all units, prove.

    python benchmarks/surgery_coverage.py --all            # every family, about an hour on one core
    python benchmarks/surgery_coverage.py timm:resnet18    # some models, nothing written
    python benchmarks/surgery_coverage.py --compare --all  # is a trace without values the same as one with them?

A family is what timm's model list keeps in one module under one leading word (``resnet.py``: resnet, seresnet, ...),
and what torchvision's list has under one leading word; its member is the one with the fewest parameters. Each model
runs in a process of its own. It is given random norms and statistics (a fresh network hides mistakes: all its biases
are zero), labelled, half of the units of every group are removed at random, and its outputs are compared with those
of the whole network with the removed channels left out. Verdicts:

- exact: relative error below 1e-5 in float32, or below 1e-10 in float64 where float32 itself is too coarse;
- exact*: the same, with statistics over channels (layer norm, means over channels) computed on what stays;
- refused: an error that names the operator or the source line; the model is as before;
- wrong: the outputs differ. There must be none.

Writes benchmarks/results/surgery_coverage.json and docs/coverage.md. With ``--compare`` each model is only labelled,
once by its shapes and once by a run with values, and the two graphs must be the same in every group, index and note;
that writes benchmarks/results/surgery_values.json.
"""

import argparse
import concurrent.futures
import json
import multiprocessing
import queue
import re
import resource
import time
import warnings
from pathlib import Path

import torch

from convette._files import write_json, write_text
from convette._provenance import provenance

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks" / "results" / "surgery_coverage.json"
COMPARED = ROOT / "benchmarks" / "results" / "surgery_values.json"
PAGE = ROOT / "docs" / "coverage.md"
SECONDS = 180
DETECTORS = ("rcnn", "retinanet", "fcos", "ssd")
# Never the smallest of a family, and slow to build even without memory.
BIG = ("giant", "huge", "so400m", "xlarge", "7b", "1b", "2b", "3b", "_so150m", "large_patch")
SIZES = (96, 128, 224, 256)


def families() -> dict[str, str]:
    """Return one model name a family: the smallest member by parameters, counted without memory."""
    import timm
    import torchvision
    from timm.models import _registry

    chosen: dict[str, tuple[int, str]] = {}
    for name in timm.list_models():
        if any(big in name for big in BIG):
            continue
        word = re.match("[a-z]+", name)
        family = f"timm {_registry._model_to_module[name]}/{word.group() if word else name}"
        _offer(chosen, family, f"timm:{name}", lambda name=name: timm.create_model(name))
    for name in torchvision.models.list_models():
        if name.startswith("quantized"):
            continue
        module = torchvision.models.get_model_builder(name).__module__.rpartition(".")[2]
        family = f"torchvision {module}/{re.match('[a-z]+', name).group()}"  # type: ignore[union-attr]
        _offer(chosen, family, f"torchvision:{name}", lambda name=name: build(f"torchvision:{name}"))
    return {family: name for family, (_, name) in sorted(chosen.items())}


def _offer(chosen: dict[str, tuple[int, str]], family: str, name: str, make) -> None:
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            size = sum(parameter.numel() for parameter in make().parameters())
    except Exception:  # a member that cannot be built without memory is not the one taken, unless it is alone
        size = 1 << 60
    if family not in chosen or size < chosen[family][0]:
        chosen[family] = (size, name)


def build(name: str) -> torch.nn.Module:
    """Build a model, untrained."""
    home, leaf = name.split(":")
    if home == "timm":
        import timm

        return timm.create_model(leaf)
    import torchvision

    backbone = {"weights_backbone": None} if any(w in leaf for w in (*DETECTORS, "lab", "fcn_", "lraspp")) else {}
    if "inception" in leaf or "googlenet" in leaf:
        backbone = {"init_weights": False}
    return torchvision.models.get_model(leaf, weights=None, **backbone)


def randomise(model: torch.nn.Module) -> None:
    """Give norms, scales and statistics values that let no mistake hide."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim <= 1:
                parameter.add_(torch.rand(parameter.shape, generator=draw) * 0.5 + 0.1)
            elif float(parameter.abs().max()) == 0:
                parameter.normal_(0, 0.02, generator=draw)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(torch.randn(buffer.shape, generator=draw) * 0.1)
            elif name.endswith("running_var"):
                buffer.copy_(torch.rand(buffer.shape, generator=draw) + 0.5)


def example_for(name: str, model: torch.nn.Module):
    """Return the smallest example the model runs on."""
    torch.manual_seed(0)
    leaf = name.split(":")[1]
    if any(word in leaf for word in DETECTORS):
        return ([torch.rand(3, 128, 160)],)
    if "raft" in leaf:
        return (torch.rand(1, 3, 128, 128), torch.rand(1, 3, 128, 128))
    if leaf in ("mc3_18", "r3d_18", "r2plus1d_18", "s3d") or leaf.startswith(("mvit_v", "swin3d")):
        small = leaf not in ("s3d",) and "mvit" not in leaf
        return torch.randn(1, 3, 16 if not small else 8, 224 if not small else 64, 224 if not small else 64)
    sizes = list(SIZES)
    config = getattr(model, "pretrained_cfg", None) or {}
    channels, size = (config.get("input_size") or (3, 224, 224))[:2]
    if config.get("fixed_input_size"):
        sizes = [size]
    for side in dict.fromkeys([*sizes, size, 299]):
        images = torch.randn(1, channels, side, side)
        try:
            with torch.no_grad():
                model(images)
            return images
        except Exception:
            continue
    raise SystemExit(f"{name}: runs on no image size tried")


def listen(model: torch.nn.Module) -> list[torch.Tensor]:
    """Return a list that fills with what a detector's dense heads compute, empty for other models.

    What a detector returns is a ranking: two nearly equal scores trade places by a rounding error.
    """
    from convette.surgery._trace import outputs_of

    heard: list[torch.Tensor] = []
    for name, module in model.named_modules():
        if name in ("head", "rpn.head") and type(model).__module__.startswith("torchvision.models.detection"):
            module.register_forward_hook(lambda _, __, out: heard.extend(outputs_of(out, [])))
    return heard


def one(name: str) -> dict:
    """Label, shrink, run, prove one model; return its row."""
    from convette.errors import StructureError
    from convette.layers._watching import call
    from convette.surgery import apply, trace
    from convette.surgery._apply import relative_error
    from convette.surgery._proof import expected_outputs
    from convette.surgery._trace import outputs_of

    warnings.filterwarnings("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (12 << 30, 12 << 30))
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = build(name).eval()
    randomise(model)
    heads = listen(model)
    example = example_for(name, model)
    with torch.no_grad():
        call(model, example)
        start = time.perf_counter()
        call(model, example)
    row: dict = {"model": name, "forward_s": time.perf_counter() - start}
    row["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    try:
        start = time.perf_counter()
        graph = trace(model, example)
        row["trace_s"] = time.perf_counter() - start
        row |= {"units": graph.units, "groups": len(graph), "frozen": sorted({item.name for item in graph.frozen})}
        row["scopes"] = len(graph.scopes)
        draw = torch.Generator().manual_seed(0)
        selection = {}
        for group in graph:
            kept = (torch.rand(group.size, generator=draw) < 0.5).nonzero().view(-1)
            least = max(1, group.constraints.minimum)
            selection[group.name] = kept if len(kept) >= least else torch.arange(least)
        start = time.perf_counter()
        edit = graph.shrink(selection)
        row["shrink_s"] = time.perf_counter() - start
        heads.clear()
        expected = heads if (plain := expected_outputs(graph, edit)) and heads else plain
        expected = [tensor.clone() for tensor in expected]
        heads.clear()
        start = time.perf_counter()
        apply(model, edit)
        row["shrink_s"] += time.perf_counter() - start
        row["rewrites"] = len(edit.rewrites)
        row["kept"] = sum(parameter.numel() for parameter in model.parameters()) / row["parameters"]
        with torch.no_grad():
            got = [tensor for tensor in outputs_of(call(model, example), []) if tensor.is_floating_point()]
        got = [tensor.clone() for tensor in heads] or got
        same = len(got) == len(expected) and all(a.shape == b.shape for a, b in zip(expected, got, strict=True))
        row["error"] = max(map(relative_error, expected, got)) if same else float("inf")
        limit = 1e-5
        if not row["error"] < limit:
            row["error_float64"], limit = in_double(name, selection, example), 1e-10
            heads.clear()
        error = row.get("error_float64", row["error"])
        row["result"] = ("exact*" if row["scopes"] else "exact") if error < limit else "wrong"
        if not selection:
            row["result"] = "nothing to remove"
        result = [tensor for tensor in outputs_of(call(model, example), []) if tensor.requires_grad]
        sum(tensor.sum() for tensor in result if tensor.is_floating_point()).backward()  # type: ignore[union-attr]
        row["backward"] = any(parameter.grad is not None for parameter in model.parameters())
    except StructureError as error:
        row["result"], row["reason"] = "refused", str(error)
    return row


def compared(name: str) -> dict:
    """Label one model with and without values; return whether that is the same, and the seconds of each."""
    from convette.surgery import trace
    from convette.surgery._comparing import difference

    warnings.filterwarnings("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (12 << 30, 12 << 30))
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = build(name).eval()
    randomise(model)
    example = example_for(name, model)
    trace(model, example)
    seconds, graphs = [], []
    for values in (False, True):
        torch.manual_seed(0)
        start = time.perf_counter()
        graphs.append(trace(model, example, values=values))
        seconds.append(time.perf_counter() - start)
    different = difference(*graphs)
    row = {"model": name, "result": "different" if different else "same", "reason": different}
    return row | {"without_s": seconds[0], "with_s": seconds[1], "needs_values": graphs[0].records.needed}


def in_double(name: str, selection: dict, example) -> float:
    """Prove the same selection in float64."""
    from convette.layers._watching import call
    from convette.surgery import apply, trace
    from convette.surgery._apply import relative_error
    from convette.surgery._proof import expected_outputs
    from convette.surgery._trace import outputs_of

    torch.manual_seed(0)
    model = build(name).eval()
    randomise(model)
    model.double()
    heads = listen(model)
    if isinstance(example, tuple):
        example = tuple(
            [item.double() for item in part] if isinstance(part, list) else part.double() for part in example
        )
    else:
        example = example.double()
    graph = trace(model, example)
    edit = graph.shrink(selection)
    heads.clear()
    plain = expected_outputs(graph, edit)
    expected = [tensor.clone() for tensor in heads] or plain
    heads.clear()
    apply(model, edit)
    with torch.no_grad():
        got = [tensor for tensor in outputs_of(call(model, example), []) if tensor.is_floating_point()]
    got = heads or got
    if any(a.shape != b.shape for a, b in zip(expected, got, strict=True)):
        return float("inf")
    return max(map(relative_error, expected, got))


def in_process(name: str, task=one) -> dict:
    """Run `task` in a process of its own, forked so that nothing is imported again; errors there become a row."""
    results = multiprocessing.get_context("fork").Queue()
    child = multiprocessing.get_context("fork").Process(target=_child, args=(name, results, task))
    child.start()
    try:
        return results.get(timeout=SECONDS)
    except queue.Empty:
        return {"model": name, "result": "no verdict", "reason": f"not done within {SECONDS} s"}
    finally:
        child.kill()
        child.join()


def _child(name: str, results: multiprocessing.Queue, task) -> None:
    try:
        results.put(task(name))
    except BaseException as error:
        text = (str(error) or "no message").splitlines()[0]
        results.put({"model": name, "result": "no verdict", "reason": f"{type(error).__name__}: {text}"[:300]})


def line_of(row: dict) -> str:
    """Return a row as one line for the terminal."""
    error = row.get("error_float64", row.get("error"))
    numbers = (
        f"{row['groups']:4d} groups {row['units']:6d} units  forward {row['forward_s']:.3f}  "
        f"trace {row['trace_s']:.3f}  shrink {row['shrink_s']:.3f} s  error {error:.0e}  "
        f"frozen {', '.join(row['frozen']) or '-'}"
        if error is not None
        else row.get("reason", "")
    )
    return f"{row['model']:45s} {row['result']:8s} {numbers}"


def compare(names: list[str], write: bool) -> None:
    """Compare traces with and without values of many models."""
    start, rows = time.time(), []
    for name in names:
        rows.append(in_process(name, compared))
        row = rows[-1]
        if row["result"] in ("same", "different"):
            print(
                f"{name:45s} {row['result']:9s} without {row['without_s']:.3f} s  with {row['with_s']:.3f} s  "
                f"{row['needs_values']} {row['reason']}",
                flush=True,
            )
        else:
            print(f"{name:45s} {row['result']} {row['reason']}", flush=True)
    counts = {key: sum(row["result"] == key for row in rows) for key in ("same", "different", "no verdict")}
    counts["need values"] = sum(bool(row.get("needs_values")) for row in rows)
    print(counts)
    if write:
        what = "labels found from shapes alone, compared with labels found in a run with values"
        write_json(COMPARED, {"what": what, **provenance(time.time() - start), "counts": counts, "results": rows})


def page(results: list[dict], about: dict) -> str:
    """Return docs/coverage.md."""
    counts: dict[str, int] = {}
    for row in results:
        counts[row["result"]] = counts.get(row["result"], 0) + 1
    summary = ", ".join(f"{number} {result}" for result, number in sorted(counts.items(), key=lambda pair: -pair[1]))
    lines = [
        "# Coverage of surgery",
        "",
        f"{len(results)} models, the smallest member of every family of timm and torchvision: {summary}.",
        "",
        "Half of the units of every group were removed at random, and the outputs compared with those of the whole",
        "network with the removed channels left out. *exact*: relative error below 1e-5 in float32 (or 1e-10 in",
        "float64 where float32 is too coarse). *exact\\**: the same, with statistics over channels (layer norm, means",
        "over channels) computed on what stays. *refused*: a clear error, the model untouched. Seconds on one thread.",
        "",
        f"Made by `python benchmarks/surgery_coverage.py --all` on {about['machine']}; {about['versions']}.",
        "",
        "| model | result | groups | units | parameters kept | relative error | frozen operators | forward s | trace s"
        " | shrink s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in results:
        if "error" not in row:
            lines.append(f"| {row['model']} | {row['result']}: {row.get('reason', '').replace('|', '/')} |||||||||")
            continue
        error = row.get("error_float64", row["error"])
        lines.append(
            f"| {row['model']} | {row['result'].replace('*', chr(92) + '*')} | {row['groups']} | {row['units']} "
            f"| {row['kept']:.2f} | {error:.0e} | {', '.join(f'`{n}`' for n in row['frozen']) or '–'} "
            f"| {row['forward_s']:.3f} | {row['trace_s']:.3f} | {row['shrink_s']:.3f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="timm:NAME or torchvision:NAME")
    parser.add_argument("--all", action="store_true", help="one member of every family; writes the results")
    parser.add_argument("--again", nargs="*", metavar="RESULT", help="only models whose last result is one of these")
    parser.add_argument("--rest", action="store_true", help="with --all: keep the results there are, do the others")
    parser.add_argument("--compare", action="store_true", help="compare traces with and without values, nothing else")
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    start = time.time()
    import timm  # noqa: F401
    import torchvision  # noqa: F401

    before = json.loads(RESULT.read_text()) if RESULT.exists() else {"results": []}
    rows = {row["model"]: row for row in before["results"]}
    names = options.models
    if options.all:
        known = before.get("families") if options.rest or options.compare else None
        names = known or list(families().values())
        rows = rows if options.rest else {}
        names = [name for name in names if name not in rows]
    elif options.again is not None:
        names = [name for name, row in rows.items() if row["result"] in options.again]
    if options.compare:
        compare(names, options.all)
        return
    every = sorted({*names, *rows})
    torch.set_num_threads(1)
    workers = concurrent.futures.ThreadPoolExecutor(options.workers)
    for row in workers.map(in_process, names):
        rows[row["model"]] = row
        print(line_of(row), flush=True)
        if options.all or options.again is not None:
            results = [rows[key] for key in sorted(rows)]
            about = provenance(time.time() - start)
            what = "surgery on every family, half of all units removed"
            write_json(RESULT, {"what": what, **about, "families": every, "results": results})
            write_text(PAGE, page(results, about))


if __name__ == "__main__":
    main()
