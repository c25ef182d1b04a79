"""``ebm-guard report``: one reliability report, and an exit code for CI."""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ebm_guard.cli.attack_options import AttackChoices, attack_options
from ebm_guard.cli.options import (
    SPEC_HELP,
    CheckOptions,
    ModelOptions,
    calibrator_option,
    check_options,
    gate_options,
    json_option,
    model_options,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ebm_guard.cli.session import Session
    from ebm_guard.predictions import Predictions
    from ebm_guard.report import Report
    from ebm_guard.robustness import Robustness


_FITTED_NAMES = ("score", "threshold", "false_reject_rate", "assurance", "calibrator")


@click.command("report")
@click.option("--data", required=True, metavar="SPEC", help=f"Evaluation data: {SPEC_HELP}.")
@click.option(
    "--calibration-data",
    metavar="SPEC",
    help="Data for temperature and threshold; default: two-fold cross-fitting on --data.",
)
@click.option(
    "--fit-data",
    metavar="SPEC",
    help="Data for the statistics of feature scores, such as training images; default: "
    "cross-fitting on --data.",
)
@click.option(
    "--ood",
    multiple=True,
    metavar="NAME=SPEC",
    help="An out-of-distribution set; near_..., far_... and shifted_... tell its role. Repeatable.",
)
@click.option(
    "--synthetic/--no-synthetic",
    default=None,
    help="OOD sets made from --data itself; default: where no --ood is given.",
)
@click.option("--guard", "guard_path", metavar="GUARD", help="Evaluate this guard as it is.")
@click.option(
    "--finetuned",
    metavar="DIR",
    help="What `ebm-guard finetune` wrote when it made this model: its outcome goes into the "
    "report.",
)
@click.option("--save-predictions", metavar="DIR", help="Keep logits and features for later runs.")
@click.option(
    "--metrics",
    type=click.Choice(["default", "all"]),
    default="default",
    show_default=True,
    help="all adds classwise ECE, debiased L2, MCE and the whole table of classes.",
)
@click.option("--no-images", is_flag=True, help="No thumbnails in the report.")
@click.option("--title", default="Reliability report", show_default=True, help="Heading.")
@click.option("-o", "--output", required=True, metavar="DIR", help="Where the report goes.")
@attack_options
@check_options
@calibrator_option
@gate_options
@json_option
@model_options
def command(
    options: ModelOptions,
    checks: CheckOptions,
    attack_choices: AttackChoices,
    data: str,
    calibration_data: str | None,
    fit_data: str | None,
    ood: tuple[str, ...],
    synthetic: bool | None,
    guard_path: str | None,
    finetuned: str | None,
    save_predictions: str | None,
    no_images: bool,
    output: str,
    as_json: bool,
    **settings: Any,
) -> int:
    r"""Write report.json, report.html, report.md and figures; fail when a requirement fails.

    \b
    ebm-guard report --model resnet50.tv_in1k --pretrained --data val/ --ood textures=dtd/ -o out
    ebm-guard report --data logits:val.npz --ood far=logits:other.npz -o out    # no model at hand

    Several processes share the passes over the data, and give the same report:

    \b
    torchrun --nproc-per-node 4 -m ebm_guard report --device cuda ...
    """
    from ebm_guard.cli.attack_options import check_attack_choices, forget_state
    from ebm_guard.cli.processes import processes
    from ebm_guard.cli.session import Session, named_specs, warnings_as_lines
    from ebm_guard.files import check_writable
    from ebm_guard.report import Settings, build_report
    from ebm_guard.report.comparison import Baseline
    from ebm_guard.report.finetune_section import Finetuned, finetune_section

    requirements = _requirements(checks)
    check_attack_choices(attack_choices)
    if guard_path is not None:
        refuse_refit(calibration_data)
    for target in filter(None, (output, save_predictions, checks.junit, checks.model_card)):
        check_writable(target)
    _check_files(checks, Path(output))
    older = None if checks.baseline is None else Baseline.read(checks.baseline)
    tuned = None if finetuned is None else Finetuned.read(finetuned)
    ood_specs = named_specs(ood)
    roles = {"evaluation": data, "calibration": calibration_data, "fit": fit_data}
    specs = [*filter(None, roles.values()), *ood_specs.values()]
    clock = time.perf_counter()
    with processes(options.device) as world, warnings_as_lines():
        session = Session(options, specs, guard_path, world)
        # Another model is refused here, before the work.
        finetune_section(tuned, session.classifier)
        parts = _predicted(session, roles, ood_specs, synthetic=synthetic)
    if not world.first:
        return 0
    session.go_on_alone()
    with warnings_as_lines():
        robustness = _attacked(session, parts, attack_choices, Path(output), settings)
        report = build_report(
            parts["evaluation"],
            ood={name: part for name, part in parts.items() if name not in roles},
            calibration=parts.get("calibration"),
            fit=parts.get("fit"),
            guard=session.guard,
            classifier=session.classifier,
            baseline=older,
            robustness=robustness,
            finetuned=tuned,
            requirements=requirements,
            settings=Settings(
                clock=clock,
                seed=options.seed,
                command=shlex.join(["ebm-guard", *sys.argv[1:]]),
                images=not no_images,
                **settings,
            ),
            picture=lambda name, row: session.picture(name, parts[name].names([row])[0]),
        )
    if save_predictions is not None:
        for name, part in parts.items():
            part.save(Path(save_predictions) / name)
    show_report(report, Path(output), as_json=as_json)
    if robustness is not None:
        forget_state(Path(output))
    return _concluded(report, checks)


def _attacked(
    session: Session,
    parts: Mapping[str, Predictions],
    choices: AttackChoices,
    output: Path,
    settings: Mapping[str, Any],
) -> Robustness | None:
    """Run the attacks, where some were asked for."""
    if choices.attacks is None:
        return None
    from ebm_guard.cli.attacking import GATE_SETTINGS, attack

    gate = {name: settings[name] for name in GATE_SETTINGS}
    return attack(session, parts, choices, output, gate)


def refuse_refit(calibration_data: str | None) -> None:
    """Refuse options that would fit anew what a given guard holds."""
    from ebm_guard.errors import InvalidInputError

    chosen = [name for name in _FITTED_NAMES if _was_given(name)]
    if chosen:
        raise InvalidInputError(
            f"got --guard and --{chosen[0].replace('_', '-')}; a given guard keeps the gate and "
            "the calibrator it was fitted with, leave one out"
        )
    if calibration_data is not None:
        raise InvalidInputError(
            "got --guard and --calibration-data; a given guard is not refitted, leave one out"
        )


def _predicted(
    session: Session,
    roles: Mapping[str, str | None],
    ood_specs: Mapping[str, str],
    *,
    synthetic: bool | None,
) -> dict[str, Predictions]:
    """Run or open every set; outliers are made where asked for, or where no OOD set is given."""
    from ebm_guard.cli.synthetic import synthetic_outliers

    parts = {
        name: session.predictions(spec, name, name, features=True)
        for name, spec in roles.items()
        if spec is not None
    }
    parts |= {
        name: session.predictions(spec, "ood", name, features=True)
        for name, spec in ood_specs.items()
    }
    if synthetic or (synthetic is None and not ood_specs):
        parts |= synthetic_outliers(session, required=bool(synthetic))
    return parts


def _requirements(checks: CheckOptions) -> list[str]:
    """Collect all requirements, and refuse bad ones before the work."""
    from ebm_guard.errors import InvalidInputError
    from ebm_guard.report.regression import PREFIX, MaxRegression
    from ebm_guard.report.requirements import parse_requirement, read_requirements

    texts = [
        *checks.require,
        *([] if checks.require_file is None else read_requirements(checks.require_file)),
        *(f"{PREFIX} {text}" for text in checks.max_regression),
    ]
    limits = [item for item in map(parse_requirement, texts) if isinstance(item, MaxRegression)]
    if limits and checks.baseline is None:
        raise InvalidInputError(
            f"got {limits[0].text!r} without --baseline; give the report.json that it is compared "
            "with, and rows.npz beside it"
        )
    return texts


def _check_files(checks: CheckOptions, output: Path) -> None:
    """Refuse files that would overwrite a part of the report, each other, or the user's text."""
    from ebm_guard.errors import InvalidInputError
    from ebm_guard.report.model_card import check_model_card
    from ebm_guard.report.render.output import OURS

    taken = {(output / path).resolve(): f"{path} of --output" for path in OURS}
    for option, name in (("--junit", checks.junit), ("--model-card", checks.model_card)):
        if name is None:
            continue
        path = Path(name).resolve()
        if path in taken or path.is_dir() or path == output.resolve():
            what = taken.get(path, "a folder")
            raise InvalidInputError(f"got {option} {name!r}, which is {what}; name another file")
        taken[path] = option
    if checks.model_card is not None:
        check_model_card(checks.model_card)


def _concluded(report: Report, checks: CheckOptions) -> int:
    """Write what CI reads, say what holds, and return the exit code."""
    from ebm_guard.report.junit import write_junit
    from ebm_guard.report.model_card import write_model_card
    from ebm_guard.report.requirements import outcome

    if checks.junit is not None:
        write_junit(report.to_dict(), checks.junit, allow_unclear=checks.allow_unclear)
        click.echo(f"junit: {checks.junit}", err=True)
    if checks.model_card is not None:
        write_model_card(report.to_dict(), checks.model_card)
        click.echo(f"model card: {checks.model_card}", err=True)
    for item in report.requirements:
        click.echo(f"{item.status}: {item.text}: {item.message}", err=True)
    code, line = outcome(report.requirements, allow_unclear=checks.allow_unclear)
    if line:
        click.echo(line, err=True)
    return code


def _was_given(name: str) -> bool:
    source = click.get_current_context().get_parameter_source(name)
    return source is not None and source is not click.core.ParameterSource.DEFAULT


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
