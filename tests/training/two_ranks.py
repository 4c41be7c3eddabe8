"""Run by torchrun from test_distributed.py, and by it in one process for comparison."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from torch import nn

from conftest import small_data, small_network
from convette import surgery
from convette.data import load_data
from convette.training import Event, Method, TrainSettings, distributed, evaluate, finish_distributed, train


class ShrinkAt(Method):
    """Takes half of the units of the first group, at a step. Rank 0's choice must win."""

    name = "shrink"
    changes_structure = True

    def __init__(self, step):
        self.step = step
        self.events = frozenset({Event.BATCH_START})

    def apply(self, event, trainer):
        if trainer.state.clock.step != self.step:
            return
        graph = surgery.trace(trainer.state.model, trainer.state.example[0])
        group = graph.groups[0]
        start = distributed.rank()  # ranks disagree on purpose
        kept = torch.arange(start, group.size, 2)
        trainer.edit_structure([graph.shrink({group.name: kept})])


def equality(shrink: bool, precision: str = "fp32") -> nn.Module:
    settings = TrainSettings(
        epochs=3, batch_size=32, label_smoothing=0.0, augmentation=(), learning_rate=0.05, precision=precision
    )
    methods = [ShrinkAt(4)] if shrink else []
    return train(small_network(norm=False), small_data(), settings, methods=methods, device="cpu").model


def digits() -> float:
    torch.manual_seed(0)
    network = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(512, 10)),
    )
    data = load_data("digits")
    train(network, data, TrainSettings(epochs=6, augmentation=()), device="cpu")
    return evaluate(network, data.test, data.preprocessing).accuracy


def main(out: Path, parts: list[str]) -> None:
    torch.set_num_threads(1)
    found = {}
    for part in parts:
        if part == "digits":
            found[part] = digits()
        else:
            network = equality(shrink=part == "shrink", precision="bf16" if part == "bf16" else "fp32")
            found[part] = network.state_dict()
            for theirs in distributed.gather(found[part]):
                assert all(torch.equal(theirs[name], tensor) for name, tensor in found[part].items()), "ranks differ"
    found["world"] = distributed.world_size()
    if distributed.is_main():
        print("only once")
        torch.save(found, out)
    finish_distributed()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
