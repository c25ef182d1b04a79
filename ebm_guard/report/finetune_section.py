"""The fine-tuning section: what the run that made this model found, in short."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ebm_guard.errors import DataError, InvalidInputError
from ebm_guard.report.finetune_report import ACCEPTED, NEVER_SEEN, SCHEMA, TRAINED_ON
from ebm_guard.report.record import ATTENTION, GOOD, NotRun, Record, Verdict
from ebm_guard.report.render import finetune_view

if TYPE_CHECKING:
    from ebm_guard.model import EnergyClassifier

REPORT_FILE, PAGE_FILE = "finetune_report.json", "finetune_report.html"
NOT_ASKED = (
    "this report judges the model as it is; where ebm-guard finetune made it, add --finetuned with "
    "the folder that finetune wrote"
)
_NUMBERS = ("start", "candidate", "difference", "bound", "limit")
# Means of the section: their heading in the full report, and the role of their sets.
_MEANS = {"never_seen": (NEVER_SEEN, "unseen"), "trained_on": (TRAINED_ON, "trained_on")}


@dataclass(frozen=True)
class FinetuneSection(Record):
    """What ``ebm-guard finetune`` found; nothing of it is measured again.

    Args:
        verdict: in plain words; the sentence is that of the full report.
        status: ``accepted`` or ``start returned``.
        reason: why, in one sentence.
        objective: its name.
        updates: made, those rolled back included.
        seed: of the run.
        acceptance: ``n`` rows and the ``tests``, or why there was no test.
        mean_auroc: of the energy over the sets that were ``never_seen`` and ``trained_on``: how
            many ``sets``, start, candidate, paired difference and whether it is better; None
            without such sets.
        losses: what is clearly worse in the candidate, in words.
        page: where the full page is.
    """

    verdict: Verdict
    status: str
    reason: str
    objective: str
    updates: int
    seed: int
    acceptance: Mapping[str, Any] | NotRun
    mean_auroc: Mapping[str, Any]
    losses: list[str]
    page: str


@dataclass(frozen=True)
class Finetuned:
    """A fine-tuning run, read from its folder.

    Args:
        section: what a report says of it.
        start: hash of the weights that it began with, or None where they have none.
        winner: hash of the weights that it returned.
        folder: where it lies.

    Example:
        >>> Finetuned.read("nowhere")
        Traceback (most recent call last):
            ...
        ebm_guard.errors.DataError: nowhere holds no finetune_report.json; give the folder that ...
    """

    section: FinetuneSection
    start: str | None
    winner: str | None
    folder: Path

    @classmethod
    def read(cls, folder: str | Path) -> Finetuned:
        """Read ``finetune_report.json`` of a folder that ``ebm-guard finetune`` wrote.

        Raises:
            DataError: missing, damaged, or of another schema.
        """
        folder = Path(folder)
        file = folder / REPORT_FILE
        if not file.exists():
            raise DataError(
                f"{folder} holds no {REPORT_FILE}; give the folder that `ebm-guard finetune` wrote "
                "with --output"
            )
        try:
            content = json.loads(file.read_text(encoding="utf-8"), parse_constant=_refuse)
            schema = content["schema"]
        except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
            raise DataError(f"cannot read the fine-tuning report {file}: {error}") from None
        if schema != SCHEMA:
            raise DataError(
                f"{file} has schema {schema!r}; this version reads {SCHEMA!r}. Run `ebm-guard "
                "finetune` again with this version"
            )
        try:
            weights = content["outcome"]["weights"]
            start, winner = (_optional(weights[name]) for name in ("start", "winner"))
            return cls(_section(content, str(folder / PAGE_FILE)), start, winner, folder)
        except (LookupError, ValueError, TypeError, AttributeError, ArithmeticError) as error:
            raise DataError(
                f"{file} is damaged, or of an older version: {type(error).__name__}: {error}. Run "
                "`ebm-guard finetune` again"
            ) from None

    def check(self, weights: str | None) -> None:
        """Refuse a model that is not the one that this run returned.

        Args:
            weights: hash of the model's weights, or None where it has none.

        Raises:
            InvalidInputError: there are no weights to compare.
            DataError: another model.
        """
        if weights is None:
            raise InvalidInputError(
                f"got the fine-tuning run {self.folder} and no model whose weights can be compared "
                "with it; give the fine-tuned model itself, not stored outputs"
            )
        if weights == self.winner:
            return
        what = "another one"
        if weights == self.start:
            what = "the one that it began with, before fine-tuning"
        raise DataError(
            f"the model under report is not the one that fine-tuning returned in {self.folder}, "
            f"but {what}: its weights are {weights}, those returned are {self.winner}. Load "
            f"{self.folder / 'weights.safetensors'} into the model (--checkpoint), or leave the "
            "fine-tuning run out"
        )


def finetune_section(
    finetuned: Finetuned | None, classifier: EnergyClassifier | None
) -> FinetuneSection | NotRun:
    """Sum up the run that made the model under report, or say how to add it.

    Raises:
        InvalidInputError: there is a run, and no model to compare with it.
        DataError: the model is not the one that the run returned.
    """
    if finetuned is None:
        return NotRun(NOT_ASKED)
    finetuned.check(None if classifier is None else classifier.weights_hash())
    return finetuned.section


def _section(content: Mapping[str, Any], page: str) -> FinetuneSection:
    """Take over what the section needs; anything of another type raises."""
    outcome, meta = content["outcome"], content["meta"]
    losses = [
        f"{name}: {finetune_view.whole_difference(item, kind).removesuffix(', worse')}"
        for name, item, kind in finetune_view.changed(content, better=False)
    ]
    if outcome["status"] not in finetune_view.OUTCOME_WORDS:
        raise ValueError(f"the outcome is {outcome['status']!r}")
    if outcome["status"] == ACCEPTED and not content["acceptance"]["passed"]:
        raise ValueError("it was accepted, and a test failed")
    return FinetuneSection(
        verdict=_verdict(outcome["status"], losses, _text(content["verdict"]["sentence"])),
        status=outcome["status"],
        reason=_text(outcome["reason"]),
        objective=_text(meta["settings"]["objective"]["objective"]),
        updates=_count(outcome["updates"]),
        seed=_count(meta["seed"]),
        acceptance=_acceptance(content["acceptance"]),
        mean_auroc={
            name: _mean(content, heading, role) for name, (heading, role) in _MEANS.items()
        },
        losses=losses,
        page=page,
    )


def _verdict(status: str, losses: list[str], sentence: str) -> Verdict:
    if status != ACCEPTED:
        return Verdict(ATTENTION, "Start returned: the model is the one that was given", sentence)
    count = len(losses)
    worse = f"{count or 'no'} figure{'' if count < 2 else 's'} worse"
    return Verdict(ATTENTION if losses else GOOD, f"Accepted, with {worse}", sentence)


def _acceptance(found: Mapping[str, Any]) -> Mapping[str, Any] | NotRun:
    if "not_run" in found:
        return NotRun(_text(found["not_run"]))
    tests = [
        {
            "name": _text(test["name"]),
            "what": _text(test["what"]),
            **{name: _number(test[name]) for name in _NUMBERS},
            "passed": _flag(test["passed"]),
            "n": _count(test["n"]),
            "method": _text(test["method"]),
        }
        for test in found["tests"]
    ]
    return {"n": _count(found["n"]), "tests": tests}


def _mean(content: Mapping[str, Any], heading: str, role: str) -> dict[str, Any] | None:
    """Return the mean over the sets of a role; of one set that is the set itself."""
    sets = [found for found in content["ood"].values() if found["role"] == role]
    if not sets:
        return None
    item = sets[0]["auroc"] if len(sets) == 1 else content["ood_means"][heading]
    sides = {name: _metric(item[name]) for name in ("start", "candidate", "difference")}
    better = item["better"]
    return {"sets": len(sets), **sides, "better": None if better is None else _flag(better)}


def _metric(found: Mapping[str, Any]) -> dict[str, Any]:
    level = _number(found["level"])
    if level is None or not 0 < level < 1:
        raise ValueError(f"an interval has level {level}")
    return {
        "value": _number(found["value"]),
        "low": _number(found["low"]),
        "high": _number(found["high"]),
        "level": level,
        "method": _text(found["method"]),
        "n": _count(found["n"]),
        "null95": _number(found["null95"]),
    }


def _text(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise TypeError(f"a text is {value!r}")
    return value


def _optional(value: object) -> str | None:
    return None if value is None else _text(value)


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"yes or no is {value!r}")
    return value


def _count(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise TypeError(f"a count is {value!r}")
    return value


def _number(value: object) -> float | None:
    if value is None:
        return None
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        raise TypeError(f"a number is {value!r}")
    return value


def _refuse(name: str) -> float:
    raise ValueError(f"it holds {name}")
