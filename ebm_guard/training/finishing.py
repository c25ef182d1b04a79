"""The end of a run: the acceptance test, the winner, its guard, and the story."""

from __future__ import annotations

import time

from torch import nn

from ebm_guard.errors import EbmGuardError, first_line
from ebm_guard.model.isolation import pixel_forward
from ebm_guard.training.acceptance import Acceptance, accept
from ebm_guard.training.density.measuring import contrastive_objective, measure_density, told
from ebm_guard.training.density.record import EnergyDensity
from ebm_guard.training.preparing import Prepared
from ebm_guard.training.refit import fit_like
from ebm_guard.training.result import ACCEPTED, START_RETURNED, FinetuneResult
from ebm_guard.training.selection import Evaluation, Look
from ebm_guard.training.setup import Outcome
from ebm_guard.training.temperatures import Temperatures
from ebm_guard.training.train_copy import Trained
from ebm_guard.training.working_copy import around, finished


def finish(of: Prepared, trained: Trained, seconds: float) -> FinetuneResult:
    """Test the best state, and return the winner.

    Args:
        of: what the run started from.
        trained: what it left.
        seconds: wall time up to here; that of the end is added.
    """
    started = time.perf_counter()
    outcome, history = trained.outcome, trained.history
    story = _told(trained, of.options.updates)
    start, copied = of.classifier.model, of.copied.model
    if not isinstance(start, nn.Module) or not isinstance(copied, nn.Module):
        raise TypeError("what was copied and trained is an nn.Module")
    candidate = acceptance = None
    if outcome.best is not None and outcome.evaluation is not None:
        candidate = finished(copied, start, outcome.best)
        look = of.acceptance.look(pixel_forward(around(of.classifier, candidate)))
        acceptance = _accept(of, look, outcome.evaluation)
        story += acceptance.story
    passed = acceptance is not None and acceptance.passed
    # The first process decides, should the last bits of the others differ.
    passed = bool(of.world.from_first([float(passed)])[0])
    status, reason = _verdict(acceptance, outcome, passed=passed)
    fitted = of.guard is not None and of.guard.threshold is not None
    guard = of.guard if fitted and of.guard is not None else of.start_guard
    winner = start
    if passed and candidate is not None:
        winner = candidate
        wrapped = around(of.classifier, candidate)
        guard, note = fit_like(of.guard, wrapped, of.parts.refit, of.sets.train, of.options.seed)
        story += [note] if note else []
    density, missing, interrupted = _density(of, candidate if passed else None)
    story += [] if density is None else [told(density)]
    story += [f"No density is offered: {missing}."] if missing else []
    history.add("event", outcome.update, text=reason)
    return FinetuneResult(
        status=status,
        reason=reason,
        story=(*story, reason),
        model=winner,
        guard=guard,
        candidate=candidate,
        start=start,
        acceptance=acceptance,
        history=tuple(history.lines),
        settings=trained.settings,
        seconds=seconds + time.perf_counter() - started,
        interrupted=outcome.interrupted or interrupted,
        parts=of.parts,
        density=density,
        no_density=missing,
    )


def _density(of: Prepared, winner: nn.Module | None) -> tuple[EnergyDensity | None, str, bool]:
    """Return the density, why there is none where one was learned, and whether Ctrl-C came."""
    if contrastive_objective(of.objective) is None:
        return None, "", False
    if winner is None:
        return None, "the start was returned, and a density belongs to the fine-tuned net", False
    try:
        return measure_density(of, winner), "", False
    except KeyboardInterrupt:
        # The run is over, and its winner stands.
        return None, "its checks were interrupted", True
    except EbmGuardError as error:
        return None, f"its checks failed: {first_line(error)}", False


def _accept(of: Prepared, look: Look, evaluation: Evaluation) -> Acceptance:
    return accept(
        of.on_acceptance,
        look,
        temperatures=Temperatures.of(of.on_selection.fit, evaluation.fit),
        max_acc_drop=of.options.max_acc_drop,
        max_nll_rise=of.options.max_nll_rise,
        roles=of.acceptance.roles,
    )


def _told(trained: Trained, updates: int) -> list[str]:
    outcome, history = trained.outcome, trained.history
    story = [_sentence(line["text"]) for line in history.of_kind("event")]
    if outcome.evaluation is None:
        return [*story, "No state of the run was within its limits on the selection rows."]
    first, best = history.of_kind("evaluation")[0], outcome.evaluation
    story.append(
        f"The best of the run is update {outcome.update} of {updates}: mean AUROC "
        f"{first['mean_auroc']:.4f} -> {best.mean_auroc:.4f}, accuracy {first['accuracy']:.4f} -> "
        f"{best.accuracy:.4f} on the selection rows."
    )
    return story


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}" + ("" if text.endswith(".") else ".")


def _verdict(acceptance: Acceptance | None, outcome: Outcome, *, passed: bool) -> tuple[str, str]:
    if passed:
        return ACCEPTED, "The fine-tuned model passed all acceptance tests and was accepted."
    if acceptance is not None:
        failed = [test.what for test in acceptance.tests if not test.passed]
        return START_RETURNED, f"The start was returned: not shown that {'; that '.join(failed)}."
    if outcome.stopped:
        why = f"every attempt ended badly, the last because {outcome.stopped}"
    elif outcome.interrupted:
        why = "the run was interrupted before any state was good enough"
    else:
        why = "no state of the run kept accuracy, NLL and ECE within their limits"
    return START_RETURNED, f"The start was returned: {why}."
