"""The guard at work: batches, counters, drift and the shadow, without a word of HTTP."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ebm_guard.deploy.serve.batching import Batcher, Result
from ebm_guard.deploy.serve.identity import identity_of
from ebm_guard.deploy.serve.metrics import Metrics
from ebm_guard.deploy.serve.parsing import Parser
from ebm_guard.deploy.serve.refusal import RefusedError
from ebm_guard.deploy.serve.settings import ServeSettings
from ebm_guard.errors import EbmGuardWarning, InvalidInputError, ModelOutputError
from ebm_guard.gate import Decision, DriftMonitor, Guard

logger = logging.getLogger("ebm_guard.serve")


class Service:
    """Decide for many clients with one guard.

    Args:
        guard: fitted, with its model.
        shadow: a second guard that decides on the same rows; it is counted and never answers.
        settings: the limits.

    Raises:
        NotFittedError: a guard was not fitted.
        InvalidInputError: a guard without a model.
    """

    def __init__(self, guard: Guard, shadow: Guard | None, settings: ServeSettings) -> None:
        for one in (guard, shadow):
            if one is not None and one.classifier is None:
                raise InvalidInputError(
                    "got a guard without its model, which cannot be served; load it with one: "
                    "Guard.load(path, model)"
                )
        self.guard, self.shadow, self.settings = guard, shadow, settings
        self.identity = identity_of(guard)
        self.metrics = Metrics(settings.energy_edges)
        self.metrics.artifact("live", self.identity.to_dict())
        if shadow is not None:
            self.metrics.artifact("shadow", identity_of(shadow).to_dict())
        self.parser = Parser.of(guard, settings.max_batch, settings.max_pixels)
        self.monitor = _monitor(guard)
        if self.monitor is not None:
            self.metrics.watch(self.monitor)
        self.batcher: Batcher | None = None
        self.metrics.gauge("queue_depth", "Requests that wait for the model.", self._depth)
        self.metrics.gauge("requests_inside", "Requests in the server.", self._inside)
        self._classes = guard.facts.get("classes") or ()
        self._logged: set[str] = set()

    def start(self) -> None:
        """Run the model once on what the guard was fitted on, and start to take requests.

        Raises:
            ModelOutputError: the model does not run.
        """
        example = self.parser.example
        if example is not None:
            try:
                self.decide(example)
            except Exception as error:
                raise ModelOutputError(
                    f"the model fails on the inputs that the guard was fitted on: {error}"
                ) from error
        self.batcher = Batcher(
            self._run,
            max_batch=self.settings.max_batch,
            max_delay=self.settings.max_delay,
            capacity=self.settings.queue_size,
        )
        self.batcher.start()

    def stop(self) -> None:
        """Answer what is queued, and stop."""
        if self.batcher is not None:
            self.batcher.close()

    def require_batcher(self) -> Batcher:
        """Return the batcher.

        Raises:
            RefusedError: the service is not started, or its thread has stopped.
        """
        if self.batcher is None:
            raise RefusedError("closing", "the server has not started yet; try again")
        if not self.batcher.alive and not self.batcher.closing:
            raise RefusedError("closing", "the thread that runs the model has stopped")
        return self.batcher

    def decide(self, inputs: Tensor) -> Decision:
        """Run the guard on a batch."""
        with self._context():
            return self.guard.forward(inputs)

    def failed(self, count: int, error: Exception) -> list[dict[str, Any]]:
        """Answer rows on which the model raised, as ``on_error`` says.

        Raises:
            RefusedError: ``on_error`` is ``raise``.
        """
        invalid = self.settings.on_error == "invalid"
        self.metrics.failed(count, invalid=invalid)
        self.log("the model raised on a request", error)
        # The message may tell more of the machine than a client should know; it is in the log.
        reason = f"the model raised {type(error).__name__}"
        if not invalid:
            raise RefusedError("failed", reason)
        row = {
            "status": "INVALID",
            "label": -1,
            "confidence": 0.0,
            "energy": None,
            "score": None,
            "p_value": 0.0,
            "accept": False,
            "reason": reason,
            "class": None,
        }
        return [dict(row) for _ in range(count)]

    def _run(self, inputs: Tensor) -> Result:
        start = time.perf_counter()
        decision = self.decide(inputs)
        answers = decision.rows()
        if len(answers) != len(inputs):
            raise ModelOutputError(
                f"the model gave {len(answers)} rows of logits for {len(inputs)} inputs"
            )
        for row in answers:
            label = row["label"]
            row["class"] = self._classes[label] if 0 <= label < len(self._classes) else None
        self.metrics.decided(decision, time.perf_counter() - start)
        if self.monitor is not None:
            self.monitor.update(decision.score)
        return answers, self._afterwards(inputs, decision)

    def _afterwards(self, inputs: Tensor, live: Decision) -> Callable[[], None]:
        def compare() -> None:
            if self.shadow is None:
                return
            try:
                self.metrics.compared(live, self._shadowed(self.shadow, inputs, live))
            except Exception as error:  # noqa: BLE001 - the shadow must never touch the answers
                self.metrics.shadow_failed()
                self.log("the guard in the shadow raised", error)

        return compare

    def _shadowed(self, shadow: Guard, inputs: Tensor, live: Decision) -> Decision:
        one, other = shadow.classifier, self.guard.classifier
        same_model = one is not None and other is not None and one.model is other.model
        if same_model and not shadow.score.needs_features:
            return shadow.decide(live.logits)
        with self._context():
            return shadow.forward(inputs)

    def _context(self) -> AbstractContextManager[Any]:
        if not self.settings.autocast or self.guard.classifier is None:
            return nullcontext()
        device = self.guard.classifier.device
        return torch.autocast("cpu" if device is None else device.type)

    def log(self, what: str, error: Exception) -> None:
        """Log an error, with its traceback the first time that one of its type comes."""
        name = f"{what}: {type(error).__name__}"
        if name in self._logged:
            logger.error("%s: %s", name, error)
            return
        self._logged.add(name)
        logger.error("%s: %s", name, error, exc_info=error)

    def _depth(self) -> float:
        return 0.0 if self.batcher is None else float(self.batcher.depth)

    def _inside(self) -> float:
        return 0.0 if self.batcher is None else float(self.batcher.inside)


def _monitor(guard: Guard) -> DriftMonitor | None:
    try:
        return guard.drift_monitor()
    except InvalidInputError as error:
        warnings.warn(f"drift is not watched: {error}", EbmGuardWarning, stacklevel=4)
        return None
