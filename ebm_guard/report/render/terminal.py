"""The report in a terminal: verdicts, requirements and the key numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ebm_guard.report.render import (
    corruption_view,
    finetune_view,
    purification_view,
    robustness_facts,
    robustness_view,
)
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
    "clear": "green",
    "raised": "yellow",
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
    if finetune_view.ran(report["finetune"]):
        _print_finetune(report["finetune"], console)
    for warning in report["warnings"]:
        console.print(Text.assemble(("! ", "bold yellow"), warning["message"]))
    if report["warnings"]:
        console.print()


def _print_finetune(section: Mapping[str, Any], console: Console) -> None:
    """Print what fine-tuning gained and lost."""
    from rich.text import Text

    console.print(Text(f"Fine-tuning: {finetune_view.run_sentence(section)}"))
    for name, note, item in finetune_view.section_means(section):
        values = " → ".join(fmt.value(item[side], "score") for side in ("start", "candidate"))
        change = finetune_view.whole_difference(item, "score")
        console.print(
            Text(f"Mean AUROC of the energy, {name.lower()} ({note}): {values}, {change}")
        )
    for line in section["losses"]:
        console.print(Text.assemble(("✗ worse: ", "red"), line))
    if not section["losses"]:
        console.print(Text(finetune_view.no_loss(section)))
    console.print(Text(f"Full page: {section['page']}", style="dim"))
    console.print()


def render_attack_terminal(report: Mapping[str, Any], console: Console) -> None:
    """Print what ``ebm-guard attack`` found: verdict, a table for each norm, flags, corruptions."""
    from rich.text import Text

    meta, section = report["meta"], report["robustness"]
    verdict = section["verdict"]
    console.print()
    console.print(Text(meta["title"], style="bold"))
    images = f"{fmt.count(section['n'])} of {fmt.count(section['of'])} images"
    line = f"{meta['model']['name']} · {report['data']['spec']} · {images}"
    console.print(Text(line, style="dim"))
    console.print()
    console.print(Text.assemble(_status(verdict["status"]), "  ", (verdict["headline"], "bold")))
    console.print(Text(verdict["sentence"]))
    console.print()
    for norm in section["norms"]:
        console.print(_norm_table(section, norm))
    refined = purification_view.result(section)
    if refined is not None:
        console.print(Text(purification_view.sentence(refined)))
        console.print(Text(purification_view.WARNING, style="yellow"))
    flags = robustness_facts.flags_sentence(section)
    console.print(Text(flags, style="yellow" if robustness_facts.raised(section) else ""))
    for flag in robustness_facts.raised(section):
        console.print(Text.assemble(("! ", "bold yellow"), f"{flag['sentence']}. {flag['advice']}"))
    for table in corruption_view.tables(section):
        console.print(Text(corruption_view.sentence(table)))
    for name, reason in robustness_facts.left_out(section):
        console.print(Text(f"{name}: {reason}", style="dim"))
    console.print(Text(robustness_facts.UPPER_BOUND, style="dim"))
    console.print()


def _norm_table(section: Mapping[str, Any], norm: Mapping[str, Any]) -> Table:
    """Build the table of one norm: what each budget leaves, and with the gate lets through."""
    from rich.text import Text

    gated = robustness_view.gate_table(section, norm)
    columns = [norm["norm"], "Right after all attacks"]
    columns += ["Wrong and accepted, gate known", "Gate not known"] if gated else []
    table = _table(*columns)
    for place, row in enumerate(robustness_view.norm_table(section, norm)):
        cells = [row["worst"]]
        if gated:
            cells += [gated[place]["known"], gated[place]["unknown"]]
        texts = [Text(cell["words"] or fmt.metric(cell["metric"])) for cell in cells]
        table.add_row(Text(row["text"], style="bold" if row["mark"] else ""), *texts)
    table.add_row()
    table.caption = Text(f"after {robustness_view.attack_labels(norm['epsilons'][0])}")
    table.caption_justify = "left"
    return table


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
