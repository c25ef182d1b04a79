"""The joint energy-based model: likelihood terms with negatives from the net's own chains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ebm_guard import energy as formulas
from ebm_guard.errors import InvalidInputError
from ebm_guard.sampling import SGLD, Sampler
from ebm_guard.sampling.checks import check_choice, check_number
from ebm_guard.training.context import Context, TrainingBatch
from ebm_guard.training.negatives.base import on_edge
from ebm_guard.training.negatives.chains import ChainNegatives, DataChains, Drawn, NoiseChains
from ebm_guard.training.negatives.replay import Replay
from ebm_guard.training.objectives.base import LossTerms, Objective
from ebm_guard.training.objectives.terms import (
    UNLABELLED,
    item,
    warmed_up,
)

CHAINS: dict[str, type[ChainNegatives]] = {
    "buffer": Replay,
    "data": DataChains,
    "noise": NoiseChains,
}


class Jem(Objective):
    """Raise the likelihood of p(y|x), p(x) and p(x, y), each with its weight.

    L = w_y L_class + r w_x (mean E(x+) - mean E(x-)) + r w_xy (mean E(x+, y) - mean E(x-, y-))
    + r a (mean (E(x+) - E0)^2 + mean (E(x-) - E0)^2) / s^2, with x- from chains that are held
    fixed, so that the gradient of the second term is w_x times the difference of the batch means
    of dE/dtheta: that of -log p(x) with the chains in place of the model's own distribution. The
    *value* of the loss is no likelihood.

    The penalty holds all energies near those of the given net (mean E0, standard deviation s):
    E(x+) - E(x-) alone is unbounded, and wrecks a trained classifier within some tens of updates.
    r rises from 0 to 1.

    This objective is for experts and for training on: on a finished classifier `margin` and `dat`
    gain more, at less cost, and lose less accuracy.

    Args:
        weight_y: w_y of the cross-entropy, >= 0.
        weight_x: w_x, >= 0.
        weight_xy: w_xy, >= 0; needs chains of its own, which follow E(x, y).
        alpha: a of the penalty, >= 0.
        chains: where chains start: ``buffer`` (persistent), ``data`` (contrastive divergence) or
            ``noise``; or ChainNegatives for p(x).
        num_steps: steps of a chain in one update.
        step_size: of SGLD, in [0, 1] pixels.
        clip: largest change of a value by the gradient in one step, or None.
        sampler: instead of SGLD with these settings.
        warm_up: share of the run over which r rises.

    Raises:
        InvalidInputError: settings out of range, or no weight is positive.

    References:
        Grathwohl et al., ICLR 2020, algorithm 1; the p(x, y) term as in the authors'
        code; Du and Mordatch, NeurIPS 2019, section 3.1 (penalty on energies, there on E^2, which
        drags a trained net's logits to 0: ours is centred); Yang and Ji, JEM++, ICCV 2021
        (class-Gaussian starts, clip).

    Example:
        >>> Jem(weight_x=0.5, chains="data").settings()["chains"]["negatives"]
        'data_chains'
    """

    name = "jem"
    default_learning_rate = 1e-4

    def __init__(
        self,
        weight_y: float = 1.0,
        weight_x: float = 0.1,
        weight_xy: float = 0.0,
        alpha: float = 0.1,
        chains: str | ChainNegatives = "buffer",
        num_steps: int = 10,
        step_size: float = 0.25,
        clip: float | None = 0.01,
        sampler: Sampler | None = None,
        warm_up: float = 0.2,
    ) -> None:
        self.weight_y = check_number("weight_y", weight_y)
        self.weight_x = check_number("weight_x", weight_x)
        self.weight_xy = check_number("weight_xy", weight_xy)
        if not self.weight_y + self.weight_x + self.weight_xy:
            raise InvalidInputError("got no positive weight; one of them must be above 0")
        self.alpha = check_number("alpha", alpha)
        self.warm_up = check_number("warm_up", warm_up, high=1.0)
        used = SGLD.short_run(num_steps, step_size, clip=clip) if sampler is None else sampler
        self.chains: ChainNegatives | None = None
        self.joint_chains: ChainNegatives | None = None
        kind = chains if isinstance(chains, ChainNegatives) else _kind(chains)(used)
        if self.weight_x > 0:
            self.chains = kind
        if self.weight_xy > 0:
            self.joint_chains = kind.conditioned()

    def begin(self, context: Context, batch: TrainingBatch) -> None:
        """Prepare buffers and starts."""
        for chains in self._all().values():
            chains.begin(context, batch)

    def loss(self, context: Context, batch: TrainingBatch) -> LossTerms:
        """Run the chains, then compute all terms from one forward pass."""
        drawn = {name: chains.draw_labelled(context, batch) for name, chains in self._all().items()}
        logits = context.together(
            augmented=batch.augmented,
            data=batch.pixels,
            **{name: part.pixels for name, part in drawn.items()},
        )
        energies = {name: formulas.energy(logits[name]) for name in ("data", *drawn)}
        ramp = warmed_up(context, self.warm_up)
        terms = {"class": self.weight_y * context.class_loss(logits["augmented"], batch.labels)}
        if "negatives" in drawn:
            gap = energies["data"].mean() - energies["negatives"].mean()
            terms["x"] = ramp * self.weight_x * gap
        if "joint" in drawn:
            gap = _joint_gap(logits["data"], batch.labels, logits["joint"], drawn["joint"])
            terms["xy"] = ramp * self.weight_xy * gap
        measured = context.measured
        away = [((part - measured.mean) / measured.std).square() for part in energies.values()]
        terms["penalty"] = ramp * self.alpha * torch.stack([part.mean() for part in away]).sum()
        total: Tensor = sum(terms.values(), start=logits["data"].new_zeros(()))
        off = next((part for name, part in energies.items() if name != "data"), None)
        return LossTerms(
            total,
            {name: item(term) for name, term in terms.items()},
            energies["data"].detach(),
            None if off is None else off.detach(),
            saturation=max((on_edge(part.pixels) for part in drawn.values()), default=None),
        )

    def _all(self) -> dict[str, ChainNegatives]:
        found = {"negatives": self.chains, "joint": self.joint_chains}
        return {name: chains for name, chains in found.items() if chains is not None}

    def rolled_back(self, context: Context) -> None:
        """Let all chains start anew."""
        for chains in self._all().values():
            chains.rolled_back(context)

    def settings(self) -> dict[str, Any]:
        """Return the settings as JSON types."""
        some = self.chains or self.joint_chains
        return {
            "objective": self.name,
            "weight_y": self.weight_y,
            "weight_x": self.weight_x,
            "weight_xy": self.weight_xy,
            "alpha": self.alpha,
            "warm_up": self.warm_up,
            "chains": None if some is None else some.settings(),
        }

    def identity(self) -> dict[str, Any]:
        """Return the settings as they were given."""
        some = self.chains or self.joint_chains
        return {**self.settings(), "chains": None if some is None else some.identity()}

    def state_dict(self) -> dict[str, Any]:
        """Return chains and starts."""
        return {name: chains.state_dict() for name, chains in self._all().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back chains and starts."""
        for name, chains in self._all().items():
            chains.load_state_dict(state[name])


def _kind(chains: str) -> type[ChainNegatives]:
    return CHAINS[check_choice("chains", chains, tuple(CHAINS))]


def _joint_gap(logits: Tensor, labels: Tensor, off_logits: Tensor, drawn: Drawn) -> Tensor:
    """Compute mean E(x+, y) over the labelled rows minus mean E(x-, y-)."""
    known = labels != UNLABELLED
    energies = formulas.joint_energy(logits[known]).gather(1, labels[known][:, None])
    data = energies.sum() / max(1, int(known.sum()))
    if drawn.labels is None:
        raise InvalidInputError("got chains of E(x) for the p(x, y) term; use conditional=True")
    return data - formulas.joint_energy(off_logits).gather(1, drawn.labels[:, None]).mean()
