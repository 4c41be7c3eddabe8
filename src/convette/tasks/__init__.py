"""Tasks: what the network's outputs mean, how far they are from the targets, and how good they are."""

from convette.tasks._task import Task
from convette.tasks.classification import (
    Classification,
    ClassificationMetrics,
    calibration_error,
    confusion_matrix,
    top_k_accuracy,
)

__all__ = [
    "Classification",
    "ClassificationMetrics",
    "Task",
    "calibration_error",
    "confusion_matrix",
    "top_k_accuracy",
]
