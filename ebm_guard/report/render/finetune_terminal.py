"""What ``ebm-guard finetune`` and ``sample`` print: the outcome and the key numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ebm_guard.report.render import density_view, editing_view, finetune_view, sample_view
from ebm_guard.report.render import format as fmt
from ebm_guard.report.render.view import SIGNS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.console import Console
    from rich.table import Table

_BETTER = {True: "green", False: "red", None: "dim"}


def render_finetune_terminal(report: Mapping[str, Any], console: Console) -> None:
    """Print a fine-tuning report: outcome, acceptance tests, start against candidate."""
    from rich.text import Text

    meta, outcome = report["meta"], report["outcome"]
    console.print()
    console.print(Text(meta["title"], style="bold"))
    line = f"{meta['model']['name']} · {fmt.count(outcome['updates'])} updates"
    console.print(Text(line, style="dim"))
    console.print()
    accepted = outcome["status"] == "accepted"
    words = f"{SIGNS['met' if accepted else 'attention']} {report['verdict']['headline']}"
    console.print(Text(words, style="bold green" if accepted else "bold yellow"))
    console.print(Text(outcome["reason"]))
    console.print()
    if finetune_view.ran(report["acceptance"]):
        console.print(_tests_table(report["acceptance"]))
    if finetune_view.ran(report["comparison"]):
        console.print(_change_table(report))
        console.print(Text(report["comparison"]["note"], style="dim"))
    for name, item, kind in finetune_view.changed(report, better=False):
        changed = finetune_view.difference(item["difference"], kind)
        console.print(Text.assemble(("✗ worse: ", "red"), f"{name}, {changed}"))
    if finetune_view.ran(report["density"]):
        console.print()
        console.print(Text(density_view.density_sentence(report["density"])))
    console.print()


def render_sample_terminal(report: Mapping[str, Any], console: Console) -> None:
    """Print what ``ebm-guard sample`` drew, class by class."""
    from rich.text import Text

    console.print()
    console.print(Text(report["meta"]["title"], style="bold"))
    console.print(Text(report["sentence"]))
    console.print()
    table = _table("Class", "Samples", "Median energy", "Named as asked")
    for row in report["classes"]:
        table.add_row(
            Text(row["name"]),
            fmt.count(len(row["energies"])),
            fmt.energy(sample_view.middle(row["energies"])),
            fmt.count(sum(row["agrees"])),
        )
    console.print(table)
    known = sample_view.reference_sentence(report)
    if known:
        console.print(Text(known, style="dim"))
    for heading, sentence in editing_view.sentences(report):
        console.print()
        console.print(Text(heading, style="bold"))
        console.print(Text(sentence))
    console.print()


def _tests_table(acceptance: Mapping[str, Any]) -> Table:
    from rich.text import Text

    table = _table("Acceptance test", "Difference", "At worst", "Allowed", "")
    for test in acceptance["tests"]:
        kind = finetune_view.test_kind(test)
        figures = [
            finetune_view.amount(test[name], kind, signed=True)
            for name in ("difference", "bound", "limit")
        ]
        style = "green" if test["passed"] else "red"
        sign = SIGNS["met" if test["passed"] else "failed"]
        table.add_row(Text(test["what"]), *map(Text, figures), Text(sign, style=style))
    table.add_row()
    return table


def _change_table(report: Mapping[str, Any]) -> Table:
    from rich.text import Text

    table = _table("Figure", "Start", "Candidate", "Difference [95 %]")
    for name, item, kind in finetune_view.key_changes(report):
        table.add_row(
            Text(name),
            Text(fmt.value(item["start"], kind)),
            Text(fmt.value(item["candidate"], kind)),
            Text(finetune_view.whole_difference(item, kind), style=_BETTER[item["better"]]),
        )
    for name, found in report["ood"].items():
        role = finetune_view.ROLES[found["role"]][0]
        item = found["auroc"]
        table.add_row(
            Text(f"AUROC on {name} ({role})"),
            Text(fmt.value(item["start"], "score")),
            Text(fmt.value(item["candidate"], "score")),
            Text(finetune_view.whole_difference(item, "score"), style=_BETTER[item["better"]]),
        )
    return table


def _table(*columns: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, header_style="dim", pad_edge=False, show_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
