"""Attack the model of a command: choose the images, fit or take the gate, show the plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
import torch
from numpy.typing import NDArray

from ebm_guard.cli.attack_options import STATE, AttackChoices
from ebm_guard.cli.session import Session, model_errors
from ebm_guard.errors import EbmGuardError, InvalidInputError
from ebm_guard.gate import Guard
from ebm_guard.predictions import Predictions
from ebm_guard.robustness.corruptions import (
    CorruptionTable,
    PublishedSet,
    evaluate_published,
    open_corrupted,
)
from ebm_guard.robustness.evaluate import evaluate_robustness
from ebm_guard.robustness.options import AttackOptions, Images
from ebm_guard.robustness.presets import preset_of
from ebm_guard.robustness.records import Robustness

if TYPE_CHECKING:
    from ebm_guard.gate.deciding import Parts
    from ebm_guard.robustness.plan import Plan

# What a gate in the loop is fitted with.
GATE_SETTINGS = ("score", "threshold", "false_reject_rate", "assurance", "calibrator")


@dataclass(frozen=True)
class Rows:
    """Which evaluation rows are attacked, and which are left for the gate.

    Args:
        attacked: row numbers, in random order.
        rest: the others.
    """

    attacked: NDArray[np.int64]
    rest: NDArray[np.int64]


def attack(
    session: Session,
    parts: Mapping[str, Predictions],
    choices: AttackChoices,
    output: Path,
    gate_settings: Mapping[str, Any],
) -> Robustness:
    """Attack the evaluation images of a command, with its gate in the loop.

    Args:
        session: with the sources open.
        parts: predictions by role and by OOD set.
        choices: of the command line.
        output: folder of the results; interrupted work is kept in it.
        gate_settings: what :meth:`ebm_guard.gate.Guard.fit` is called with, where no guard is
            given.

    Raises:
        InvalidInputError: no model, or images that cannot be read again.
    """
    if session.classifier is None or "evaluation" not in session.sources:
        raise InvalidInputError(
            "attacks need a model and images; stored predictions have neither. Give --model and "
            "--data with images, or leave out --attacks"
        )
    evaluation = parts["evaluation"]
    rows = _rows(session, evaluation, choices, own_gate="calibration" in parts)
    gate, no_gate = _gate(session, parts, rows, gate_settings)
    images = Images(
        session.pixels("evaluation", evaluation.names(list(rows.attacked))),
        None
        if evaluation.labels is None
        else torch.from_numpy(evaluation.labels[rows.attacked].astype(np.int64)),
        torch.from_numpy(rows.attacked),
        of=len(evaluation),
    )
    options = AttackOptions(
        preset=str(choices.attacks),
        threats=choices.threats(),
        norm=choices.norm,
        images=choices.attack_images,
        time_budget=choices.time_budget,
        seed=session.options.seed,
        batch_size=choices.attack_batch_size,
        state=output / STATE,
        resume=choices.resume,
        attackers=choices.attackers(),
        corruptions=choices.corruptions,
        purify=choices.purification(),
    )
    published = [open_corrupted(folder) for folder in choices.corrupted]
    try:
        with model_errors("an attack"):
            found = evaluate_robustness(
                session.classifier,
                images,
                gate=gate,
                no_gate=no_gate,
                ood=_ood(session, parts, choices),
                options=options,
                on_plan=None if session.options.quiet else show_plan,
                say=None if session.options.quiet else say,
            )
    except KeyboardInterrupt:
        click.echo(
            f"finished stages are kept in {output / STATE}; the same command with --resume goes on",
            err=True,
        )
        raise
    tables = tuple(_published(session, part, gate, choices).to_dict() for part in published)
    return replace(found, published=tables)


def say(line: str) -> None:
    """Print what a stage did, on stderr."""
    click.echo(f"  {line}", err=True)


def show_plan(plan: Plan) -> None:
    """Print what will be run, and how long it should take, on stderr."""
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"Plan: {plan.n} images to attack", header_style="bold", title_justify="left"
    )
    table.add_column("part")
    for heading in ("images", "gradients", "forwards", "about"):
        table.add_column(heading, justify="right")
    for line in plan.lines:
        table.add_row(
            line.title,
            f"{line.images:,}",
            f"{line.gradients:,}",
            f"{line.forwards:,}",
            _time(line.seconds),
        )
    budget = "" if plan.time_budget is None else f" of a budget of {_time(plan.time_budget)}"
    table.caption = (
        f"about {_time(plan.seconds)} in all{budget}, at {plan.gradients_per_second:,.0f} "
        "gradients a second; a robust net takes longer than a few images foretell"
    )
    if plan.cut:
        table.caption += "; fewer images than the preset's, for the budget"
    Console(stderr=True).print(table)


def _time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _rows(
    session: Session, evaluation: Predictions, choices: AttackChoices, *, own_gate: bool
) -> Rows:
    """Draw the images to attack; where the gate is fitted on the others, leave it half of them."""
    preset = preset_of(str(choices.attacks), evaluation.num_classes)
    wanted = max(choices.attack_images or preset.images, preset.corruption_images)
    n = len(evaluation)
    most = n if own_gate or session.guard is not None else max(1, n // 2)
    order = np.random.default_rng([session.options.seed, 16]).permutation(n)
    count = min(wanted, most)
    return Rows(order[:count], np.sort(order[count:]))


def _gate(
    session: Session,
    parts: Mapping[str, Predictions],
    rows: Rows,
    settings: Mapping[str, Any],
) -> tuple[Parts | None, str]:
    """Return the gate in the loop: the given one, or one fitted on rows that are not attacked."""
    if session.guard is not None:
        return session.guard.state().parts, ""
    data = parts.get("calibration")
    data = parts["evaluation"].select(rows.rest) if data is None else data
    if not len(data):
        return None, "no rows are left to fit a gate on"
    try:
        guard = Guard(session.classifier).fit(
            data, fit_data=parts.get("fit"), canary=False, **settings
        )
    except EbmGuardError as error:
        return None, f"no gate could be fitted on {len(data):,} rows that are not attacked: {error}"
    return guard.state().parts, ""


def _published(
    session: Session, published: PublishedSet, gate: Parts | None, choices: AttackChoices
) -> CorruptionTable:
    """Measure a published corrupted set, of which the evaluation images are the clean one."""
    limit = preset_of(str(choices.attacks), 2).corruption_images
    return evaluate_published(
        published,
        lambda source: session.labelled(source, published.title),
        session.sources["evaluation"],
        parts=gate,
        limit=limit,
        seed=session.options.seed,
    )


def _ood(
    session: Session, parts: Mapping[str, Predictions], choices: AttackChoices
) -> dict[str, torch.Tensor]:
    """Return images of the user's OOD sets; made ones say nothing about an attacker's images."""
    limit = preset_of(str(choices.attacks), parts["evaluation"].num_classes).ood_images
    found = {}
    for name, part in parts.items():
        foreign = name not in ("evaluation", "calibration", "fit")
        made = name.startswith(("synthetic_", "shifted"))
        if not limit or not foreign or made or name not in session.sources:
            continue
        order = np.random.default_rng([session.options.seed, 19]).permutation(len(part))
        chosen = np.sort(order[:limit])
        try:
            found[name] = session.pixels(name, part.names(list(chosen)))
        except InvalidInputError as error:
            click.echo(f"warning: {name} is not attacked: {error}", err=True)
    return found
