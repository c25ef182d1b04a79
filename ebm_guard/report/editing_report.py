"""What inpainting, denoising and morphing gave, measured beside what knows nothing of the net."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ebm_guard.intervals import Metric, mean, proportion
from ebm_guard.report.record import Record, plain

if TYPE_CHECKING:
    import torch

    from ebm_guard.sampling import Denoised, Inpainted, Morph

STAGES = ("truth", "given", "trivial", "chains")
LEVELS = (0.05, 0.5, 0.95)
# Below this share of accepted proposals, chains stay where they start.
_FROZEN = 0.05


@dataclass(frozen=True)
class EditedSection(Record):
    """Damaged images that chains were to restore.

    Stages are ``truth``, ``given`` (where chains started), ``trivial`` (a fill or a filter without
    the net) and ``chains``.

    Args:
        n: images.
        sentence: what came of it, in words.
        measure: ``rmse`` (of the values in the holes; lower is better) or ``psnr`` (dB; higher).
        errors: mean of the measure by stage, the truth left out.
        difference: chains minus trivial, paired by image.
        better: whether the chains are nearer to the truth; None where the interval holds 0.
        energy: mean E(x) by stage.
        below_truth: share of the images whose chains end at a lower energy than the truth has.
        named: share named as labelled by stage, or None without labels.
        rows: for each image its label, and by stage the measure, E(x) and the class named.
        acceptance: share of the proposals that the sampler accepted; None where it rejects none.
        settings: of the chains.
    """

    n: int
    sentence: str
    measure: str
    errors: Mapping[str, Metric]
    difference: Metric
    better: bool | None
    energy: Mapping[str, Metric]
    below_truth: Metric
    named: Mapping[str, Metric] | None
    rows: list[dict[str, Any]]
    acceptance: float | None
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class MorphSection(Record):
    """Chains on their way from class a to class b.

    Args:
        n: chains.
        sentence: what came of it, in words.
        a: number of the class that they come from.
        b: of the class that they go to.
        names: of the two.
        t: of the frames, from 0 to 1.
        probability_a: p(a|x) by frame, ``low``, ``median``, ``high`` (5, 50, 95 % of the chains).
        probability_b: p(b|x).
        joint_energy_a: E(x, a).
        joint_energy_b: E(x, b).
        energy: E(x).
        moved: RMSE from the start.
        arrived: share of the chains named b at the end.
        moved_end: mean RMSE from the start at the end.
        nearest: mean RMSE from a start to its nearest real image of b, or None without images.
        nearest_end: the same from where the chains ended.
        difference: nearest_end minus nearest, paired by chain, or None.
        settings: of the chains.
    """

    n: int
    sentence: str
    a: int
    b: int
    names: tuple[str, str]
    t: list[float]
    probability_a: Mapping[str, list[float]]
    probability_b: Mapping[str, list[float]]
    joint_energy_a: Mapping[str, list[float]]
    joint_energy_b: Mapping[str, list[float]]
    energy: Mapping[str, list[float]]
    moved: Mapping[str, list[float]]
    arrived: Metric
    moved_end: Metric
    nearest: Metric | None
    nearest_end: Metric | None
    difference: Metric | None
    settings: Mapping[str, Any]


def inpainting_section(made: Inpainted) -> EditedSection:
    """Put inpainting into the report; the truth must be known."""
    return _section(made, "rmse", {name: made.errors(name) for name in _damaged(made)})


def denoising_section(made: Denoised) -> EditedSection:
    """Put denoising into the report; the truth must be known."""
    return _section(made, "psnr", {name: made.psnr(name) for name in _damaged(made)})


def _damaged(made: Inpainted | Denoised) -> list[str]:
    return [name for name in STAGES if name in made.pixels and name != "truth"]


def _section(
    made: Inpainted | Denoised, measure: str, values: Mapping[str, torch.Tensor]
) -> EditedSection:
    errors = {name: _array(part) for name, part in values.items()}
    energy = {name: _array(made.energy[name]) for name in STAGES if name in made.energy}
    predicted = {name: made.predicted[name].tolist() for name in energy}
    labels = None if made.labels is None else made.labels.tolist()
    difference = mean(errors["chains"] - errors["trivial"])
    better = _sign(difference)
    if better is not None and measure == "rmse":
        better = not better
    below = energy["chains"] < energy["truth"]
    named = labels and {
        name: proportion(sum(map(int.__eq__, found, labels)), len(labels))
        for name, found in predicted.items()
    }
    means = {name: mean(part) for name, part in errors.items()}
    below_truth = proportion(int(below.sum()), len(below))
    steps = made.trace.acceptance
    accepted = None if steps is None or not len(steps) else float(steps.mean())
    rows = [
        {
            "label": None if labels is None else labels[row],
            "errors": {name: float(part[row]) for name, part in errors.items()},
            "energy": {name: float(part[row]) for name, part in energy.items()},
            "predicted": {name: part[row] for name, part in predicted.items()},
        }
        for row in range(len(below))
    ]
    return EditedSection(
        n=len(below),
        sentence=_edit_sentence(measure, means, difference, better, below_truth, accepted),
        measure=measure,
        errors=means,
        difference=difference,
        better=better,
        energy={name: mean(part) for name, part in energy.items()},
        below_truth=below_truth,
        named=named or None,
        rows=rows,
        acceptance=accepted,
        settings=plain(made.settings),
    )


def _edit_sentence(
    measure: str,
    means: Mapping[str, Metric],
    difference: Metric,
    better: bool | None,
    below: Metric,
    accepted: float | None,
) -> str:
    inpainted = measure == "rmse"
    what = "the fill" if inpainted else "the filter"
    unit, digits = ("", 3) if inpainted else (" dB", 2)

    def said(metric: Metric) -> str:
        return f"{metric.value:.{digits}f}{unit}".replace("-", "−")

    if inpainted:
        compared = (
            f"Inside the holes the chains are off by an RMSE of {said(means['chains'])}, the "
            f"smooth fill from the surroundings by {said(means['trivial'])}"
        )
    else:
        compared = (
            f"The chains reach a PSNR of {said(means['chains'])} and the Wiener filter "
            f"{said(means['trivial'])}; the noisy images have {said(means['given'])}"
        )
    verdict = {
        True: f"the chains are nearer to the true images than {what}, which knows nothing of the "
        "net",
        False: f"{what}, which knows nothing of the net, is nearer to the true images",
        None: f"no difference between the chains and {what} is shown by {difference.n} images",
    }[better]
    if accepted is not None and accepted < _FROZEN:
        return (
            f"{compared}. The chains hardly moved: {100 * accepted:.1f} % of their proposals were "
            "accepted, so this says nothing about the energy. Take smaller steps."
        )
    more = f" {100 * below.value:.0f} % of the chains end at a lower energy than the true image has"
    if below.value >= 0.5:
        more += ": the net finds what it made itself more familiar than the truth"
    return f"{compared}: {verdict}.{more}."


def morph_section(made: Morph) -> MorphSection:
    """Put a morph into the report."""
    chains = made.frames.shape[1]
    moved = _array(made.moved)
    nearest = nearest_end = difference = None
    shorter = False
    if made.nearest_b is not None and made.nearest_b_end is not None:
        near, after = _array(made.nearest_b), _array(made.nearest_b_end)
        nearest, nearest_end, difference = mean(near), mean(after), mean(after - near)
        there = (made.predicted[-1] == made.b).numpy()
        shorter = int(there.sum()) > 1 and _sign(mean((near - moved[-1])[there])) is True
    arrived = proportion(int((made.predicted[-1] == made.b).sum()), chains)
    end = mean(moved[-1])
    said = _morph_sentence(made.names, arrived, end)
    if nearest is None or nearest_end is None or difference is None:
        said += " No real images were given to compare the distance with."
    else:
        said += _near_sentence(made.names[1], nearest, nearest_end, difference, shorter)
    return MorphSection(
        n=chains,
        sentence=said,
        a=made.a,
        b=made.b,
        names=made.names,
        t=[float(value) for value in made.t],
        probability_a=_spread(made.probability_a),
        probability_b=_spread(made.probability_b),
        joint_energy_a=_spread(made.joint_energy_a),
        joint_energy_b=_spread(made.joint_energy_b),
        energy=_spread(made.energy),
        moved=_spread(made.moved),
        arrived=arrived,
        moved_end=end,
        nearest=nearest,
        nearest_end=nearest_end,
        difference=difference,
        settings=plain(made.settings),
    )


def _morph_sentence(names: tuple[str, str], arrived: Metric, end: Metric) -> str:
    return (
        f"{round(arrived.value * arrived.n)} of {arrived.n} chains from {names[0]} are named "
        f"{names[1]} at the end, after their pixels moved by an RMSE of {end.value:.3f}."
    )


def _near_sentence(
    name: str, nearest: Metric, nearest_end: Metric, difference: Metric, shorter: bool
) -> str:
    """Say whether the chains came nearer to real images."""
    verdict = {
        False: f"the chains came nearer to real images of {name}",
        True: f"the chains went away from real images of {name}; what the net reacts to is not "
        "what they look like",
        None: f"that they came nearer to real images of {name} is not shown",
    }[_sign(difference)]
    said = (
        f" The nearest real image of {name} is {nearest.value:.3f} away from where they started, "
        f"and {nearest_end.value:.3f} from where they ended: {verdict}."
    )
    if shorter:
        said += (
            " The chains that arrived moved by less than the way to a real image, as adversarial "
            "examples do."
        )
    return said


def _sign(difference: Metric) -> bool | None:
    """Tell whether a difference is above 0; None where its interval holds 0, or there is none."""
    if difference.low is None or difference.high is None:
        return None
    if difference.low <= 0 <= difference.high:
        return None
    return difference.value > 0


def _array(values: torch.Tensor) -> NDArray[np.float64]:
    return np.asarray(values.double().numpy(), dtype=np.float64)


def _spread(values: torch.Tensor) -> dict[str, list[float]]:
    rows = np.quantile(_array(values), LEVELS, axis=1)
    return dict(zip(("low", "median", "high"), rows.tolist(), strict=True))
