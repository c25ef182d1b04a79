"""The rows of ``ebm-guard predict``: the same rows in the same batches, from any place on.

Of several processes each decides on its share of the batches.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from typing import Any

from ebm_guard.cli.session import Session, model_errors
from ebm_guard.data import parse_spec
from ebm_guard.data.specs import STORED_KINDS
from ebm_guard.deploy.batch import UNREADABLE
from ebm_guard.deploy.batch_source import (
    guard_identity,
    images_identity,
    rows_behind,
    stored_identity,
)
from ebm_guard.errors import InvalidInputError
from ebm_guard.gate import Decision, Guard
from ebm_guard.inference import lowest_energy_labels
from ebm_guard.predictions.shared import block_of, share_of
from ebm_guard.progress import track

_CHUNK = 4096
# What changes a row, or its last digits: a batch of another size is another sum.
_OPTIONS = ("model", "batch_size", "amp", "channels_last", "limit", "split", "data_dir")
Rows = list[dict[str, Any]]


class PredictRows(ABC):
    """Decide on the rows of a spec.

    Args:
        session: its options say how.
        guard: decides.
        top_k: how many labels of the lowest joint energy each row names, or None.
    """

    def __init__(self, session: Session, guard: Guard, top_k: int | None) -> None:
        self._session, self._guard, self._top_k = session, guard, top_k
        self._classes: Sequence[str] = guard.facts.get("classes") or ()

    def behind(self, done: int) -> Iterator[Rows]:
        """Yield this process's rows behind the first ``done`` of them, a batch at a time."""
        for rows in self._batches(done):
            for row in rows:
                for place in (row, *row.get("top", ())):
                    place["class"] = self._class(place["label"])
            yield rows

    def identity(self, guard_path: str) -> dict[str, Any]:
        """Return what the rows depend on, as JSON types."""
        options = self._session.options
        settings = {name: getattr(options, name) for name in _OPTIONS}
        settings |= {"top_k": self._top_k, "seed": options.seed if options.limit else None}
        facts = {"data": self._data(), "options": settings}
        return facts | guard_identity(self._guard, guard_path)

    @abstractmethod
    def _batches(self, done: int) -> Iterator[Rows]:
        """Yield batches, without the names of the classes."""

    @abstractmethod
    def _data(self) -> dict[str, Any]:
        """Return what tells these data from others."""

    def _class(self, label: int) -> str | None:
        if not 0 <= label < len(self._classes):
            return None
        return self._classes[label]


def predict_rows(session: Session, data: str, top_k: int | None) -> PredictRows:
    """Open a spec.

    Args:
        session: of the command, with a guard.
        data: the spec.
        top_k: how many labels of the lowest joint energy each row names, or None.

    Raises:
        InvalidInputError: the session has no guard.
    """
    guard = session.guard
    if guard is None:
        raise InvalidInputError("got a session without a guard; needed the path of an artefact")
    stored = parse_spec(data).kind in STORED_KINDS
    return (_StoredRows if stored else _ImageRows)(session, guard, data, top_k)


class _ImageRows(PredictRows):
    def __init__(self, session: Session, guard: Guard, data: str, top_k: int | None) -> None:
        super().__init__(session, guard, top_k)
        self._spec = parse_spec(data)
        self._source = session.open(self._spec, "evaluation", "data")
        self._share = share_of(self._source, session.world, session.options.batch_size)

    def _data(self) -> dict[str, Any]:
        return images_identity(self._spec, self._source)

    def _batches(self, done: int) -> Iterator[Rows]:
        if self._share is None:
            return
        session, spec = self._session, self._spec.text
        rest = rows_behind(self._share, done)
        names = iter(() if rest is None else rest.ids)
        shown = track(f"decide {spec}", self._share.total, enabled=not session.options.quiet)
        with shown as advance, model_errors(spec):
            advance(done)
            for batch in () if rest is None else session.batches(rest):
                rows: Rows = []
                if len(batch.inputs):
                    with session.autocast():
                        decision = self._guard(batch.inputs)
                    rows = _decided(decision, batch.ids, self._top_k)
                rows += [_unreadable(name, error) for name, error in batch.skipped]
                yield _in_order(rows, names)
                advance(len(rows))


class _StoredRows(PredictRows):
    def __init__(self, session: Session, guard: Guard, data: str, top_k: int | None) -> None:
        super().__init__(session, guard, top_k)
        self._spec = parse_spec(data)
        self._part = session.predictions(data, "evaluation", "data")

    def _data(self) -> dict[str, Any]:
        return stored_identity(self._spec, self._part)

    def _batches(self, done: int) -> Iterator[Rows]:
        chunks = block_of(-(-len(self._part) // _CHUNK), self._session.world)
        stop = min(chunks.stop * _CHUNK, len(self._part))
        for start in range(chunks.start * _CHUNK + done, stop, _CHUNK):
            block = self._part.select(slice(start, start + _CHUNK))
            names = self._part.names(range(start, start + len(block)))
            rows = _decided(self._guard.decide_stored(block), names, self._top_k)
            yield rows if self._part.kind == "logits" else _without_energies(rows)


def _decided(decision: Decision, ids: Sequence[str], top_k: int | None) -> Rows:
    """Return the rows of a decision, with the labels of the lowest joint energy where asked for."""
    rows = decision.rows(ids)
    if top_k is None:
        return rows
    found = lowest_energy_labels(decision.logits, top_k)
    for row, labels, energies in zip(
        rows, found.labels.tolist(), found.energies.tolist(), strict=True
    ):
        valid = row["status"] != "INVALID"
        row["top"] = [
            {"label": label, "class": None, "energy": energy}
            for label, energy in zip(labels, energies, strict=True)
            if valid
        ]
    return rows


def _without_energies(rows: Rows) -> Rows:
    """Take the energies away: stored probabilities have lost the offset that they hang on."""
    for row in rows:
        row["energy"] = None
        for place in row.get("top", ()):
            place["energy"] = None
    return rows


def _in_order(rows: Rows, names: Iterator[str]) -> Rows:
    """Put the unreadable images of a batch between the others, as the source has them.

    Args:
        rows: of a batch.
        names: of the source from this batch on; none for a stream, whose names are numbers.
    """
    places: defaultdict[str, deque[int]] = defaultdict(deque)
    for place, name in enumerate(itertools.islice(names, len(rows))):
        places[name].append(place)  # a list may name an image twice
    return sorted(rows, key=lambda row: places[row["id"]].popleft() if places else int(row["id"]))


def _unreadable(name: str, error: str) -> dict[str, Any]:
    return {
        "id": name,
        "status": "INVALID",
        "accept": False,
        "label": -1,
        "confidence": 0.0,
        "energy": None,
        "score": None,
        "p_value": 0.0,
        "reason": f"{UNREADABLE}{error}",
        "top": [],
    }
