"""Outliers made from the user's own images, where a command needs some and none were given."""

from __future__ import annotations

from dataclasses import replace

import click
import numpy as np
from numpy.typing import NDArray

from ebm_guard.cli.session import Session
from ebm_guard.data import ImageSource
from ebm_guard.data.outliers import GUARD_KINDS, OutlierSource
from ebm_guard.errors import DataError, InvalidInputError
from ebm_guard.predictions import Predictions

# Five kinds of this many tell the scores apart, and cost less than most evaluation sets.
_ROWS = 500


def synthetic_outliers(session: Session, *, required: bool) -> dict[str, Predictions]:
    """Return predictions on outliers made from the evaluation images, by name.

    Args:
        session: with the evaluation source open.
        required: say why there are none, where none can be made.

    Raises:
        InvalidInputError: none can be made of this source, and they were asked for.
    """
    base = session.sources.get("evaluation")
    if base is None:
        if required:
            raise InvalidInputError(
                "got --synthetic for stored predictions; outliers are made from images, give "
                "--data that holds some, and --model"
            )
        return {}
    if base.total is not None and base.total > _ROWS:
        base = base.subset(session.chosen(base.total, _ROWS))
    try:
        return _outliers(session, base)
    except InvalidInputError as error:
        if required:
            raise
        click.echo(f"warning: no synthetic outliers: {error}", err=True)
        return {}


def apart_for_outliers(
    session: Session, name: str, n: int
) -> tuple[NDArray[np.int64], dict[str, Predictions]]:
    """Set a fifth of the rows apart, and return the others and outliers made from these.

    Args:
        session: with the source open.
        name: of the source.
        n: its rows.

    Raises:
        InvalidInputError: stored rows, a stream, or unreadable images among the rows.
    """
    source = session.sources.get(name)
    if source is None:
        raise InvalidInputError(
            "got --score auto for stored predictions; it chooses on outliers made from images, "
            "give --data that holds some, and --model"
        )
    if source.total != n:
        raise InvalidInputError(
            f"got --score auto for {source.spec}, of which {n} rows could be read; the rows set "
            "apart must be known, so give data without unreadable images"
        )
    apart = session.chosen(n, max(1, min(_ROWS, n // 5)))
    rest = np.setdiff1d(np.arange(n, dtype=np.int64), apart)
    return rest, _outliers(session, source.subset(apart))


def _outliers(session: Session, base: ImageSource) -> dict[str, Predictions]:
    found = {}
    for kind in GUARD_KINDS:
        name = f"synthetic_{kind}"
        if name in session.sources:
            raise InvalidInputError(f"got --ood {name!r} and --synthetic; take another name")
        source = OutlierSource(base, kind, session.options.seed)
        try:
            part = session.run(source, source.spec, features=True)
        except DataError as error:
            # Images of one colour, say, look the same when they are turned round.
            click.echo(f"warning: no outliers of this kind: {error}", err=True)
            continue
        notes = {"class_match": "made from the evaluation images"}
        session.sources[name] = source
        found[name] = replace(part, labels=None, notes=notes)
    if not found:
        raise InvalidInputError(f"no kind of outliers can be made of {base.spec}; give --ood sets")
    return found
