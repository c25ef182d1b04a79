"""What an evaluation will cost, before it runs; with a time budget, fewer images.

A pilot on a few images tells which share withstands each epsilon: what falls early is cheap, what
stands pays for every step. Images are cut before steps, since fewer steps would be a weaker attack
under the same name.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ebm_guard.attacks import PGD, Examples, Misclassify, Query, climb
from ebm_guard.robustness.presets import Preset
from ebm_guard.robustness.purify import MODES, Purification
from ebm_guard.robustness.purify_attack import PurifyBudget
from ebm_guard.robustness.records import Record
from ebm_guard.robustness.runner import Speed
from ebm_guard.robustness.subject import Subject
from ebm_guard.robustness.threat import Threat

PILOT_IMAGES = 16
PILOT_STEPS = 5
FEWEST = 32
# A fooled image costs about this many gradients: the one at the start, and the steps to the flip.
_EARLY = 2.5
_MINIMAL_STEPS = 100
# About this share of first flips is refused by a gate that keeps 95 % of clean images.
_REFUSED = 0.3
# The pilot and the measured speed are rough.
_RESERVE = 0.85


@dataclass(frozen=True)
class Line(Record):
    """One part of the plan.

    Args:
        title: what is run.
        images: on how many images.
        gradients: expected, in all.
        forwards: expected, in all.
        seconds: expected.
    """

    title: str
    images: int
    gradients: int
    forwards: int
    seconds: float


@dataclass(frozen=True)
class Plan(Record):
    """The whole plan.

    Args:
        n: attacked images.
        lines: its parts.
        seconds: expected, in all.
        time_budget: seconds, or None.
        cut: whether images were cut for the budget.
        gradients_per_second: measured.
    """

    n: int
    lines: tuple[Line, ...]
    seconds: float
    time_budget: float | None
    cut: bool
    gradients_per_second: float


@dataclass(frozen=True)
class Scope:
    """What the plan depends on.

    Args:
        preset: what to run.
        threats: norms with their budgets.
        standing: for each threat, the share of images that withstands each epsilon (pilot).
        available: images there are.
        with_gate: whether attacks on the gate run.
        ood: images of each OOD set, by name.
        eot_samples: passes per gradient.
        purify: settings of the purification that is attacked too, or None.
    """

    preset: Preset
    threats: tuple[Threat, ...]
    standing: tuple[tuple[float, ...], ...]
    available: int
    with_gate: bool
    ood: dict[str, int]
    eot_samples: int = 1
    purify: Purification | None = None


def pilot(
    subject: Subject,
    examples: Examples,
    threats: tuple[Threat, ...],
    seed: int,
    *,
    gradient: bool = True,
) -> tuple[tuple[float, ...], ...]:
    """Attack a few images lightly; return the share that stands at each epsilon of each threat."""
    if not gradient:
        return tuple((1.0,) * len(threat.epsilons) for threat in threats)
    few = examples.select(slice(0, PILOT_IMAGES))
    query = Query(subject.forward, Misclassify("margin"), batch_size=subject.batch_size)
    shares = []
    for threat in threats:
        rows, found = torch.arange(len(few)), []
        for epsilon in threat.epsilons:
            if len(rows):
                rule = PGD(PILOT_STEPS, norm=threat.norm, random_start=False)
                part = few.select(rows)
                outcome = climb(rule, query, part, epsilon.value, seed=(seed, 9))
                rows = rows[~outcome.success.cpu()]
            found.append(len(rows) / len(few))
        shares.append(tuple(found))
    return tuple(shares)


def make_plan(scope: Scope, speed: Speed, time_budget: float | None) -> Plan:
    """Choose the number of images, and list what will be run.

    Example:
        >>> from ebm_guard.robustness.presets import preset_of
        >>> from ebm_guard.robustness.threat import default_threats
        >>> scope = Scope(preset_of("quick", 10), default_threats(3, with_l2=False),
        ...               ((0.9, 0.4, 0.0, 0.0, 0.0),), 1000, True, {})
        >>> make_plan(scope, Speed(0.002, 0.005), None).n
        128
        >>> make_plan(scope, Speed(0.002, 0.005), 20.0).cut
        True
    """
    wanted = min(scope.available, scope.preset.images)
    n = wanted
    while time_budget is not None and n > FEWEST:
        if sum(line.seconds for line in _lines(scope, n, speed)) <= _RESERVE * time_budget:
            break
        n = max(FEWEST, int(n * 0.9))
    n = min(n, wanted)
    lines = tuple(_lines(scope, n, speed))
    return Plan(
        n,
        lines,
        round(sum(line.seconds for line in lines), 1),
        time_budget,
        n < wanted,
        round(1 / speed.gradient, 1),
    )


def _lines(scope: Scope, n: int, speed: Speed) -> list[Line]:
    preset, eot = scope.preset, scope.eot_samples

    def line(title: str, images: int, gradients: float, forwards: float = 0) -> Line:
        seconds = speed.seconds(forwards, gradients * eot)
        return Line(title, images, round(gradients * eot), round(forwards), round(seconds, 1))

    found = []
    for threat, standing in zip(scope.threats, scope.standing, strict=True):
        budgets = ", ".join(epsilon.text for epsilon in threat.epsilons)
        gradients, forwards = _flips(preset, standing, n)
        found.append(line(f"attacks, {threat.norm} {budgets}", n, gradients, forwards))
        if scope.with_gate:
            found.append(line(f"attacks on the gate, {threat.norm}", n, _gate(preset, standing, n)))
    path = min(n, preset.path_images)
    found.append(line("energy along the attack", path, path * (preset.gate_steps + 3 * _EARLY)))
    last = scope.standing[0][-1]
    sweep = n * last * (4 * 20 + 40) if preset.sweep else 0
    queries = preset.square_queries * 24
    found.append(line("flags of masked gradients", n, n + sweep, queries))
    for name, size in scope.ood.items():
        images = min(size, preset.ood_images)
        if images and scope.with_gate:
            steps = (preset.gate_steps + 1) * len(scope.threats[0].epsilons)
            found.append(line(f"make {name} accepted", images, images * steps))
    if preset.minimal_images:
        images = min(n, preset.minimal_images)
        found.append(line("smallest change that fools (FMN)", images, images * _MINIMAL_STEPS))
    if preset.corruptions:
        images = min(scope.available, preset.corruption_images)
        passes = images * len(preset.corruptions) * len(preset.severities)
        found.append(line("corruptions", images, 0, passes))
    if scope.purify is not None:
        found.append(_purified(scope, n, speed))
    if preset.autoattack:
        found.append(line("pyautoattack on the survivors", n, n * last * 1200, n * last * 5000))
    return found


def _purified(scope: Scope, n: int, speed: Speed) -> Line:
    """Estimate the attacks of the purified classifier, as if it stood like the bare one."""
    if scope.purify is None:
        raise ValueError("got no settings of a purification")
    threat = scope.threats[0]
    budget = PurifyBudget.of(scope.preset.name)
    needed = budget.needed(scope.purify, scope.eot_samples)
    stands = scope.standing[0][threat.epsilons.index(threat.reference)]
    images = min(n, budget.images)
    answers = images * (stands * (budget.num_steps + 1) + (1 - stands) * _EARLY)
    costs = [needed.cost(scope.purify, mode) for mode in MODES]
    gradients = answers * sum(cost["gradients"] for cost in costs)
    forwards = answers * sum(cost["forwards"] for cost in costs)
    seconds = round(speed.seconds(forwards, gradients), 1)
    title = (
        f"purification ({scope.purify.num_steps} steps) at {threat.norm} {threat.reference.text}"
    )
    return Line(title, images, round(gradients), round(forwards), seconds)


def _flips(preset: Preset, standing: tuple[float, ...], n: int) -> tuple[float, float]:
    gradients = forwards = 0.0
    before = 1.0
    for after in standing:
        reached = before
        for attacker in preset.attackers:
            cost = n * ((reached - after) * _EARLY + after * (attacker.steps + 1))
            if attacker.needs_gradient:
                gradients += cost
            else:
                forwards += cost
            reached = after
        before = after
    return gradients, forwards


def _gate(preset: Preset, standing: tuple[float, ...], n: int) -> float:
    """Estimate aim B (for what is wrong and refused, first flips mostly) and aim C."""
    fallen = [1 - after for after in standing]
    refuse = preset.forced_rejection * sum(standing) * (preset.gate_steps + 1)
    return n * (_REFUSED * sum(fallen) * 3 * _EARLY + refuse)
