"""``ebm-guard fit``: fit a guard and save it as one file."""

from __future__ import annotations

import click

from ebm_guard.cli.options import (
    SPEC_HELP,
    ModelOptions,
    calibrator_option,
    gate_options,
    json_option,
    model_options,
)


@click.command("fit")
@click.option(
    "--data",
    required=True,
    metavar="SPEC",
    help=f"ID data that the model was not trained on: {SPEC_HELP}.",
)
@click.option("--no-canary", is_flag=True, help="Keep no inputs in the artefact.")
@click.option(
    "-o", "--output", required=True, metavar="GUARD.safetensors", help="Where the guard goes."
)
@calibrator_option
@gate_options
@json_option
@model_options
def command(
    options: ModelOptions,
    data: str,
    calibrator: str,
    no_canary: bool,
    output: str,
    score: str,
    threshold: str,
    false_reject_rate: float,
    assurance: float,
    as_json: bool,
) -> None:
    r"""Fit calibrator and threshold on held-out data, and save the guard.

    \b
    ebm-guard fit --model resnet50.tv_in1k --pretrained --data val/ -o guard.safetensors
    """
    import json

    from ebm_guard.cli.session import Session, warnings_as_lines
    from ebm_guard.files import check_writable
    from ebm_guard.gate import Guard
    from ebm_guard.gate.artifact import CANARY_ROWS
    from ebm_guard.gate.storage import describe_manifest, manifest_of

    check_writable(output)
    with warnings_as_lines():
        session = Session(options, [data])
        predictions = session.predictions(data, "calibration", "calibration")
        canary = None
        if "calibration" in session.sources and not no_canary:
            source = session.sources["calibration"]
            canary = next(iter(session.batches(source))).inputs[:CANARY_ROWS]
        with session.autocast():
            guard = Guard(session.classifier).fit(
                predictions,
                score=score,
                calibrator=calibrator,
                threshold=threshold,
                false_reject_rate=false_reject_rate,
                assurance=assurance,
                canary=canary if canary is not None else False,
            )
    path = guard.save(output)
    manifest = manifest_of(guard.state())
    if as_json:
        click.echo(json.dumps(manifest, allow_nan=False))
    else:
        for word, sentence in describe_manifest(manifest):
            click.echo(f"{word:>12}  {sentence}")
    click.echo(f"guard: {path}", err=True)
