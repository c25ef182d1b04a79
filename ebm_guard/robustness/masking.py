"""Flags that a robust accuracy flatters: signs of masked gradients, in words, with what to do.

An attack that follows useless gradients reports a robust model where there is a broken attack. No
flag proves robustness, and a raised flag proves nothing by itself: it says where to look.

Counts are judged by an exact one-sided binomial test: a flag is raised where a true share of 1 %
would give so many images in at most 5 % of runs. One image in 50 raises nothing; three do.

References:
    Athalye et al., Obfuscated Gradients Give a False Sense of Security, ICML 2018, section 3.1;
    Carlini et al., On Evaluating Adversarial Robustness, 2019, section 5. The tests are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ebm_guard.attacks.rows import Examples
from ebm_guard.model.isolation import Forward
from ebm_guard.robustness.masking_probes import (
    CLOSED,
    LARGE_EPSILONS,
    Count,
    CurvePoint,
    StepsGain,
    forward_problem,
    large_epsilon_accuracy,
    more_steps_gain,
    output_problem,
    random_forward,
    zero_gradient_count,
)

__all__ = [
    "ALPHA",
    "LARGE_EPSILONS",
    "NAMES",
    "SHARE",
    "Count",
    "CurvePoint",
    "MaskingEvidence",
    "MaskingFlag",
    "StepsGain",
    "exceeds",
    "forward_problem",
    "large_epsilon_accuracy",
    "masking_flags",
    "more_steps_gain",
    "output_problem",
    "probe_model",
    "random_forward",
    "zero_gradient_count",
]

Status = Literal["clear", "raised", "not_run"]
ALPHA = 0.05
# A share of images that chance and rounding may explain.
SHARE = 0.01
# A curve that fell by this share of the images, and then loses less than the second share of those
# left while epsilon grows by the third number, is flat.
_FELL, _MOVES, _RATIO = 0.1, 0.05, 4.0
# All pixels at 0.5 lie within this linf distance of every image.
_GREY = 0.5


@dataclass(frozen=True)
class MaskingEvidence:
    """What was measured; None where it was not.

    Args:
        square_only: images that the square attack fooled and no gradient attack did, of those
            attacked by both.
        fgsm_only: images that FGSM fooled and PGD did not, at the same epsilon.
        large_epsilon: images still right at large budgets, of those right without attack; see
            :func:`~ebm_guard.robustness.masking_probes.large_epsilon_accuracy`.
        curve: the same at the budgets of the report.
        zero_gradients: by loss, images whose gradient is zero everywhere or not finite.
        random_forward: whether two forward passes of the same images differ.
        output_problem: what is wrong with the logits, '' for nothing.
        forward_problem: why no gradient passes, or what hides it, '' for nothing.
        more_steps: what twice the steps gained.
    """

    square_only: Count | None = None
    fgsm_only: Count | None = None
    large_epsilon: Sequence[CurvePoint] | None = None
    curve: Sequence[CurvePoint] | None = None
    zero_gradients: Mapping[str, Count] | None = None
    random_forward: bool | None = None
    output_problem: str | None = None
    forward_problem: str | None = None
    more_steps: StepsGain | None = None


@dataclass(frozen=True)
class MaskingFlag:
    """One check.

    Args:
        name: of the check.
        status: ``clear``, ``raised`` or ``not_run``.
        sentence: what was seen.
        advice: what to do, '' unless raised or not run.
    """

    name: str
    status: Status
    sentence: str
    advice: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the flag as JSON types."""
        return asdict(self)


@dataclass(frozen=True)
class _Check:
    name: str
    run: Callable[[MaskingEvidence], tuple[bool, str] | None]
    advice: str


def masking_flags(evidence: MaskingEvidence) -> list[MaskingFlag]:
    """Judge the evidence: one flag for each of the nine checks, in a fixed order.

    Example:
        >>> flags = masking_flags(MaskingEvidence(square_only=Count(9, 100)))
        >>> [flag.name for flag in flags if flag.status == "raised"]
        ['square_wins']
    """
    found = []
    for check in _CHECKS:
        seen = check.run(evidence)
        if seen is None:
            advice = "run the preset `standard` or `full`, with a larger time budget if one was set"
            found.append(MaskingFlag(check.name, "not_run", "not measured in this run", advice))
        else:
            raised, sentence = seen
            status: Status = "raised" if raised else "clear"
            found.append(MaskingFlag(check.name, status, sentence, check.advice if raised else ""))
    return found


