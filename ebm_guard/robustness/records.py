"""What an evaluation of robustness found, as frozen records; ``to_dict`` gives JSON types."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from ebm_guard.intervals import Metric


class Record:
    """Base of the records: fields become keys, in order."""

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON types."""
        # Only dataclasses derive from this base.
        items = (item for item in fields(self) if not item.metadata.get("by_row"))  # type: ignore[arg-type]
        return {item.name: _plain(getattr(self, item.name)) for item in items}


def by_row() -> Any:
    """Return a field with one entry for each image: to compare with, not to write down."""
    return field(default=(), repr=False, metadata={"by_row": True})


@dataclass(frozen=True)
class AttackResult(Record):
    """What one attack left standing at one epsilon.

    Args:
        name: registered name.
        label: with its budget, such as ``PGD-20``.
        robust_accuracy: share of **all** images still right after it and all before it; None where
            it was not run.
        fooled: images that it fooled and those before it did not.
        gradients: it took, in all.
        forwards: forward passes it took, in all.
        reason: why it was not run, or ''.
    """

    name: str
    label: str
    robust_accuracy: Metric | None
    fooled: int
    gradients: int
    forwards: int
    reason: str = ""


@dataclass(frozen=True)
class GatedResult(Record):
    """The same epsilon with the gate in the loop.

    Args:
        plain: share of all images that are not *wrong and accepted*, where the attacker does not
            know of the gate (their images at the first flip).
        aware: the same where the attacker knows the gate; None where it was not run.
        success_rate: share of the images *right and accepted at first* that the aware attacker
            gets wrong and accepted.
        rejected: share of the plain attacker's wrong images that the gate refuses; None without
            any.
        forced_rejection: share of the images *right and accepted at first* that an attacker gets
            refused; None where it was not run.
        labels: the attacks, with their budgets.
        reason: why a number is missing, or ''.
    """

    plain: Metric | None
    aware: Metric | None
    success_rate: Metric | None
    rejected: Metric | None
    forced_rejection: Metric | None
    labels: tuple[str, ...] = ()
    reason: str = ""


@dataclass(frozen=True)
class EpsilonResult(Record):
    """All attacks at one epsilon.

    Args:
        epsilon: in pixel units.
        text: as people write it.
        attacks: in their order; each sees only what those before it left.
        worst_case: share of **all** images that every attack left right; None unless all of them
            ran.
        success_rate: share of the images *right at first* that some attack made wrong.
        fooled: images wrong at this epsilon.
        rounded: share of **all** images of which no image was found that is wrong as an 8-bit file
            too; None unless all attacks ran.
        outside: adversarial images up to here that were not finite, or not in the ball or box, and
            so counted as right.
        gated: with the gate, or None without one.
        standing: for each attacked image whether all attacks left it right; not in the JSON.
    """

    epsilon: float
    text: str
    attacks: tuple[AttackResult, ...]
    worst_case: Metric | None
    success_rate: Metric | None
    fooled: int
    rounded: Metric | None
    outside: int
    gated: GatedResult | None
    standing: tuple[bool, ...] = by_row()


@dataclass(frozen=True)
class NormResult(Record):
    """One norm: the curve over epsilon.

    Args:
        norm: ``linf`` or ``l2``.
        reference: text of the epsilon that the verdict speaks of.
        epsilons: ascending.
        minimal: the smallest distance that fools, or None.
    """

    norm: str
    reference: str
    epsilons: tuple[EpsilonResult, ...]
    minimal: MinimalResult | None = None

    def at(self, text: str) -> EpsilonResult:
        """Return the row of an epsilon."""
        return next(row for row in self.epsilons if row.text == text)


@dataclass(frozen=True)
class MinimalResult(Record):
    """How far the nearest wrong image is, by a minimal-norm attack.

    Args:
        label: the attack with its budget.
        n: images, originally wrong ones count with distance 0.
        found: images for which one was found.
        median: of the distance, in pixel units; None where fewer than half were found.
        quantiles: 0.05, 0.25, 0.5, 0.75, 0.95 of the distance; None where not found.
        curve: share of images right at each epsilon of the table, from this one run.
    """

    label: str
    n: int
    found: int
    median: float | None
    quantiles: tuple[float | None, ...]
    curve: Mapping[str, Metric]


