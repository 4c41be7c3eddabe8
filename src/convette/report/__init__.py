"""The report of a run: one self-contained HTML file, made from the run folder alone."""

from convette.report._writer import render_report, write_report

__all__ = ["render_report", "write_report"]
