"""Options of the attacks, shared by ``report`` and ``attack``. No torch here."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ebm_guard.cli.options import Command, grouped

if TYPE_CHECKING:
    from ebm_guard.robustness.purify import Purification
    from ebm_guard.robustness.threat import Threat

PRESETS = ("quick", "standard", "full")
NORMS = ("linf", "l2")
CORRUPTION_SETS = ("builtin", "imagecorruptions", "none")
# Folder in the output that keeps finished stages while the attacks run.
STATE = "attack-state"
_BATCH = 64
_DURATION = re.compile(r"(?P<number>\d+(\.\d*)?)\s*(?P<unit>s|sec|m|min|h)?")
_SECONDS = {None: 1, "s": 1, "sec": 1, "m": 60, "min": 60, "h": 3600}


class Duration(click.ParamType[float]):
    """Seconds, written as 120, 120s, 2m or 1h."""

    name = "DURATION"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Return seconds."""
        if isinstance(value, float):
            return value
        match = _DURATION.fullmatch(str(value).strip())
        if match is None or not float(match["number"]):
            self.fail(f"got {value!r}; needed a time such as 120s, 2m or 1h", param, ctx)
        return float(match["number"]) * _SECONDS[match["unit"]]


@dataclass(frozen=True)
class AttackChoices:
    """What the command line says about attacks."""

    attacks: str | None
    time_budget: float | None
    norm: str | None
    epsilon: tuple[str, ...]
    attack_images: int | None
    attack_batch_size: int
    attacker: tuple[str, ...]
    corruptions: str
    corrupted: tuple[str, ...]
    purify: int | None
    purify_step_size: float | None
    purify_noise: float | None
    purify_radius: float | None
    resume: bool

    def threats(self) -> tuple[Threat, ...] | None:
        """Return the norm with its budgets, or None for those of the literature.

        Raises:
            InvalidInputError: a budget that is no number.
        """
        from ebm_guard.robustness.threat import Threat

        if not self.epsilon:
            return None
        return (Threat.of(self.norm or "linf", self.epsilon),)

    def purification(self) -> Purification | None:
        """Return the purification that is attacked too, or None.

        Raises:
            InvalidInputError: a setting out of range.
        """
        from ebm_guard.robustness.purify import Purification

        if self.purify is None:
            return None
        given: dict[str, Any] = {
            "step_size": self.purify_step_size,
            "noise_std": self.purify_noise,
            "radius": self.purify_radius,
        }
        chosen = {name: value for name, value in given.items() if value is not None}
        return Purification(self.purify, **chosen)

    def attackers(self) -> dict[str, Callable[..., Any]]:
        """Import the attacks that were given, by name.

        Raises:
            InvalidInputError: not NAME=FILE.py:CALL, a name twice, or nothing there.
        """
        from ebm_guard.errors import InvalidInputError
        from ebm_guard.model.loading import import_callable

        found: dict[str, Callable[..., Any]] = {}
        for pair in self.attacker:
            name, equals, place = pair.partition("=")
            if not equals or not name or ":" not in place or name in found:
                raise InvalidInputError(
                    f"got --attacker {pair!r}; needed NAME=FILE.py:CALL or NAME=MODULE:CALL, each "
                    "name once"
                )
            found[name] = import_callable(place, "attack")
        return found


