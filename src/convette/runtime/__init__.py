"""Running networks where they will run: export to a file, engines by name, measured latency, verification."""

from convette.runtime._export import export, exported_size, read_export_metadata
from convette.runtime._load import Contention, Load, contention
from convette.runtime._verify import Verification, verify
from convette.runtime.engines import ENGINES, Engine, EngineSpec, Runner, missing, prepare
from convette.runtime.latency import Choice, Latency, fastest, measure_latency, overlap
from convette.runtime.latency_variability import (
    Reversal,
    Spread,
    VariabilityStudy,
    spread,
    study,
    study_table,
)

__all__ = [
    "ENGINES",
    "Choice",
    "Contention",
    "Engine",
    "EngineSpec",
    "Latency",
    "Load",
    "Reversal",
    "Runner",
    "Spread",
    "VariabilityStudy",
    "Verification",
    "contention",
    "export",
    "exported_size",
    "fastest",
    "measure_latency",
    "missing",
    "overlap",
    "prepare",
    "read_export_metadata",
    "spread",
    "study",
    "study_table",
    "verify",
]
