"""``ebm-guard predict``: decide on every image, a row each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ebm_guard.cli.options import SPEC_HELP, ModelOptions, json_option, model_options

if TYPE_CHECKING:
    from ebm_guard.cli.predicting import PredictRows
    from ebm_guard.deploy.batch import Outputs, Tally
    from ebm_guard.distributed import World

_INTERRUPTED = 130
_FORMATS = ("jsonl", "csv", "parquet")


@click.command("predict")
@click.argument("guard_path", metavar="GUARD")
@click.option("--data", required=True, metavar="SPEC", help=f"What to decide on: {SPEC_HELP}.")
@click.option(
    "--format",
    "file_format",
    type=click.Choice(_FORMATS),
    default="jsonl",
    show_default=True,
    help="A JSON object or a CSV line for each row, or a Parquet file (extra `parquet`).",
)
@click.option(
    "--top-k",
    type=click.IntRange(min=1),
    metavar="K",
    help="Add the K labels of the lowest joint energy E(x,y) = -f(x)[y] to each row.",
)
@click.option(
    "--review",
    metavar="FILE",
    help="Also write the refused rows (REJECT and INVALID) as JSON lines, in the data's order.",
)
@click.option(
    "--resume",
    is_flag=True,
    help="Keep what is done in OUTPUT.part when stopped, and go on behind it where it is there.",
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
    review: str | None,
    resume: bool,
    output: str,
    as_json: bool,
) -> int:
    r"""Write one row per image: status, label, confidence, energy, score, p-value, reason.

    An unreadable image is a row with status INVALID. Exit code 4 when the model gave NaN or
    infinite logits for a row; the file is complete all the same. --top-k adds the field top: a
    list of {label, class, energy}, the lowest energy first, empty where INVALID (JSON in a CSV
    cell). The energies are before calibration.

    Files appear when they are complete. Without --resume a run that is stopped leaves nothing; with
    it, the same command goes on behind the last batch that was written, and ends with the files
    of a run that nobody stopped. Data, guard, model and options must be the same.

    \b
    ebm-guard predict guard.safetensors --model resnet50.tv_in1k --data new/ -o out.jsonl
    ebm-guard predict guard.safetensors --model resnet50.tv_in1k --data new/ -o out.jsonl --resume
    torchrun --nproc-per-node 4 -m ebm_guard predict guard.safetensors --device cuda ...
    """
    from ebm_guard.cli.predicting import predict_rows
    from ebm_guard.cli.processes import processes
    from ebm_guard.cli.session import Session, warnings_as_lines
    from ebm_guard.deploy.batch import Outputs, Tally
    from ebm_guard.deploy.batch_formats import fields_of

    fields = fields_of(top=top_k is not None)
    outputs = Outputs(Path(output), file_format, fields, None if review is None else Path(review))
    outputs.check()
    tally = Tally()
    with processes(options.device) as world, warnings_as_lines():
        session = Session(options, [data], guard_path, world)
        rows = predict_rows(session, data, top_k)
        if not resume:
            _write(outputs, rows, tally, world)
        elif not _kept(outputs, rows, guard_path, tally, world):
            return _INTERRUPTED
        _show(outputs, tally, as_json=as_json)
    if tally.broken and world.first:
        click.echo(f"error: the model gave non-finite logits for {tally.broken} rows", err=True)
        return 4
    return 0


def _write(outputs: Outputs, rows: PredictRows, tally: Tally, world: World) -> None:
    from ebm_guard.deploy.batch import write_once
    from ebm_guard.deploy.batch_shards import write_shared

    if world.size == 1:
        write_once(outputs, rows.behind(0), tally)
    else:
        write_shared(outputs, rows.behind(0), tally, world)


def _kept(outputs: Outputs, rows: PredictRows, guard_path: str, tally: Tally, world: World) -> bool:
    """Run with a journal; return whether it came to its end."""
    from ebm_guard.deploy.batch import write_resumable
    from ebm_guard.deploy.batch_shards import refuse_another_number, write_shared_resumable
    from ebm_guard.errors import EbmGuardError

    def told(words: str) -> None:
        click.echo(
            f"{words}; {tally.kept:,} rows are kept beside {outputs.output}, and the same command "
            "goes on behind them",
            err=True,
        )

    identity = rows.identity(guard_path) | {
        "format": outputs.file_format,
        "review": outputs.review is not None and str(outputs.review),
    }
    try:
        if world.size == 1:
            refuse_another_number(outputs, world)
            write_resumable(outputs, identity, rows.behind, tally)
        else:
            write_shared_resumable(outputs, identity, rows.behind, tally, world)
    except KeyboardInterrupt:
        told("interrupted")
        return False
    except EbmGuardError:
        if tally.kept:
            told("stopped")
        raise
    return True


def _show(outputs: Outputs, tally: Tally, *, as_json: bool) -> None:
    summary: dict[str, Any] = {"rows": tally.rows, **tally.counts}
    if as_json:
        summary["output"] = str(outputs.output)
        if outputs.review is not None:
            summary |= {"review": str(outputs.review), "refused": tally.refused}
        if tally.taken_over:
            summary["taken_over"] = tally.taken_over
        click.echo(json.dumps(summary))
        return
    text = ", ".join(f"{value:,} {key}" for key, value in summary.items())
    queue = "" if outputs.review is None else f"; {tally.refused:,} for review: {outputs.review}"
    earlier = f"; {tally.taken_over:,} rows of an earlier run" if tally.taken_over else ""
    click.echo(f"{text}: {outputs.output}{queue}{earlier}")
