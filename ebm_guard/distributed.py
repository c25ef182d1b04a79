"""Several processes that do one piece of work: who they are, and what they agree on.

Started by ``torchrun``, which sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; one process alone
needs nothing of it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ebm_guard.errors import DataError, InvalidInputError, ProcessError, first_line

# A process that is gone is noticed at once, by its connection; this is how long a slow one has.
_PATIENCE = timedelta(hours=12)
# Those that a command may go on from.
_OWN_ERRORS = {kind.__name__: kind for kind in (DataError, InvalidInputError)}


@dataclass(frozen=True)
class World:
    """The processes of a run.

    Args:
        rank: of this process, from 0.
        size: number of processes.
        device: on which this process trains.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def first(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def share(self, n: int) -> slice:
        """Return this process's part of n rows that were drawn for all.

        Raises:
            InvalidInputError: the rows cannot be shared out evenly.

        Example:
            >>> World(rank=1, size=2).share(64)
            slice(32, 64, None)
        """
        if n % self.size:
            raise InvalidInputError(
                f"got batch_size={n} for {self.size} processes; needed a multiple of them, because "
                "batch_size counts the images of all processes"
            )
        part = n // self.size
        return slice(self.rank * part, (self.rank + 1) * part)

    def wrapped(self, net: nn.Module) -> nn.Module:
        """Return the net with its gradients averaged over the processes."""
        if self.size == 1:
            return net
        # Batch-norm statistics are fixed, and equal on all.
        devices = [self.device.index] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(net, device_ids=devices, broadcast_buffers=False)

    def mean(self, values: Sequence[float | None]) -> list[float | None]:
        """Average numbers over the processes; NaN or None where any of them has none."""
        if self.size == 1:
            return list(values)
        filled = [float("nan") if value is None else value for value in values]
        packed = self._packed(filled)
        dist.all_reduce(packed)
        means = (packed / self.size).tolist()
        return [None if value is None else mean for value, mean in zip(values, means, strict=True)]

    def any(self, flag: bool) -> bool:
        """Whether the flag is up on any process."""
        if self.size == 1:
            return flag
        packed = self._packed([float(flag)])
        dist.all_reduce(packed)
        return bool(packed.item() > 0)

    def from_first(self, values: Sequence[float]) -> list[float]:
        """Return the numbers of the first process, on all."""
        if self.size == 1:
            return list(values)
        packed = self._packed(list(values))
        dist.broadcast(packed, src=0)
        return [float(value) for value in packed.tolist()]

    def wait(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            dist.barrier()

    def texts(self, own: str) -> list[str]:
        """Return a text of every process, on all.

        Raises:
            ProcessError: a process is gone.
        """
        if self.size == 1:
            return [own]
        data = _bytes_of(own.encode("utf-8", "backslashreplace"))
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        with _contact():
            dist.all_gather(sizes, torch.tensor([len(data)]))
            longest = max(1, *(int(size) for size in sizes))
            padded = torch.zeros(longest, dtype=torch.uint8)
            padded[: len(data)] = data
            found = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.size)]
            dist.all_gather(found, padded)
        return [
            text[: int(size)].numpy().tobytes().decode()
            for text, size in zip(found, sizes, strict=True)
        ]

    @contextmanager
    def together(self, doing: str) -> Iterator[None]:
        """Run a block to whose end all processes come, or none: the error of one is that of all.

        Args:
            doing: what the block does, for the message.

        Raises:
            EbmGuardError: that of another process, where it is one of ours.
            ProcessError: another process failed in another way, or is gone.
        """
        failed: Exception | None = None
        try:
            yield
        except Exception as error:
            if self.size == 1:
                raise
            failed = error
        told = "" if failed is None else f"{type(failed).__name__}: {first_line(failed)}"
        try:
            heard = self.texts(told)
        except ProcessError as gone:
            raise failed or gone from None
        if failed is not None:
            raise failed
        for rank, words in enumerate(heard):
            if words:
                # The same kind of error everywhere: what one goes on from, all go on from.
                kind = _OWN_ERRORS.get(words.partition(":")[0], ProcessError)
                raise kind(
                    f"process {rank} of {self.size} failed while {doing}, so all stop: {words}"
                )

    def send(self, data: bytes | memoryview) -> None:
        """Send bytes to the first process, which must call :meth:`receive`.

        Raises:
            ProcessError: it is gone.
        """
        with _contact():
            dist.send(_bytes_of(data), dst=0)

    def receive(self, size: int, rank: int) -> bytes:
        """Receive bytes that a process sends.

        Args:
            size: number of bytes.
            rank: of the sender.

        Raises:
            ProcessError: it is gone.
        """
        block = torch.empty(size, dtype=torch.uint8)
        with _contact():
            dist.recv(block, src=rank)
        return block.numpy().tobytes()

    def _packed(self, values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=self.device)


