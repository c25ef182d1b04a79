"""``ebm-guard report``: one reliability report, and an exit code for CI."""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ebm_guard.cli.options import SPEC_HELP, ModelOptions, gate_options, json_option, model_options

if TYPE_CHECKING:
    from ebm_guard.cli.session import Session
    from ebm_guard.predictions import Predictions
    from ebm_guard.report import Report


_GATE_NAMES = ("score", "threshold", "false_reject_rate", "assurance")


@click.command("report")
@click.option("--data", required=True, metavar="SPEC", help=f"Evaluation data: {SPEC_HELP}.")
@click.option(
    "--calibration-data",
    metavar="SPEC",
    help="Data for temperature and threshold; default: two-fold cross-fitting on --data.",
)
@click.option(
    "--ood",
    multiple=True,
    metavar="NAME=SPEC",
    help="An out-of-distribution set; near_... and far_... tell its role. Repeatable.",
)
@click.option(
    "--baseline",
    metavar="REPORT.json",
    help="An older report (with its rows.npz) to compare with, row by row.",
)
@click.option("--guard", "guard_path", metavar="GUARD", help="Evaluate this guard as it is.")
@click.option(
    "--require",
    "requirements",
    multiple=True,
    metavar="BOUND",
    help="Such as 'ece<=0.05', 'auroc>=0.9', 'gate.coverage>=0.94'. Repeatable.",
)
@click.option("--allow-unclear", is_flag=True, help="Let bounds inside an interval pass.")
@click.option("--save-predictions", metavar="DIR", help="Keep logits and features for later runs.")
@click.option("--no-images", is_flag=True, help="No thumbnails in the report.")
@click.option("--title", default="Reliability report", show_default=True, help="Heading.")
@click.option("-o", "--output", required=True, metavar="DIR", help="Where the report goes.")
@gate_options
@json_option
@model_options
def command(
    options: ModelOptions,
    data: str,
    calibration_data: str | None,
    ood: tuple[str, ...],
    baseline: str | None,
    guard_path: str | None,
    requirements: tuple[str, ...],
    allow_unclear: bool,
    save_predictions: str | None,
    no_images: bool,
    title: str,
    output: str,
    score: str,
    threshold: str,
    false_reject_rate: float,
    assurance: float,
    as_json: bool,
) -> int:
    r"""Write report.json, report.html, report.md and figures; fail when a requirement fails.

    \b
    ebm-guard report --model resnet50.tv_in1k --pretrained --data val/ --ood textures=dtd/ -o out
    ebm-guard report --data logits:val.npz --ood far=logits:other.npz -o out    # no model at hand
    """
    from ebm_guard.cli.session import Session, named_specs, warnings_as_lines
    from ebm_guard.errors import InvalidInputError
    from ebm_guard.files import check_writable
    from ebm_guard.report import Settings, build_report
    from ebm_guard.report.comparison import Baseline
    from ebm_guard.report.requirements import exit_code, parse_requirement

    for text in requirements:
        parse_requirement(text)
    chosen = [name for name in _GATE_NAMES if _was_given(name)]
    if guard_path is not None and chosen:
        raise InvalidInputError(
            f"got --guard and --{chosen[0].replace('_', '-')}; a given guard keeps the gate it was "
            "fitted with, leave one out"
        )
    if guard_path is not None and calibration_data is not None:
        raise InvalidInputError(
            "got --guard and --calibration-data; a given guard is not refitted, leave one out"
        )
    for folder in filter(None, (output, save_predictions)):
        check_writable(folder)
    older = None if baseline is None else Baseline.read(baseline)
    ood_specs = named_specs(ood)
    specs = [data, *([calibration_data] if calibration_data else []), *ood_specs.values()]
    clock = time.perf_counter()
    with warnings_as_lines():
        session = Session(options, specs, guard_path)
        parts = _predicted(session, data, calibration_data, ood_specs, keep=bool(save_predictions))
        report = build_report(
            parts["evaluation"],
            ood={name: parts[name] for name in ood_specs},
            calibration=parts.get("calibration"),
            guard=session.guard,
            classifier=session.classifier,
            baseline=older,
            requirements=requirements,
            settings=Settings(
                clock=clock,
                score=score,
                threshold=threshold,
                false_reject_rate=false_reject_rate,
                assurance=assurance,
                seed=options.seed,
                title=title,
                command=shlex.join(["ebm-guard", *sys.argv[1:]]),
                images=not no_images,
            ),
            picture=lambda name, row: session.picture(name, parts[name].names([row])[0]),
        )
    if save_predictions is not None:
        for name, part in parts.items():
            part.save(Path(save_predictions) / name)
    show_report(report, Path(output), as_json=as_json)
    for item in report.requirements:
        click.echo(f"{item.status}: {item.text}: {item.message}", err=True)
    return exit_code(report.requirements, allow_unclear=allow_unclear)


def _was_given(name: str) -> bool:
    source = click.get_current_context().get_parameter_source(name)
    return source is not None and source is not click.core.ParameterSource.DEFAULT


def _predicted(
    session: Session,
    data: str,
    calibration_data: str | None,
    ood_specs: dict[str, str],
    *,
    keep: bool,
) -> dict[str, Predictions]:
    """Run or open every set; features are only kept for later runs."""
    wanted = {"evaluation": (data, "evaluation")}
    if calibration_data:
        wanted["calibration"] = (calibration_data, "calibration")
    wanted |= {name: (spec, "ood") for name, spec in ood_specs.items()}
    return {
        name: session.predictions(spec, role, name, features=keep)
        for name, (spec, role) in wanted.items()
    }


def show_report(report: Report, folder: Path, *, as_json: bool) -> None:
    """Write the report's files, and print it: a table on stdout, or JSON."""
    import json

    from rich.console import Console

    from ebm_guard.report.render import render_terminal, write_outputs

    content = report.to_dict()
    write_outputs(content, folder, report.rows)
    if as_json:
        click.echo(json.dumps(content, allow_nan=False))
    else:
        render_terminal(content, Console())
    click.echo(f"report: {folder / 'report.html'}", err=True)