@dataclass(frozen=True)
class OodEpsilon(Record):
    """Unknown images, attacked so that the gate accepts them.

    Args:
        epsilon: in pixel units; 0 for the images as they are.
        text: as people write it.
        accepted: share of the OOD images accepted.
        auroc: of the gate's score, OOD images attacked, ID images as they are.
        fpr95: share of OOD accepted where 95 % of ID is accepted.
    """

    epsilon: float
    text: str
    accepted: Metric
    auroc: Metric
    fpr95: Metric


@dataclass(frozen=True)
class OodResult(Record):
    """One OOD set under aim D.

    Args:
        n: OOD images.
        rows: by epsilon, the clean ones first.
        label: the attack with its budget.
    """

    n: int
    rows: tuple[OodEpsilon, ...]
    label: str


@dataclass(frozen=True)
class PurifiedMode(Record):
    """What one gradient of the purified classifier left standing.

    Args:
        name: ``identity``, ``unrolled`` or ``transfer``.
        label: the attack with its budget.
        robust_accuracy: share of **all** images still right; None where it was not run.
        fooled: images right when purified that it made wrong.
        gradients: it took, in all, those of the sampler among them.
        forwards: forward passes it took, in all.
        reason: why it was not run, or ''.
    """

    name: str
    label: str
    robust_accuracy: Metric | None
    fooled: int
    gradients: int
    forwards: int
    reason: str = ""


@dataclass(frozen=True)
class PurificationResult(Record):
    """A classifier that refines its input, under attack; the gate is not asked.

    Args:
        settings: of the sampler.
        norm: ``linf`` or ``l2``.
        epsilon: in pixel units.
        text: as people write it.
        n: images.
        clean: accuracy of the purified classifier without attack, by the majority of fresh draws.
        bare_clean: of the bare classifier on the same images.
        bare: of the bare classifier after all attacks of the table; None where not all ran.
        modes: one attack for each gradient.
        worst_case: share of **all** images that no mode fools; None unless all of them ran.
        eot_samples: gradients averaged in a step.
        success_draws: fresh predictions that a verdict is the majority of.
        gradients_per_image: that one prediction takes.
        forwards_per_image: further forward passes that one prediction takes.
    """

    settings: Mapping[str, Any]
    norm: str
    epsilon: float
    text: str
    n: int
    clean: Metric
    bare_clean: Metric
    bare: Metric | None
    modes: tuple[PurifiedMode, ...]
    worst_case: Metric | None
    eot_samples: int
    success_draws: int
    gradients_per_image: int
    forwards_per_image: int


@dataclass(frozen=True)
class Robustness(Record):
    """A whole evaluation.

    Args:
        preset: ``quick``, ``standard`` or ``full``.
        n: attacked images.
        of: images they were drawn from.
        label_source: ``true labels`` or ``predicted labels``.
        clean: accuracy at epsilon 0, on these images.
        gate: score and promise of the gate in the loop, or None and why.
        clean_gated: share not wrong and accepted at epsilon 0, or None.
        norms: one result for each norm.
        ood: OOD sets under attack, by name.
        energy_path: energies along the attack, or None.
        flags: whether the numbers can be trusted.
        corruptions: the table of the built-in set, or None.
        published: tables of published corrupted sets, such as CIFAR-10-C.
        reference: a foreign implementation on the survivors, or None.
        cost: forward passes and gradients, in all and per image.
        run: seconds, in all and of each stage: what differs between two runs.
        settings: seed, attacks with their settings, versions.
        left_out: what was not run, and why.
        purification: the classifier with SGLD-refined inference under attack, or None.
        right: for each attacked image whether it is right without attack; not in the JSON.
    """

    preset: str
    n: int
    of: int
    label_source: str
    clean: Metric
    gate: Mapping[str, Any]
    clean_gated: Metric | None
    norms: tuple[NormResult, ...]
    ood: Mapping[str, OodResult]
    energy_path: Any
    flags: tuple[Any, ...]
    corruptions: Any
    published: tuple[Any, ...]
    reference: Mapping[str, Any] | None
    cost: Mapping[str, Any]
    run: Mapping[str, Any]
    settings: Mapping[str, Any]
    left_out: tuple[Mapping[str, str], ...]
    purification: PurificationResult | None = None
    right: tuple[bool, ...] = by_row()


def _plain(value: Any) -> Any:
    if hasattr(value, "to_dict"):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
