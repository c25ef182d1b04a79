"""The loop: update, guard, evaluate, roll back, remember the best.

A good state is one whose evaluation keeps accuracy, NLL and ECE within their limits; the best is
the good state with the highest mean AUROC. When the safeguard ends an attempt, or it ends without
one good state, the run goes back to the last good state with half the learning rate and other
random numbers.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ebm_guard.errors import ModelOutputError, first_line
from ebm_guard.model.isolation import pixel_forward
from ebm_guard.progress import Advance, track
from ebm_guard.training.augment import augmented, make_augment
from ebm_guard.training.checkpoint import save_checkpoint
from ebm_guard.training.context import TrainingBatch
from ebm_guard.training.ema import WeightAverage
from ebm_guard.training.interrupt import interruptible
from ebm_guard.training.objectives.base import LossTerms
from ebm_guard.training.options import learning_rate_at
from ebm_guard.training.order import Order
from ebm_guard.training.safeguard import Safeguard, harm, within_limits
from ebm_guard.training.selection import Evaluation
from ebm_guard.training.setup import FreshForward, Outcome, Setup
from ebm_guard.training.temperatures import Temperatures

SLOWER = 0.5


class Loop:
    """One run of fine-tuning, from its first update or from a checkpoint.

    Args:
        setup: what it works on.
        forward: the context's forward, where it has to be told of new weights.
    """

    def __init__(self, setup: Setup, forward: FreshForward | None = None) -> None:
        self._of = setup
        self._forward = forward
        self._trained = {
            name: part for name, part in setup.net.model.named_parameters() if part.requires_grad
        }
        self._net = setup.world.wrapped(setup.net)
        setup.context.net = self._net
        self._optimizer = _optimizer(self._trained, setup)
        self._average = WeightAverage(setup.net.model, setup.options.ema)
        self._guard = Safeguard(setup.context.measured.std)
        self._augment = make_augment(setup.options.augment)
        self._update, self._attempt, self._seconds = 0, 0, 0.0
        self._best: dict[str, Any] | None = None
        self._good = self._state()
        options, images = setup.options, setup.images
        self._order = Order(
            len(images),
            images.labelled,
            options.batch_size,
            options.labelled_share,
            options.seed,
            setup.world.size,
        )
        self._interrupted, self._stopped = False, ""

    def run(self) -> Outcome:
        """Run to the end, to Ctrl-C, or until the safeguard gives up."""
        options, history = self._of.options, self._of.history
        with (
            track("fine-tune", options.updates, enabled=self._of.progress) as advance,
            interruptible() as pressed,
        ):
            advance(self._update)
            try:
                self._go(pressed, advance)
            except KeyboardInterrupt:
                # Raised by someone's code in the midst of an update: the last checkpoint stands.
                self._interrupted = True
        if self._interrupted:
            history.add("event", self._update, text=f"interrupted after {self._update} updates")
        best = self._best
        return Outcome(
            best=None if best is None else best["weights"],
            evaluation=None if best is None else Evaluation(**best["evaluation"]),
            update=self._update if best is None else int(best["update"]),
            interrupted=self._interrupted,
            stopped=self._stopped,
            rollbacks=self._attempt,
        )

    def _go(self, pressed: Callable[[], bool], advance: Advance) -> None:
        options = self._of.options
        while self._update < options.updates and not self._stopped:
            before = self._update
            trouble, stop = self._one_update(pressed)
            if trouble is None:
                self._update += 1
                due = self._update % options.interval == 0 or self._update == options.updates
                if due:
                    trouble = self._evaluate() or self._in_vain()
                if due and trouble is None:
                    self._save()
            if trouble is not None:
                self._roll_back(trouble)
            advance(self._update - before)
            if stop:
                self._interrupted = True
                self._save()
                return

    def _one_update(self, pressed: Callable[[], bool]) -> tuple[str | None, bool]:
        """Make one update; return why the attempt must end, or None, and whether to stop."""
        of, started = self._of, time.perf_counter()
        context = of.context
        context.update, context.attempt = self._update, self._attempt
        # For models that draw random numbers in their forward pass.
        torch.manual_seed(_seed(of.options.seed, self._attempt, self._update, of.world.rank))
        rate = self._rate()
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        batch = self._batch()
        self._optimizer.zero_grad(set_to_none=True)
        terms, trouble = self._loss(batch)
        # All processes go on to the backward pass, or none does.
        if of.world.any(trouble is not None) or terms is None:
            stop = of.world.any(pressed())
            return trouble or "another process met energies that are not finite", stop
        terms.total.backward()  # type: ignore[no-untyped-call]
        parameters = list(self._trained.values())
        norm = float(nn.utils.clip_grad_norm_(parameters, of.options.gradient_clip))
        edge = float(((batch.pixels <= 0) | (batch.pixels >= 1)).float().mean())
        numbers, parts, edge, stop = self._agreed(terms, edge, pressed())
        trouble = self._guard.judge(
            numbers["loss"], norm, numbers["gap"], numbers["saturation"], edge
        )
        if trouble is None:
            self._optimizer.step()
            self._average.update()
            self._outdated()
        self._seconds += time.perf_counter() - started
        of.history.add(
            "update",
            self._update,
            **numbers,
            parts=parts,
            gradient_norm=norm,
            learning_rate=rate,
            attempt=self._attempt,
            seconds=round(self._seconds, 4),
        )
        return trouble, stop

    def _loss(self, batch: TrainingBatch) -> tuple[LossTerms | None, str | None]:
        try:
            return self._of.objective(self._of.context, batch), None
        except ModelOutputError as error:
            # A sampler met energies that are not finite.
            return None, first_line(error)

    def _agreed(
        self, terms: LossTerms, edge: float, pressed: bool
    ) -> tuple[dict[str, Any], dict[str, float | None], float, bool]:
        """Average what is shown and guarded over the processes."""

        def mean(values: Tensor | None) -> float | None:
            return None if values is None else float(values.mean())

        numbers: dict[str, float | None] = {
            "loss": float(terms.total.detach()),
            "gap": terms.gap,
            "energy_data": mean(terms.energy_data),
            "energy_negatives": mean(terms.energy_negatives),
            "saturation": terms.saturation,
        }
        own = [*numbers.values(), *terms.parts.values(), edge, float(pressed)]
        found = self._of.world.mean(own)
        shown = dict(zip(numbers, found, strict=False))
        parts = dict(zip(terms.parts, found[len(numbers) :], strict=False))
        return shown, parts, float(found[-2] or 0.0), bool(found[-1])

    def _batch(self) -> TrainingBatch:
        of = self._of
        rows = self._order.rows(self._update, self._attempt)
        own = rows[of.world.share(len(rows))]
        pixels = of.images.pixels(own).to(of.world.device)
        labels = of.images.labels
        if labels is None:
            raise TypeError("training images are labelled by now")
        generator = of.context.generator("augmentation")
        return TrainingBatch(
            pixels=pixels,
            labels=labels[torch.from_numpy(own)].to(of.world.device),
            augmented=augmented(self._augment, pixels, generator),
            rows=torch.from_numpy(own),
        )

    def _rate(self) -> float:
        options = self._of.options
        highest = self._of.highest * SLOWER**self._attempt
        return learning_rate_at(self._update, options.updates, highest, options.warm_up)

    def _evaluate(self) -> str | None:
        """Look at the selection rows; return why the attempt must end, or None."""
        of = self._of
        with self._average.applied():
            look = of.panel.look(pixel_forward(of.classifier))
        if of.world.any(not look.finite):
            return "the logits of the selection rows are not finite"
        pair = Temperatures.of(of.start.fit, look.fit)
        own = Evaluation.of(look, pair.candidate)
        found_harm = harm(of.start, look, of.options)
        fine = within_limits(Evaluation.of(of.start, pair.start), own, of.options)
        # The last bits may differ between processes: what the first one found holds for all.
        flags = [float(found_harm is not None), float(fine)]
        harmed, chosen, *numbers = of.world.from_first([*flags, *own.numbers()])
        found = own.with_numbers(numbers)
        good = bool(chosen) and not harmed
        best = good and (self._best is None or found.mean_auroc > self._best["mean_auroc"])
        of.history.add("evaluation", self._update, **found.to_dict(), eligible=good, best=best)
        if best:
            self._best = {
                "update": self._update,
                "mean_auroc": found.mean_auroc,
                "evaluation": {
                    key: value for key, value in found.to_dict().items() if key != "mean_auroc"
                },
                "weights": self._average.mean(),
            }
        if good:
            self._good = self._state()
        return (found_harm or "the first process found harm") if harmed else None

    def _in_vain(self) -> str | None:
        """At the end of an attempt: say that no state of the run could be chosen, or None."""
        if self._update < self._of.options.updates or self._best is not None:
            return None
        return "no state kept accuracy, NLL and ECE within their limits on the selection rows"

    def _roll_back(self, trouble: str) -> None:
        """Go back to the last good state, or give up."""
        of = self._of
        tried = self._attempt + 1
        if self._attempt >= of.options.attempts:
            self._stopped = trouble
            text = f"stopped after {tried} attempts: {trouble}"
            of.history.add("event", self._update, text=text)
            return
        back = int(self._good["update"])
        text = (
            f"attempt {tried} ended: {trouble}. Back to update {back}, learning rate halved to "
            f"{self._of.highest * SLOWER**tried:.3g}"
        )
        of.history.add("event", self._update, text=text)
        self._restore(self._good)
        self._attempt = tried
        self._guard.restart()
        of.context.update, of.context.attempt = self._update, self._attempt
        of.objective.rolled_back(of.context)

    def _state(self) -> dict[str, Any]:
        """Copy what a rollback goes back to."""
        return {
            "update": self._update,
            "weights": {name: part.detach().clone() for name, part in self._trained.items()},
            "average": self._average.state_dict(),
            "optimizer": copy.deepcopy(self._optimizer.state_dict()),
        }

    @torch.no_grad()
    def _restore(self, state: Mapping[str, Any]) -> None:
        self._update = int(state["update"])
        for name, part in state["weights"].items():
            self._trained[name].copy_(part)
        self._average.load_state_dict(state["average"])
        self._optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        self._outdated()

    def _outdated(self) -> None:
        if self._forward is not None:
            self._forward.outdated()

    def _save(self) -> None:
        of = self._of
        if of.folder is None:
            return
        state = {
            "now": self._state(),
            "good": self._good,
            "best": self._best,
            "attempt": self._attempt,
            "seconds": self._seconds,
            "safeguard": self._guard.state_dict(),
            "objective": of.objective.state_dict(),
            "measured": of.context.measured.to_dict(),
            "history": of.history.lines,
        }
        save_checkpoint(of.folder, state, of.settings, of.world.rank)
        of.world.wait()

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint; the objective has its state already."""
        self._restore(state["now"])
        self._good, self._best = state["good"], state["best"]
        self._attempt, self._seconds = int(state["attempt"]), float(state["seconds"])
        self._guard.load_state_dict(state["safeguard"])


def _optimizer(trained: Mapping[str, nn.Parameter], setup: Setup) -> torch.optim.Optimizer:
    # Biases and norms have one axis; pulling them to zero helps nobody.
    decay = setup.options.weight_decay
    groups = [
        {"params": [part for part in trained.values() if part.ndim > 1], "weight_decay": decay},
        {"params": [part for part in trained.values() if part.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if setup.options.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=setup.highest, momentum=0.9, nesterov=True)
    return torch.optim.AdamW(groups, lr=setup.highest)


def _seed(*key: int) -> int:
    return int(np.random.SeedSequence([*key, 43]).generate_state(1)[0])
