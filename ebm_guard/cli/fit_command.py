"""``ebm-guard fit``: fit a guard and save it as one file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ebm_guard.cli.options import (
    SPEC_HELP,
    ModelOptions,
    calibrator_option,
    fit_gate_options,
    json_option,
    model_options,
)

if TYPE_CHECKING:
    from torch import Tensor

    from ebm_guard.cli.session import Session
    from ebm_guard.gate import Guard


@click.command("fit")
@click.option(
    "--data",
    required=True,
    metavar="SPEC",
    help=f"ID data that the model was not trained on: {SPEC_HELP}.",
)
@click.option(
    "--fit-data",
    metavar="SPEC",
    help="Data for the statistics of a feature score, such as training images; default: half of "
    "--data.",
)
@click.option("--no-canary", is_flag=True, help="Keep no inputs in the artefact.")
@click.option(
    "-o", "--output", required=True, metavar="GUARD.safetensors", help="Where the guard goes."
)
@calibrator_option
@fit_gate_options
@click.option("--per-class", is_flag=True, help="A cut for each predicted class.")
@click.option(
    "--simultaneous", is_flag=True, help="With --per-class: the assurance is for all cuts at once."
)
@click.option(
    "--risk",
    type=float,
    help="Certify that at most this share of the accepted predictions is wrong.",
)
@click.option(
    "--risk-assurance",
    type=float,
    default=0.95,
    show_default=True,
    help="Probability that --risk is met.",
)
@json_option
@model_options
def command(
    options: ModelOptions,
    data: str,
    fit_data: str | None,
    no_canary: bool,
    output: str,
    score: str,
    as_json: bool,
    **settings: Any,
) -> None:
    r"""Fit calibrator and threshold on held-out data, and save the guard.

    \b
    ebm-guard fit --model resnet50.tv_in1k --pretrained --data val/ -o guard.safetensors
    torchrun --nproc-per-node 4 -m ebm_guard fit --device cuda ...    # the same guard, sooner
    """
    from ebm_guard.cli.processes import processes
    from ebm_guard.cli.session import Session, warnings_as_lines
    from ebm_guard.cli.synthetic import apart_for_outliers
    from ebm_guard.files import check_writable
    from ebm_guard.gate import Guard

    check_writable(output)
    specs = [data, *([fit_data] if fit_data else [])]
    with processes(options.device) as world, warnings_as_lines():
        session = Session(options, specs, world=world)
        features = score == "auto" or _needs_features(score)
        predictions = session.predictions(data, "calibration", "calibration", features=features)
        outliers = None
        if score == "auto":
            rows, outliers = apart_for_outliers(session, "calibration", len(predictions))
            predictions = predictions.select(rows)
        detector = (
            None if fit_data is None else session.predictions(fit_data, "fit", "fit", features=True)
        )
    if not world.first:
        return
    session.go_on_alone()
    with warnings_as_lines():
        canary = None if no_canary else _canary(session)
        with session.autocast():
            guard = Guard(session.classifier).fit(
                predictions,
                fit_data=detector,
                score=score,
                outliers=outliers,
                seed=options.seed,
                canary=canary if canary is not None else False,
                **settings,
            )
    save_guard(guard, output, as_json=as_json)


def save_guard(guard: Guard, output: str, *, as_json: bool) -> None:
    """Write a guard, and say what it is."""
    import json

    from ebm_guard.gate.storage import describe_manifest, manifest_of

    path = guard.save(output)
    manifest = manifest_of(guard.state())
    if as_json:
        click.echo(json.dumps(manifest, allow_nan=False))
    else:
        for word, sentence in describe_manifest(manifest):
            click.echo(f"{word:>12}  {sentence}")
    click.echo(f"guard: {path}", err=True)


def _needs_features(score: str) -> bool:
    from ebm_guard.ood import score_class

    return score_class(score).needs_features


def _canary(session: Session) -> Tensor | None:
    from ebm_guard.gate.artifact import CANARY_ROWS

    source = session.sources.get("calibration")
    if source is None:
        return None
    first: Tensor = next(iter(session.batches(source))).inputs[:CANARY_ROWS]
    return first