def probe_model(forward: Forward, examples: Examples, batch_size: int = 64) -> MaskingEvidence:
    """Measure what needs no attack: kind of output, gradients, randomness.

    Args:
        forward: the attacked function.
        examples: real images, unattacked.
        batch_size: images per pass.
    """
    problem = forward_problem(forward, examples)
    zeros = {}
    if not problem.startswith(CLOSED):
        zeros = {
            loss: zero_gradient_count(forward, examples, loss, batch_size)
            for loss in ("ce", "margin")
        }
    return MaskingEvidence(
        zero_gradients=zeros or None,
        random_forward=random_forward(forward, examples),
        output_problem=output_problem(forward, examples),
        forward_problem=problem,
    )


def exceeds(count: int, n: int, share: float = SHARE) -> bool:
    """Tell whether so many of n would be seen in at most 5 % of runs at this true share.

    P(Binomial(n, share) >= count) <= 0.05.

    Example:
        >>> [exceeds(count, 50) for count in (1, 2, 3)]
        [False, False, True]
    """
    from scipy.stats import binom

    return count > 0 and float(binom.sf(count - 1, n, share)) <= ALPHA


def _square(evidence: MaskingEvidence) -> tuple[bool, str] | None:
    found = evidence.square_only
    if found is None or not found.n:
        return None
    return exceeds(found.count, found.n), (
        f"the square attack, which uses no gradients, fooled {found.count} of {found.n} images "
        "that all gradient attacks left standing"
    )


def _fgsm(evidence: MaskingEvidence) -> tuple[bool, str] | None:
    found = evidence.fgsm_only
    if found is None or not found.n:
        return None
    return exceeds(found.count, found.n), (
        f"one step (FGSM) fooled {found.count} of {found.n} images that many steps (PGD) did not"
    )


def _large(evidence: MaskingEvidence) -> tuple[bool, str] | None:
    points = [point for point in evidence.large_epsilon or () if point.n]
    if not points:
        return None
    last = max(points, key=lambda point: point.epsilon)
    reach = (
        "where every image can be turned into the same grey one"
        if last.epsilon >= _GREY
        else "where the images of ordinary data can be changed beyond recognition"
    )
    return exceeds(last.standing, last.n), (
        f"{last.standing} of {last.n} images were still right at epsilon {_written(last.epsilon)}, "
        f"{reach}"
    )


def _flat(evidence: MaskingEvidence) -> tuple[bool, str] | None:
    points = sorted(
        (point for point in evidence.curve or () if point.epsilon > 0 and point.n),
        key=lambda point: point.epsilon,
    )
    pairs = [
        (low, high)
        for low in points
        for high in points
        if high.epsilon >= _RATIO * low.epsilon * (1 - 1e-9)
    ]
    if not pairs:
        return None
    for low, high in pairs:
        if low.n - low.standing >= _FELL * low.n and _stays(low, high):
            return True, (
                f"the accuracy stays at {high.standing} to {low.standing} of {low.n} images "
                f"between epsilon {_written(low.epsilon)} and {_written(high.epsilon)}"
            )
    first, last = points[0], points[-1]
    return False, (
        f"the accuracy moves from {first.standing} of {first.n} images at epsilon "
        f"{_written(first.epsilon)} to {last.standing} at {_written(last.epsilon)}"
    )


def _stays(low: CurvePoint, high: CurvePoint) -> bool:
    """Tell whether fewer fell than 5 % of those left would give in 95 % of runs."""
    from scipy.stats import binom

    fallen = low.standing - high.standing
    return low.standing > 0 and float(binom.cdf(fallen, low.standing, _MOVES)) <= ALPHA


