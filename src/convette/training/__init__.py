"""Training: `train` in one call, and below it a trainer whose methods may change the network while it learns."""

from convette.training._fabric import FabricAdapter, resolve_device, start_distributed
from convette.training._train import TrainResult, train
from convette.training.checkpoints import CheckpointFolder
from convette.training.choose import Choice
from convette.training.distillation import Distillation, distillation_loss, feature_loss
from convette.training.distributed import barrier, broadcast, finish_distributed, is_main, rank, world_size
from convette.training.ema import Ema
from convette.training.evaluation import Evaluation, evaluate, evaluate_runner, recalibrate_batch_norm
from convette.training.events import Event, Method
from convette.training.methods import (
    AnnealSkewness,
    ConsistentTraining,
    MixStyleDomains,
    NormLossTraining,
    SemiMixStyleTraining,
    SparseSwitch,
    find_method,
    make_method,
    methods_of,
    with_own,
)
from convette.training.optimizers import WarmupCosine, build_optimizer
from convette.training.settings import TrainSettings
from convette.training.state import Clock, EpochRecord, LossTerms, Stage, State
from convette.training.step import PlainStep, StepStrategy
from convette.training.taps import FeatureTaps
from convette.training.trainer import Trainer

__all__ = [
    "AnnealSkewness",
    "CheckpointFolder",
    "Choice",
    "Clock",
    "ConsistentTraining",
    "Distillation",
    "Ema",
    "EpochRecord",
    "Evaluation",
    "Event",
    "FabricAdapter",
    "FeatureTaps",
    "LossTerms",
    "Method",
    "MixStyleDomains",
    "NormLossTraining",
    "PlainStep",
    "SemiMixStyleTraining",
    "SparseSwitch",
    "Stage",
    "State",
    "StepStrategy",
    "TrainResult",
    "TrainSettings",
    "Trainer",
    "WarmupCosine",
    "barrier",
    "broadcast",
    "build_optimizer",
    "distillation_loss",
    "evaluate",
    "evaluate_runner",
    "feature_loss",
    "find_method",
    "finish_distributed",
    "is_main",
    "make_method",
    "methods_of",
    "rank",
    "recalibrate_batch_norm",
    "resolve_device",
    "start_distributed",
    "train",
    "with_own",
    "world_size",
]
