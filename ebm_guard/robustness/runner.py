"""Run the stages of an evaluation: within a time budget, with progress, and so that one can resume.

A stage is work with a key and a largest possible cost. Its result is arrays; they are kept in a
folder, so that an interrupted evaluation goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ebm_guard.attacks import Examples, Misclassify, Query
from ebm_guard.errors import DataError
from ebm_guard.files import DAMAGED_NPZ, cannot_write, replace_file
from ebm_guard.robustness.subject import Counts, Subject

Arrays = dict[str, NDArray[Any]]
BUDGET = "not run: budget"
_STATE = "state.json"


@dataclass(frozen=True)
class Speed:
    """What one image costs.

    Args:
        forward: seconds of a forward pass.
        gradient: seconds of a forward and a backward pass.
    """

    forward: float
    gradient: float

    def seconds(self, forwards: float, gradients: float) -> float:
        """Return the time of some forward passes and gradients."""
        return forwards * self.forward + gradients * self.gradient


def measure_speed(subject: Subject, examples: Examples, *, gradient: bool = True) -> Speed:
    """Time a forward pass and a gradient: the best of three batches of up to 32 images."""
    query = Query(subject.forward, Misclassify("margin"), batch_size=subject.batch_size)
    few = examples.select(slice(0, min(len(examples), subject.batch_size, 32)))
    times = []
    for wanted in (False, gradient):
        runs = []
        for _ in range(3):
            started = time.perf_counter()
            query.answer(few.pixels, few, gradient=wanted)
            if subject.on_gpu:
                torch.cuda.synchronize()
            runs.append((time.perf_counter() - started) / len(few))
        # The first pass allocates and chooses algorithms.
        times.append(min(runs))
    return Speed(forward=times[0], gradient=max(times))


@dataclass
class Ledger:
    """What the evaluation has cost, and what was left out.

    Args:
        forwards: forward passes of single images, those of gradients not counted.
        gradients: gradients of single images.
        left_out: stages that were left out, and why.
        seconds: wall time of each stage.
        counted: forwards and gradients of the stages of this run.
    """

    forwards: int = 0
    gradients: int = 0
    left_out: list[dict[str, str]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    counted: NDArray[np.int64] = field(default_factory=lambda: np.zeros(2, np.int64))


class Runner:
    """Run stages one after the other.

    Args:
        speed: what an image costs.
        time_budget: seconds for all stages, or None.
        store: where results are kept, or None.
        say: called with a line about each stage.
        started: when the clock of the budget began.
        counts: of the subject, to tell what each stage costs.
        seed: torch's global numbers start from it, and the key, in each stage: a model with random
            inference then gives the same after an interruption. None leaves them alone.
    """

    def __init__(
        self,
        speed: Speed,
        *,
        time_budget: float | None = None,
        store: Store | None = None,
        say: Callable[[str], None] | None = None,
        started: float | None = None,
        counts: Counts | None = None,
        seed: int | None = None,
    ) -> None:
        self.counts, self._seed = counts or Counts(), seed
        self.speed, self.time_budget, self.store = speed, time_budget, store
        self.ledger = Ledger()
        self._say = say or (lambda _: None)
        self._started = time.perf_counter() if started is None else started

    @property
    def left(self) -> float:
        """Seconds of the budget that are left; infinite without one."""
        if self.time_budget is None:
            return float("inf")
        return self.time_budget - (time.perf_counter() - self._started)

    def run(
        self,
        key: str,
        title: str,
        work: Callable[[], Mapping[str, Any]],
        *,
        forwards: float = 0,
        gradients: float = 0,
    ) -> Arrays | None:
        """Run a stage, or read what an interrupted run kept of it.

        Args:
            key: names the stage in the store.
            title: what it does, in words.
            work: returns tensors or arrays; ``forwards`` and ``gradients`` among them are summed.
            forwards: forward passes that it takes at most.
            gradients: gradients that it takes at most.

        Returns:
            The arrays, or None where the time budget does not allow the stage.
        """
        kept = None if self.store is None else self.store.get(key)
        if kept is None:
            needed = self.speed.seconds(forwards, gradients)
            if needed > self.left:
                reason = f"{BUDGET} ({needed:.0f} s needed at most, {max(0, self.left):.0f} s left)"
                self.ledger.left_out.append({"name": title, "reason": reason})
                self._say(f"{title}: {reason}")
                return None
            kept = self._worked(key, work)
            self._say(f"{title}: {float(kept['seconds']):.1f} s")
        else:
            self._say(f"{title}: kept from the interrupted run")
        self.ledger.seconds[title] = round(float(kept["seconds"]), 3)
        self.ledger.forwards += int(kept["cost"][0])
        self.ledger.gradients += int(kept["cost"][1])
        return kept

    def _worked(self, key: str, work: Callable[[], Mapping[str, Any]]) -> Arrays:
        """Run a stage, and keep what it found and cost."""
        if self._seed is not None:
            torch.manual_seed(int(_hash(f"{self._seed}/{key}"), 16) % 2**63)
        started, before = time.perf_counter(), (self.counts.forwards, self.counts.gradients)
        kept = {name: _array(value) for name, value in work().items()}
        now = (self.counts.forwards, self.counts.gradients)
        kept["cost"] = np.subtract(now, before)
        kept["seconds"] = np.array(time.perf_counter() - started)
        self.ledger.counted += kept["cost"]
        if self.store is not None:
            try:
                self.store.put(key, kept)
            except DataError as error:
                self._say(f"finished stages are kept no longer: {error}")
                self.store = None
        return kept

    def settle(self) -> None:
        """Add to the ledger what was asked outside of stages: plan, speed, clean images."""
        now = np.array([self.counts.forwards, self.counts.gradients])
        outside = now - self.ledger.counted
        self.ledger.forwards += int(outside[0])
        self.ledger.gradients += int(outside[1])


class Store:
    """Results of stages in a folder, one ``.npz`` file each.

    Args:
        folder: made if it is missing.
        fingerprint: what the results hang on: model, images, settings.
        resume: take what is there; else it is thrown away.

    Raises:
        DataError: the folder holds other files, or the results of another evaluation.
    """

    def __init__(self, folder: Path, fingerprint: Mapping[str, Any], *, resume: bool) -> None:
        self.folder = folder
        text = json.dumps(fingerprint, sort_keys=True)
        if folder.exists():
            self._take_over(text, resume=resume)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with replace_file(folder / _STATE) as new:
                new.write_text(text)
        except OSError as error:
            raise cannot_write(folder, error) from None

    def _take_over(self, text: str, *, resume: bool) -> None:
        state = self.folder / _STATE
        # A file that was being written when the process was killed begins with a dot.
        names = [path for path in self.folder.iterdir() if not path.name.startswith(".")]
        foreign = [path for path in names if path.suffix not in (".npz", ".json")]
        if foreign or not state.is_file():
            raise DataError(
                f"{self.folder} holds other files than those of an interrupted evaluation; "
                "nothing was changed. Choose another output"
            )
        if not resume:
            shutil.rmtree(self.folder)
        elif state.read_text() != text:
            raise DataError(
                f"{self.folder} holds the results of another evaluation (other weights, images, "
                "seed or settings), so it cannot be resumed. Give the same command as then, or "
                "leave out --resume to start anew"
            )

    def get(self, key: str) -> Arrays | None:
        """Return what was kept, or None; a damaged file counts as missing."""
        path = self._path(key)
        if not path.is_file():
            return None
        try:
            with np.load(path, allow_pickle=False) as kept:
                return dict(kept)
        except DAMAGED_NPZ:
            return None

    def put(self, key: str, arrays: Arrays) -> None:
        """Keep the arrays of a stage, all or nothing."""
        with replace_file(self._path(key)) as new, new.open("wb") as stream:
            np.savez(stream, **arrays)  # type: ignore[arg-type]

    def _path(self, key: str) -> Path:
        return self.folder / f"{_hash(key)}.npz"


def rows_key(rows: Tensor) -> str:
    """Name a choice of rows: a stage that is kept belongs to the rows it was run on."""
    return f"{len(rows)}-{_hash(str(rows.tolist()))}"


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _array(value: Any) -> NDArray[Any]:
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)


def tensor(array: NDArray[Any]) -> Tensor:
    """Return an array of a stage as a tensor."""
    return torch.from_numpy(np.ascontiguousarray(array))
