"""The report in a terminal: verdicts, requirements and the key numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ebm_guard.report.render import format as fmt
from ebm_guard.report.render.view import SIGNS, STATUS_WORDS, key_numbers, pillars

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

COLOURS = {
    "good": "green",
    "met": "green",
    "attention": "yellow",
    "unclear": "yellow",
    "bad": "red",
    "failed": "red",
    "not_run": "dim",
}


def render_terminal(report: Mapping[str, Any], console: Console) -> None:
    """Print a summary of the report; texts of the user are never read as markup."""
    from rich.text import Text

    meta, evaluation = report["meta"], report["data"]["evaluation"]
    console.print()
    console.print(Text(meta["title"], style="bold"))
    line = f"{meta['model']['name']} · {evaluation['spec']} · {fmt.count(evaluation['n'])} images"
    console.print(Text(line, style="dim"))
    console.print()
    console.print(_pillar_table(report))
    if report["requirements"]:
        console.print(_requirement_table(report))
    console.print(_number_table(report))
    for warning in report["warnings"]:
        console.print(Text.assemble(("! ", "bold yellow"), warning["message"]))
    if report["warnings"]:
        console.print()


def _table(*columns: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, header_style="dim", pad_edge=False, show_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _status(status: str) -> Text:
    from rich.text import Text

    return Text(f"{SIGNS[status]} {STATUS_WORDS[status]}", style=COLOURS[status], no_wrap=True)


def _pillar_table(report: Mapping[str, Any]) -> Table:
    """Build the table of verdicts."""
    from rich.text import Text

    table = _table("Pillar", "Verdict", "In short")
    for card in pillars(report):
        table.add_row(Text(card["name"]), _status(card["status"]), Text(card["headline"]))
    table.add_row()
    return table


def _requirement_table(report: Mapping[str, Any]) -> Table:
    """Build the table of requirements."""
    from rich.text import Text

    table = _table("Requirement", "Verdict", "Value [95 %]")
    for row in report["requirements"]:
        value = fmt.metric(row, fmt.kind_of(row["path"]))
        table.add_row(Text(row["text"]), _status(row["status"]), Text(value))
    table.add_row()
    return table


def _number_table(report: Mapping[str, Any]) -> Table:
    """Build the table of key numbers."""
    from rich.text import Text

    table = _table("Number", "Value [95 %]", "n")
    for name, value, n in key_numbers(report):
        table.add_row(Text(name), Text(value), Text(n, justify="right"))
    table.add_row()
    return table
