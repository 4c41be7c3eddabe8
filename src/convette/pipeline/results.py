"""What each stage of a run leaves behind, as validated JSON: the shapes of `run.json` and `<stage>/result.json`.

`docs/run-folder.md` describes the same files in words. Anything that reads a run (the report, `convette fit` on resume,
a script of yours) goes through these classes: `read_result(run_dir, "train")`.
"""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from convette.errors import UsageError

RUN_FILE = "run.json"
RESULT_FILE = "result.json"
FORMAT = 1
Unit = Literal["share", "count", "bytes", "ms"]
FileFormat = Literal["convette", "onnx", "openvino"]


class Part(BaseModel):
    """A piece of a run's JSON: unknown keys are refused, nothing can be changed after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)


class SplitSummary(Part):
    """How many images a split has, in all and for each class (in the order of `class_names`)."""

    images: int
    class_counts: list[int]


class BadFile(Part):
    """An image that was skipped, and why."""

    path: str
    reason: str


class Scores(Part):
    """What a network reaches on a split: shares in 0..1, `confusion[label][prediction]` in images."""

    images: int
    accuracy: float
    loss: float
    calibration_error: float | None = None
    confusion: list[list[int]] | None = None


class Epoch(Part):
    """One epoch of a training: mean loss and accuracy on both splits, learning rate at its end, seconds."""

    epoch: int
    train_loss: float
    train_accuracy: float | None = None
    validation_loss: float | None = None
    validation_accuracy: float | None = None
    learning_rate: float | None = None
    seconds: float


class StageResult(Part):
    """What every stage says: how long it took (in the sitting that finished it) and when it was done."""

    seconds: float = 0.0
    finished_at: str | None = None


class DataResult(StageResult):
    """`data/result.json`."""

    source: str
    fingerprint: str
    class_names: list[str]
    channels: int
    height: int
    width: int
    preprocessing: dict[str, Any]
    splits: dict[str, SplitSummary]
    bad: list[BadFile]
    notes: list[str]
    samples: str = "samples.npz"


class ModelResult(StageResult):
    """`model/result.json`. `cost` and `smallest`: `convette.cost.Cost` as JSON, of the start and its thinnest self.

    `converted`: what it was converted to, a line for each `[[convert]]` of the recipe.
    """

    name: str
    requested: str
    reason: str
    cost: dict[str, Any]
    smallest: dict[str, Any] | None
    converted: list[str] = []
    file: str = "model.safetensors"


class TrainingResult(StageResult):
    """`train/result.json`."""

    settings: dict[str, Any]
    device: str
    epochs: list[Epoch]
    validation: Scores
    file: str = "model.safetensors"


class PathPoint(Part):
    """Where the network stood after a step of compression (step 0: before the first).

    Latencies are median milliseconds on `engine`; `accuracy` is on the validation split, after this step's recovery.
    """

    step: int
    macs: int
    parameters: int
    size: int
    latency: float | None = None
    engine: str | None = None
    accuracy: float | None = None
    accuracy_before_recovery: float | None = None


class Width(Part):
    """Output channels of a layer before and after; layers that were not touched are listed too."""

    layer: str
    before: int
    after: int


class LimitResult(Part):
    """One limit of the budget: as written, in absolute units (`latency` in milliseconds), what was reached."""

    limit: str
    metric: str
    engine: str | None
    value: float
    bound: float
    met: bool


class BitsTried(Part):
    """The network pruned for so many bits a weight and rounded: on the validation split, early in its distillation."""

    bits: int
    parameters: int
    bytes: int
    accuracy: float
    loss: float
    kept: bool = False


class CompressResult(StageResult):
    """`compress/result.json`. `tried`: the bits a weight it was pruned for, where the size is met by bits too."""

    budget: str
    settings: dict[str, Any]
    path: list[PathPoint]
    widths: list[Width]
    recovery: list[Epoch]
    validation_before: Scores
    validation_after: Scores
    limits: list[LimitResult]
    tried: list[BitsTried] = []
    file: str = "model.safetensors"


class Candidate(Part):
    """One precision that was tried: accuracy on the validation split, median latency in milliseconds, bytes."""

    name: str
    engine: str
    precision: str
    accuracy: float
    latency: float
    size: int
    file: str
    note: str = ""


class QuantizationResult(StageResult):
    """`quantize/result.json`."""

    candidates: list[Candidate]
    failures: list[str]
    kept: str
    precision: str
    reason: str
    file: str | None


class ExportedFile(Part):
    """A deployable file, relative to the run folder."""

    file: str
    format: FileFormat
    precision: str
    bytes: int
    recommended: bool = False


class ExportResult(StageResult):
    """`export/result.json`. `unfolded`: layers that are no plain ones in the files, and why."""

    files: list[ExportedFile]
    unfolded: dict[str, str] = {}


class FileCheck(Part):
    """An exported file against the network it was made from, on real images."""

    file: str
    engine: str
    images: int
    max_abs_error: float
    tolerance: float
    agreement: float
    accuracy: float | None = None
    passed: bool


class VerifyResult(StageResult):
    """`verify/result.json`: the one place where the test split is used.

    `file_before`, `file_after`: bytes of the networks' files on disk, headers and all, where one was exported.
    """

    files: list[FileCheck]
    test_before: Scores
    test_after: Scores
    cost_before: dict[str, Any]
    cost_after: dict[str, Any]
    limits: list[LimitResult]
    file_before: int | None = None
    file_after: int | None = None
    predictions: str = "predictions.npz"
    mistakes: str = "mistakes.npz"


class ExplainedImage(Part):
    """A test image whose maps were drawn: `correlation` is Spearman's between the map before and after."""

    index: int
    label: int
    prediction_before: int
    prediction_after: int
    confidence_after: float
    right: bool
    correlation: float


