"""Flow-contrastive estimation: NCE whose noise is a flow that learns to look like the data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ebm_guard import energy as formulas
from ebm_guard.sampling.checks import check_whole
from ebm_guard.sampling.densities import GaussianMixture, KnownDensity
from ebm_guard.training.context import Context, TrainingBatch
from ebm_guard.training.density.heads import classifier_of, found_head, head_weights
from ebm_guard.training.objectives.base import LossTerms
from ebm_guard.training.objectives.flow import FlowDensity, require_zuko
from ebm_guard.training.objectives.nce import Nce

# Of the flow's learning rate at each rollback, as the loop slows down the net's.
SLOWER = 0.5


class Fce(Nce):
    """Tell data from draws of a flow, while the flow makes that harder.

    The model is that of ``nce`` on features, p(h) = q(h) exp(-E(h) - c) with q known; the noise
    is a normalising flow q_a. Both share one value

    V(W, c, a) = mean over data of log s(u(h)) + mean over draws of log s(-u(g_a(z))),
    u(h) = log q(h) - E(h) - c - log q_a(h) - log ratio

    (with the rows of both counted alike, as in ``nce``). Every update takes one step up V in the
    head's weights and c, beside the class loss, and one step down V in the weights a of the flow,
    through its density and through its draws. The flow starts by maximum likelihood. Where the
    model is right, V pulls the flow towards the data's density, as a Jensen-Shannon divergence.
    A rollback takes the flow back to its likelihood start and halves its learning rate.

    Args:
        weight: w >= 0.
        base: q: ``gaussian`` or ``mixture``.
        head: ``discriminant`` or ``given``; see ``nce``.
        ratio: draws for each image, whole, >= 1.
        warm_up: share of the run over which the weight of the contrast rises.
        flow_steps: steps of the likelihood start, on the rows that q is fitted on.

    Raises:
        InvalidInputError: settings out of range; zuko is not installed.

    References:
        Gao et al., Flow Contrastive Estimation of Energy-Based Models, CVPR 2020 (value function
        shared by both models). Differs: the energy tilts a known density, so that log Z can be
        checked; one step each per update; the class loss is minimised with it.
    """

    name = "fce"

    def __init__(
        self,
        weight: float = 1.0,
        base: str = "mixture",
        head: str | None = None,
        ratio: int = 1,
        warm_up: float = 0.1,
        flow_steps: int = 20,
    ) -> None:
        require_zuko()
        super().__init__(
            weight=weight, space="features", base=base, head=head, ratio=ratio, warm_up=warm_up
        )
        self.flow_steps = check_whole("flow_steps", flow_steps)
        self._flow: FlowDensity | None = None
        self._begun: dict[str, Any] | None = None

    @property
    def flow(self) -> FlowDensity:
        """The flow, made on first use around the densities that were fitted."""
        if self._flow is None:
            like = self.space.noise
            if not isinstance(like, GaussianMixture):
                raise TypeError("the noise of features is a mixture of Gaussians")
            self._flow = FlowDensity(like)
        return self._flow

    def begun(self, context: Context, points: Tensor) -> None:
        """Fit the flow by maximum likelihood, and keep it for rollbacks."""
        like = self.space.noise
        if not isinstance(like, GaussianMixture):
            raise TypeError("the noise of features is a mixture of Gaussians")
        self._flow = FlowDensity(like, context.seed, context.device)
        self._flow.fit(points, self.flow_steps, context.torch_generator("flow"))
        self._flow.restart()
        self._begun = self._flow.state_dict()

    def loss(self, context: Context, batch: TrainingBatch) -> LossTerms:
        """Compute class loss and contrast; c and the flow take their steps."""
        classifier = classifier_of(context)
        found_head(classifier, batch.pixels)
        weight, bias = (part.double().clone() for part in head_weights(classifier))
        terms = super().loss(context, batch)
        constant = self.constant or 0.0

        def log_model(points: Tensor) -> Tensor:
            energies = formulas.energy(F.linear(points, weight, bias))
            return self.space.base.log_density(points) - energies - constant

        data = self._seen
        if data is None:
            raise TypeError("the contrast keeps the points that it saw")
        self.flow.contend(
            data, log_model, self.ratio * len(data), context.torch_generator("contend")
        )
        return terms

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw n points of the flow, float64."""
        return self.flow.draw(n, generator)

    @torch.no_grad()
    def log_ratio(self, points: Tensor) -> Tensor:
        """Compute log q - log q_a, (N,) float64, without gradients."""
        return self.space.base.log_density(points) - self.flow.log_density(points)

    def final_noise(self) -> KnownDensity | None:
        """Return the flow."""
        return self.flow

    def rolled_back(self, context: Context) -> None:
        """Fit c anew, and go back to the flow of the start, which then learns more slowly."""
        super().rolled_back(context)
        if self._begun is not None:
            self.flow.load_state_dict(self._begun)
        self.flow.restart(SLOWER**context.attempt)

    def identity(self) -> dict[str, Any]:
        """Return the settings as they were given."""
        return {**super().identity(), "flow_steps": self.flow_steps}

    def state_dict(self) -> dict[str, Any]:
        """Return c, the known densities, and the flow with its optimiser, now and at the start."""
        flow = None if self._flow is None else self._flow.state_dict()
        return {**super().state_dict(), "flow": flow, "begun": self._begun}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back c, the known densities, and the flow."""
        super().load_state_dict(state)
        self._flow, self._begun = None, state["begun"]
        if state["flow"] is not None:
            self.flow.load_state_dict(state["flow"])
