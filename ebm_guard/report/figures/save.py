"""Figures as bytes: the same report gives the same PNG and SVG on every run."""

from __future__ import annotations

import re
from functools import partial
from io import StringIO
from typing import TYPE_CHECKING, Any

from ebm_guard.report.figures.attack_energy import PARTS, robustness_energy
from ebm_guard.report.figures.corruption_map import (
    corruption_tables,
    robustness_corruptions,
    shown_metrics,
)
from ebm_guard.report.figures.editing import edit_errors, morph_path
from ebm_guard.report.figures.energy import energy_histogram
from ebm_guard.report.figures.finetune import (
    finetune_ood,
    finetune_robustness,
    finetune_training,
    robust_norms,
    training_panels,
)
from ebm_guard.report.figures.ranking import ranked_scores, roc, score_ranking
from ebm_guard.report.figures.reliability import reliability
from ebm_guard.report.figures.robustness import curve_lines, robustness_curve, robustness_ood
from ebm_guard.report.figures.samples import sample_energies, sample_traces, trace_panels
from ebm_guard.report.figures.selective import joint_map, risk_coverage
from ebm_guard.report.figures.style import THEME, drawing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from matplotlib.figure import Figure

DPI = 200  # twice the usual 100, for sharp pictures on a phone and in print


def save_figures(report: Mapping[str, Any], folder: Path) -> dict[str, tuple[Path, Path]]:
    """Write each figure that the report has data for as PNG and SVG; return their paths.

    ``report`` is a report, or what ``ebm-guard attack``, ``finetune`` or ``sample`` wrote.
    """
    return {name: save_figure(draw(), name, folder) for name, draw in _figures(report)}