@contextmanager
def _contact() -> Iterator[None]:
    """Tell a lost connection from other errors."""
    try:
        yield
    except RuntimeError as error:
        raise ProcessError(
            "lost the connection to another process of this run, which died or was stopped; its "
            f"own messages say why ({first_line(error)})"
        ) from None


def _bytes_of(data: bytes | memoryview) -> Tensor:
    if not len(data):  # an empty buffer makes no tensor
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


@contextmanager
def working_together(device: torch.device) -> Iterator[World]:
    """Join the processes that ``torchrun`` started for work without gradients, or stand alone.

    They talk through gloo, whatever device their models are on: only results are exchanged.

    Args:
        device: of this process's model.

    Raises:
        InvalidInputError: the device is that of another process.
        ProcessError: the others cannot be reached.
    """
    if not processes_expected():
        yield World(device=device)
        return
    check_own_device(device)
    with _contact():
        dist.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield World(dist.get_rank(), dist.get_world_size(), device)
    finally:
        dist.destroy_process_group()


def processes_expected() -> bool:
    """Tell whether ``torchrun`` started this process as one of several."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def world_of(device: torch.device | None) -> Iterator[World]:
    """Join the processes that ``torchrun`` started, or stand alone.

    A process group that the caller made is used and left; one made here is closed at the end.

    Args:
        device: of the model; gloo on the CPU, nccl on CUDA.
    """
    device = torch.device("cpu") if device is None else device
    size = int(os.environ.get("WORLD_SIZE", "1"))
    ours = size > 1 and dist.is_available() and not dist.is_initialized()
    if size > 1:
        check_own_device(device)
    # nccl works on the current device, also where it is given none, as in a barrier.
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        if ours:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        try:
            if dist.is_available() and dist.is_initialized():
                yield World(dist.get_rank(), dist.get_world_size(), device)
            else:
                yield World(device=device)
        finally:
            if ours:
                dist.destroy_process_group()


def local_device(device: torch.device) -> torch.device:
    """Return this process's own GPU for ``cuda`` under ``torchrun``; other devices as they are.

    Where every process sees one GPU alone (by CUDA_VISIBLE_DEVICES) that one is its own.

    Example:
        >>> local_device(torch.device("cpu"))
        device(type='cpu')
    """
    rank = os.environ.get("LOCAL_RANK")
    if str(device) != "cuda" or rank is None:
        return device
    return torch.device("cuda", int(rank) if torch.cuda.device_count() > 1 else 0)


def check_own_device(device: torch.device) -> None:
    """Refuse the first GPU for a process that is not the first of its machine.

    That is where a model lands that was moved by ``model.cuda()`` on every process.

    Raises:
        InvalidInputError: with the device that is needed.
    """
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    first = str(device) in ("cuda", "cuda:0")
    if first and rank > 0 and torch.cuda.device_count() > rank:
        raise InvalidInputError(
            f"got a model on {device} in process {rank} of this machine; every process needs a GPU "
            f'of its own: model.to("cuda:{rank}") (LOCAL_RANK)'
        )
