"""``ebm-guard demo``: the whole job on embedded data, in under a minute."""

from __future__ import annotations

import json
import time
from pathlib import Path

import click

from ebm_guard.cli.options import json_option

_OOD = {"near_digits_8_9": "demo:near_ood", "far_photo_patches": "demo:far_ood"}
_SHOWN = 8


@click.command("demo")
@click.option("-o", "--output", required=True, metavar="DIR", help="Where the results go.")
@click.option("-q", "--quiet", is_flag=True, help="No progress bars.")
@json_option
def command(output: str, quiet: bool, as_json: bool) -> None:
    """Wrap, fit, report and gate a small digit classifier; no network, no other files.

    Writes guard.safetensors, decisions.jsonl and the report into DIR.
    """
    from ebm_guard.cli.options import ModelOptions
    from ebm_guard.cli.report_command import show_report
    from ebm_guard.cli.session import Session, warnings_as_lines
    from ebm_guard.data.demo import load_demo
    from ebm_guard.files import check_writable, replace_file
    from ebm_guard.gate import Guard
    from ebm_guard.report import Settings, build_report

    options = ModelOptions(
        model=None, checkpoint=None, pretrained=False, num_classes=None, mean=None, std=None,
        img_size=None, batch_size=256, workers=0, device=None, amp=False, channels_last=False,
        seed=0, strict=True, limit=None, quiet=quiet,
    )  # fmt: skip
    folder = Path(output)
    check_writable(folder)
    specs = {"evaluation": "demo:evaluation", "calibration": "demo:calibration", **_OOD}
    clock = time.perf_counter()
    with warnings_as_lines():
        session = Session(options, list(specs.values()))
        parts = {
            name: session.predictions(spec, "ood" if name in _OOD else name, name)
            for name, spec in specs.items()
        }
        guard = Guard(session.classifier).fit(parts["calibration"])
        report = build_report(
            parts["evaluation"],
            ood={name: parts[name] for name in _OOD},
            calibration=parts["calibration"],
            classifier=session.classifier,
            settings=Settings(
                clock=clock,
                title="Demo: handwritten digits",
                command=f"ebm-guard demo --output {output}",
                extra={"data_note": load_demo("evaluation").note},
            ),
            picture=lambda name, row: session.picture(name, parts[name].names([row])[0]),
        )
    show_report(report, folder, as_json=as_json)
    path = guard.save(folder / "guard.safetensors")
    decided = {}
    with replace_file(folder / "decisions.jsonl") as new, new.open("w") as file:
        for name in ("evaluation", *_OOD):
            rows = [
                row
                for batch in session.batches(session.sources[name])
                for row in guard(batch.inputs).rows(batch.ids)
            ]
            decided[name] = rows[:_SHOWN]
            for row in rows:
                file.write(json.dumps({"set": name, **row}, allow_nan=False) + "\n")
    if not as_json:
        _show_decisions(decided)
    click.echo(f"guard: {path}", err=True)


def _show_decisions(decided: dict[str, list[dict[str, object]]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="The gate at work, first rows of each set", header_style="bold")
    for heading in ("set", "id", "decision", "digit", "confidence", "energy"):
        table.add_column(heading)
    for name, rows in decided.items():
        for row in rows[:3]:
            numbers = [f"{row[key]:.3f}" for key in ("confidence", "energy")]
            table.add_row(name, str(row["id"]), str(row["status"]), str(row["label"]), *numbers)
    Console().print(table)
