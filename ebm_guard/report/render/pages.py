"""HTML and Markdown pages, filled from the report dict by the templates beside this folder."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ebm_guard.report.render import calibration_view, view
from ebm_guard.report.render import format as fmt

if TYPE_CHECKING:
    from collections.abc import Mapping

    from jinja2 import Environment

TEMPLATES = Path(__file__).parents[1] / "templates"


def render_html(report: Mapping[str, Any], figures_svg: Mapping[str, str]) -> str:
    """Render the report as one self-contained HTML page.

    ``figures_svg`` is what ``figures.inline_svgs(report)`` returns; with an empty dict the page
    has its tables alone.
    """
    page = _environment().get_template("report.html.j2")
    return page.render(r=report, svg=figures_svg, view=view, calview=calibration_view, fmt=fmt)


def render_markdown(report: Mapping[str, Any]) -> str:
    """Render the report as Markdown for pull requests and CI summaries."""
    page = _environment().get_template("report.md.j2")
    return page.render(r=report, view=view, calview=calibration_view, fmt=fmt)


def render_summary(report: Mapping[str, Any]) -> str:
    """Render the verdicts and the key numbers as a small HTML table for notebooks."""
    page = _environment().get_template("summary.html.j2")
    return page.render(r=report, view=view, calview=calibration_view, fmt=fmt)


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