def save_figure(figure: Figure, name: str, folder: Path) -> tuple[Path, Path]:
    """Write one figure as PNG and SVG; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    png, svg = folder / f"{name}.png", folder / f"{name}.svg"
    with drawing():
        figure.savefig(png, dpi=DPI, metadata={"Software": None})
    svg.write_text(svg_text(figure, name), encoding="utf-8", newline="\n")
    return png, svg


def inline_svgs(report: Mapping[str, Any]) -> dict[str, str]:
    """Draw single panels for a web page: no ids in common, colours as CSS variables.

    Panels and not the side-by-side figures, so that a phone can put them under each other.
    The ROC panels are numbered in the order of ``report["ood"]``.
    """
    if "outcome" in report:
        panels = {name: draw() for name, draw in _finetune_panels(report)}
    elif "samples" in report:
        panels = {name: draw() for name, draw in _sample_figures(report, single=True)}
    else:
        panels = {name: draw() for name, draw in _robustness_panels(report["robustness"])}
    if "calibration" in report:
        panels.update(_report_panels(report))
    return {name: _for_page(svg_text(figure, name)) for name, figure in panels.items()}


def _report_panels(report: Mapping[str, Any]) -> dict[str, Figure]:
    """Draw the single panels of all sections but robustness."""
    panels: dict[str, Figure] = {}
    for when in ("before", "after"):
        if "curve" in report["calibration"].get(when, {}):
            panels[f"reliability_{when}"] = reliability(report["calibration"][when])
    shared = ("risk_coverage", "joint_map", "energy_histogram", "score_ranking")
    panels.update((name, draw()) for name, draw in _figures(report) if name in shared)
    for number, (name, entry) in enumerate(report["ood"].items()):
        if entry.get("roc"):
            panels[f"roc_{number}"] = roc({name: entry}, titles=False)
    return panels


def svg_text(figure: Figure, name: str) -> str:
    """Write a figure as SVG without dates or versions, its ids starting with ``name``."""
    stream = StringIO()
    with drawing(**{"svg.hashsalt": f"ebm_guard/{name}"}):
        empty = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(stream, format="svg", metadata=empty)
    text = re.sub(r"<!DOCTYPE.*?>|<metadata>.*?</metadata>", "", stream.getvalue(), flags=re.S)
    text = re.sub(r'(\sid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    return re.sub(r"\n\s*\n+", "\n", text)


def _figures(report: Mapping[str, Any]) -> Iterator[tuple[str, Callable[[], Figure]]]:
    """List the figures that the report has data for, each with the call that draws it."""
    if "outcome" in report:
        yield from _finetune_figures(report)
        return
    if "samples" in report:
        yield from _sample_figures(report)
        return
    if "calibration" in report:
        yield from _report_figures(report)
    yield from _robustness_figures(report["robustness"])


def _report_figures(report: Mapping[str, Any]) -> Iterator[tuple[str, Callable[[], Figure]]]:
    calibration, energy, ood = report["calibration"], report["energy"], report["ood"]
    if "curve" in calibration.get("before", {}):
        after = calibration["after"] if "curve" in calibration["after"] else None
        yield "reliability", partial(reliability, calibration["before"], after)
    if "curves" in report["selective"]:
        yield "risk_coverage", partial(risk_coverage, report["selective"])
        if report["selective"]["joint"] is not None:
            yield "joint_map", partial(joint_map, report["selective"])
    if "histogram" in energy:
        yield "energy_histogram", partial(energy_histogram, energy)
    if any(entry.get("roc") for entry in ood.values()):
        yield "roc", partial(roc, ood)
    if ranked_scores(report):
        yield "score_ranking", partial(score_ranking, report)


def _robustness_figures(
    section: Mapping[str, Any],
) -> Iterator[tuple[str, Callable[..., Figure]]]:
    if "not_run" in section:
        return
    if any(curve_lines(section, norm) for norm in section["norms"]):
        yield "robustness_curve", partial(robustness_curve, section)
    if section["energy_path"] is not None:
        yield "robustness_energy", partial(robustness_energy, section["energy_path"])
    tables = corruption_tables(section)
    if tables:
        yield "robustness_corruptions", partial(robustness_corruptions, tables)
    if section["ood"]:
        yield "robustness_ood", partial(robustness_ood, section)


def _robustness_panels(section: Mapping[str, Any]) -> Iterator[tuple[str, Callable[[], Figure]]]:
    """List the figures of robustness as single panels, named by what they are of."""
    for name, draw in _robustness_figures(section):
        if name == "robustness_curve":
            for norm in section["norms"]:
                if curve_lines(section, norm):
                    yield f"{name}_{norm['norm']}", partial(draw, norm["norm"])
        elif name == "robustness_energy":
            for part in PARTS:
                yield f"{name}_{part}", partial(draw, part)
        elif name == "robustness_corruptions":
            for number, table in enumerate(corruption_tables(section)):
                for metric in shown_metrics(table):
                    panel = partial(robustness_corruptions, [table], metric)
                    yield f"{name}_{number}_{metric}", panel
        else:
            yield name, draw


def _finetune_figures(report: Mapping[str, Any]) -> Iterator[tuple[str, Callable[..., Figure]]]:
    if report["ood"]:
        yield "finetune_ood", partial(finetune_ood, report)
    if training_panels(report["training"]):
        yield "finetune_training", partial(finetune_training, report["training"])
    if robust_norms(report["robustness"]):
        yield "finetune_robustness", partial(finetune_robustness, report["robustness"])


def _finetune_panels(report: Mapping[str, Any]) -> Iterator[tuple[str, Callable[[], Figure]]]:
    """List the figures of fine-tuning as single panels, named by what they are of."""
    for name, draw in _finetune_figures(report):
        if name == "finetune_training":
            for panel in training_panels(report["training"]):
                yield f"{name}_{panel}", partial(draw, panel)
        elif name == "finetune_robustness":
            for norm in robust_norms(report["robustness"]):
                yield f"{name}_{norm['norm']}", partial(draw, norm["norm"])
        else:
            yield name, draw


def _sample_figures(
    report: Mapping[str, Any], *, single: bool = False
) -> Iterator[tuple[str, Callable[..., Figure]]]:
    panels = trace_panels(report["trace"])
    if single:
        for panel in panels:
            yield f"sample_traces_{panel}", partial(sample_traces, report["trace"], panel)
    elif panels:
        yield "sample_traces", partial(sample_traces, report["trace"])
    yield "sample_energies", partial(sample_energies, report)
    for name in ("inpainting", "denoising"):
        if name in report:
            yield f"sample_{name}_errors", partial(edit_errors, report[name])
    if "morphing" in report:
        yield "sample_morphing_path", partial(morph_path, report["morphing"])


def _for_page(svg: str) -> str:
    """Fit an SVG into a page: its fonts, its colours, no XML prologue, any width."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg, count=2).replace("xlink:href", "href")
    # A style element inside an SVG applies to the whole page; the page has this rule itself.
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, count=1, flags=re.S)
    svg = re.sub(r"font(-family)?: ([^;\"]*)'DejaVu Sans'", _page_font, svg)
    head, body = svg.split(">", 1)
    head = re.sub(r'\s(width|height)="[^"]*"', "", head) + ' aria-hidden="true"'
    for colour, variable in THEME.items():
        body = body.replace(colour, f"var({variable}, {colour})")
    return f"{head}>{body}".strip()


def _page_font(match: re.Match[str]) -> str:
    """Keep size and weight of a font, and take the family of the page."""
    family = "font-family: var(--fig-font, sans-serif)"
    if match[1]:
        return family
    bold = "font-weight: bold; " if re.search(r"\b(bold|700)\b", match[2]) else ""
    size = re.search(r"[\d.]+px", match[2])
    return bold + (f"font-size: {size[0]}; " if size else "") + family
