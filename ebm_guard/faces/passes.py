"""A pass over somebody's loader in the middle of their training, which leaves no trace."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DistributedSampler

from ebm_guard.errors import DataError, EbmGuardWarning, InvalidInputError
from ebm_guard.faces.rows import Rows, Table

# From a batch of a loader to the model's input and its labels.
Read = Callable[[Any], tuple[Any, Tensor | None]]


def read_batch(batch: Any) -> tuple[Any, Tensor | None]:
    """Read (inputs, labels), {inputs or pixel_values, labels or label}, or inputs.

    Raises:
        DataError: the batch is none of these.

    Example:
        >>> read_batch([torch.zeros(2, 3), torch.tensor([0, 1])])[1]
        tensor([0, 1])
    """
    inputs, labels = batch, None
    if isinstance(batch, Mapping):
        inputs = batch.get("pixel_values", batch.get("inputs"))
        labels = batch.get("labels", batch.get("label"))
    elif isinstance(batch, (tuple, list)) and len(batch) in (1, 2):
        inputs, labels = batch[0], batch[1] if len(batch) == 2 else None
    if not isinstance(inputs, Tensor):
        raise DataError(
            f"got a batch of type {type(batch).__name__}; needed a tensor of inputs, a pair "
            "(inputs, labels), or a mapping with 'pixel_values' and 'labels'. Give read=, which "
            "takes a batch and returns (inputs, labels)"
        )
    return inputs, labels


@contextmanager
def no_trace(device: torch.device | None, seed: int | None = None) -> Iterator[None]:
    """Restore the global random numbers of torch, numpy and Python afterwards; no gradients.

    Args:
        device: whose generator is restored beside the CPU's.
        seed: of all three inside, so that a pass repeats itself; None goes on from where they are.

    Example:
        >>> state = torch.random.get_rng_state()
        >>> with no_trace(None):
        ...     _ = torch.rand(3)
        >>> torch.equal(state, torch.random.get_rng_state())
        True
    """
    devices = [device] if device is not None and device.type == "cuda" else []
    plain, numbers = random.getstate(), np.random.get_state()  # noqa: NPY002 - the user's, kept
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        try:
            if seed is not None:
                torch.manual_seed(seed)
                random.seed(seed)
                np.random.seed(seed)  # noqa: NPY002
            yield
        finally:
            random.setstate(plain)
            np.random.set_state(numbers)  # noqa: NPY002


def run_loader(
    name: str,
    loader: Iterable[Any],
    logits_of: Callable[[Any], Tensor],
    device: torch.device | None,
) -> list[Table]:
    """Run the model over an OOD loader, each process its share of the batches.

    The loader is read by all processes, with the same random numbers, so that all see the same
    batches; process r runs the batches r, r + size, ... A loader that a ``DistributedSampler``
    shares out is run in full by each process, without the rows that pad the shares.

    Args:
        name: of the set.
        loader: of batches.
        logits_of: from a batch to logits.
        device: of the model.

    Returns:
        The tables of all processes.

    Raises:
        DataError: no rows.
    """
    rank, size = world()
    shared = size > 1 and own_rows(loader) is None
    rows = Rows(f"the OOD set {name}", labelled=False)
    with no_trace(device, seed=0):
        for index, batch in enumerate(loader):
            if not shared or index % size == rank:
                rows.add(logits_of(batch))
    tables = gather(rows.table(own_rows(loader)), device)
    if not sum(map(len, tables)):
        raise DataError(f"the loader of the OOD set {name} gave no rows; needed at least one")
    return tables


def world() -> tuple[int, int]:
    """Return this process's rank and the number of processes."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def own_rows(loader: Any) -> int | None:
    """Return how many of this process's rows are its own, and not there to pad its share.

    torch's ``DistributedSampler`` repeats rows until all shares are equally long: row j of process
    r is row r + j size of the set, and those beyond the end of the set are repetitions.

    Returns:
        The number of rows, or None where no such sampler shares the rows out.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> sampler = DistributedSampler(range(5), num_replicas=2, rank=1)
        >>> len(sampler), own_rows(DataLoader(range(5), sampler=sampler))
        (3, 2)
    """
    sampler = getattr(loader, "sampler", None)
    if not isinstance(sampler, DistributedSampler):
        sampler = getattr(getattr(loader, "batch_sampler", None), "sampler", None)
    if not isinstance(sampler, DistributedSampler):
        return None
    if sampler.drop_last:
        return len(sampler)
    rows: Any = sampler.dataset
    return len(range(sampler.rank, len(rows), sampler.num_replicas))


def warn_unshared(name: str) -> None:
    """Say that rows are counted as each process gave them."""
    warnings.warn(
        f"{world()[1]} processes read {name} without a DistributedSampler: its rows are counted as "
        "each process gives them, those that several give several times",
        EbmGuardWarning,
        stacklevel=3,
    )


def gather(table: Table, device: torch.device | None) -> list[Table]:
    """Return the tables of all processes, by rank; their lengths may differ.

    Args:
        table: (N, K) of this process.
        device: of the model, over which NCCL talks.
    """
    size = world()[1]
    if size == 1:
        return [table]
    place = device if device is not None and "nccl" in str(dist.get_backend()) else "cpu"
    length = torch.tensor([len(table)], device=place)
    lengths = [torch.zeros_like(length) for _ in range(size)]
    dist.all_gather(lengths, length)
    longest = max(int(found) for found in lengths)
    padded = torch.zeros((longest, table.shape[1]), dtype=torch.float64)
    padded[: len(table)] = torch.from_numpy(table)
    padded = padded.to(place)
    tables = [torch.zeros_like(padded) for _ in range(size)]
    dist.all_gather(tables, padded)
    return [found[: int(n)].cpu().numpy() for found, n in zip(tables, lengths, strict=True)]


def interleave(tables: list[Table]) -> Table:
    """Put the rows of all processes in the order in which one process would have met them.

    Row j of process r is row r + j size, as ``DistributedSampler`` deals rows out; the metrics are
    then those of one process to the last bit.

    Example:
        >>> interleave([np.array([[0.0], [2.0]]), np.array([[1.0]])]).ravel().tolist()
        [0.0, 1.0, 2.0]
    """
    ranks = np.concatenate([np.full(len(part), rank) for rank, part in enumerate(tables)])
    places = np.concatenate([np.arange(len(part)) for part in tables])
    return np.asarray(np.concatenate(tables)[np.lexsort((ranks, places))])


def check_names(ood: Mapping[str, Any]) -> dict[str, Any]:
    """Refuse names of OOD sets that no log could keep apart.

    Raises:
        InvalidInputError: an empty name, or one that is not text.
    """
    for name in ood:
        if not isinstance(name, str) or not name.strip():
            raise InvalidInputError(f"got {name!r} as the name of an OOD set; needed some text")
    return dict(ood)
