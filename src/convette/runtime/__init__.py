"""Running networks where they will run: export to a file, engines by name, measured latency, verification."""

from convette.runtime._export import export, exported_size, read_export_metadata
from convette.runtime._verify import Verification, verify
from convette.runtime.engines import ENGINES, Engine, EngineSpec, Runner, missing, prepare
from convette.runtime.latency import Choice, Latency, fastest, measure_latency, overlap

__all__ = [
    "ENGINES",
    "Choice",
    "Engine",
    "EngineSpec",
    "Latency",
    "Runner",
    "Verification",
    "export",
    "exported_size",
    "fastest",
    "measure_latency",
    "missing",
    "overlap",
    "prepare",
    "read_export_metadata",
    "verify",
]
