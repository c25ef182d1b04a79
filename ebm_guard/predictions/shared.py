"""One pass that several processes share: each runs whole batches, the first one has all rows.

The batches are those of one process, in the same order, so that the logits are the same to the
last bit where the device computes a batch the same way twice.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from ebm_guard.data import ImageSource
from ebm_guard.data.batches import Batch
from ebm_guard.data.sources import StreamSource
from ebm_guard.distributed import World
from ebm_guard.errors import DataError, InvalidInputError
from ebm_guard.model import EnergyClassifier
from ebm_guard.predictions.collected import Collected
from ebm_guard.predictions.passes import as_batch, collect, probed
from ebm_guard.predictions.record import Array, Predictions

# Bytes of one message, and batches in which the head is looked for.
_MESSAGE = 1 << 26
_PROBE_BATCHES = 2


def block_of(count: int, world: World) -> range:
    """Return which of ``count`` things are this process's: blocks in order, sizes within one.

    Example:
        >>> [block_of(5, World(rank, 3)) for rank in range(3)]
        [range(0, 1), range(1, 3), range(3, 5)]
    """
    return range(count * world.rank // world.size, count * (world.rank + 1) // world.size)


def share_of(source: ImageSource, world: World, batch_size: int) -> ImageSource | None:
    """Return the rows of this process, whole batches of them, or None where it has none.

    Args:
        source: all rows.
        world: the processes.
        batch_size: rows per batch.

    Raises:
        InvalidInputError: a stream that does not say how many rows it has.

    Example:
        >>> from ebm_guard.data import open_source
        >>> [len(share_of(open_source("demo:"), World(rank, 2), 64)) for rank in (0, 1)]
        [256, 194]
    """
    if world.size == 1:
        return source
    if source.total is None:
        raise InvalidInputError(
            f"got {world.size} processes for {source.spec}, a stream that does not say how many "
            "images it has, so they cannot share it. Run one process, or for wds/ give the number "
            "behind the shards: wds/#val-{000..003}.tar|4000"
        )
    batches = block_of(-(-source.total // batch_size), world)
    if isinstance(source, StreamSource) and world.rank == world.size - 1:
        # To its end, for it may hold more rows than it declares.
        return source.behind(batches.start * batch_size)
    rows = np.arange(batches.start * batch_size, min(batches.stop * batch_size, source.total))
    return source.subset(rows.astype(np.int64)) if len(rows) else None


def predict_shared(
    classifier: EnergyClassifier,
    source: ImageSource,
    batches: Callable[[ImageSource], Iterable[Batch]],
    world: World,
    *,
    batch_size: int,
    features: bool = False,
    progress: bool = False,
    amp: bool = False,
    memory_limit: int = 1 << 30,
    text: str,
) -> Predictions:
    """Run a classifier once over a data set, each process over its share.

    Args:
        classifier: the wrapped model, the same on all processes.
        source: the rows, the same on all processes.
        batches: reads a source.
        world: the processes.
        batch_size: rows per batch.
        features: also keep the features and the head.
        progress: show a progress bar on stderr.
        amp: run the model under autocast.
        memory_limit: bytes per column beyond which it is kept in a temporary file.
        text: description of the data.

    Returns:
        On the first process what :func:`~ebm_guard.predictions.predict` gives for all rows; on the
        others a record of the same length and number of classes, in which all is 0.

    Raises:
        DataError: no rows, or what processes read does not fit together.
        ProcessError: another process failed, or is gone.
    """
    with world.together(f"reading {text}"):
        own = share_of(source, world, batch_size)
        if features and classifier.head is None and world.size > 1:
            # All processes must find the head, or none: in the rows in which one process would.
            first = source.subset(np.arange(min(len(source), _PROBE_BATCHES * batch_size)))
            next(probed(classifier, map(as_batch, batches(first))), None)
            features = classifier.head is not None
        found = collect(
            classifier,
            () if own is None else batches(own),
            features=features,
            total=0 if own is None else own.total,
            progress=progress,
            amp=amp,
            memory_limit=memory_limit,
            source=text,
        )
    if world.size == 1:
        return found.predictions(classifier, text)
    headers = [json.loads(header) for header in world.texts(json.dumps(_header(found)))]
    if not world.first:
        for data in _messages(found):
            world.send(data)
        return _outline(headers, text)
    for rank, header in enumerate(headers[1:], start=1):
        _append(found, header, rank, world)
    _check_columns(found, text)
    return found.predictions(classifier, text)


def _header(found: Collected) -> dict[str, Any]:
    """Say what this process has; its rows follow."""
    layouts = {name: column.layout() for name, column in found.columns.items()}
    columns = {name: [layout[0].str, list(layout[1])] for name, layout in layouts.items() if layout}
    return {"columns": columns, "names": len(_names(found)), "dtype": found.dtype}


def _names(found: Collected) -> bytes:
    return json.dumps([found.ids, found.skipped]).encode()


def _messages(found: Collected) -> Iterator[bytes]:
    yield _names(found)
    for column in found.columns.values():
        array = column.array()
        if array is not None:
            for start, stop in _blocks(array.dtype, array.shape):
                yield np.ascontiguousarray(array[start:stop]).tobytes()


def _append(found: Collected, header: dict[str, Any], rank: int, world: World) -> None:
    ids, skipped = json.loads(world.receive(header["names"], rank))
    found.ids.extend(ids)
    found.skipped.extend((name, error) for name, error in skipped)
    found.dtype = found.dtype or header["dtype"]
    for name, (kind, shape) in header["columns"].items():
        dtype = np.dtype(kind)
        for start, stop in _blocks(dtype, shape):
            size = (stop - start) * _row_bytes(dtype, shape)
            rows: Array = np.frombuffer(world.receive(size, rank), dtype=dtype)
            found.columns[name].add(rows.reshape(stop - start, *shape[1:]))


def _blocks(dtype: np.dtype[Any], shape: tuple[int, ...] | list[int]) -> Iterator[tuple[int, int]]:
    step = max(1, _MESSAGE // max(1, _row_bytes(dtype, shape)))
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])


def _row_bytes(dtype: np.dtype[Any], shape: tuple[int, ...] | list[int]) -> int:
    return dtype.itemsize * int(np.prod(shape[1:], dtype=np.int64))


def _check_columns(found: Collected, text: str) -> None:
    for name, column in found.columns.items():
        if column.n not in (0, len(found)):
            raise DataError(
                f"{text}: {column.n} of {len(found)} rows have {name}; give all rows them, or none"
            )


def _outline(headers: list[dict[str, Any]], text: str) -> Predictions:
    """Return rows of zeros that take no memory, of the right number."""
    shapes = [header["columns"]["logits"][1] for header in headers if header["columns"]]
    if not shapes:
        raise DataError(f"{text} gave no rows")
    rows = sum(shape[0] for shape in shapes)
    return Predictions(
        np.broadcast_to(np.zeros((1, 1), np.float32), (rows, shapes[0][1])),
        hashes=np.broadcast_to(np.zeros(1, np.uint64), (rows,)),
        source=text,
    )