class ExplainResult(StageResult):
    """`explain/result.json`; `drift`: 1 - mean correlation over `drift_images` test images, with its 95 % interval."""

    method: str
    layer_before: str
    layer_after: str
    reason: str
    images: list[ExplainedImage]
    drift: float
    drift_interval: tuple[float, float]
    drift_images: int
    maps: str = "maps.npz"


class ReportResult(StageResult):
    """`report/result.json`."""

    file: str = "report.html"


class StageState(Part):
    """A stage in `run.json`: finished (in how many seconds of its last sitting), left out (why), or still to do."""

    name: str
    state: Literal["to do", "finished", "left out"]
    seconds: float = 0.0
    finished_at: str | None = None
    note: str = ""


class Row(Part):
    """A row of the table people read. `unit`: "share", "count", "bytes" or "ms"; `budget` and `met` where limited."""

    key: str
    label: str
    unit: Unit
    before: float
    after: float
    budget: float | None = None
    met: bool | None = None


class Summary(Part):
    """The outcome of a finished run."""

    rows: list[Row]
    met: bool
    notes: list[str] = Field(default_factory=list)
    use: list[str] = Field(default_factory=list)


class RunRecord(Part):
    """`run.json`."""

    format: int = FORMAT
    name: str
    command: str
    reproduce: str
    created: str
    updated: str
    recipe: dict[str, Any]
    machine: dict[str, Any]
    versions: dict[str, str]
    state: Literal["running", "finished"] = "running"
    stages: list[StageState] = Field(default_factory=list)
    summary: Summary | None = None

    def stage(self, name: str) -> StageState:
        """Return the state of the stage `name`."""
        return next((stage for stage in self.stages if stage.name == name), StageState(name=name, state="to do"))


RESULTS: dict[str, type[StageResult]] = {
    "data": DataResult,
    "model": ModelResult,
    "train": TrainingResult,
    "compress": CompressResult,
    "quantize": QuantizationResult,
    "export": ExportResult,
    "verify": VerifyResult,
    "explain": ExplainResult,
    "report": ReportResult,
}


def read_run(run_dir: Path | str) -> RunRecord:
    """Return the record of a run folder. Raises `UsageError` if the folder holds no readable run."""
    return _read(Path(run_dir) / RUN_FILE, RunRecord)


def read_result(run_dir: Path | str, stage: str) -> Any:
    """Return what `stage` left (one of the classes in `RESULTS`), or None if it has not finished or was left out."""
    path = Path(run_dir) / stage / RESULT_FILE
    return _read(path, RESULTS[stage]) if path.exists() else None


def _read(path: Path, kind: type[Part]) -> Any:
    try:
        return kind.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UsageError(f"{path}: not a run folder of convette ({error.strerror}).") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise UsageError(
            f"{path}: {where}: {first['msg']}; written by another version of convette? Use another --out, or --restart."
        ) from error
