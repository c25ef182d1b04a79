"""The guard at work: batches, counters, drift and the shadow, without a word of HTTP."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ebm_guard.deploy.serve.batching import Batcher, Result
from ebm_guard.deploy.serve.identity import identity_of
from ebm_guard.deploy.serve.metrics import Metrics
from ebm_guard.deploy.serve.parsing import Parser
from ebm_guard.deploy.serve.refusal import RefusedError
from ebm_guard.deploy.serve.settings import ServeSettings
from ebm_guard.deploy.serve.workers import Workers
from ebm_guard.errors import EbmGuardWarning, InvalidInputError, ModelOutputError
from ebm_guard.gate import Decision, DriftMonitor, Guard
from ebm_guard.gate.decision import INVALID

logger = logging.getLogger("ebm_guard.serve")
# Seconds that a batch gets to end in at shutdown, when nobody waits for it any more.
_LAST_BATCH = 2.0
# Seconds after the last failure from which a failing model is tried with requests again.
_PAUSE = 30.0


class Service:
    """Decide for many clients with one guard.

    Args:
        guard: fitted, with its model.
        shadow: a second guard that decides on the same rows; it is counted and never answers.
        settings: the limits.

    Raises:
        NotFittedError: a guard was not fitted.
        InvalidInputError: a guard without a model, or a shadow that takes other inputs.
    """

    def __init__(self, guard: Guard, shadow: Guard | None, settings: ServeSettings) -> None:
        for one in (guard, shadow):
            if one is not None and one.classifier is None:
                raise InvalidInputError(
                    "got a guard without its model, which cannot be served; load it with one: "
                    "Guard.load(path, model)"
                )
        if shadow is not None:
            _check_shadow(guard, shadow)
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
        self.decoders: Workers | None = None
        self.metrics.gauge("queue_depth", "Requests that wait for the model.", self._depth)
        self.metrics.gauge("requests_inside", "Requests in the server.", self._inside)
        self._classes = guard.facts.get("classes") or ()
        self._logged: set[str] = set()
        self._failures, self._failed_at = 0, 0.0

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
        self.decoders = Workers(self.settings.decoders, "ebm-guard-image")

    def stop(self) -> None:
        """Answer what is queued, and stop; a model that hangs is not waited for long."""
        if self.batcher is not None:
            self.batcher.close(_LAST_BATCH)
        if self.decoders is not None:
            self.decoders.close()

    def give_up(self) -> None:
        """Refuse the requests that still wait for the model."""
        if self.batcher is not None:
            self.batcher.give_up()

    def require(self) -> tuple[Batcher, Workers]:
        """Return the batcher and the threads that decode.

        Raises:
            RefusedError: the service is not started, or its thread has stopped.
        """
        if self.batcher is None or self.decoders is None:
            raise RefusedError("closing", "the server has not started yet; try again")
        if not self.batcher.alive and not self.batcher.closing:
            raise RefusedError("stopped", "the thread that runs the model has stopped")
        return self.batcher, self.decoders

    def sick(self) -> str:
        """Say why the process is to be restarted; nothing where it is not."""
        limit = self.settings.model_timeout
        if self.batcher is None or self.decoders is None:
            return "the server has not started yet"
        if self.batcher.busy_for > limit:
            return f"one batch has run for more than {limit:g} seconds"
        if self.decoders.stuck(limit):
            return f"all threads that decode have hung for more than {limit:g} seconds"
        if not self.batcher.alive and not self.batcher.closing:
            return "the thread that runs the model has stopped"
        return ""

    def unready(self) -> str:
        """Say why no requests are to be sent here; nothing where they are."""
        if self.batcher is not None and self.batcher.closing:
            return "the server is shutting down"
        many = self._failures >= self.settings.max_failures
        if many and time.monotonic() - self._failed_at < _PAUSE:
            return f"the model raised {self._failures} times in a row"
        return self.sick()

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
        if invalid and self.monitor is not None:
            self.monitor.update(torch.full((count,), torch.nan))
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
        # The shadow must see what came, whatever the model does to its input.
        kept = inputs.clone() if self._shadow_runs() else inputs
        try:
            decision = self.decide(inputs)
            if len(decision) != len(inputs):
                raise ModelOutputError(
                    f"the model gave {len(decision)} rows of logits for {len(inputs)} inputs"
                )
        except Exception:
            self._count_failure()
            raise
        self._failures = 0
        answers = decision.rows()
        for row in answers:
            label = row["label"]
            row["class"] = self._classes[label] if 0 <= label < len(self._classes) else None
        self.metrics.decided(decision, time.perf_counter() - start)
        if self.monitor is not None:
            self.monitor.update(decision.score.masked_fill(decision.status == INVALID, torch.nan))
        return answers, self._afterwards(kept, decision)

    def _count_failure(self) -> None:
        """Count a batch that raised; inputs that make a sound model raise do not add up."""
        self._failures += 1
        self._failed_at = time.monotonic()
        if self._failures < self.settings.max_failures or self.parser.example is None:
            return
        try:
            self.decide(self.parser.example)
        except Exception as error:  # noqa: BLE001 - the model is the user's
            self.log("the model raises on the inputs that the guard was fitted on, too", error)
        else:
            self._failures = 0

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
        if not self._shadow_runs():
            return shadow.decide(live.logits)
        with self._context():
            return shadow.forward(inputs)

    def _shadow_runs(self) -> bool:
        """Say whether the shadow runs a model, and cannot use the logits of the live one."""
        if self.shadow is None:
            return False
        one, other = self.shadow.classifier, self.guard.classifier
        same_model = one is not None and other is not None and one.model is other.model
        return self.shadow.score.needs_features or not same_model

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


def _check_shadow(guard: Guard, shadow: Guard) -> None:
    """Refuse a shadow that would be given inputs which were prepared for another guard."""
    found = [
        None if one.classifier is None or one.classifier.preprocessing is None
        # Where the settings were read does not change a pixel.
        else replace(one.classifier.preprocessing, source="")
        for one in (guard, shadow)
    ]  # fmt: skip
    if None not in found and found[0] != found[1]:
        raise InvalidInputError(
            f"got a shadow with another preprocessing ({found[1]}) than the guard that answers "
            f"({found[0]}); both decide on the same inputs. Serve the new guard by itself, and "
            "send it a copy of the traffic"
        )


def _monitor(guard: Guard) -> DriftMonitor | None:
    try:
        return guard.drift_monitor()
    except InvalidInputError as error:
        warnings.warn(f"drift is not watched: {error}", EbmGuardWarning, stacklevel=4)
        return None
