"""``convette prune NAME --budget "macs<=50%" --criterion l1 --epochs 0`` for every model of the coverage table.

    python benchmarks/prune_any.py --all --minutes 10     # what is not done yet, smallest first, for ten minutes
    python benchmarks/prune_any.py timm:resnet18          # some models, nothing written
    python benchmarks/prune_any.py --again                # once more what failed

Each model runs in a process of its own with at most 10 GB of address space: the command itself, then the written file
is loaded again, run on an example, and its multiply-accumulates are counted. Verdicts:

- pruned: the file is there, loads, runs, and holds the budget;
- refused: one clear line and exit code (the line is recorded);
- no classifier: the table also has detectors, segmentation and optical flow of torchvision, which convette builds not;
- failed: anything else (a traceback, a file that does not load, a budget missed).

Writes benchmarks/results/prune_any.json after every model, so that a run that is stopped goes on where it was.
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import queue
import resource
import tempfile
import time
import traceback
import warnings
from pathlib import Path

import torch

from convette._files import write_json
from convette._provenance import provenance

ROOT = Path(__file__).parent.parent
COVERAGE = ROOT / "benchmarks" / "results" / "surgery_coverage.json"
RESULT = ROOT / "benchmarks" / "results" / "prune_any.json"
COMMAND = 'convette prune NAME --budget "macs<=50%" --criterion l1 --epochs 0'
SECONDS = 900
MEMORY = 16_000_000_000


def one(name: str, folder: Path) -> dict:
    """Prune one model by the command, load what it wrote, run and count it; return its row."""
    from convette.cli.main import main as convette
    from convette.cost import count
    from convette.models import load
    from convette.pipeline.from_example import example_of

    warnings.filterwarnings("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    torch.set_num_threads(1)
    file = folder / "pruned.safetensors"
    said, lamented = io.StringIO(), io.StringIO()
    start = time.perf_counter()
    command = ["prune", name, "--budget", "macs<=50%", "--criterion", "l1", "--epochs", "0", "--seed", "0"]
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(lamented):
        code = convette([*command, "--out", str(file), "--json", "--quiet"])
    row: dict = {"model": name, "seconds": round(time.perf_counter() - start, 2)}
    if code:
        lines = [line for line in lamented.getvalue().splitlines() if line.strip()]
        one_line = len(lines) == 1 and lines[0].startswith("convette: ")
        verdict = "refused" if one_line else "failed"
        if one_line and lines[0].endswith("it is no classifier."):
            verdict = "no classifier"
        return row | {"result": verdict, "code": code, "reason": " ".join(lines)[:400]}
    path = json.loads(said.getvalue())["path"]
    row |= {"macs_before": path[0]["macs"], "macs_after": path[-1]["macs"], "bytes": file.stat().st_size}
    model = load(file)
    example = example_of(model)
    with torch.no_grad():
        model(example)
    row["example"] = list(example.shape)
    counted = count(model, example).macs
    good = counted == path[-1]["macs"] and counted <= 0.5 * path[0]["macs"]
    return row | (
        {"result": "pruned"} if good else {"result": "failed", "reason": f"the loaded file has {counted} MACs"}
    )


def in_process(name: str) -> dict:
    """Run `one` in a process of its own, forked so that nothing is imported again; errors there become a row."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        child = context.Process(target=_child, args=(name, Path(folder), results))
        child.start()
        waited = 0
        try:
            while True:
                try:
                    return results.get(timeout=1)
                except queue.Empty:
                    waited += 1
                    if not child.is_alive() and results.empty():
                        return {"model": name, "result": "failed", "reason": f"ended with code {child.exitcode}"}
                    if waited >= SECONDS:
                        return {"model": name, "result": "failed", "reason": f"not done within {SECONDS} s"}
        finally:
            child.kill()
            child.join()


def _child(name: str, folder: Path, results: multiprocessing.Queue) -> None:
    try:
        results.put(one(name, folder))
    except BaseException as error:
        text = (str(error) or "no message").splitlines()[0]
        where = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"{type(error).__name__}: {text} ({Path(where.filename).name}:{where.lineno})"
        results.put({"model": name, "result": "failed", "reason": reason[:400]})


def table(size_of: dict[str, int]) -> list[str]:
    """Return the names of the coverage table, smallest network first."""
    return sorted(size_of, key=lambda name: (size_of[name], name))


def summary(rows: dict[str, dict], names: list[str]) -> str:
    """Return how many of how many."""
    counts: dict[str, int] = {}
    for row in rows.values():
        counts[row["result"]] = counts.get(row["result"], 0) + 1
    return f"{len(rows)} of {len(names)} models: " + ", ".join(f"{n} {result}" for result, n in sorted(counts.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="timm:NAME or torchvision:NAME")
    parser.add_argument("--all", action="store_true", help="every model of the table that has no result yet")
    parser.add_argument("--again", action="store_true", help="those that were not pruned")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after the model that ends after this long")
    options = parser.parse_args()
    import timm  # noqa: F401
    import torchvision  # noqa: F401

    start = time.time()
    sizes = {row["model"]: row.get("parameters", 1 << 60) for row in json.loads(COVERAGE.read_text())["results"]}
    names = table(sizes)
    rows = {row["model"]: row for row in json.loads(RESULT.read_text())["results"]} if RESULT.exists() else {}
    wanted = options.models or [name for name in names if name not in rows]
    if options.again:
        wanted = [name for name in names if name in rows and rows[name]["result"] in ("refused", "failed")]
    torch.set_num_threads(1)
    before = json.loads(RESULT.read_text())["seconds"] if RESULT.exists() else 0.0
    for name in wanted:
        if time.time() - start > 60 * options.minutes:
            break
        row = in_process(name)
        print(f"{name:48s} {row['result']:8s} {row.get('seconds', 0):7.1f} s  {row.get('reason', '')}", flush=True)
        if options.all or options.again:
            rows[name] = row
            results = [rows[key] for key in names if key in rows]
            about = provenance(round(before + time.time() - start, 1))
            text = summary(rows, names)
            write_json(RESULT, {"what": COMMAND, "summary": text, **about, "results": results})
    if options.all or options.again:
        print(summary(rows, names))


if __name__ == "__main__":
    main()
