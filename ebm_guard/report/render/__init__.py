"""Views of a report dict: HTML, Markdown, the terminal, and all of them as files."""

from ebm_guard.report.render.finetune_terminal import (
    render_finetune_terminal,
    render_sample_terminal,
)
from ebm_guard.report.render.output import (
    write_attack_outputs,
    write_finetune_outputs,
    write_outputs,
    write_sample_outputs,
)
from ebm_guard.report.render.pages import (
    render_attack_html,
    render_attack_markdown,
    render_finetune_html,
    render_finetune_markdown,
    render_html,
    render_markdown,
    render_sample_html,
    render_sample_markdown,
    render_summary,
)
from ebm_guard.report.render.terminal import render_attack_terminal, render_terminal

__all__ = [
    "render_attack_html",
    "render_attack_markdown",
    "render_attack_terminal",
    "render_finetune_html",
    "render_finetune_markdown",
    "render_finetune_terminal",
    "render_html",
    "render_markdown",
    "render_sample_html",
    "render_sample_markdown",
    "render_sample_terminal",
    "render_summary",
    "render_terminal",
    "write_attack_outputs",
    "write_finetune_outputs",
    "write_outputs",
    "write_sample_outputs",
]