def _options(default: str | None) -> tuple[Any, ...]:
    return (
        click.option(
            "--attacks",
            type=click.Choice(PRESETS),
            default=default,
            show_default=default is not None,
            help="quick: PGD-20 and APGD on 128 images; standard: AutoAttack-grade (APGD-CE, "
            "targeted APGD, Square) on 512, also L2; full: more, and pyautoattack on what stands.",
        ),
        click.option(
            "--time-budget",
            type=Duration(),
            metavar="TIME",
            help="Such as 120s or 2m: fewer images are attacked, and what does not fit is named "
            "as not run.",
        ),
        click.option(
            "--norm", type=click.Choice(NORMS), help="Only this norm; of --epsilon, default: linf."
        ),
        click.option(
            "--epsilon",
            multiple=True,
            metavar="NUMBER",
            help="Budget in pixel units of [0, 1], such as 8/255. Repeatable; the largest is the "
            "one of the verdict. Default: those of the literature.",
        ),
        click.option(
            "--attack-images",
            type=click.IntRange(min=1),
            help="Images to attack, at most; default: the preset's.",
        ),
        click.option(
            "--attack-batch-size",
            type=click.IntRange(min=1),
            default=_BATCH,
            show_default=True,
            help="Images per pass of an attack.",
        ),
        click.option(
            "--attacker",
            multiple=True,
            metavar="NAME=FILE.py:CALL",
            help="One more attack(model, x, y, epsilon) -> x_adv, of any library; run last, and "
            "judged by us. Repeatable.",
        ),
        click.option(
            "--corruptions",
            type=click.Choice(CORRUPTION_SETS),
            default="builtin",
            show_default=True,
            help="imagecorruptions: the types of ImageNet-C, by the extra `corruptions`.",
        ),
        click.option(
            "--corrupted",
            multiple=True,
            metavar="FOLDER",
            help="CIFAR-10-C or ImageNet-C, of which --data is the clean set. Repeatable.",
        ),
        click.option(
            "--purify",
            type=click.IntRange(min=1),
            metavar="N",
            help="Also attack the classifier with N steps of SGLD on its energy before it answers "
            "(JEM): by three gradients, the worst is reported.",
        ),
        click.option(
            "--purify-step-size",
            type=float,
            metavar="NUMBER",
            help="Factor of the energy's gradient; default: JEM's, 0.25 in [0, 1] pixels.",
        ),
        click.option(
            "--purify-noise",
            type=float,
            metavar="NUMBER",
            help="Standard deviation of the noise of each step; default: JEM's, 0.005.",
        ),
        click.option(
            "--purify-radius",
            type=float,
            metavar="NUMBER",
            help="Largest change of a pixel by purification; default: the box [0, 1] alone.",
        ),
        click.option(
            "--resume", is_flag=True, help="Go on with the attacks that were interrupted."
        ),
    )


def attack_options(command: Command) -> Command:
    """Add the options of :class:`AttackChoices`; without ``--attacks`` none is run."""
    return grouped(command, "attack_choices", AttackChoices, _options(None))


def attack_options_on(command: Command) -> Command:
    """Add the same options to a command whose purpose they are."""
    return grouped(command, "attack_choices", AttackChoices, _options("quick"))


def check_attack_choices(choices: AttackChoices) -> None:
    """Refuse bad budgets, and options that would be ignored, before the work.

    Raises:
        InvalidInputError: with the way out.
    """
    from ebm_guard.errors import InvalidInputError

    given = {
        "--time-budget": choices.time_budget,
        "--norm": choices.norm,
        "--epsilon": choices.epsilon,
        "--attack-images": choices.attack_images,
        "--attacker": choices.attacker,
        "--corruptions": choices.corruptions != CORRUPTION_SETS[0],
        "--corrupted": choices.corrupted,
        "--purify": choices.purify,
        **_tuned(choices),
        "--attack-batch-size": choices.attack_batch_size != _BATCH,
        "--resume": choices.resume,
    }
    ignored = [name for name, value in given.items() if value]
    if choices.attacks is None and ignored:
        raise InvalidInputError(f"got {ignored[0]} without --attacks; add --attacks quick")
    tuned = [name for name, value in _tuned(choices).items() if value]
    if choices.purify is None and tuned:
        raise InvalidInputError(f"got {tuned[0]} without --purify; add --purify 10")
    choices.threats()
    choices.purification()
    choices.attackers()


def _tuned(choices: AttackChoices) -> dict[str, bool]:
    """Tell which settings of the purification were given."""
    return {
        "--purify-step-size": choices.purify_step_size is not None,
        "--purify-noise": choices.purify_noise is not None,
        "--purify-radius": choices.purify_radius is not None,
    }


def forget_state(output: Path) -> None:
    """Remove the kept stages once the results are written."""
    import shutil

    shutil.rmtree(output / STATE, ignore_errors=True)
