"""Aim A along a norm: each attack gets what the one before left, each epsilon what was left below.

A fooled image stays fooled at every larger epsilon, so the curve falls by construction, and an
image that still stands is attacked from the best point that a smaller epsilon found.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ebm_guard.attacks import PGD, Examples, Misclassify, Outcome, Query, climb
from ebm_guard.attacks.foreign import ForeignOutcome, judge_callable
from ebm_guard.errors import InvalidInputError
from ebm_guard.gate.deciding import Parts
from ebm_guard.intervals import Metric, proportion
from ebm_guard.robustness.gate_attacks import Attempt, Source, gate_plan
from ebm_guard.robustness.presets import Attacker, Preset
from ebm_guard.robustness.records import AttackResult
from ebm_guard.robustness.runner import BUDGET, Arrays, Runner, rows_key, tensor
from ebm_guard.robustness.subject import Judged, Subject, inside, rounded
from ebm_guard.robustness.threat import Epsilon, Threat

_SHARPEN = 20


@dataclass(frozen=True)
class Context:
    """What all stages of an evaluation share.

    Args:
        subject: the classifier with its gate.
        examples: the attacked images.
        clean: what the classifier says about them as they are.
        preset: what to run.
        threats: norms with their budgets; the first one is the main one.
        runner: runs the stages.
        seed: of all random numbers.
        eot_samples: forward and backward passes per gradient.
        gate_source: where attacks on the gate take their gradient from.
    """

    subject: Subject
    examples: Examples
    clean: Judged
    preset: Preset
    threats: tuple[Threat, ...]
    runner: Runner
    seed: int
    eot_samples: int = 1
    gate_source: Source = "score"

    @property
    def parts(self) -> Parts:
        """The gate; only asked for where there is one."""
        if self.subject.parts is None:
            raise InvalidInputError("got no gate; attacks on the gate need one")
        return self.subject.parts

    def gate_plan(self, aim: str) -> list[Attempt]:
        """List the ways to an aim against this gate."""
        return gate_plan(aim, self.parts, self.gate_source)

    def query(self, goal: Any) -> Query:
        """Ask the subject with a goal."""
        subject = self.subject
        return Query(
            subject.forward,
            goal,
            batch_size=subject.batch_size,
            eot_samples=self.eot_samples,
            success_draws=subject.draws,
        )

    def cost(self, images: int, steps: int, *, gradient: bool) -> dict[str, float]:
        """Return the most that some steps on some images can take."""
        draws = self.subject.draws if self.subject.draws > 1 else 0
        answers = images * (steps + 1)
        plain = answers * max(draws, 0 if gradient else 1)
        return {"forwards": plain, "gradients": answers * self.eot_samples * gradient}


@dataclass
class Chain:
    """Where the attacker of a norm stands, image by image.

    Args:
        pixels: (N, C, H, W) the wrong image, or the best one so far.
        fooled: (N,) bool.
        taken: (N,) bool, the wrong image is accepted by the gate.
        wrong_rounded: (N,) bool, an image was found that is wrong after rounding too.
        fallen_at: (N,) index of the epsilon they fell at; -1 where wrong from the start, and the
            number of epsilons where they stand.
        margin: (N,) of ``pixels``, see :class:`~ebm_guard.robustness.subject.Judged`.
        outside: images that a foreign or broken step put outside the ball.
    """

    pixels: Tensor
    fooled: Tensor
    taken: Tensor
    wrong_rounded: Tensor
    fallen_at: Tensor
    margin: Tensor
    outside: int = 0

    @classmethod
    def begin(cls, context: Context, threat: Threat) -> Chain:
        """Start at the clean images: those wrong already are fooled at epsilon 0."""
        clean, examples = context.clean, context.examples
        as_files = context.subject.judge_rounded(examples.pixels, examples.labels)
        return cls(
            examples.pixels.clone(),
            clean.wrong.clone(),
            (clean.taken & clean.wrong).clone(),
            as_files.wrong & clean.wrong,
            torch.where(clean.wrong, -1, len(threat.epsilons)),
            clean.margin.clone(),
        )

    def take_over(self, rows: Tensor, found: Arrays, index: int) -> int:
        """Enter what a stage found for some rows; return how many it fooled."""
        fooled, margin = tensor(found["fooled"]), tensor(found["margin"])
        # An attack on another loss may end further away than the one before it.
        nearer = fooled | (margin > self.margin[rows])
        self.pixels[rows[nearer]] = tensor(found["pixels"])[nearer]
        self.margin[rows[nearer]] = margin[nearer]
        self.fooled[rows] = fooled
        self.taken[rows] = tensor(found["taken"])
        self.wrong_rounded[rows] = tensor(found["wrong_rounded"])
        self.outside += int(found["outside"])
        self.fallen_at[rows[fooled]] = index
        return int(fooled.sum())


def attack_epsilon(
    context: Context, threat: Threat, index: int, chain: Chain
) -> tuple[list[AttackResult], bool]:
    """Run the attacks of the preset at one epsilon; return their results, and whether all ran."""
    epsilon, results, complete = threat.epsilons[index], [], True
    n = len(context.examples)
    for number, attacker in enumerate(context.preset.attackers):
        rows = torch.nonzero(~chain.fooled).squeeze(1)
        found: Arrays | None = {}
        fooled = 0
        if len(rows):
            found = _stage(context, threat, epsilon, attacker, (index, number), chain, rows)
            if found is not None:
                fooled = chain.take_over(rows, found, index)
        complete &= found is not None
        left: Metric | None = proportion(n - int(chain.fooled.sum()), n)
        results.append(
            AttackResult(
                attacker.name,
                attacker.label,
                None if found is None else left,
                fooled,
                gradients=_total(found, "gradients"),
                forwards=_total(found, "forwards"),
                reason=BUDGET if found is None else "",
            )
        )
    return results, complete


def sharpen(context: Context, threat: Threat, index: int, chain: Chain) -> bool:
    """Push fooled images on until they are wrong as 8-bit files too; return whether that ran.

    The attacks stop at the border, where half a grey value undoes the flip; that would make files
    look safer than they are. Rounding is a part of the forward pass here, its gradient the
    identity; without gradients nothing is pushed, and the figure is left out.
    """
    epsilon = threat.epsilons[index]
    rows = torch.nonzero(chain.fooled & ~chain.wrong_rounded).squeeze(1)
    # Whole grey values only, so that rounding does not lead out of the ball.
    levels = int(epsilon.value * 255 + 1e-6)
    radius = levels / 255 if threat.norm == "linf" else epsilon.value
    if not len(rows) or not radius:
        return True
    if not any(attacker.needs_gradient for attacker in context.preset.attackers):
        return False
    examples, rule = context.examples.select(rows), PGD(_SHARPEN, norm=threat.norm)
    forward = context.subject.forward

    def work() -> Mapping[str, Any]:
        query = context.query(Misclassify("margin"))
        query.forward = lambda pixels: forward(pixels + (rounded(pixels) - pixels).detach())
        place = (context.seed, 5, index)
        outcome = climb(rule, query, examples, radius, start=chain.pixels[rows], seed=place)
        found = judged_outcome(context, outcome, examples, threat.norm, epsilon.value)
        return {"wrong_rounded": found["wrong_rounded"]}

    found = context.runner.run(
        f"rounded/{threat.norm}/{epsilon.text}/{rows_key(rows)}",
        f"wrong after rounding at {threat.norm} {epsilon.text}, {len(rows)} images",
        work,
        **context.cost(len(rows), _SHARPEN, gradient=True),
    )
    if found is not None:
        chain.wrong_rounded[rows] = tensor(found["wrong_rounded"])
    return found is not None


def _stage(
    context: Context,
    threat: Threat,
    epsilon: Epsilon,
    attacker: Attacker,
    place: tuple[int, int],
    chain: Chain,
    rows: Tensor,
) -> Arrays | None:
    examples = context.examples.select(rows)
    start = chain.pixels[rows] if attacker.carries and place[0] > 0 else None
    gradient = attacker.needs_gradient

    def work() -> Mapping[str, Any]:
        outcome = run_goals(context, attacker, threat.norm, examples, epsilon, start, place)
        return judged_outcome(context, outcome, examples, threat.norm, epsilon.value)

    return context.runner.run(
        f"flip/{threat.norm}/{epsilon.text}/{attacker.label}/{rows_key(rows)}",
        f"{attacker.label} at {threat.norm} {epsilon.text}, {len(rows)} images",
        work,
        **context.cost(len(rows), attacker.steps, gradient=gradient),
    )


def run_goals(
    context: Context,
    attacker: Attacker,
    norm: str,
    examples: Examples,
    epsilon: Epsilon,
    start: Tensor | None,
    place: tuple[int, ...],
) -> Outcome:
    """Run an attack with each of its goals, on what the goals before left."""
    if attacker.call is not None:
        return judge_callable(
            attacker.call,
            context.query(attacker.goals[0]),
            examples,
            epsilon.value,
            norm=norm,
            seed=(context.seed, 1, *place),
            name=attacker.label,
        )
    rule = attacker.rule(norm)
    rows, total = torch.arange(len(examples)), None
    for number, goal in enumerate(attacker.goals):
        outcome = climb(
            rule,
            context.query(goal),
            examples.select(rows),
            epsilon.value,
            start=None if start is None else start[rows],
            seed=(context.seed, 1, *place, number),
        )
        total = outcome if total is None else total.with_rows(rows, outcome)
        rows = torch.nonzero(~total.success.cpu()).squeeze(1)
        if not len(rows):
            break
    if total is None:
        raise ValueError(f"{attacker.label} has no goal")
    return total


def judged_outcome(
    context: Context, outcome: Outcome, examples: Examples, norm: str, epsilon: float
) -> dict[str, Any]:
    """Re-score the final images by the deployed forward pass; what is outside counts as right."""
    valid = inside(outcome.pixels, examples, norm, epsilon)
    if isinstance(outcome, ForeignOutcome):
        valid &= outcome.fault.cpu() == 0
    shape = (-1, *[1] * (examples.pixels.ndim - 1))
    kept = torch.where(
        valid.reshape(shape).to(examples.pixels.device), outcome.pixels, examples.pixels
    )
    judged = context.subject.judge(kept, examples.labels)
    as_files = context.subject.judge_rounded(kept, examples.labels)
    files_inside = inside(rounded(kept), examples, norm, epsilon + _rounding(examples, norm))
    fooled = judged.wrong & valid
    forwards = outcome.forwards - outcome.gradients
    return {
        "pixels": kept,
        "fooled": fooled,
        "taken": judged.taken & fooled,
        "wrong_rounded": as_files.wrong & valid & files_inside,
        "margin": judged.margin,
        "outside": int((~valid).sum()),
        "gradients": outcome.gradients,
        "forwards": forwards.clamp(min=0),
    }


def _rounding(examples: Examples, norm: str) -> Tensor:
    """Say how far rounding may lead out of a ball, (N,).

    In linf not at all, where the clean image is a file itself; else half a grey value, and in l2
    that for every pixel.
    """
    if norm == "linf":
        return (rounded(examples.pixels) - examples.pixels).abs().flatten(1).amax(dim=1)
    return torch.full((len(examples),), 0.5 / 255 * examples.pixels[0].numel() ** 0.5)


def _total(found: Arrays | None, name: str) -> int:
    return 0 if not found or name not in found else int(found[name].sum())
