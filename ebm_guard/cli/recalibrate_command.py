"""``ebm-guard recalibrate``: the same gate on new familiar data, with its history kept."""

from __future__ import annotations

import click

from ebm_guard.cli.options import SPEC_HELP, ModelOptions, json_option, model_options


@click.command("recalibrate")
@click.argument("guard_path", metavar="GUARD")
@click.option(
    "--data",
    required=True,
    metavar="SPEC",
    help=f"New ID data, a random sample of all traffic that people found familiar: {SPEC_HELP}.",
)
@click.option(
    "-o", "--output", required=True, metavar="GUARD.safetensors", help="Where the new guard goes."
)
@json_option
@model_options
def command(options: ModelOptions, guard_path: str, data: str, output: str, as_json: bool) -> None:
    r"""Fit calibrator and threshold of a guard anew; score, detector and model stay.

    \b
    ebm-guard recalibrate old.safetensors --model resnet50.tv_in1k --data june/ -o june.safetensors
    """
    from ebm_guard.cli.fit_command import save_guard
    from ebm_guard.cli.session import Session, warnings_as_lines
    from ebm_guard.errors import NotFittedError
    from ebm_guard.files import check_writable

    check_writable(output)
    with warnings_as_lines():
        session = Session(options, [data], guard_path)
        old = session.guard
        if old is None:
            raise NotFittedError(f"{guard_path} holds no guard")
        part = session.predictions(
            data, "calibration", "calibration", features=old.score.needs_features
        )
        with session.autocast():
            new = old.recalibrate(part, seed=options.seed)
    save_guard(new, output, as_json=as_json)
