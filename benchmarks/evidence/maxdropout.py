"""MaxDropout against dropout and nothing: the gap between training and test, and whether features are spread.

    python benchmarks/evidence/maxdropout.py [--seeds 3]

Fixed before any result was seen. 1,000 USPS digits for training (so that the network learns them by heart), all 2,007
test digits; the CIFAR ResNet of depth 8 with 8, 16, 32 channels, 10 epochs, no augmentation. Behind each of the three
stages: nothing, dropout of channels 0.1, MaxDropout 0.3 over the whole tensor (the paper's) and within each image.
"top 1 % off": points of test accuracy lost when the largest 1 % of the activations behind every stage of each image is
set to 0 at test time, the same for all networks. Expected: a smaller gap, test accuracy 0 to 1 points up, less lost
without the top 1 %.
"""

import time

import torch
import torch.nn.functional as F
from _figures import told, write_runs
from _work import accuracy, images_of, load, options, over_seeds, train
from torch import Tensor, nn

from convette.layers.regularization import insert_after_stages
from convette.models.cifar_resnet import CifarResNet
from convette.surgery import Append, apply

TRAIN, EPOCHS = 1000, 10
STAGES = ("layer1", "layer2", "layer3")


def network(kind: str) -> nn.Module:
    model = CifarResNet(8, 10, 1, (8, 16, 32))
    if kind == "random":
        apply(model, *(Append(stage, "torch.nn:Dropout2d", {"p": 0.1}) for stage in STAGES))
    elif kind != "none":
        insert_after_stages(model, 0.3, kind)  # type: ignore[arg-type]
    return model


def without_the_top(_: nn.Module, __: object, y: Tensor) -> Tensor:
    flat = y.flatten(1)
    limit = flat.quantile(0.99, dim=1, keepdim=True)
    return torch.where(flat > limit, 0, flat).view_as(y)


def main() -> None:
    arguments = options(__doc__, shared=True)
    started = time.monotonic()
    data = load("usps", arguments.shared)
    images, labels = images_of(data, "train")
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:TRAIN]
    inputs, targets = images[chosen] * 2 - 1, labels[chosen]
    test, wanted = images_of(data, "test")
    test = test * 2 - 1

    def run(model: nn.Module, seed: int) -> dict[str, float]:
        train(model, inputs, targets, F.cross_entropy, epochs=EPOCHS, seed=seed, batch=50)
        seen, unseen = accuracy(model, inputs, targets), accuracy(model, test, wanted)
        handles = [model.get_submodule(name).register_forward_hook(without_the_top) for name in STAGES]
        reduced = accuracy(model, test, wanted)
        for handle in handles:
            handle.remove()
        return {"training": seen, "test": unseen, "gap": seen - unseen, "top 1 % off": unseen - reduced}

    arms = {
        "none": lambda seed: network("none"),
        "dropout of channels 0.1": lambda seed: network("random"),
        "MaxDropout 0.3": lambda seed: network("tensor"),
        "MaxDropout 0.3 an image": lambda seed: network("sample"),
    }
    found = over_seeds(arms, arguments.seeds, run)
    parts = [told(found, "MaxDropout 0.3", "none", key) for key in ("test", "gap", "top 1 % off")]
    summary = f"{TRAIN} USPS digits, a ResNet of depth 8. " + " ".join(parts)
    settings = {"train": TRAIN, "epochs": EPOCHS, "seeds": arguments.seeds}
    shares = ("training", "test", "gap", "top 1 % off")
    write_runs("maxdropout", summary, found, started, shares=shares, settings=settings)


if __name__ == "__main__":
    main()
