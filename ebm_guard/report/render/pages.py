"""HTML and Markdown pages, filled from the report dict by the templates beside this folder."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ebm_guard.report.render import (
    calibration_view,
    corruption_view,
    density_view,
    editing_view,
    finetune_view,
    purification_view,
    robustness_facts,
    robustness_view,
    sample_view,
    view,
)
from ebm_guard.report.render import format as fmt

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from jinja2 import Environment

    from ebm_guard.report.editing_images import EditPictures

TEMPLATES = Path(__file__).parents[1] / "templates"


def render_html(report: Mapping[str, Any], figures_svg: Mapping[str, str]) -> str:
    """Render the report as one self-contained HTML page.

    ``figures_svg`` is what ``figures.inline_svgs(report)`` returns; with an empty dict the page
    has its tables alone.
    """
    return _render("report.html.j2", report, svg=figures_svg)


def render_markdown(report: Mapping[str, Any]) -> str:
    """Render the report as Markdown for pull requests and CI summaries."""
    return _render("report.md.j2", report)


def render_summary(report: Mapping[str, Any]) -> str:
    """Render the verdicts and the key numbers as a small HTML table for notebooks."""
    return _render("summary.html.j2", report)


def render_attack_html(report: Mapping[str, Any], figures_svg: Mapping[str, str]) -> str:
    """Render what ``ebm-guard attack`` found as one self-contained HTML page.

    ``figures_svg`` is what ``figures.inline_svgs(report)`` returns.
    """
    return _render("robustness.html.j2", report, svg=figures_svg)


def render_attack_markdown(report: Mapping[str, Any]) -> str:
    """Render what ``ebm-guard attack`` found as Markdown."""
    return _render("robustness.md.j2", report)


def render_finetune_html(report: Mapping[str, Any], figures_svg: Mapping[str, str]) -> str:
    """Render a fine-tuning report as one self-contained HTML page.

    ``figures_svg`` is what ``figures.inline_svgs(report)`` returns.
    """
    return _render("finetune.html.j2", report, svg=figures_svg)


def render_finetune_markdown(report: Mapping[str, Any]) -> str:
    """Render a fine-tuning report as Markdown."""
    return _render("finetune.md.j2", report)


def render_sample_html(
    report: Mapping[str, Any],
    figures_svg: Mapping[str, str],
    pictures: Sequence[str],
    edits: Mapping[str, EditPictures] | None = None,
) -> str:
    """Render what ``ebm-guard sample`` drew as one self-contained HTML page.

    Args:
        report: what ``SampleReport.to_dict()`` returns.
        figures_svg: what ``figures.inline_svgs(report)`` returns.
        pictures: a PNG as data URI for each sample.
        edits: pictures of the sections ``inpainting``, ``denoising`` and ``morphing``.
    """
    shown = editing_view.shown(edits or {})
    return _render("samples.html.j2", report, svg=figures_svg, pictures=pictures, edits=shown)


def render_sample_markdown(report: Mapping[str, Any]) -> str:
    """Render what ``ebm-guard sample`` drew as Markdown."""
    return _render("samples.md.j2", report)


def _render(name: str, report: Mapping[str, Any], **more: Any) -> str:
    return (
        _environment()
        .get_template(name)
        .render(
            r=report,
            view=view,
            calview=calibration_view,
            robview=robustness_view,
            purview=purification_view,
            robfacts=robustness_facts,
            corview=corruption_view,
            ftview=finetune_view,
            densview=density_view,
            samview=sample_view,
            editview=editing_view,
            fmt=fmt,
            **more,
        )
    )


@lru_cache(maxsize=1)
def _environment() -> Environment:
    """Prepare the templates; the HTML escapes every text, a missing value is an error."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=select_autoescape(enabled_extensions=("html.j2",)),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(
        m=fmt.metric,
        v=fmt.value,
        ci=fmt.interval,
        pct=fmt.percent,
        num=fmt.number,
        count=fmt.count,
        energy=fmt.energy,
        nb=fmt.unbroken,
        prose=fmt.prose_html,
        mdp=fmt.prose_markdown,
        score=fmt.score,
        md=fmt.markdown,
        code=fmt.code,
        plain=view.plain,
        sentence_=view.sentence,
        picture=view.picture,
    )
    return environment
