"""Do the given CIFAR ResNet weights load strictly and reproduce their accuracy on the lossless test images?

    python benchmarks/cifar_resnet_weights.py [--shared ../shared/data]

Writes benchmarks/results/cifar_resnet_weights.json. Expected, from the weights' own description: 91.5, 92.8, 93.3 and
92.6 % on 1,000 images; the published figures are for all 10,000. One image of tolerance, for another PyTorch may round
a logit the other way.
"""

import argparse
import time
from pathlib import Path

import torch

from convette._files import write_json
from convette._provenance import provenance
from convette.data import ImageData, load_data
from convette.models import create_model, known_preprocessing

EXPECTED = {"resnet20": 0.915, "resnet32": 0.928, "resnet44": 0.933, "resnet56": 0.926}
PUBLISHED = {"resnet20": 0.9173, "resnet32": 0.9263, "resnet44": 0.9310, "resnet56": 0.9339}
RESULT = Path(__file__).parent / "results" / "cifar_resnet_weights.json"


def accuracy(name: str, data: ImageData, weights: Path) -> tuple[float, int]:
    """Return the test accuracy of `name` with `weights`, and its number of parameters."""
    model = create_model(name, weights=weights).eval()
    normalisation = known_preprocessing(model)
    if normalisation is None:
        raise SystemExit(f"{weights}: not the published weights")
    mean, std = normalisation
    preprocessing = data.with_preprocessing(mean=mean, std=std).preprocessing
    correct = 0
    with torch.inference_mode():
        for batch in data.test.batches(250):
            correct += int((model(preprocessing(batch.images)).argmax(1) == batch.labels).sum())
    return correct / len(data.test), sum(p.numel() for p in model.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path("../shared/data"))
    shared = parser.parse_args().shared
    torch.set_num_threads(1)
    start = time.monotonic()
    data = load_data(f"parquet:{shared / 'cifar10-lossless'}")
    rows = {}
    for name, expected in EXPECTED.items():
        measured, parameters = accuracy(name, data, shared / "cifar10-resnet" / f"{name}.safetensors")
        rows[name] = {
            "parameters": parameters,
            "accuracy": measured,
            "expected": expected,
            "published_on_10000_images": PUBLISHED[name],
            "reproduced": abs(measured - expected) <= 1.5 / len(data.test),
        }
        print(f"{name}: {measured:.1%} (expected {expected:.1%})")
    write_json(
        RESULT,
        {"what": "top-1 accuracy on the 1,000 lossless test images", "models": rows}
        | provenance(time.monotonic() - start),
    )


if __name__ == "__main__":
    main()
