"""``ebm-guard sample``: what a classifier believes its classes look like."""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ebm_guard.cli.options import SPEC_HELP, ModelOptions, json_option, model_options
from ebm_guard.cli.sample_editing import (
    EditOptions,
    check_edit_rows,
    check_edits,
    edit_options,
    run_edits,
)

if TYPE_CHECKING:
    from ebm_guard.cli.session import Session
    from ebm_guard.predictions import Predictions
    from ebm_guard.report.editing_images import EditPictures
    from ebm_guard.sampling import SampleSheet
    from ebm_guard.sampling.sampler import Sampler

SAMPLERS = ("sgld", "sgld:short_run", "sgld:langevin", "mala", "hmc")
STARTS = ("gaussian", "uniform", "data")
# Images that starts are fitted on and energies compared with.
_MOST = 2000
_BATCH = 128


@click.command("sample")
@click.option(
    "--data",
    metavar="SPEC",
    help="Labelled images to start from (gaussian, data) and to compare energies with: "
    f"{SPEC_HELP}.",
)
@click.option(
    "--classes",
    metavar="0,3",
    help="Numbers or names; default: all, or the first 10 where there are more.",
)
@click.option(
    "--per-class", type=click.IntRange(min=1), default=8, show_default=True, help="Chains."
)
@click.option(
    "--sampler",
    type=click.Choice(SAMPLERS),
    default="sgld",
    show_default=True,
    help="sgld is noisy descent (sgld:short_run); the others follow exp(-E).",
)
@click.option("--steps", type=click.IntRange(min=1), help="Steps of a chain.")
@click.option(
    "--step-size",
    type=click.FloatRange(min=0, min_open=True),
    help="Of the sampler, for pixels in [0, 1].",
)
@click.option(
    "--start",
    type=click.Choice(STARTS),
    help="gaussian: around the mean of each class; default with --data, else uniform noise.",
)
@click.option(
    "--save-samples",
    is_flag=True,
    help="Write samples.npz: images, labels and energies, a data set for npz:.",
)
@edit_options
@click.option("--title", default="Samples", show_default=True, help="Heading.")
@click.option("-o", "--output", required=True, metavar="DIR", help="Where the results go.")
@json_option
@model_options
def command(
    options: ModelOptions,
    edits: EditOptions,
    data: str | None,
    classes: str | None,
    per_class: int,
    sampler: str,
    steps: int | None,
    step_size: float | None,
    start: str | None,
    save_samples: bool,
    title: str,
    output: str,
    as_json: bool,
) -> None:
    r"""Run chains down the energy of each class, and show where they end.

    The energy of an ordinarily trained classifier is a score and no density: its samples show what
    the net reacts to. --inpaint, --denoise and --morph ask the same energy for more, and measure
    the answer beside a fill or a filter without the net. With --data demo: no --model is needed.

    \b
    ebm-guard sample --model net.py:net --checkpoint net.safetensors --data val/ -o out
    """
    from ebm_guard.cli.session import Session, model_errors, warnings_as_lines
    from ebm_guard.errors import InvalidInputError
    from ebm_guard.files import check_writable
    from ebm_guard.report.meta import data_set
    from ebm_guard.report.sample_images import eight_bit
    from ebm_guard.report.sample_report import sample_report
    from ebm_guard.sampling import sample

    if data is None and start in ("gaussian", "data"):
        raise InvalidInputError(f"got --start {start} without --data; give images to start from")
    if data is None and options.model is None:
        raise InvalidInputError(
            "got neither --model nor --data; give --model, or --data demo: for the demo's net"
        )
    check_edits(edits, data)
    check_writable(output)
    clock = time.perf_counter()
    with warnings_as_lines():
        session = Session(options, [] if data is None else [data])
        known = None if data is None else session.predictions(data, "evaluation", "starts")
        given, runner = _given(session, known), _sampler(sampler, steps, step_size)
        if known is not None:
            check_edit_rows(edits, session.require_classifier(), given, known.num_classes)
        with model_errors("sampling"):
            sheet = sample(
                session.require_classifier(),
                classes=None if classes is None else [item.strip() for item in classes.split(",")],
                per_class=per_class,
                sampler=runner,
                start=start,
                seed=options.seed,
                **given,
            )
            sections, pictures = run_edits(
                edits,
                session.require_classifier(),
                given,
                sampler=runner,
                name=sampler,
                step_size=step_size,
                num_chains=per_class,
                seed=options.seed,
            )
        report = sample_report(
            sheet,
            session.require_classifier(),
            said=_said(session, sheet),
            known=known,
            edits=sections,
            data={} if known is None else {"starts": data_set(known, "starts")},
            title=title,
            command=shlex.join(["ebm-guard", *sys.argv[1:]]),
            clock=clock,
        )
    content, folder = report.to_dict(), Path(output)
    images = eight_bit(sheet.pixels)
    _show(content, folder, images, pictures, keep=save_samples, as_json=as_json)


def _sampler(name: str, steps: int | None, step_size: float | None) -> Sampler:
    """Build the sampler; those that accept or reject bounce off the walls of [0, 1]."""
    from ebm_guard.sampling import make_sampler

    settings: dict[str, Any] = {"num_steps": steps, "step_size": step_size}
    settings = {key: value for key, value in settings.items() if value is not None}
    if name in ("mala", "hmc"):
        settings |= {"box": (0.0, 1.0), "boundary": "reflect"}
    if name == "sgld:langevin":
        settings.setdefault("step_size", 1e-4)
    return make_sampler(name, **settings)


def _given(session: Session, known: Predictions | None) -> dict[str, Any]:
    """Return images and labels to start from."""
    import numpy as np
    import torch

    from ebm_guard.errors import InvalidInputError

    if known is None:
        return {}
    if known.labels is None:
        raise InvalidInputError(
            "got --data without labels; starts by class need them. Leave --data out for noise"
        )
    order = np.random.default_rng([session.options.seed, 53]).permutation(len(known))[:_MOST]
    rows = np.sort(order)
    return {
        "images": session.pixels("starts", known.names(list(rows))),
        "labels": torch.from_numpy(known.labels[rows].astype(np.int64)),
    }


def _said(session: Session, sheet: SampleSheet) -> Predictions:
    """Run the net over the samples, as over any images."""
    import torch

    from ebm_guard.predictions import Predictions

    classifier = session.require_classifier()
    with torch.no_grad():
        logits = [classifier(classifier.pixels(part)) for part in torch.split(sheet.pixels, _BATCH)]
    return Predictions(torch.cat(logits).float().cpu().numpy(), source="samples")


def _show(
    content: dict[str, Any],
    folder: Path,
    images: Any,
    edits: dict[str, EditPictures],
    *,
    keep: bool,
    as_json: bool,
) -> None:
    """Write the files, and print the result: a table on stdout, or JSON."""
    import json

    from rich.console import Console

    from ebm_guard.report.render import render_sample_terminal, write_sample_outputs

    write_sample_outputs(content, folder, images, keep=keep, edits=edits)
    if as_json:
        click.echo(json.dumps(content, allow_nan=False))
    else:
        render_sample_terminal(content, Console())
    click.echo(f"samples: {folder / 'samples.html'}", err=True)
