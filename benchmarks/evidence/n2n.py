"""N2N's second policy against as many students drawn at random, untrained students, the same rewards.

    python benchmarks/evidence/n2n.py [--seeds 3]

Writes benchmarks/evidence/results/n2n.json. Per seed: a ResNet-8 is trained on 539 digits; the shrinkage policy
proposes 60 students (15 updates of 4), and 60 are drawn at random (a policy that is never updated). Students inherit
weights and are judged at once, by accuracy on the validation split and parameters: what is compared is the search, not
the teaching. Settings were written before any result.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch

from convette._files import write_json
from convette._progress import note
from convette._provenance import provenance
from convette.data import load_data
from convette.models import create_model
from convette.pipeline.compare import estimate
from convette.pruning.n2n import N2NSettings, n2n
from convette.training import TrainSettings, train

OUT = Path(__file__).parent / "results" / "n2n.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    started = time.perf_counter()
    best: dict[str, list[float]] = {"random": [], "policy": []}
    median: dict[str, list[float]] = {"random": [], "policy": []}
    data = load_data("digits", test_fraction=0.6)
    for seed in range(options.seeds):
        torch.manual_seed(seed)
        chosen = TrainSettings(epochs=12, batch_size=64, augmentation=(), precision="fp32", seed=seed)
        model = create_model("resnet8", in_channels=1, seed=seed)
        teacher = train(model, data, chosen, device="cpu").model
        for name, rate in (("random", 1e-12), ("policy", 0.01)):
            settings = N2NSettings(
                removal_epochs=0, shrink_epochs=15, rollouts=4, student_epochs=0, shrink_rate=rate, seed=seed
            )
            found = n2n(teacher, data, settings, device="cpu")
            best[name].append(found.best.reward)
            median[name].append(statistics.median(student.reward for student in found.students[-20:]))
            note(f"seed {seed}, {name}: best {best[name][-1]:.3f}, median of the last 20 {median[name][-1]:.3f}")
    gained = estimate([a - b for a, b in zip(best["policy"], best["random"], strict=True)])
    later = estimate([a - b for a, b in zip(median["policy"], median["random"], strict=True)])
    summary = (
        f"60 students each, {options.seeds} seeds: the best reward by the policy is {gained.mean:+.3f} against drawing "
        f"at random (95 % interval {gained.low:+.3f} to {gained.high:+.3f}), the median of the last 20 "
        f"{later.mean:+.3f} ({later.low:+.3f} to {later.high:+.3f})."
    )
    table = {name: [f"{statistics.mean(best[name]):.3f}", f"{statistics.mean(median[name]):.3f}"] for name in best}
    raw = {"best": best, "median_of_last": median}
    columns = ["best reward", "median reward of the last 20"]
    write_json(
        OUT, {"summary": summary, "columns": columns, "rows": table, **raw, **provenance(time.perf_counter() - started)}
    )
    note(summary)


if __name__ == "__main__":
    main()
