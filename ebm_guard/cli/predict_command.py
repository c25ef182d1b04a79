"""``ebm-guard predict``: decide on every image, a row each."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import IO, TYPE_CHECKING, Any

import click

from ebm_guard.cli.options import SPEC_HELP, ModelOptions, json_option, model_options

if TYPE_CHECKING:
    from ebm_guard.cli.session import Session
    from ebm_guard.gate import Decision, Guard

FIELDS = (
    "id",
    "status",
    "accept",
    "label",
    "class",
    "confidence",
    "energy",
    "score",
    "p_value",
    "reason",
)
_CHUNK = 4096


@click.command("predict")
@click.argument("guard_path", metavar="GUARD")
@click.option("--data", required=True, metavar="SPEC", help=f"What to decide on: {SPEC_HELP}.")
@click.option(
    "--format",
    "file_format",
    type=click.Choice(["jsonl", "csv"]),
    default="jsonl",
    show_default=True,
    help="A JSON object or a CSV line for each row.",
)
@click.option(
    "--top-k",
    type=click.IntRange(min=1),
    metavar="K",
    help="Add the K labels of the lowest joint energy E(x,y) = -f(x)[y] to each row.",
)
@click.option("-o", "--output", required=True, metavar="FILE", help="Where the rows go.")
@json_option
@model_options
def command(
    options: ModelOptions,
    guard_path: str,
    data: str,
    file_format: str,
    top_k: int | None,
    output: str,
    as_json: bool,
) -> int:
    r"""Write one row per image: status, label, confidence, energy, score, p-value, reason.

    An unreadable image is a row with status INVALID. Exit code 4 when the model gave NaN or
    infinite logits for a row; the file is complete all the same. --top-k adds the field top: a
    list of {label, class, energy}, the lowest energy first, empty where INVALID (JSON in a CSV
    cell). The energies are before calibration.

    \b
    ebm-guard predict guard.safetensors --model resnet50.tv_in1k --data new/ -o out.jsonl
    """
    from ebm_guard.cli.session import Session, warnings_as_lines
    from ebm_guard.files import check_writable, replace_file

    check_writable(output)
    counts: Counter[str] = Counter()
    broken = 0
    with warnings_as_lines():
        session = Session(options, [data], guard_path)
        with replace_file(output) as new, new.open("w", newline="", encoding="utf-8") as file:
            write = _writer(file, file_format, _fields(top_k))
            for row in _rows(session, data, top_k):
                write(row)
                counts[row["status"]] += 1
                broken += row["status"] == "INVALID" and not row["reason"].startswith("unreadable")
    summary = {"rows": counts.total(), **counts}
    if as_json:
        click.echo(json.dumps(summary | {"output": output}))
    else:
        click.echo(", ".join(f"{value:,} {key}" for key, value in summary.items()) + f": {output}")
    if broken:
        click.echo(f"error: the model gave non-finite logits for {broken} rows", err=True)
        return 4
    return 0


def _fields(top_k: int | None) -> tuple[str, ...]:
    return FIELDS if top_k is None else (*FIELDS, "top")


def _writer(file: IO[str], file_format: str, fields: tuple[str, ...]) -> Any:
    if file_format == "csv":
        table = csv.DictWriter(file, fields)
        table.writeheader()
        if "top" in fields:
            return lambda row: table.writerow(row | {"top": json.dumps(row["top"])})
        return table.writerow
    return lambda row: file.write(json.dumps(row, allow_nan=False) + "\n")


def _rows(session: Session, data: str, top_k: int | None) -> Iterator[dict[str, Any]]:
    from ebm_guard.data import parse_spec
    from ebm_guard.data.specs import STORED_KINDS

    guard = session.guard
    if guard is None:
        return
    classes = guard.facts.get("classes") or ()
    rows = (
        _stored_rows(session, guard, data, top_k)
        if parse_spec(data).kind in STORED_KINDS
        else _image_rows(session, guard, data, top_k)
    )
    for row in rows:
        for place in (row, *row.get("top", ())):
            label = place["label"]
            named = label is not None and 0 <= label < len(classes)
            place["class"] = classes[label] if named else None
        yield {key: row[key] for key in _fields(top_k)}


def _decided(decision: Decision, ids: Sequence[str], top_k: int | None) -> list[dict[str, Any]]:
    """Return the rows of a decision, with the labels of the lowest joint energy where asked for."""
    rows = decision.rows(ids)
    if top_k is None:
        return rows
    from ebm_guard.inference import lowest_energy_labels

    found = lowest_energy_labels(decision.logits, top_k)
    for row, labels, energies in zip(
        rows, found.labels.tolist(), found.energies.tolist(), strict=True
    ):
        valid = row["status"] != "INVALID"
        row["top"] = [
            {"label": label, "class": None, "energy": energy}
            for label, energy in zip(labels, energies, strict=True)
            if valid
        ]
    return rows


def _image_rows(
    session: Session, guard: Guard, data: str, top_k: int | None
) -> Iterator[dict[str, Any]]:
    from ebm_guard.cli.session import model_errors
    from ebm_guard.data import parse_spec
    from ebm_guard.progress import track

    source = session.open(parse_spec(data), "evaluation", "data")
    enabled = not session.options.quiet
    with track(f"decide {data}", source.total, enabled=enabled) as advance, model_errors(data):
        for batch in session.batches(source):
            if len(batch.inputs):
                with session.autocast():
                    decision = guard(batch.inputs)
                yield from _decided(decision, batch.ids, top_k)
            for name, error in batch.skipped:
                yield _unreadable(name, error)
            advance(len(batch.ids) + len(batch.skipped))


def _stored_rows(
    session: Session, guard: Guard, data: str, top_k: int | None
) -> Iterator[dict[str, Any]]:
    part = session.predictions(data, "evaluation", "data")
    for start in range(0, len(part), _CHUNK):
        block = part.select(slice(start, start + _CHUNK))
        names = part.names(range(start, start + len(block)))
        yield from _decided(guard.decide_stored(block), names, top_k)


def _unreadable(name: str, error: str) -> dict[str, Any]:
    return {
        "id": name,
        "status": "INVALID",
        "accept": False,
        "label": None,
        "confidence": 0.0,
        "energy": None,
        "score": None,
        "p_value": 0.0,
        "reason": f"unreadable: {error}",
        "top": [],
    }
