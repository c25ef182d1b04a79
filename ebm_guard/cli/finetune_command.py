"""``ebm-guard finetune``: a better energy, or the start back, with a before/after report."""

from __future__ import annotations

import os
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ebm_guard.cli.finetune_options import TrainingChoices, training_options
from ebm_guard.cli.options import SPEC_HELP, ModelOptions, json_option, model_options

if TYPE_CHECKING:
    from ebm_guard.report.finetune_report import FinetuneReport

ATTACKS = ("none", "quick", "standard")


@click.command("finetune")
@click.option("--train-data", required=True, metavar="SPEC", help=f"Labelled images: {SPEC_HELP}.")
@click.option(
    "--val-data",
    required=True,
    metavar="SPEC",
    help="Labelled images that the model was not trained on: a quarter chooses, half accepts, a "
    "quarter fits the new guard.",
)
@click.option(
    "--data",
    metavar="SPEC",
    help="Labelled images for the before/after report alone; default: the acceptance rows of "
    "--val-data.",
)
@click.option(
    "--unlabelled",
    metavar="SPEC",
    help="More images of the same classes to train on; labels, if any, are not looked at.",
)
@click.option("--outliers", metavar="SPEC", help="Unknown images to train on.")
@click.option(
    "--ood-validation",
    metavar="SPEC",
    help="Unknown images to choose and to accept on, half of them for either.",
)
@click.option(
    "--ood",
    multiple=True,
    metavar="NAME=SPEC",
    help="Unknown images for the report alone. Repeatable.",
)
@click.option(
    "--guard", "guard_path", metavar="GUARD", help="Its settings are those of the new guard."
)
@click.option(
    "--attacks",
    type=click.Choice(ATTACKS),
    default="none",
    show_default=True,
    help="Attack both nets on the same images; minutes.",
)
@click.option(
    "--epsilon",
    multiple=True,
    metavar="NUMBER",
    help="Budget of the attacks (linf) in pixel units, such as 8/255. Repeatable.",
)
@click.option("--attack-images", type=click.IntRange(min=1), help="Images to attack, at most.")
@click.option("--require-accepted", is_flag=True, help="Exit with 1 where the start was returned.")
@click.option("--title", default="Fine-tuning report", show_default=True, help="Heading.")
@click.option("-o", "--output", required=True, metavar="DIR", help="Where the results go.")
@training_options
@json_option
@model_options
def command(
    options: ModelOptions,
    training: TrainingChoices,
    output: str,
    title: str,
    require_accepted: bool,
    as_json: bool,
    **inputs: Any,
) -> int:
    r"""Fine-tune a copy of a classifier; keep it only where it passes a test on rows of its own.

    The best state found must keep accuracy and NLL within bounds and not lose AUROC, or the start
    is returned, which is a valid outcome. Writes weights.safetensors, guard.safetensors,
    history.jsonl, finetune.json and the before/after report. Ctrl-C tests the best state so far.

    \b
    ebm-guard finetune --model net.py:net --checkpoint net.safetensors --train-data train/
        --val-data val/ --data test/ --ood street=street/ -o out
    ebm-guard finetune --train-data demo: --val-data demo: --max-acc-drop 0.02 -o out
    """
    from ebm_guard.cli.finetuning import Inputs, check_inputs, finetuned, forget_state
    from ebm_guard.cli.session import warnings_as_lines
    from ebm_guard.files import check_writable

    check_writable(output)
    given = Inputs(**inputs)
    check_inputs(given, training, Path(output))
    clock = time.perf_counter()
    with warnings_as_lines():
        result, report = finetuned(
            options,
            given,
            training,
            Path(output),
            title=title,
            command=shlex.join(["ebm-guard", *sys.argv[1:]]),
            clock=clock,
        )
    refused = int(require_accepted and not result.accepted)
    # Under torchrun every process has the same result, and one of them writes it.
    if report is None or os.environ.get("RANK", "0") != "0":
        return refused
    result.save(output)
    _show(report, Path(output), as_json=as_json)
    if result.interrupted:
        click.echo("the same command with --resume goes on with this run", err=True)
    else:
        forget_state(Path(output))
    if refused:
        click.echo("the start was returned, and --require-accepted was given", err=True)
    return refused


def _show(report: FinetuneReport, folder: Path, *, as_json: bool) -> None:
    """Write the files, and print the result: tables on stdout, or JSON."""
    import json

    from rich.console import Console

    from ebm_guard.report.render import render_finetune_terminal, write_finetune_outputs

    content = report.to_dict()
    write_finetune_outputs(content, folder)
    if as_json:
        click.echo(json.dumps(content, allow_nan=False))
    else:
        render_finetune_terminal(content, Console())
    click.echo(f"report: {folder / 'finetune_report.html'}", err=True)
