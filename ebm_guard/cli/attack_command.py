"""``ebm-guard attack``: how robust a classifier and its gate are, and nothing else."""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ebm_guard.cli.attack_options import AttackChoices, attack_options_on
from ebm_guard.cli.options import (
    SPEC_HELP,
    ModelOptions,
    calibrator_option,
    gate_options,
    json_option,
    model_options,
)

if TYPE_CHECKING:
    from ebm_guard.report.attack_report import AttackReport


@click.command("attack")
@click.option("--data", required=True, metavar="SPEC", help=f"Images to attack: {SPEC_HELP}.")
@click.option(
    "--calibration-data",
    metavar="SPEC",
    help="Data for the gate in the loop; default: the images of --data that are not attacked.",
)
@click.option("--fit-data", metavar="SPEC", help="Data for the statistics of a feature score.")
@click.option(
    "--ood",
    multiple=True,
    metavar="NAME=SPEC",
    help="Unknown images that an attacker makes accepted (standard, full). Repeatable.",
)
@click.option("--guard", "guard_path", metavar="GUARD", help="The gate in the loop, as it is.")
@click.option("--title", default="Robustness report", show_default=True, help="Heading.")
@click.option("-o", "--output", required=True, metavar="DIR", help="Where the results go.")
@attack_options_on
@calibrator_option
@gate_options
@json_option
@model_options
def command(
    options: ModelOptions,
    attack_choices: AttackChoices,
    data: str,
    calibration_data: str | None,
    fit_data: str | None,
    ood: tuple[str, ...],
    guard_path: str | None,
    title: str,
    output: str,
    as_json: bool,
    **settings: Any,
) -> None:
    r"""Attack a classifier with its gate, corrupt its images, and write what came of it.

    The final images are re-scored by the deployed forward pass; a robust accuracy is an upper
    bound, never a certificate. Interrupted attacks go on with --resume.

    \b
    ebm-guard attack --model resnet50.tv_in1k --pretrained --data val/ --time-budget 10m -o out
    """
    from ebm_guard.cli.attack_options import check_attack_choices, forget_state
    from ebm_guard.cli.attacking import attack
    from ebm_guard.cli.report_command import refuse_refit
    from ebm_guard.cli.session import Session, named_specs, warnings_as_lines
    from ebm_guard.errors import InvalidInputError
    from ebm_guard.files import check_writable
    from ebm_guard.report.attack_report import attack_report

    if guard_path is not None:
        refuse_refit(calibration_data)
        if fit_data is not None:
            raise InvalidInputError(
                "got --guard and --fit-data; a given guard keeps its detector, leave one out"
            )
    check_writable(output)
    check_attack_choices(attack_choices)
    ood_specs = named_specs(ood)
    roles = {"evaluation": data, "calibration": calibration_data, "fit": fit_data}
    clock = time.perf_counter()
    with warnings_as_lines():
        session = Session(options, [*filter(None, roles.values()), *ood_specs.values()], guard_path)
        parts = {
            name: session.predictions(spec, name, name, features=True)
            for name, spec in roles.items()
            if spec is not None
        }
        parts |= {
            name: session.predictions(spec, "ood", name, features=True)
            for name, spec in ood_specs.items()
        }
        found = attack(session, parts, attack_choices, Path(output), settings)
        report = attack_report(
            found,
            parts["evaluation"],
            session.require_classifier(),
            title=title,
            command=shlex.join(["ebm-guard", *sys.argv[1:]]),
            clock=clock,
        )
    _show(report, Path(output), as_json=as_json)
    forget_state(Path(output))


def _show(report: AttackReport, folder: Path, *, as_json: bool) -> None:
    """Write the files, and print the result: a table on stdout, or JSON."""
    import json

    from rich.console import Console

    from ebm_guard.report.render import render_attack_terminal, write_attack_outputs

    content = report.to_dict()
    write_attack_outputs(content, folder)
    if as_json:
        click.echo(json.dumps(content, allow_nan=False))
    else:
        render_attack_terminal(content, Console())
    click.echo(f"report: {folder / 'robustness.html'}", err=True)
