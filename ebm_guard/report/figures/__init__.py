"""Figures of the report: matplotlib only here, drawn from the report dict only."""

from ebm_guard.report.figures.attack_energy import robustness_energy
from ebm_guard.report.figures.corruption_map import robustness_corruptions
from ebm_guard.report.figures.editing import edit_errors, edit_sheet, morph_path
from ebm_guard.report.figures.energy import energy_histogram
from ebm_guard.report.figures.finetune import (
    finetune_ood,
    finetune_robustness,
    finetune_training,
)
from ebm_guard.report.figures.ranking import roc, score_ranking
from ebm_guard.report.figures.reliability import reliability
from ebm_guard.report.figures.robustness import robustness_curve, robustness_ood
from ebm_guard.report.figures.samples import sample_energies, sample_sheet, sample_traces
from ebm_guard.report.figures.save import inline_svgs, save_figure, save_figures, svg_text

__all__ = [
    "edit_errors",
    "edit_sheet",
    "energy_histogram",
    "finetune_ood",
    "finetune_robustness",
    "finetune_training",
    "inline_svgs",
    "morph_path",
    "reliability",
    "robustness_corruptions",
    "robustness_curve",
    "robustness_energy",
    "robustness_ood",
    "roc",
    "sample_energies",
    "sample_sheet",
    "sample_traces",
    "save_figure",
    "save_figures",
    "score_ranking",
    "svg_text",
]
