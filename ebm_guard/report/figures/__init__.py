"""Figures of the report: matplotlib only here, drawn from the report dict only."""

from ebm_guard.report.figures.energy import energy_histogram
from ebm_guard.report.figures.ranking import roc, score_ranking
from ebm_guard.report.figures.reliability import reliability
from ebm_guard.report.figures.save import inline_svgs, save_figures, svg_text

__all__ = [
    "energy_histogram",
    "inline_svgs",
    "reliability",
    "roc",
    "save_figures",
    "score_ranking",
    "svg_text",
]
