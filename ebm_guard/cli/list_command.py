"""``ebm-guard list``: every registered method."""

from __future__ import annotations

import json

import click

from ebm_guard.cli.options import json_option
from ebm_guard.registry import FAMILIES, methods


@click.command("list")
@click.option("--family", type=click.Choice(FAMILIES), help="Only this family.")
@json_option
def command(family: str | None, as_json: bool) -> None:
    """List every method: family, name, paper, equation, needs, default."""
    rows = methods(family)
    if as_json:
        click.echo(json.dumps([row.to_dict() for row in rows], indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(show_lines=False, header_style="bold", row_styles=("", "dim"))
    for heading in ("family", "name", "equation", "needs", "paper"):
        table.add_column(heading, overflow="fold", no_wrap=heading == "name")
    for row in rows:
        name = f"{row.name} (default)" if row.default else row.name
        table.add_row(row.family, name, row.equation, ", ".join(row.needs), row.paper)
    Console().print(table, markup=False)
