"""The reliability report: built from predictions, kept as JSON, seen as HTML and Markdown."""

from ebm_guard.report.build import Settings, build_report
from ebm_guard.report.record import Report

__all__ = ["Report", "Settings", "build_report"]
