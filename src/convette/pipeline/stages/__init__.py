"""The stages of a run, in order; one small file each."""

from convette.pipeline._run import Stage
from convette.pipeline.stages import compress, data, explain, export, model, quantize, report, train, verify

STAGES: dict[str, Stage] = {
    module.STAGE.name: module.STAGE
    for module in (data, model, train, compress, quantize, export, verify, explain, report)
}
FIT = tuple(STAGES)
TRAIN = ("data", "model", "train", "verify")
COMPARE = ("data", "model", "train", "compress", "verify")

__all__ = ["COMPARE", "FIT", "STAGES", "TRAIN", "Stage"]
