"""Running networks where they will run: export to a file, engines by name, measured latency, verification."""

from convette.runtime.engines import ENGINES, Engine, EngineSpec, Runner, missing, prepare
from convette.runtime.export import export, exported_size, read_export_metadata
from convette.runtime.latency import Latency, measure_latency

__all__ = [
    "ENGINES",
    "Engine",
    "EngineSpec",
    "Latency",
    "Runner",
    "export",
    "exported_size",
    "measure_latency",
    "missing",
    "prepare",
    "read_export_metadata",
]
