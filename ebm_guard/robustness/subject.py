"""What is attacked: the classifier as deployed, with its gate where it has one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ebm_guard.attacks import Examples, pixel_forward, untouched
from ebm_guard.attacks.geometry import TOLERANCE, ball_of
from ebm_guard.attacks.goals import margin, wrong
from ebm_guard.errors import UnsupportedModelError
from ebm_guard.gate.deciding import Parts, decide
from ebm_guard.model import EnergyClassifier
from ebm_guard.model.classifier import ClassifierOutput, check_kind

_PROBE = 8


@dataclass(frozen=True)
class Judged:
    """The deployed forward pass's word on some images.

    Args:
        wrong: (N,) bool, the classifier names another class than the label.
        accepted: (N,) bool, the gate accepts; all True without a gate.
        taken: (N,) bool, the deployed label is wrong **and** the gate accepts; without a gate the
            same as ``wrong``.
        margin: (N,) max_{j != y} f_j - f_y of the classifier, > 0 where it is wrong.
        energy: (N,) float64.
        score: (N,) float64 of the gate, or the energy without one.
    """

    wrong: Tensor
    accepted: Tensor
    taken: Tensor
    margin: Tensor
    energy: Tensor
    score: Tensor


@dataclass
class Counts:
    """What the model was asked: passes of single images.

    Args:
        forwards: without a gradient.
        gradients: forward and backward passes.
    """

    forwards: int = 0
    gradients: int = 0


class Subject:
    """A classifier under attack.

    Args:
        classifier: the wrapped model; pixels go through its preprocessing.
        parts: the gate, or None.
        batch_size: images per forward pass.
        draws: fresh forward passes that a verdict is the majority of, for random inference.

    Raises:
        UnsupportedModelError: the gate's score needs features and the head was not found.
    """

    def __init__(
        self,
        classifier: EnergyClassifier,
        parts: Parts | None = None,
        *,
        batch_size: int = 64,
        draws: int = 1,
    ) -> None:
        self.classifier, self.parts = classifier, parts
        self.batch_size, self.draws = batch_size, draws
        self.counts = Counts()
        self._plain = pixel_forward(classifier, features=self.needs_features)

    def forward(self, pixels: Tensor) -> ClassifierOutput:
        """Run the model on pixels, and count what it costs."""
        wanted = torch.is_grad_enabled() and pixels.requires_grad
        self.counts.gradients += len(pixels) * wanted
        self.counts.forwards += len(pixels) * (not wanted)
        return self._plain(pixels)

    @property
    def needs_features(self) -> bool:
        """Whether the gate's score reads features."""
        return self.parts is not None and self.parts.score.needs_features

    @property
    def on_gpu(self) -> bool:
        """Whether the model runs on a CUDA device, which works on while Python goes on."""
        device = self.classifier.device
        return device is not None and device.type == "cuda"

    def with_draws(self, draws: int) -> Subject:
        """Return the same subject, judged by the majority of some draws."""
        found = Subject(self.classifier, self.parts, batch_size=self.batch_size, draws=draws)
        found.counts = self.counts
        return found

    @contextmanager
    def untouched(self, seed: int) -> Iterator[None]:
        """Hold the user's model still; see :func:`ebm_guard.model.isolation.untouched`."""
        with untouched(self.classifier.model, seed):
            yield

    def check(self, pixels: Tensor) -> None:
        """Run a first batch: find the head where needed, and refuse probabilities.

        Raises:
            UnsupportedModelError: no head, or outputs that are no logits.
        """
        probe = pixels[:_PROBE]
        if self.needs_features and (self.classifier.head is None or not self.classifier.head.found):
            head = self.classifier.probe_head(self.classifier.pixels(probe))
            if not head.found:
                raise UnsupportedModelError(
                    "the gate's score needs the features of the last linear layer, and that was "
                    f"not found in this model: {head.message}"
                )
        with torch.no_grad():
            check_kind(self.forward(probe).logits)

    def judge(self, pixels: Tensor, labels: Tensor) -> Judged:
        """Run the deployed forward pass, in float32 pixels, and decide."""
        parts = []
        for start in range(0, len(pixels), self.batch_size):
            rows = slice(start, start + self.batch_size)
            draws = [self._judge(pixels[rows], labels[rows]) for _ in range(self.draws)]
            parts.append(draws[0] if self.draws == 1 else _majority(draws))
        return Judged(
            *(torch.cat([getattr(part, name) for part in parts]) for name in _FIELDS),
        )

    def judge_rounded(self, pixels: Tensor, labels: Tensor) -> Judged:
        """Judge the images as files keep them: rounded to 256 grey values."""
        return self.judge(rounded(pixels), labels)

    @torch.no_grad()
    def _judge(self, pixels: Tensor, labels: Tensor) -> Judged:
        output = self.forward(pixels)
        mistaken = wrong(output.logits, labels).cpu()
        ahead = margin(output.logits.float(), labels.to(output.logits.device)).cpu()
        if self.parts is None:
            energy = _energy(output)
            every = torch.ones_like(mistaken)
            return Judged(mistaken, every, mistaken, ahead, energy, energy)
        decision = decide(self.parts, output.logits, output.features)
        accepted = decision.accept.cpu()
        taken = accepted & (decision.label.cpu() != labels.cpu())
        return Judged(
            mistaken, accepted, taken, ahead, decision.energy.double().cpu(), decision.score.cpu()
        )


_FIELDS = ("wrong", "accepted", "taken", "margin", "energy", "score")


def rounded(pixels: Tensor) -> Tensor:
    """Round pixels in [0, 1] to the 256 grey values that files keep."""
    return (pixels * 255).round().clamp(0, 255) / 255


def inside(pixels: Tensor, examples: Examples, norm: str, epsilon: float | Tensor) -> Tensor:
    """Tell which images are finite, in the ball and in the box, (N,) bool.

    An image that is not counts as withstanding: a verdict fails closed.
    """
    finite = torch.isfinite(pixels).flatten(1).all(dim=1)
    boxed = ((pixels >= 0) & (pixels <= 1)).flatten(1).all(dim=1)
    near = ball_of(norm).distance(pixels, examples.pixels) <= epsilon + TOLERANCE
    return (finite & boxed & near).cpu()


def _energy(output: ClassifierOutput) -> Tensor:
    from ebm_guard import energy as formulas

    return formulas.energy(output.logits).double().cpu()


def _majority(draws: list[Judged]) -> Judged:
    def most(name: str) -> Tensor:
        return torch.stack([getattr(item, name) for item in draws]).double().mean(dim=0) > 0.5

    def mean(name: str) -> Tensor:
        return torch.stack([getattr(item, name) for item in draws]).mean(dim=0)

    found: dict[str, Any] = {name: most(name) for name in _FIELDS[:3]}
    found |= {name: mean(name) for name in _FIELDS[3:]}
    return replace(draws[0], **found)
