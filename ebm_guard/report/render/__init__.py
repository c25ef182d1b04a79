"""Views of a report dict: HTML, Markdown, the terminal, and all of them as files."""

from ebm_guard.report.render.output import write_outputs
from ebm_guard.report.render.pages import render_html, render_markdown, render_summary
from ebm_guard.report.render.terminal import render_terminal

__all__ = ["render_html", "render_markdown", "render_summary", "render_terminal", "write_outputs"]
