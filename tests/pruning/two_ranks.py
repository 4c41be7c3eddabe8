"""Run by torchrun from `test_ranks.py`: prune the digits on two ranks, write down a digest of the result."""

import hashlib
import json
import sys
from pathlib import Path

import torch
from torch import nn

from convette.data import load_data
from convette.errors import BudgetError
from convette.pruning import PruneSettings, prune
from convette.training import TrainSettings, finish_distributed, rank, start_distributed

torch.set_num_threads(1)
start_distributed("cpu")
torch.manual_seed(0)
data = load_data("digits")
model = nn.Sequential(
    nn.Conv2d(data.preprocessing.channels, 8, 3, padding=1, bias=False),
    nn.BatchNorm2d(8),
    nn.ReLU(),
    nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False),
    nn.BatchNorm2d(12),
    nn.ReLU(),
    nn.AdaptiveAvgPool2d(2),
    nn.Flatten(),
    nn.Linear(48, data.num_classes),
)
# Ranks that score alike agree by luck; these would not.
settings = PruneSettings(criterion="random", steps=2, epochs=1, seed=rank())
quick = TrainSettings(batch_size=128, augmentation=(), precision="fp32")
result = prune(model, data, "macs<=50%", settings, train_settings=quick, device="cpu", checkpoint_dir=sys.argv[1])
digest = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in result.model.state_dict().values()))
refused = False
try:
    prune(model, data, "macs<=0.3K", settings, train_settings=quick, device="cpu")
except BudgetError:
    refused = True
# One file a rank: lines that two processes print at once get mixed.
found = {"met": result.met, "digest": digest.hexdigest(), "refused": refused}
Path(sys.argv[1], f"rank-{rank()}.json").write_text(json.dumps(found))
finish_distributed()