def _written(epsilon: float) -> str:
    """Write a budget as people do: as a short decimal, or in 255ths.

    Example:
        >>> _written(0.3), _written(8 / 255), _written(0.5 / 255)
        ('0.3', '8/255', '0.5/255')
    """
    levels = epsilon * 255
    if abs(epsilon - round(epsilon, 2)) < 1e-9:
        return f"{epsilon:.3g}"
    whole = abs(2 * levels - round(2 * levels)) < 1e-6
    return f"{levels:.4g}/255" if whole else f"{epsilon:.3g}"


def _zeros(evidence: MaskingEvidence) -> tuple[bool, str] | None:
    losses = {name: found for name, found in (evidence.zero_gradients or {}).items() if found.n}
    if not losses:
        return None
    shares = ", ".join(
        f"{found.count} of {found.n} images with the loss {name}" for name, found in losses.items()
    )
    bad = [name for name, found in losses.items() if exceeds(found.count, found.n)]
    sentence = f"the gradient is zero, or not finite, on {shares}"
    good = [name for name in losses if name not in bad]
    if bad and good:
        sentence += (
            f": the logits are so far apart that {' and '.join(bad)} rounds to nothing, and "
            f"{' and '.join(good)} does not"
        )
    return bool(bad), sentence


def _random(evidence: MaskingEvidence) -> tuple[bool, str] | None:
    if evidence.random_forward is None:
        return None
    if evidence.random_forward:
        return True, "two forward passes of the same images give different logits"
    return False, "two forward passes of the same images give the same logits"


def _outputs(evidence: MaskingEvidence) -> tuple[bool, str] | None:
    if evidence.output_problem is None:
        return None
    return bool(evidence.output_problem), evidence.output_problem or "the outputs are logits"


def _forward(evidence: MaskingEvidence) -> tuple[bool, str] | None:
    if evidence.forward_problem is None:
        return None
    fine = "gradients pass through the model, and it computes none of its own"
    return bool(evidence.forward_problem), evidence.forward_problem or fine


def _steps(evidence: MaskingEvidence) -> tuple[bool, str] | None:
    found = evidence.more_steps
    if found is None or not found.n:
        return None
    raised = found.gained / found.n >= SHARE and exceeds(found.gained, found.n)
    return raised, (
        f"{2 * found.num_steps} steps fooled {found.gained} of {found.n} images that "
        f"{found.num_steps} steps did not ({100 * found.gained / found.n:.1f} points)"
    )


_CHECKS = (
    _Check(
        "square_wins",
        _square,
        "the gradients mislead: trust the worst case over both attacks only, give the square "
        "attack more queries, and look for rounding, clipping or noise in the model or its "
        "preprocessing",
    ),
    _Check(
        "fgsm_beats_pgd",
        _fgsm,
        "the loss is rough near the images: use smaller steps, more random starts and the margin "
        "loss, and compare with the square attack",
    ),
    _Check(
        "large_epsilon",
        _large,
        "the attack fails, or this budget is small for these images: attack at linf 0.5, where "
        "all images can be the same grey one; what stands there stands because the attack fails. "
        "Then use more steps, other losses and the square attack",
    ),
    _Check(
        "flat_curve",
        _flat,
        "a larger budget must help an attack that works: look for a model that does not let "
        "gradients through for some images, and run the square attack on those that stand",
    ),
    _Check(
        "zero_gradients",
        _zeros,
        "attacks cannot move these images: use the margin loss or DLR instead of cross-entropy; "
        "where those are zero as well the model rounds or saturates, and only the square attack "
        "counts",
    ),
    _Check(
        "random_forward",
        _random,
        "average each gradient over at least 20 passes (eot_samples), and call an image fooled "
        "where most of at least 10 fresh passes are wrong",
    ),
    _Check(
        "not_logits",
        _outputs,
        "give the attack the logits before the softmax: probabilities saturate, and their "
        "gradients vanish",
    ),
    _Check(
        "hidden_gradient",
        _forward,
        "gradient attacks do not see what the model does: use the square attack, or write the "
        "model so that gradients pass (a differentiable stand-in for the part that hides them)",
    ),
    _Check(
        "more_steps_gain",
        _steps,
        "the attack had not finished: double the steps until nothing is gained, and report that "
        "number",
    ),
)
NAMES = tuple(check.name for check in _CHECKS)
