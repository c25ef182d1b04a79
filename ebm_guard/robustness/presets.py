"""The sizes of an evaluation: which attacks, on how many images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ebm_guard.attacks import APGD, PGD, Goal, Misclassify, Square, StepRule, TargetedMisclassify
from ebm_guard.attacks.foreign import ForeignAttack
from ebm_guard.errors import InvalidInputError, suggest
from ebm_guard.robustness.corruptions import BUILTIN


@dataclass(frozen=True)
class Attacker:
    """One attack of a preset.

    Args:
        name: its registered name.
        label: with its budget, as the report prints it.
        rule: makes the step rule of a norm.
        goals: run one after the other, each on what the one before left.
        carries: starts from the best image of the smaller epsilon, else from its own start.
        call: an attack of another library, which is asked instead of the rule; or None.
    """

    name: str
    label: str
    rule: Callable[[str], StepRule[Any]]
    goals: tuple[Goal, ...]
    carries: bool = False
    call: ForeignAttack | None = None

    @classmethod
    def foreign(cls, name: str, call: ForeignAttack) -> Attacker:
        """Take an attack of another library; its cost is not known before it runs."""
        goals = (Misclassify("margin"),)
        return cls(name, name, lambda norm: PGD(20, norm=norm), goals, call=call)

    def settings(self, norm: str) -> dict[str, Any]:
        """Return the settings along a norm, for the report."""
        if self.call is not None:
            return {"given": getattr(self.call, "__qualname__", type(self.call).__name__)}
        loss = [getattr(goal, "loss", goal.name) for goal in self.goals[:1]]
        return {**self.rule(norm).settings(), "loss": loss[0], "goals": len(self.goals)}

    @property
    def steps(self) -> int:
        """Answers that an image costs at most."""
        return self.rule("linf").num_steps * len(self.goals)

    @property
    def needs_gradient(self) -> bool:
        """Whether the answers carry gradients."""
        return self.rule("linf").needs_gradient


@dataclass(frozen=True)
class Preset:
    """What an evaluation runs.

    Args:
        name: ``quick``, ``standard`` or ``full``.
        images: attacked images, at most.
        attackers: in their order, for every epsilon of every norm.
        with_l2: also the L2 norm, where the user names no norm.
        gate_steps: steps of the attacks on the gate.
        forced_rejection: run aim C.
        ood_images: images of each OOD set for aim D; 0 leaves it out.
        path_images: images whose energy is followed step by step.
        minimal_images: images for the minimal-norm attack; 0 leaves it out.
        square_queries: queries of Square where it only serves as a flag; 0 where it is an attacker.
        sweep: large budgets and doubled steps, for the flags.
        corruption_images: images for the corruptions.
        severities: of the corruptions.
        corruptions: their names; none for no corruptions.
        autoattack: run the reference implementation on the survivors.
    """

    name: str
    images: int
    attackers: tuple[Attacker, ...]
    with_l2: bool = False
    gate_steps: int = 20
    forced_rejection: bool = False
    ood_images: int = 0
    path_images: int = 64
    minimal_images: int = 0
    square_queries: int = 0
    sweep: bool = False
    corruption_images: int = 128
    severities: tuple[int, ...] = (3,)
    corruptions: tuple[str, ...] = BUILTIN
    autoattack: bool = False


def _pgd(steps: int) -> Attacker:
    goals = (Misclassify("ce"),)
    return Attacker("pgd", f"PGD-{steps}", lambda norm: PGD(steps, norm=norm), goals, carries=True)


def _apgd(loss: str, steps: int) -> Attacker:
    goals = (Misclassify(loss),)
    words = loss if loss == "margin" else loss.upper()
    return Attacker(
        f"apgd_{loss}", f"APGD-{words} {steps}", lambda norm: APGD(steps, norm=norm), goals
    )


def _apgd_targeted(steps: int, targets: int) -> Attacker:
    goals = tuple(TargetedMisclassify(rank) for rank in range(1, targets + 1))
    label = f"APGD-T {steps} x {targets} targets"
    return Attacker("apgd_targeted", label, lambda norm: APGD(steps, norm=norm), goals)


def _square(queries: int) -> Attacker:
    goals = (Misclassify("margin"),)
    return Attacker("square", f"Square {queries}", lambda norm: Square(queries, norm=norm), goals)


def without_gradients(preset: Preset) -> Preset:
    """Keep what can be run on a model that lets no gradient through: Square alone."""
    return replace(
        preset,
        attackers=(_square(5000 if preset.name == "full" else 1000),),
        path_images=0,
        minimal_images=0,
        square_queries=0,
        sweep=False,
        autoattack=False,
    )


PRESETS = ("quick", "standard", "full")


def preset_of(name: str, num_classes: int) -> Preset:
    """Return a preset, its targeted attack cut to the classes that there are.

    Args:
        name: ``quick`` (about a minute for a small net on a CPU), ``standard`` (AutoAttack-grade:
            APGD-CE, targeted APGD, Square), or ``full`` (also pyautoattack on the survivors).
        num_classes: of the classifier.

    Raises:
        InvalidInputError: unknown name.

    Example:
        >>> [attacker.label for attacker in preset_of("quick", 10).attackers]
        ['PGD-20', 'APGD-margin 30']
    """
    targets = min(9, num_classes - 1)
    quick = Preset("quick", 128, (_pgd(20), _apgd("margin", 30)), square_queries=200)
    strong = (_pgd(20), _apgd("ce", 100), _apgd_targeted(100, targets))
    standard = Preset(
        "standard",
        512,
        (*strong, _square(1000)),
        with_l2=True,
        forced_rejection=True,
        ood_images=128,
        minimal_images=64,
        sweep=True,
        corruption_images=200,
        severities=(1, 3, 5),
    )
    full = replace(
        standard,
        name="full",
        images=1000,
        attackers=(*strong, _square(5000)),
        ood_images=500,
        minimal_images=256,
        corruption_images=1000,
        severities=(1, 2, 3, 4, 5),
        autoattack=True,
    )
    known = {preset.name: preset for preset in (quick, standard, full)}
    if name not in known:
        raise InvalidInputError(
            f"got attacks {name!r}; known are {', '.join(known)}{suggest(name, known)}"
        )
    return known[name]
